"""All graphs of one session: the budget, and which graph is dropped first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cg_lightning.capture.entry import GraphEntry
from cg_lightning.core.errors import CaptureError


class GraphCache:
    """Stores the order of use of all graphs, and drops graphs. Nothing else may drop one.

    The owner of a dropped entry is not told. :meth:`GraphEntry.is_valid` returns False from then
    on, and the owner asks before each replay. The cache does not know keys.

    Args:
        max_graphs: The maximum number of graphs.
        synchronize: Waits for the device, because a graph must not be destroyed while it runs.
    """

    def __init__(self, max_graphs: int, synchronize: Callable[[], None]) -> None:
        self._max_graphs = max_graphs
        self._synchronize = synchronize
        self._owners: dict[GraphEntry, Any] = {}
        self.step = 0
        """The number of the current step. Each entry stores the step of its last use."""

    @property
    def why_evicted(self) -> str:
        """The reason why a graph was dropped to make room."""
        return f"evicted: more graphs than max_graphs={self._max_graphs}"

    def make_room(self) -> Any:
        """Drop the least recently used graph if the budget is used up.

        Returns:
            The owner of the dropped graph; None if no graph was dropped.

        Raises:
            CaptureError: The current step has used that graph itself. If it were dropped, every
                step would capture every graph again.
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
        """Store a new graph.

        Args:
            entry: The graph.
            owner: The object that :meth:`make_room` returns when this graph is dropped.
        """
        entry.last_step = self.step
        self._owners[entry] = owner

    def drop(self, entry: GraphEntry) -> None:
        """Drop one graph; idempotent."""
        if self._owners.pop(entry, None) is not None:
            self._synchronize()
            entry.drop()

    def drop_all(self) -> bool:
        """Drop every graph. Return True if there was one."""
        if not self._owners:
            return False
        self._synchronize()
        for entry in self._owners:
            entry.drop()
        self._owners.clear()
        return True

    def entries(self) -> list[GraphEntry]:
        """Return all stored graphs."""
        return list(self._owners)
