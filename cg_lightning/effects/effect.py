"""What a captured step does to metrics, and how a replay does it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.tree import rebuild
from cg_lightning.metrics.deferred_checks import DeferredCheck
from cg_lightning.metrics.states import FixedStates, Slot
from cg_lightning.trainer.log_calls import Calls, CapturedLogCalls
from cg_lightning.trainer.logged_results import LogEffect


@dataclasses.dataclass
class StepEffects:
    """The effects of one captured step, in terms of the attributes of its metrics."""

    states: FixedStates
    reads: list[Slot]
    """States that the graph reads where they are fixed."""
    checks: list[DeferredCheck]
    make_log_calls: Callable[[Calls], None]
    homes: list[tuple[Slot, Tensor]] = dataclasses.field(default_factory=list)
    """Where the states are after a replay."""
    appended: list[tuple[dict[str, Any], str, int, bool]] = dataclasses.field(default_factory=list)
    """List states: attributes, name, how many tensors come to it, and whether the list stays the same object."""
    counts: list[tuple[dict[str, Any], str, int]] = dataclasses.field(default_factory=list)
    """Counters, and by how much they go up."""
    values: list[tuple[dict[str, Any], str, Any, int]] = dataclasses.field(default_factory=list)
    """Attributes that are set: the value, and how many of its leaves are tensors of the graph."""
    metrics: list[nn.Module] = dataclasses.field(default_factory=list)
    """Metrics whose states the graph writes."""
    log: LogEffect | None = None
    log_calls: CapturedLogCalls | None = None
    """Calls of ``self.log`` that are to be made, where their effect is not known."""
    tensors: list[Tensor] = dataclasses.field(default_factory=list)
    """During the capture: what the graph computes for lists and attributes, in order."""
    num_tensors: int = 0
    _period: int = -1

    def take_tensors(self) -> list[Tensor]:
        """Gives the tensors away, so that the graph's memory is not held."""
        tensors, self.tensors = self.tensors, []
        if self.log_calls is not None:
            tensors = [*tensors, *self.log_calls.take_tensors()]
        self.num_tensors = len(tensors)
        return tensors

    def drop(self) -> None:
        """Says that the graph is gone; its flags are still to be read."""
        for check in self.checks:
            check.dropped = True

    def prepare_replay(self) -> bool:
        """Brings states that were set since into the tensors that the graph reads; False where the graph cannot be
        replayed: metrics were replaced, or a state has another shape or dtype.
        """
        if self._period != self.states.period and self.log is not None and self.log.is_stale():
            return False
        if self.log is not None:
            self.log.before()
        moved = [
            slot
            for slot in self.reads
            if slot.name in slot.attributes or slot.home is not slot.fixed
        ]
        if not all(map(Slot.fits, moved)):
            return False
        if moved:
            self._copy_in(moved)
        return True

    def _copy_in(self, moved: list[Slot]) -> None:
        values = [slot.value() for slot in moved]
        for slot in moved:  # whose state was in one of these tensors keeps it
            if any(home is slot.fixed for _, home in self.states.homes()):
                self.states.give_out(slot.fixed)
        torch._foreach_copy_([slot.fixed for slot in moved], values)

    def after_replay(self, tensors: list[Tensor]) -> None:
        """Leaves what the step would have left.

        Args:
            tensors: What the graph computed for lists and attributes; nothing overwrites it.
        """
        if self._period != self.states.period:  # once a stage
            self.states.intercept(self.metrics)
            self._period = self.states.period
            if self.log is not None:
                self.log.begin_stage()
        for slot, home in self.homes:
            slot.attributes.pop(slot.name, None)
            slot.home = home
        for attributes, name, increment in self.counts:
            attributes[name] += increment
        given = iter(tensors)
        for attributes, name, number, same_list in self.appended:
            items = [next(given) for _ in range(number)]
            if same_list:
                attributes[name].extend(items)
            else:
                attributes[name] = [*attributes[name], *items]
        for attributes, name, value, number in self.values:
            attributes[name] = rebuild(value, given) if number else value
        if self.log is not None:
            self.log.after()
        if self.log_calls is not None:
            self.make_log_calls(self.log_calls.given(given))
