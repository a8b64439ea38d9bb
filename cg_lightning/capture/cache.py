"""How many graphs there may be; the least recently used goes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cg_lightning.core.errors import CaptureError, CUDAGraphError

_FIRST_WAIT = 10


class EvictedError(CUDAGraphError):
    """A graph was evicted more than once, and is not captured again yet."""


@dataclasses.dataclass(eq=False)
class Place:
    """The place of one graph in the budget, kept while it has none."""

    drop: Callable[[], None]
    """Forgets the graph."""
    step: int = 0
    """The step that used it last."""
    use: int = 0
    """The number of that use, among all uses of all graphs."""
    evictions: int = 0
    wait: int = 0
    """So many calls run eagerly before it is captured again."""


class GraphBudget:
    """Knows every graph of a session, and when it was used last.

    Where there are more keys than places, each graph might be evicted before it is replayed, and every step capture one:
    slower than eager. So one that was evicted a second time waits for 10 calls before it is captured again, then for 20, 40...
    """

    def __init__(self, max_graphs: int, synchronize: Callable[[], None]) -> None:
        self._max_graphs = max_graphs
        self._synchronize = synchronize  # a graph must not go while it runs
        self._places: set[Place] = set()
        self.step = 0
        """The number of the step under way."""
        self.uses = 0
        """Replays so far."""

    def add(self, place: Place) -> None:
        """Takes a new graph."""
        self._places.add(place)
        place.step, place.use = self.step, self.uses

    def use(self, place: Place) -> None:
        """Notes that a graph is replayed."""
        self.uses += 1
        place.step, place.use = self.step, self.uses

    def make_room(self, place: Place) -> None:
        """Evicts the least recently used graph where there are as many as there may be.

        Raises:
            CaptureError: That one was used by the step under way. Evicting it would capture every graph in every step.
            EvictedError: It is not yet time to capture the graph of ``place`` again.
        """
        if place.wait:
            place.wait -= 1
            raise EvictedError(
                f"evicted: more graphs than max_graphs={self._max_graphs}; raise it, or use fewer shapes"
            )
        if len(self._places) < self._max_graphs:
            return
        oldest = min(self._places, key=lambda place: place.use)
        if oldest.step == self.step:
            raise CaptureError(
                f"One step needs more than max_graphs={self._max_graphs} graphs; raise max_graphs."
            )
        self.drop(oldest)
        oldest.evictions += 1
        if oldest.evictions > 1:
            oldest.wait = _FIRST_WAIT * 2 ** (oldest.evictions - 2)

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
