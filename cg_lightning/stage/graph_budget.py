"""How many graphs there may be; the least recently used goes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cg_lightning.core.errors import CaptureError


@dataclasses.dataclass(eq=False)
class Place:
    """The place of one graph in the budget."""

    drop: Callable[[], None]
    """Forgets the graph."""
    step: int
    """The step that used it last."""
    use: int
    """The number of that use, among all uses of all graphs."""


class GraphBudget:
    """Knows every graph of a session, and when it was used last."""

    def __init__(self, max_graphs: int, synchronize: Callable[[], None]) -> None:
        self._max_graphs = max_graphs
        self._synchronize = synchronize  # a graph must not go while it runs
        self._places: set[Place] = set()
        self.step = 0
        """The number of the step under way."""
        self.uses = 0
        """Replays so far."""

    def add(self, drop: Callable[[], None]) -> Place:
        """Gives a new graph its place."""
        place = Place(drop, self.step, self.uses)
        self._places.add(place)
        return place

    def use(self, place: Place) -> None:
        """Notes that a graph is replayed."""
        self.uses += 1
        place.step, place.use = self.step, self.uses

    def make_room(self) -> None:
        """Evicts the least recently used graph where there are as many as there may be.

        Raises:
            CaptureError: That one was used by the step under way. Evicting it would capture every graph in every step.
        """
        if len(self._places) < self._max_graphs:
            return
        oldest = min(self._places, key=lambda place: place.use)
        if oldest.step == self.step:
            raise CaptureError(f"One step needs more than max_graphs={self._max_graphs} graphs; raise max_graphs.")
        self.drop(oldest)

    def drop(self, place: Place) -> None:
        """Drops one graph."""
        self._synchronize()
        place.drop()
        self._places.discard(place)

    def drop_all(self) -> bool:
        """Drops every graph; says whether there was any."""
        if not self._places:
            return False
        self._synchronize()
        for place in self._places:
            place.drop()
        self._places.clear()
        return True
