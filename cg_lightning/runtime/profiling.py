"""Ranges for profilers and traces: ``cuda_graph/watch``, ``/capture``, ``/verify``, ``/replay``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from cg_lightning.backends import GraphBackend


class Profiler(Protocol):
    """The part of Lightning's profilers that is used here."""

    def profile(self, action_name: str) -> AbstractContextManager[object]:
        """Return a context whose time is counted for ``action_name``."""


class Ranges:
    """Marks ranges for the profiler of the Trainer, and as NVTX ranges.

    Args:
        backend: Marks ranges for traces of its device.
        profiler: The profiler. None: nothing is marked.
    """

    def __init__(self, backend: GraphBackend, profiler: Profiler | None) -> None:
        self._backend = backend
        self._profiler = profiler
        self.is_on = profiler is not None
        """Whether ranges are marked. A replay reads it, because an unused range costs time."""
        self._open: set[str] = set()

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """While this is entered, the range ``cuda_graph/<name>`` is marked.

        Inside a range of the same name nothing is marked, because Lightning's profilers cannot nest
        it.
        """
        if self._profiler is None or name in self._open:
            yield
            return
        action = f"cuda_graph/{name}"
        self._open.add(name)
        try:
            with self._profiler.profile(action), self._backend.range(action):
                yield
        finally:
            self._open.remove(name)
