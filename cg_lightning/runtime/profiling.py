"""Ranges that profilers and traces show: ``cuda_graph/watch``, ``/capture``, ``/verify`` and ``/replay``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from cg_lightning.backends import GraphBackend


class Profiler(Protocol):
    """What is used of Lightning's profilers."""

    def profile(self, action_name: str) -> AbstractContextManager[object]:
        """Return a context whose time is counted for ``action_name``."""


class Ranges:
    """Marks what we do, for the profiler of the Trainer and as NVTX ranges.

    Args:
        backend: Marks ranges for traces of its device.
        profiler: The profiler; None: nobody looks, so nothing is marked.
    """

    def __init__(self, backend: GraphBackend, profiler: Profiler | None) -> None:
        self._backend = backend
        self._profiler = profiler
        self.is_on = profiler is not None
        """Whether anything is marked. A replay asks this instead of entering a range for nothing."""

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Mark what is run inside as ``cuda_graph/<name>``."""
        if self._profiler is None:
            yield
            return
        action = f"cuda_graph/{name}"
        with self._profiler.profile(action), self._backend.range(action):
            yield
