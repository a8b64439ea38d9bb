"""All graphs of one session: how many there may be, and which goes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cg_lightning.capture.entry import GraphEntry
from cg_lightning.core.errors import CaptureError


class GraphCache:
    """Owns the order of use of all graphs, and drops them.

    It alone drops a graph: an entry that was dropped says so (:meth:`GraphEntry.is_valid`), and its owner finds out at the
    next look-up. It does not know keys.

    Args:
        max_graphs: The most graphs that are kept.
        synchronize: Waits for the device: a graph must not be destroyed while it runs.
    """

    def __init__(self, max_graphs: int, synchronize: Callable[[], None]) -> None:
        self._max_graphs = max_graphs
        self._synchronize = synchronize
        self._owners: dict[GraphEntry, Any] = {}
        self.step = 0
        """The number of the step under way; an entry stores that of its latest use."""

    @property
    def why_evicted(self) -> str:
        """Why a graph had to go."""
        return f"evicted: more graphs than max_graphs={self._max_graphs}"

    def make_room(self) -> Any:
        """Drop the least recently used graph if there are as many as there may be.

        Returns:
            The owner of the graph that was dropped; None if none was.

        Raises:
            CaptureError: The step under way has used that graph itself. To drop it would mean to capture every graph in
                every step.
        """
        if len(self._owners) < self._max_graphs:
            return None
        oldest = min(self._owners, key=lambda entry: entry.last_step)
        if oldest.last_step == self.step:
            raise CaptureError(
                f"One step needs more than max_graphs={self._max_graphs} graphs; raise max_graphs."
            )
        owner = self._owners[oldest]
        self.drop(oldest)
        return owner

    def add(self, entry: GraphEntry, owner: Any) -> None:
        """Take a new graph; ``owner`` is what :meth:`make_room` returns when the graph has to go."""
        entry.last_step = self.step
        self._owners[entry] = owner

    def drop(self, entry: GraphEntry) -> None:
        """Drop one graph; idempotent."""
        if self._owners.pop(entry, None) is not None:
            self._synchronize()
            entry.drop()

    def drop_all(self) -> bool:
        """Drop every graph; return whether there was any."""
        if not self._owners:
            return False
        self._synchronize()
        for entry in self._owners:
            entry.drop()
        self._owners.clear()
        return True

    def entries(self) -> list[GraphEntry]:
        """Return all graphs that are kept."""
        return list(self._owners)
