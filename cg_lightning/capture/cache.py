"""All graphs of one session: the budget, and which graph is dropped first."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from cg_lightning.backends import GraphBackend
from cg_lightning.capture.entry import GraphEntry
from cg_lightning.core.errors import CaptureError, NoRoomError

_LEAST_INTERVAL = 8
"""A graph may be expected to be used again after so many steps, if it came more often as well."""


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
        self._least_refused = 0
        """The memory of the smallest graph that found no room; 0: all have found room."""
        self.step = 0
        """The number of the current step. Each entry stores the step of its last use."""

    @property
    def why_evicted(self) -> str:
        """The reason why :meth:`make_room` has dropped a graph."""
        return f"evicted: more graphs than max_graphs={self._max_graphs}"

    @property
    def why_too_large(self) -> str:
        """The reason why :meth:`make_room_for` has dropped a graph."""
        return f"evicted: more memory than max_graph_bytes={self._max_bytes}"

    def why_no_room(self, num_bytes: int) -> str:
        """Return the reason if a new graph would take the place of one that is still in use.

        That one would be captured again soon, in the place of the next.

        Args:
            num_bytes: The memory of an earlier graph of the same key. 0: there was none; then it
                needs as much as the smallest graph that has found no room.
        """
        needed = num_bytes or self._least_refused
        if len(self._owners) >= self._max_graphs:
            oldest = self._first_to_go()
            if oldest.last_step == self.step or self._is_overdue(oldest):
                return ""
            option, why = "max_graphs", f"all graphs of max_graphs={self._max_graphs} are in use"
        elif needed and self._excess(needed, self._in_use()) > 0:
            option, why = "max_graph_bytes", self._why_no_memory()
        else:
            return ""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"CUDAGraphCallback: {why}; what has no graph yet runs eagerly until "
                f"one of them was not used for a while. Raise {option}.",
                stacklevel=2,
            )
        return why

    def _why_no_memory(self) -> str:
        return (
            f"graphs that are in use leave too little memory of max_graph_bytes={self._max_bytes}"
        )

    def _in_use(self) -> list[GraphEntry]:
        return [each for each in self._owners if not self._is_overdue(each)]

    def _excess(self, num_bytes: int, others: Iterable[GraphEntry]) -> int:
        """Return by how much a graph and others exceed the budget of bytes; 0: they do not."""
        if self._max_bytes is None:
            return 0
        return max(0, num_bytes + sum(each.num_bytes for each in others) - self._max_bytes)

    def _is_overdue(self, entry: GraphEntry) -> bool:
        """Return True if a graph was not used for more than twice the time between its uses."""
        return self.step - entry.last_step > 2 * max(entry.interval, _LEAST_INTERVAL)

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
        """Drop overdue graphs until ``entry`` fits into the budget of bytes, the oldest first.

        Only a capture shows how much memory a graph needs, so this comes after it.

        Args:
            entry: A new graph that is not stored yet.

        Returns:
            The owners of the dropped graphs.

        Raises:
            CaptureError: With the graphs that the current step uses, it never fits.
            NoRoomError: It does not fit while others are in use. Only ``entry`` was dropped.
        """
        needed = entry.num_bytes
        if self._excess(needed, self._in_use()):
            self._backend.synchronize()
            entry.drop()
            if self._excess(needed, [e for e in self._owners if e.last_step == self.step]):
                raise CaptureError(
                    f"A graph of {needed} bytes, with the others of its step, needs more than "
                    f"max_graph_bytes={self._max_bytes}; raise max_graph_bytes."
                )
            self._least_refused = min(needed, self._least_refused or needed)
            raise NoRoomError(self._why_no_memory())
        leaving: list[GraphEntry] = []
        excess = self._excess(needed, self._owners)
        for oldest in sorted(self._owners, key=lambda each: each.last_step):
            if excess <= 0:
                break
            if self._is_overdue(oldest):
                leaving.append(oldest)
                excess -= oldest.num_bytes
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
