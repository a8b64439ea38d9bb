"""The process-wide switches that change which kernels a step launches, hence part of every key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _tf32_getters() -> tuple[Callable[[], Any], ...]:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9: reading the old names raises once the new ones were used
        return (lambda: matmul.fp32_precision, lambda: cudnn.conv.fp32_precision, lambda: cudnn.rnn.fp32_precision)
    return (lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision)


_GETTERS: tuple[Callable[[], Any], ...] = (
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.get_default_dtype,
    torch.are_deterministic_algorithms_enabled,
    lambda: torch.backends.cudnn.enabled,
    lambda: torch.backends.cudnn.benchmark,
    lambda: torch.backends.cudnn.deterministic,
    lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
    *_tf32_getters(),
)


def autocast_flags(device_type: str) -> tuple[bool, torch.dtype | None]:
    """Whether autocast is on for ``device_type``, and to which dtype."""
    if not torch.is_autocast_enabled(device_type):
        return (False, None)
    return (True, torch.get_autocast_dtype(device_type))


def kernel_flags() -> tuple[Any, ...]:
    """Gives grad and inference mode, default dtype, determinism, TF32, cuDNN and SDPA switches, and autocast."""
    return (*[get() for get in _GETTERS], autocast_flags("cuda"), autocast_flags("cpu"))
