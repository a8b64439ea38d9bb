"""All graphs of one session: the budget, and which graph is dropped first."""

from __future__ import annotations

import warnings
from typing import Any

from cg_lightning.backends import GraphBackend
from cg_lightning.capture.entry import GraphEntry
from cg_lightning.core.errors import CaptureError

_FIRST_INTERVAL = 8
"""A graph that was used in one step only is expected to be used again after so many steps."""


class GraphCache:
    """Stores the order of use of all graphs, and drops graphs. Nothing else may drop one.

    The owner of a dropped entry gets no call. :meth:`GraphEntry.is_valid` returns False from then
    on, and the owner asks before each replay. The cache does not know keys.

    Args:
        backend: Waits for the device, because a graph must not be destroyed while it runs.
        max_graphs: The maximum number of graphs.
        max_bytes: The maximum memory of all graphs, as measured in their captures. None: no limit.
    """

    def __init__(
        self, backend: GraphBackend, max_graphs: int, max_bytes: int | None = None
    ) -> None:
        self._max_graphs = max_graphs
        self._max_bytes = max_bytes
        self._backend = backend
        self._owners: dict[GraphEntry, Any] = {}
        self._has_warned = False
        self.step = 0
        """The number of the current step. Each entry stores the step of its last use."""

    @property
    def why_evicted(self) -> str:
        """The reason why :meth:`make_room` has dropped a graph."""
        return f"evicted: more graphs than max_graphs={self._max_graphs}"

    @property
    def why_no_room(self) -> str:
        """The reason why :meth:`has_room` has returned False."""
        return f"all graphs of max_graphs={self._max_graphs} are in use"

    @property
    def why_too_large(self) -> str:
        """The reason why :meth:`make_room_for` has dropped a graph."""
        return f"evicted: more memory than max_graph_bytes={self._max_bytes}"

    def has_room(self) -> bool:
        """Return False if a new graph would take the place of one that is still in use.

        That one would be captured again soon, in the place of the next.
        """
        if len(self._owners) < self._max_graphs:
            return True
        oldest = self._first_to_go()
        if oldest.last_step == self.step or self._is_overdue(oldest):
            return True
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"CUDAGraphCallback: {self.why_no_room}; what has no graph yet runs eagerly until "
                "one of them was not used for a while. Raise max_graphs.",
                stacklevel=2,
            )
        return False

    def _is_overdue(self, entry: GraphEntry) -> bool:
        """Return True if a graph was not used for more than twice the time between its uses."""
        return self.step - entry.last_step > 2 * (entry.interval or _FIRST_INTERVAL)

    def _first_to_go(self) -> GraphEntry:
        return min(self._owners, key=lambda each: (not self._is_overdue(each), each.last_step))

    def make_room(self) -> Any:
        """Drop the least recently used graph if the budget is used up; first those overdue.

        Returns:
            The owner of the dropped graph; None if no graph was dropped.

        Raises:
            CaptureError: The current step has used that graph itself. If it were dropped, every
                step would capture every graph again.
        """
        if len(self._owners) < self._max_graphs:
            return None
        oldest = self._first_to_go()
        if oldest.last_step == self.step:
            raise CaptureError(
                f"One step needs more than max_graphs={self._max_graphs} graphs; raise max_graphs."
            )
        owner = self._owners[oldest]
        self.drop(oldest)
        return owner

    def make_room_for(self, entry: GraphEntry) -> list[Any]:
        """Drop the least recently used graphs until ``entry`` fits into the budget of bytes.

        Only a capture shows how much memory a graph needs, so this comes after it.

        Args:
            entry: A new graph that is not stored yet.

        Returns:
            The owners of the dropped graphs.

        Raises:
            CaptureError: The other graphs that the current step does not use are not enough. Only
                ``entry`` was dropped.
        """
        if self._max_bytes is None:
            return []
        excess = entry.num_bytes + sum(each.num_bytes for each in self._owners) - self._max_bytes
        leaving: list[GraphEntry] = []
        for oldest in sorted(self._owners, key=lambda each: each.last_step):
            if excess <= 0 or oldest.last_step == self.step:
                break
            leaving.append(oldest)
            excess -= oldest.num_bytes
        if excess > 0:
            needed = entry.num_bytes
            self._backend.synchronize()
            entry.drop()
            raise CaptureError(
                f"A graph of {needed} bytes, with the others of its step, needs more than "
                f"max_graph_bytes={self._max_bytes}; raise max_graph_bytes."
            )
        owners = [self._owners[each] for each in leaving]
        for each in leaving:
            self.drop(each)
        return owners

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
            self._backend.synchronize()
            entry.drop()

    def drop_all(self) -> bool:
        """Drop every graph. Return True if there was one."""
        if not self._owners:
            return False
        self._backend.synchronize()
        for entry in self._owners:
            entry.drop()
        self._owners.clear()
        return True

    def entries(self) -> list[GraphEntry]:
        """Return all stored graphs."""
        return list(self._owners)
