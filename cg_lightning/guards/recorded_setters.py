"""Settings of kernels that are in no key, because to read them takes too long for each step.

PyTorch sets them by functions of C, which its own functions in Python look up at each call, or
which an object in ``torch.backends.cudnn`` holds. So while steps may run from graphs, these are
replaced by functions that note a change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cg_lightning.guards import audit_events


class _Setting(NamedTuple):
    name: str
    """As the user would write it."""
    setter: str
    """A private function of ``torch._C``, and so is the next one."""
    getter: str


_SETTINGS = [
    setting
    for setting in (
        _Setting(
            "torch.backends.cuda.preferred_blas_library",
            "_set_blas_preferred_backend",
            "_get_blas_preferred_backend",
        ),
        _Setting(
            "torch.backends.cuda.preferred_linalg_library",
            "_set_linalg_preferred_backend",
            "_get_linalg_preferred_backend",
        ),
        _Setting(
            "torch.backends.cudnn.benchmark_limit",
            "_cuda_set_cudnn_benchmark_limit",
            "_cuda_get_cudnn_benchmark_limit",
        ),
        _Setting(
            "torch.backends.cudnn.depthwise_kernel",
            "_set_cudnn_depthwise_kernel",
            "_get_cudnn_depthwise_kernel",
        ),
        _Setting(
            "torch._C._set_sm_carveout_experimental",
            "_set_sm_carveout_experimental",
            "_get_sm_carveout_experimental",
        ),
        _Setting(
            "torch.nn.attention.activate_flash_attention_impl",
            "_set_sdp_use_fa3",
            "_get_fa3_sdp_enabled",
        ),
        _Setting(
            "torch.utils.deterministic.fill_uninitialized_memory",
            "_set_deterministic_fill_uninitialized_memory",
            "_get_deterministic_fill_uninitialized_memory",
        ),
    )
    if hasattr(torch._C, setting.setter) and hasattr(torch._C, setting.getter)
]


class RecordedSetters:
    """Notes changes of the settings as other rewritten parts of PyTorch, which drops all graphs."""

    _installed = 0
    """How many are installed now."""
    _replaced: list[tuple[Any, str, Callable[..., Any]]] = []  # noqa: RUF012
    """What holds a setter, the name of it there, and the setter."""

    def __init__(self) -> None:
        self._is_installed = False
        self._values = _values()

    def install(self) -> None:
        """Note changes from now on, and those since :meth:`remove`."""
        if self._is_installed:
            return
        for setting, now, before in zip(_SETTINGS, _values(), self._values, strict=True):
            if now != before:
                audit_events.rewritten().append(setting.name)
        self._is_installed = True
        RecordedSetters._installed += 1
        if RecordedSetters._installed == 1:
            for setting in _SETTINGS:
                original = getattr(torch._C, setting.setter)
                recorded = _recorded(original, setting)
                for holder, name in _places_of(original, setting):
                    self._replaced.append((holder, name, original))
                    setattr(holder, name, recorded)

    def remove(self) -> None:
        """Leave no trace."""
        if not self._is_installed:
            return
        self._is_installed = False
        self._values = _values()
        RecordedSetters._installed -= 1
        if not RecordedSetters._installed:
            for holder, name, original in self._replaced:
                setattr(holder, name, original)
            self._replaced.clear()


def _values() -> list[Any]:
    return [getattr(torch._C, setting.getter)() for setting in _SETTINGS]


def _places_of(setter: Callable[..., Any], setting: _Setting) -> list[tuple[Any, str]]:
    """Return what holds a setter, and the name of it there."""
    properties = [
        each for each in vars(type(torch.backends.cudnn)).values() if _holds(each, setter)
    ]
    return [(torch._C, setting.setter), *[(each, "setter") for each in properties]]


def _holds(value: Any, setter: Callable[..., Any]) -> bool:
    return getattr(value, "setter", None) is setter


def _recorded(original: Callable[..., Any], setting: _Setting) -> Callable[..., Any]:
    @functools.wraps(original)
    def recorded(*values: Any) -> Any:
        get = getattr(torch._C, setting.getter)
        before = get()
        result = original(*values)
        if get() != before:
            audit_events.rewritten().append(setting.name)
        return result

    return recorded
