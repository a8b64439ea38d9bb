"""A gate that forbids captures, and a count of those that happened (vLLM: ``compilation/monitor.py``, ``counter.py``)."""

from __future__ import annotations

import dataclasses

from cg_lightning.core.errors import CUDAGraphError


@dataclasses.dataclass
class CompilationCounter:
    """Counts over the life of the process."""

    num_cudagraph_captured: int = 0


compilation_counter = CompilationCounter()

_capturing_enabled = True


def set_cudagraph_capturing_enabled(enabled: bool) -> None:
    """Opens or closes the gate. While it is closed, any capture raises; replays go on."""
    global _capturing_enabled
    _capturing_enabled = enabled


def validate_cudagraph_capturing_enabled() -> None:
    """Raises:
    CUDAGraphError: The gate is closed.
    """
    if not _capturing_enabled:
        raise CUDAGraphError(
            "A CUDA graph was about to be captured while set_cudagraph_capturing_enabled(False) holds."
        )
