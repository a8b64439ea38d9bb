"""Functions that make a tensor of Python values: ``torch.tensor`` and the like."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from cg_lightning.backends.imported_functions import replaced_where_imported
from cg_lightning.core.kernel_flags import device_of_new_tensors

TensorMaker = Callable[..., Tensor]

_POSITIONAL = {
    "tensor": ("data",),
    "as_tensor": ("data",),
    "asarray": ("obj",),
    "new_tensor": ("self", "data"),
}
_OPTIONS = ("dtype", "device", "copy", "requires_grad")
_ORIGINALS: dict[str, TensorMaker] = {
    "tensor": torch.tensor,
    "as_tensor": torch.as_tensor,
    "asarray": torch.asarray,
    "new_tensor": Tensor.new_tensor,
}
_NUMBERS = (bool, int, float, complex)
_SEQUENCES = (list, tuple, range, torch.Size)
MOST_VALUES = 256
"""Larger values are compared only once an epoch (``guards/values.py``), so they may change."""
# private. Without it, the recorder would record operations of ours, so nothing is constant
_without_modes = getattr(_python_dispatch, "_disable_current_modes", None)


CAN_WORK_BESIDE = _without_modes is not None
"""Whether :func:`beside_the_step` can be entered."""


@contextlib.contextmanager
def beside_the_step() -> Iterator[None]:
    """While this is entered, no mode of ours or of a user sees an operation."""
    assert _without_modes is not None
    with _without_modes(), torch.inference_mode(False):
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class MakerCall:
    """One call of a function that makes a tensor.

    Attributes:
        name: ``tensor``, ``as_tensor``, ``asarray`` or ``new_tensor``.
        run: Makes the call.
        arguments: The arguments by name.
    """

    name: str
    run: Callable[[], Tensor]
    arguments: dict[str, Any]

    @property
    def _data(self) -> Any:
        return self.arguments.get("data", self.arguments.get("obj"))

    def is_constant_on(self, device: torch.device) -> bool:
        """Return True if the call makes a tensor on ``device`` of a few Python values alone.

        A tensor among the values is no such value: it can be another one in the next step.
        """
        given = self.arguments
        others = [name for name in given if name not in ("self", "data", "obj", *_OPTIONS)]
        if not CAN_WORK_BESIDE or others or given.get("requires_grad"):
            return False
        on_cpu = device.type == "cpu"
        shares_memory = self.name in ("as_tensor", "asarray") and on_cpu
        return self.is_made_on(device) and count_plain(self._data, shares_memory) <= MOST_VALUES

    @property
    def copies_values(self) -> bool:
        """Whether the call makes a tensor of Python values alone, in memory of its own."""
        copies = self.name in ("tensor", "new_tensor")
        return copies and count_plain(self._data, shares_memory=False) < math.inf

    def is_made_on(self, device: torch.device) -> bool:
        """Return True if the call makes a tensor on ``device``, the one of the graphs."""
        made_on = self._device()
        return made_on.type == device.type and made_on.index in (None, device.index)

    def _device(self) -> torch.device:
        if self.arguments.get("device") is not None:
            return torch.device(self.arguments["device"])
        if self.name == "new_tensor":
            own: torch.device = self.arguments["self"].device
            return own
        return device_of_new_tensors()

    def on_host(self) -> Tensor:
        """Return the result of the call, on the CPU in memory of its own, without a dispatch."""
        options = {name: self.arguments.get(name) for name in ("dtype",)}
        given = [self.arguments["self"]] if self.name == "new_tensor" else []
        with beside_the_step():
            made = _ORIGINALS[self.name](*given, self._data, **options, device="cpu")
            return made.clone()


def made_on_host(data: Any) -> Tensor:
    """Return what ``torch.tensor`` makes of plain values. Nothing dispatches it."""
    with beside_the_step():
        return _ORIGINALS["tensor"](data, device="cpu")


AnswerCall = Callable[[MakerCall], Tensor]


@contextlib.contextmanager
def answered_makers(answer: AnswerCall) -> Iterator[None]:
    """Call ``answer`` instead of each function that makes a tensor, in this thread.

    The names are replaced, because a ``TorchFunctionMode`` would take attention off its fast path.
    """
    makers = {}
    for name in _POSITIONAL:
        original = getattr(Tensor if name == "new_tensor" else torch, name)  # or its replacement
        makers[name] = original, _answered(name, original, answer)
    _, new_tensor = makers.pop("new_tensor")
    with replaced_where_imported(makers), patch.object(Tensor, "new_tensor", new_tensor):
        yield


def _answered(name: str, original: TensorMaker, answer: AnswerCall) -> TensorMaker:
    thread = threading.get_ident()

    def make(*args: Any, **kwargs: Any) -> Tensor:
        if threading.get_ident() != thread or len(args) > len(_POSITIONAL[name]):
            return original(*args, **kwargs)
        arguments = {**dict(zip(_POSITIONAL[name], args, strict=False)), **kwargs}
        return answer(MakerCall(name, lambda: original(*args, **kwargs), arguments))

    return make


def count_plain(value: Any, shares_memory: bool) -> float:
    """Return the number of values in numbers, nested sequences of them, and NumPy's arrays.

    It is infinite for all else, and for an array whose memory the tensor would share.
    """
    if type(value) in _NUMBERS:
        return 1
    if type(value) in _SEQUENCES:
        many = len(value) > MOST_VALUES
        return math.inf if many else sum(count_plain(item, shares_memory) for item in value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.number | numpy.bool_):
        return 1
    is_array = numpy is not None and type(value) is numpy.ndarray and value.dtype != object
    return value.size if is_array and not shares_memory else math.inf
