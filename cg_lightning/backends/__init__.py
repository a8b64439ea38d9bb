"""Backends: ``cuda`` for GPUs, ``recorder`` for any device without a graph API.

- ``base.py``: the protocol of a backend.
- ``capture_scope.py``: the lock and the settings around every capture, for all backends.
- ``copies_from_host.py``: operations that copy a tensor of the host to the device of the graphs.
- ``copies_to_host.py``: methods that copy a tensor of the device to the host.
- ``cuda.py``: ``torch.cuda.CUDAGraph``. No other file uses ``torch.cuda``.
- ``dispatch_mode.py``: watches dispatched operations and does not change their results.
- ``followed_generators.py``: random generators of the user's on the device.
- ``host_indices.py``: lists and arrays of the host that index a tensor.
- ``host_reads.py``: calls that wait for a GPU and that the dispatcher does not show.
- ``illegal_operations.py``: the table of operations that a CUDA graph cannot contain.
- ``imported_functions.py``: replaces functions of libraries: in one place, or in each module
  that has imported them.
- ``operation_writes.py``: the arguments that a dispatched operation writes to.
- ``recorder.py``: a graph API for devices without one: records operations and replays them.
- ``tensor_makers.py``: functions that make a tensor of Python values: ``torch.tensor`` and the
  like.
- ``texts_of_pytorch.py``: texts of PyTorch that decide something, as it has no type for them.
"""

from __future__ import annotations

import torch

from cg_lightning.backends import cuda
from cg_lightning.backends.base import CapturedGraph, GraphBackend
from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.core.settings import BACKENDS

__all__ = [
    "BACKENDS",
    "CapturedGraph",
    "GraphBackend",
    "RecorderBackend",
    "check_backend",
    "resolve_backend",
]


def check_backend(backend: str) -> str:
    """Return ``backend`` if it can be used on this machine.

    Raises:
        ValueError: ``backend`` is unknown, or it is ``cuda`` and there is no CUDA device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}.")
    if backend == "cuda" and not cuda.is_available():
        raise ValueError(
            "backend='cuda' needs a CUDA device and there is none; choose 'recorder' or 'auto'."
        )
    return backend


def resolve_backend(backend: str, device: torch.device | None = None) -> GraphBackend | None:
    """Return the backend of that name for ``device``, or for the default device if it is None.

    ``auto`` is ``cuda`` on a CUDA device. On other devices it is None: everything runs eagerly.

    Raises:
        ValueError: As in :func:`check_backend`, or ``cuda`` is asked for and ``device`` is not a
            CUDA device.
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
            f"backend='cuda' was asked for, but the work runs on {device}; "
            "choose 'recorder' or 'auto'."
        )
    return None
