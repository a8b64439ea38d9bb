"""Switches of the process that select kernels. They are part of every key."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import DeviceContext


def _native(name: str, public: Callable[[], Any], *args: str) -> Callable[[], Any]:
    """Return PyTorch's private getter for a setting if it exists, otherwise the public getter.

    The public one takes ten times as long, and it runs at every step.
    """
    getter = getattr(torch._C, name, None)
    if getter is None:
        return public
    return functools.partial(getter, *args) if args else getter


def _float32_precision() -> tuple[Callable[[], Any], ...]:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if not hasattr(matmul, "fp32_precision"):
        return (
            lambda: matmul.allow_tf32,
            lambda: cudnn.allow_tf32,
            torch.get_float32_matmul_precision,
        )
    # torch 2.9: the old names raise if the new ones were used; "none" follows the general setting
    settings: dict[tuple[str, str], Callable[[], Any]] = {
        ("generic", "all"): lambda: torch.backends.fp32_precision,  # type: ignore[attr-defined]
        ("cuda", "all"): lambda: cudnn.fp32_precision,
        ("cuda", "matmul"): lambda: matmul.fp32_precision,
        ("cuda", "conv"): lambda: cudnn.conv.fp32_precision,
        ("cuda", "rnn"): lambda: cudnn.rnn.fp32_precision,
    }
    return tuple(
        [
            _native("_get_fp32_precision_getter", public, *names)
            for names, public in settings.items()
        ]
    )


def _function_modes() -> tuple[Any, ...]:
    """Return the modes that change what functions of torch do, the outermost first."""
    number = torch._C._len_torch_function_stack()
    if not number:
        return ()
    modes = [torch._C._get_function_stack_at(index) for index in range(number)]
    return tuple([mode.device if type(mode) is DeviceContext else mode for mode in modes])


_GETTERS: tuple[Callable[[], Any], ...] = (
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.get_default_dtype,
    _function_modes,
    _native("_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled),
    _native("_get_cudnn_enabled", lambda: torch.backends.cudnn.enabled),
    _native("_get_cudnn_benchmark", lambda: torch.backends.cudnn.benchmark),
    _native("_get_cudnn_deterministic", lambda: torch.backends.cudnn.deterministic),
    _native(
        "_get_cublas_allow_fp16_reduced_precision_reduction",
        lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    ),
    _native(
        "_get_cublas_allow_bf16_reduced_precision_reduction",
        lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    ),
    _native(
        "_get_cublas_allow_fp16_accumulation",
        lambda: torch.backends.cuda.matmul.allow_fp16_accumulation,
    ),
    _native("_get_flash_sdp_enabled", torch.backends.cuda.flash_sdp_enabled),
    _native("_get_mem_efficient_sdp_enabled", torch.backends.cuda.mem_efficient_sdp_enabled),
    _native("_get_math_sdp_enabled", torch.backends.cuda.math_sdp_enabled),
    _native("_get_cudnn_sdp_enabled", torch.backends.cuda.cudnn_sdp_enabled),
    *_float32_precision(),
)


_any_autocast = _native("_is_any_autocast_enabled", lambda: True)


def autocast_flags(device_type: str) -> tuple[bool, torch.dtype | None]:
    """Return whether autocast is on for ``device_type``, and its dtype."""
    if not torch.is_autocast_enabled(device_type):
        return (False, None)
    return (True, torch.get_autocast_dtype(device_type))


def kernel_flags() -> tuple[Any, ...]:
    """Return all switches as a hashable tuple.

    They are grad mode, inference mode, default dtype, function modes, determinism, TF32, cuDNN,
    SDPA and autocast.
    """
    flags = [get() for get in _GETTERS]
    if _any_autocast():
        flags += [autocast_flags("cuda"), autocast_flags("cpu")]
    return tuple(flags)
