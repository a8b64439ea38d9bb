"""One capture: the switch, the counter, and weak references to outputs.

The public names are vLLM's (``vllm/compilation/monitor.py``, ``counter.py``).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from cg_lightning.backends import CapturedGraph, GraphBackend, resolve_backend
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import CUDAGraphError
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import CUDAGraphOptions
from cg_lightning.core.tree import flatten, rebuild

logger = logging.getLogger("cg_lightning")
_Output = TypeVar("_Output")


@dataclasses.dataclass
class CompilationCounter:
    """Counts captures since the start of the process; it counts no compilation.

    The name is vLLM's (``vllm/compilation/counter.py``).

    Example::

        >>> import torch
        >>> from cg_lightning import compilation_counter, graphed
        >>> before = compilation_counter.num_cudagraph_captured
        >>> net = torch.nn.Linear(8, 4).eval()
        >>> with torch.inference_mode(), graphed(net, backend="recorder") as run:
        ...     outputs = [run(torch.randn(2, 8)) for _ in range(8)]
        >>> compilation_counter.num_cudagraph_captured - before
        1
    """

    num_cudagraph_captured: int = 0
    """Number of successful captures by any wrapper and any callback."""


compilation_counter = CompilationCounter()
"""The counter of this process. Nothing resets it: compare two readings."""

_capturing_enabled = True


def set_cudagraph_capturing_enabled(enabled: bool) -> None:
    """Allow or forbid captures in this process (vLLM: ``vllm/compilation/monitor.py``).

    While captures are forbidden, every attempt raises :class:`CUDAGraphError`. It does *not* affect
    graphs that exist: they are still replayed.

    Example::

        >>> from cg_lightning import (
        ...     CUDAGraphError,
        ...     set_cudagraph_capturing_enabled,
        ...     validate_cudagraph_capturing_enabled,
        ... )
        >>> set_cudagraph_capturing_enabled(False)
        >>> try:
        ...     validate_cudagraph_capturing_enabled()
        ... except CUDAGraphError:
        ...     print("forbidden")
        ... finally:
        ...     set_cudagraph_capturing_enabled(True)
        forbidden

    Args:
        enabled: True to allow captures, which is the initial state.
    """
    global _capturing_enabled
    _capturing_enabled = enabled


def validate_cudagraph_capturing_enabled() -> None:
    """Check that captures are allowed (vLLM: ``vllm/compilation/monitor.py``).

    Example::

        >>> from cg_lightning import validate_cudagraph_capturing_enabled
        >>> validate_cudagraph_capturing_enabled()  # raises nothing: captures are allowed

    Raises:
        CUDAGraphError: ``set_cudagraph_capturing_enabled(False)`` forbids captures.
    """
    if not _capturing_enabled:
        raise CUDAGraphError(
            "A CUDA graph was about to be captured, but set_cudagraph_capturing_enabled(False) "
            "forbids it."
        )


def weak_ref_tensors(output: _Output, backend: GraphBackend | None = None) -> _Output:
    """Return ``output`` with each tensor replaced by a weak reference to the same memory.

    A weak reference has the same shape, dtype and strides, but does not keep the memory alive. It
    does *not* copy, and other leaves are returned as they are. Do not read a weak CUDA tensor after
    its memory was freed: PyTorch cannot detect that. On other devices, the new tensor keeps the
    memory alive. vLLM's function of this name (``vllm/utils``) takes lists and tuples only.

    Example::

        >>> import torch
        >>> from cg_lightning import weak_ref_tensors
        >>> output = {"logits": torch.ones(2, 3), "count": 7}
        >>> weak = weak_ref_tensors(output)
        >>> weak["logits"].data_ptr() == output["logits"].data_ptr(), weak["count"]
        (True, 7)

    Args:
        output: A tensor, or any nested containers of tensors and other values.
        backend: The backend that owns the memory. None: the backend of each tensor's device.
    """
    leaves, _ = flatten(output)
    weak = [_weak(leaf, backend) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return rebuild(output, iter(weak))  # type: ignore[no-any-return]


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
    """Capture ``run`` once, and return the graph with the output of ``run``.

    The output has no valid values before the first replay.

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
