"""Ways to capture and replay work: ``cuda`` for GPUs, ``recorder`` for any device without a graph
  API.

- ``base.py``: what a backend has to offer.
- ``capture_scope.py``: what holds around every capture, whatever the backend.
- ``cuda.py``: ``torch.cuda.CUDAGraph``. The only file that touches ``torch.cuda``.
- ``dispatch_mode.py``: watching dispatched operations without changing what they compute.
- ``host_reads.py``: calls that the dispatcher does not see, or not as what they would be on a
  GPU.
- ``illegal_operations.py``: which operations a CUDA graph cannot hold: one table, for the
  recorder and for diagnosis.
- ``recorder.py``: a graph API for devices that have none: records dispatched operations, and
  replays them on the same memory.
"""

from __future__ import annotations

import torch

from cg_lightning.backends import cuda
from cg_lightning.backends.base import CapturedGraph, GraphBackend
from cg_lightning.backends.recorder import RecorderBackend

__all__ = [
    "BACKENDS",
    "CapturedGraph",
    "GraphBackend",
    "RecorderBackend",
    "check_backend",
    "resolve_backend",
]

BACKENDS = ("auto", "cuda", "recorder")


def check_backend(backend: str) -> str:
    """Raises:
    ValueError: ``backend`` is unknown, or is ``cuda`` where there is no CUDA device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}.")
    if backend == "cuda" and not cuda.is_available():
        raise ValueError(
            "backend='cuda' needs a CUDA device and there is none; choose 'recorder' or 'auto'."
        )
    return backend


def resolve_backend(backend: str, device: torch.device | None = None) -> GraphBackend | None:
    """Gives the backend of that name for ``device`` (None: the default one).

    ``auto`` is ``cuda`` on a CUDA device and None, meaning that all runs eagerly, elsewhere.

    Raises:
        ValueError: As :func:`check_backend`, or ``cuda`` is asked for on a device that is none.
    """
    check_backend(backend)
    if backend == "recorder":
        return RecorderBackend(device or torch.device("cpu"))
    if device is None:
        device = cuda.current_device() if cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and cuda.is_available():
        return cuda.cuda_backend(device)
    if backend == "cuda":
        raise ValueError(
            f"backend='cuda' was asked for, but the work runs on {device}; choose 'recorder' or 'auto'."
        )
    return None
