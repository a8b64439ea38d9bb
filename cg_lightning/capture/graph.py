"""One capture: the gate, the counter, and outputs that do not keep their memory (vLLM: ``monitor.py``, ``counter.py``)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cg_lightning.backends import CapturedGraph, GraphBackend, resolve_backend
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import CUDAGraphError
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import CUDAGraphOptions
from cg_lightning.core.tree import flatten, rebuild

logger = logging.getLogger("cg_lightning")


@dataclasses.dataclass
class CompilationCounter:
    """Counts over the life of the process."""

    num_cudagraph_captured: int = 0


compilation_counter = CompilationCounter()

_capturing_enabled = True


def set_cudagraph_capturing_enabled(enabled: bool) -> None:
    """Open or close the gate. While it is closed, every capture raises; replays go on."""
    global _capturing_enabled
    _capturing_enabled = enabled


def validate_cudagraph_capturing_enabled() -> None:
    """Raises:
    CUDAGraphError: The gate is closed.
    """
    if not _capturing_enabled:
        raise CUDAGraphError(
            "A CUDA graph was about to be captured, but set_cudagraph_capturing_enabled(False) forbids it."
        )


def weak_ref_tensors(output: Any, backend: GraphBackend | None = None) -> Any:
    """Return ``output`` with each tensor replaced by one on the same memory that does not keep the memory alive.

    Dtype, shape and strides are kept; other leaves stay as they are. A CUDA tensor made in this way must not be read after
    its memory was freed, and PyTorch cannot notice that. On other devices the new tensor does keep the memory.

    Args:
        output: Any nest of containers and tensors (vLLM's function of this name takes lists and tuples).
        backend: The backend that the memory belongs to; None: the one of each tensor's device.
    """
    leaves, _ = flatten(output)
    weak = [_weak(leaf, backend) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return rebuild(output, iter(weak))


def _weak(tensor: Tensor, backend: GraphBackend | None) -> Tensor:
    backend = backend or resolve_backend("auto", tensor.device)
    return tensor.detach() if backend is None else backend.weak_ref_tensor(tensor)


def capture_graph(
    backend: GraphBackend,
    run: Callable[[], Any],
    mode: CUDAGraphMode,
    descriptor: BatchDescriptor,
    options: CUDAGraphOptions,
    *,
    collect_garbage: bool,
) -> tuple[CapturedGraph, Any]:
    """Capture ``run`` once; return the graph and what ``run`` returned, whose values only a replay computes.

    Raises:
        CaptureError: The capture failed; the backend is as usable as before.
        CUDAGraphError: Captures are disabled.
    """
    validate_cudagraph_capturing_enabled()
    if options.debug_log_enable:
        logger.debug("Capturing a CUDA graph on (%s, %s)", mode.name, descriptor)
    captured = backend.capture(
        run, collect_garbage=collect_garbage, capture_error_mode=options.capture_error_mode
    )
    compilation_counter.num_cudagraph_captured += 1
    return captured
