"""Memory that code in a backward reads, and where no gradient may be.

A graph computes all gradients before the first one is added to ``parameter.grad``. So code in the
backward (a hook of a tensor, a function of the user's) would not see what it sees in eager, if it
reads memory in which a gradient is: ``parameter.grad = flat_buffer[:n].view_as(parameter)``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.guards.values import addresses_of


class GradientsElsewhere:
    """The condition that no gradient is in memory that a watched backward has read.

    Args:
        parameters: All parameters of the module.
        addresses: The addresses of the storages that the backward has read.
    """

    def __init__(self, parameters: Iterable[Tensor], addresses: Iterable[int]) -> None:
        self._parameters = list(parameters)
        self._addresses = frozenset(addresses)
        self.key = ("gradients", self._addresses)
        """The identity of the condition."""

    def holds(self) -> bool:
        """Return True if all gradients are elsewhere."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return self._addresses.isdisjoint(addresses_of(gradients))

    def explain(self) -> Changed:
        """Return the change; empty if there is none."""
        if self.holds():
            return NO_CHANGE
        return Changed("a gradient is in memory that the backward reads")
