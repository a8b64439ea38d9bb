"""The side effects of a captured step, and how to do them again after a replay.

A graph contains the work of a step on the device. The work of the step in Python is stored as a
list of effects. There is one effect of each kind for all metrics of a step, because a replay of a
small step takes only a few microseconds: states are copied with one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor


class Effect:
    """One side effect of a captured step.

    For each replay, in this order: :meth:`is_valid` of all effects, :meth:`before_replay` of all,
    the replay, :meth:`after_replay` of all.
    """

    def is_valid(self) -> bool:
        """Return False if the graph is no longer usable and must be captured again."""
        return True

    def before_replay(self) -> None:
        """Prepare the tensors that the graph reads."""

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Do the side effect.

        Args:
            tensors: The tensors that the graph computed for all effects, in the order of the
                effects. Each effect takes as many as it needs, always the same number. They are
                copies that nothing overwrites.
        """

    def drop(self) -> None:
        """Release resources. It is called once, when the graph is dropped."""


class Taker(Protocol):
    """Uses values that a graph computes besides the output. They are copied like outputs."""

    def take(self, built: tuple[Any, Any]) -> Any:
        """Use the values, and return the output.

        Args:
            built: The output and the values, of the current replay.
        """


def methods(effects: Iterable[Effect], name: str) -> list[Callable[..., Any]]:
    """Return the method ``name`` of all effects that override it.

    Most effects override only one or two methods. In a replay of a small step, calls of the other
    methods would take a fourth of the time of all effects.
    """
    bound = [(getattr(effect, name), getattr(type(effect), name)) for effect in effects]
    return [method for method, own in bound if own is not getattr(Effect, name)]
