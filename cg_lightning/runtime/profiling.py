"""Ranges for profilers and traces: ``cuda_graph/watch``, ``/capture``, ``/verify``, ``/replay``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from cg_lightning.backends import GraphBackend

NSYS = "NSYS_PROFILING_SESSION_ID"
"""Nsight Systems sets it in the processes that ``nsys profile`` and ``nsys launch`` start."""
NVTX = "CG_LIGHTNING_NVTX"
"""Ours: 1 asks for NVTX ranges, for other tools that show them."""


class Profiler(Protocol):
    """The part of Lightning's profilers that is used here."""

    def profile(self, action_name: str) -> AbstractContextManager[object]:
        """Return a context whose time is counted for ``action_name``."""


class Ranges:
    """Marks ranges for tools that show them. Without such a tool it does nothing.

    They are marked for the profiler of the Trainer, for PyTorch's profilers (``torch.profiler``,
    ``emit_nvtx``) and as NVTX ranges under ``nsys``.

    Args:
        backend: Marks ranges for traces of its device.
        profiler: The profiler of the Trainer; None if it has none.
    """

    def __init__(self, backend: GraphBackend, profiler: Profiler | None) -> None:
        self._backend = backend
        self._profiler = profiler
        self.is_on = False
        """Whether ranges are marked. A replay reads it, because an unused range costs time."""
        self._open: set[str] = set()

    def begin_stage(self) -> None:
        """Find out whether something shows ranges. It is asked once a stage."""
        self.is_on = (
            self._profiler is not None
            or NSYS in os.environ
            or os.environ.get(NVTX, "0") not in ("", "0")
            or _is_pytorch_profiling()
        )

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """While this is entered, the range ``cuda_graph/<name>`` is marked.

        Inside a range of the same name nothing is marked, because Lightning's profilers cannot nest
        it.
        """
        if not self.is_on or name in self._open:
            yield
            return
        self._open.add(name)
        try:
            with self._marked(f"cuda_graph/{name}"):
                yield
        finally:
            self._open.remove(name)

    @contextlib.contextmanager
    def _marked(self, action: str) -> Iterator[None]:
        if self._profiler is not None:
            with self._profiler.profile(action), self._backend.range(action):
                yield
        elif _is_pytorch_profiling():  # under emit_nvtx, this is an NVTX range as well
            with torch.autograd.profiler.record_function(action):
                yield
        else:
            with self._backend.range(action):
                yield


def _is_pytorch_profiling() -> bool:
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]
