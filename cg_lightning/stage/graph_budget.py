"""How many graphs there may be; the least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import CaptureError


class _Owner(Protocol):
    def drop(self, descriptor: BatchDescriptor) -> None: ...


class GraphBudget:
    """Knows every graph of a session in order of use."""

    def __init__(self, max_graphs: int, synchronize: Callable[[], None]) -> None:
        self._max_graphs = max_graphs
        self._synchronize = synchronize  # a graph must not go while it runs
        self._last_step: OrderedDict[tuple[_Owner, BatchDescriptor], int] = OrderedDict()
        self.step = 0
        """The number of the step under way."""
        self.uses = 0
        """Replays so far."""

    def use(self, owner: _Owner, descriptor: BatchDescriptor) -> None:
        """Notes that a graph is replayed."""
        self.uses += 1
        self._last_step[owner, descriptor] = self.step
        self._last_step.move_to_end((owner, descriptor))

    def make_room(self) -> None:
        """Evicts the least recently used graph where there are as many as there may be.

        Raises:
            CaptureError: That one was used by the step under way. Evicting it would capture every graph in every step.
        """
        if len(self._last_step) < self._max_graphs:
            return
        (owner, descriptor), step = next(iter(self._last_step.items()))
        if step == self.step:
            raise CaptureError(f"One step needs more than max_graphs={self._max_graphs} graphs; raise max_graphs.")
        self.drop(owner, descriptor)

    def drop(self, owner: _Owner, descriptor: BatchDescriptor) -> None:
        """Drops one graph."""
        self._synchronize()
        owner.drop(descriptor)
        self._last_step.pop((owner, descriptor), None)

    def drop_all(self) -> bool:
        """Drops every graph; says whether there was any."""
        if not self._last_step:
            return False
        self._synchronize()
        for owner, descriptor in self._last_step:
            owner.drop(descriptor)
        self._last_step.clear()
        return True
