"""Switches of the process that select kernels. They are part of every key."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._device import DeviceContext


def _native(name: str, public: Callable[[], Any]) -> Callable[[], Any]:
    """Return PyTorch's private getter for a setting if it exists, otherwise the public getter.

    The public one takes ten times as long, and it runs at every step.
    """
    getter: Callable[[], Any] = getattr(torch._C, name, public)
    return getter


_deterministic = _native(
    "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)
_cudnn_enabled = _native("_get_cudnn_enabled", lambda: torch.backends.cudnn.enabled)
_cudnn_benchmark = _native("_get_cudnn_benchmark", lambda: torch.backends.cudnn.benchmark)
_cudnn_deterministic = _native(
    "_get_cudnn_deterministic", lambda: torch.backends.cudnn.deterministic
)
_fp16_reduction = _native(
    "_get_cublas_allow_fp16_reduced_precision_reduction",
    lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
)
_bf16_reduction = _native(
    "_get_cublas_allow_bf16_reduced_precision_reduction",
    lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
)
_fp16_accumulation = _native(
    "_get_cublas_allow_fp16_accumulation",
    lambda: torch.backends.cuda.matmul.allow_fp16_accumulation,
)
_flash_sdp = _native("_get_flash_sdp_enabled", torch.backends.cuda.flash_sdp_enabled)
_mem_efficient_sdp = _native(
    "_get_mem_efficient_sdp_enabled", torch.backends.cuda.mem_efficient_sdp_enabled
)
_math_sdp = _native("_get_math_sdp_enabled", torch.backends.cuda.math_sdp_enabled)
_cudnn_sdp = _native("_get_cudnn_sdp_enabled", torch.backends.cuda.cudnn_sdp_enabled)
_math_sdp_reduction = _native(
    "_get_math_sdp_allow_fp16_bf16_reduction",
    torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
)
_sdp_order: Callable[[], list[int]] = getattr(torch._C, "_get_sdp_priority_order", list)
_native_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)


def _float32_precision_native() -> tuple[Any, ...]:
    return (
        # that of "cuda" shows in the next three
        _native_precision("generic", "all"),
        _native_precision("cuda", "matmul"),
        _native_precision("cuda", "conv"),
        _native_precision("cuda", "rnn"),
    )


def _float32_precision_by_backend() -> tuple[Any, ...]:
    # the old names raise if the new ones were used; "none" follows the general setting
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    return (
        torch.backends.fp32_precision,  # type: ignore[attr-defined]
        matmul.fp32_precision,
        cudnn.conv.fp32_precision,
        cudnn.rnn.fp32_precision,
    )


_float32_precision: Callable[[], tuple[Any, ...]] = (
    _float32_precision_by_backend if _native_precision is None else _float32_precision_native
)


_number_of_function_modes: Callable[[], int] = torch._C._len_torch_function_stack


def _function_modes() -> tuple[Any, ...]:
    """Return the modes that change what functions of torch do, the outermost first."""
    number = _number_of_function_modes()
    modes = [torch._C._get_function_stack_at(index) for index in range(number)]
    return tuple([mode.device if type(mode) is DeviceContext else mode for mode in modes])


_number_of_dispatch_modes: Callable[[], int] = getattr(
    torch._C, "_len_torch_dispatch_stack", lambda: 0
)  # private


def seeing_mode() -> str:
    """Return the class of a mode of the user's that sees what is called; empty if there is none.

    A ``TorchDispatchMode`` sees each operation, a ``TorchFunctionMode`` each function of torch. A
    replay makes no such call.
    """
    modes: list[Any] = []
    if _number_of_function_modes():
        modes = [each for each in _function_modes() if not isinstance(each, torch.device)]
    if number := _number_of_dispatch_modes():
        modes.append(torch._C._get_dispatch_stack_at(number - 1))
    return type(modes[-1]).__name__ if modes else ""


def device_of_new_tensors() -> torch.device:
    """Return where functions make tensors: ``torch.get_default_device``, which makes one itself."""
    devices = [each for each in _function_modes() if isinstance(each, torch.device)]
    return devices[-1] if devices else torch.device("cpu")


_AUTOCASTING = ("cuda", "cpu")
_any_autocast = _native("_is_any_autocast_enabled", lambda: True)


def autocast_flags(device_type: str) -> tuple[bool, torch.dtype | None]:
    """Return whether autocast is on for ``device_type``, and its dtype."""
    if not torch.is_autocast_enabled(device_type):
        return (False, None)
    return (True, torch.get_autocast_dtype(device_type))


def keeps_casts(device_type: str) -> bool:
    """Return True if autocast is on and keeps the weights that it has cast.

    Until its outermost context ends, later casts are those copies, even if weights have changed.
    """
    return bool(
        _any_autocast()
        and torch.is_autocast_enabled(device_type)
        and torch.is_autocast_cache_enabled()
    )


def kernel_flags() -> tuple[Any, ...]:
    """Return all switches as a hashable tuple.

    They are grad mode, inference mode, default dtype, function modes, determinism, TF32, cuDNN,
    SDPA and autocast.
    """
    # written out: a loop over these functions takes twice as long, at every step and call
    flags = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        _function_modes() if _number_of_function_modes() else (),
        _deterministic(),
        _cudnn_enabled(),
        _cudnn_benchmark(),
        _cudnn_deterministic(),
        _fp16_reduction(),
        _bf16_reduction(),
        _fp16_accumulation(),
        _flash_sdp(),
        _mem_efficient_sdp(),
        _math_sdp(),
        _cudnn_sdp(),
        _math_sdp_reduction(),
        tuple(_sdp_order()),
        _float32_precision(),
    )
    if _any_autocast():
        return (*flags, autocast_flags("cuda"), autocast_flags("cpu"))
    return flags


NAMES = (
    "grad mode",
    "inference mode",
    "torch.get_default_dtype()",
    "function modes",
    "deterministic algorithms",
    "torch.backends.cudnn.enabled",
    "torch.backends.cudnn.benchmark",
    "torch.backends.cudnn.deterministic",
    "reduced precision in float16",
    "reduced precision in bfloat16",
    "accumulation in float16",
    "flash SDPA",
    "memory-efficient SDPA",
    "math SDPA",
    "cuDNN SDPA",
    "reduced precision in math SDPA",
    "order of SDPA",
    "precision of float32",
    "autocast on cuda",
    "autocast on cpu",
)
"""What messages call the switches, in their order."""


def differing_flag(now: Sequence[Any], before: Sequence[Any]) -> tuple[str, Any, Any] | None:
    """Return the name of the first switch that differs, with both values; None if none does.

    Args:
        now: What :func:`kernel_flags` has returned.
        before: What it had returned earlier.
    """
    off = (False, None)  # without autocast, its flags are left out
    for name, value, was in itertools.zip_longest(NAMES, now, before, fillvalue=off):
        if value != was:
            return str(name), value, was
    return None


def lasting_flags() -> tuple[Any, ...]:
    """Return all switches except those in :class:`CallModes`."""
    flags = kernel_flags()
    return flags[1:-2] if _any_autocast() else flags[1:]


def switches() -> tuple[Any, ...]:
    """Return all settings that a step must not change: the switches, and some without a kernel."""
    return (
        *kernel_flags(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_anomaly_enabled(),
        torch.is_anomaly_check_nan_enabled(),
        torch.get_num_threads(),
    )


class CallModes(NamedTuple):
    """Grad mode and autocast during a call in a step."""

    grad: bool
    autocast: dict[str, tuple[bool, torch.dtype | None]]

    @classmethod
    def now(cls) -> CallModes:
        """Return the current ones."""
        return cls(torch.is_grad_enabled(), {kind: autocast_flags(kind) for kind in _AUTOCASTING})

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """While this is entered, they are set again for another call."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, (is_on, dtype) in self.autocast.items():
                if autocast_flags(kind) != (is_on, dtype):
                    stack.enter_context(torch.autocast(kind, dtype, enabled=is_on))
            yield
