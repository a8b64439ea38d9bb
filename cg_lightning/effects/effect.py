"""The side effects of a captured step, and how a replay has them again.

A graph holds what a step computed on the device. What the step did in Python beside that is a list
of effects. One effect of each kind is enough for all metrics of a step: copies of states are made
with one call, and a replay of a small step takes a few microseconds in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import flatten, rebuild
from cg_lightning.effects.logged_values import Calls, LogCalls, LoggedValues
from cg_lightning.metrics.deferred_checks import DeferredCheck
from cg_lightning.metrics.states import MetricState, MetricStates

Attributes = dict[str, Any]
"""The ``__dict__`` of a metric; it stays the same one."""


class Effect:
    """One side effect of a captured step.

    For each replay, in this order: :meth:`is_valid` of all effects, :meth:`before_replay` of all,
    the replay, :meth:`after_replay` of all.
    """

    def is_valid(self) -> bool:
        """Return False if the graph can no longer be used, and has to be captured again."""
        return True

    def before_replay(self) -> None:
        """Prepare what the graph reads."""

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Leave what the step would have left.

        Args:
            tensors: What the graph computed for all effects, in the order of the effects. Each
                effect takes as many as it needs, always the same number. They are copies that
                nothing overwrites.
        """

    def drop(self) -> None:
        """Called once, when the graph is dropped."""


def methods(effects: Iterable[Effect], name: str) -> list[Callable[..., Any]]:
    """Return the method ``name`` of those effects that have one of their own.

    Most effects leave one or two methods as they are; in each replay of a small step, calling them
    for nothing takes a fourth of the time of all effects.
    """
    bound = [(getattr(effect, name), getattr(type(effect), name)) for effect in effects]
    return [method for method, own in bound if own is not getattr(Effect, name)]


class MoveMetricStates(Effect):
    """Metric states: the graph reads and writes them in static tensors.

    If nothing has touched the states since the last replay of the same graph, which is the usual
    case, there is nothing to move; this is found with one look at each metric.

    Args:
        states: All metric states of the run.
        read: States that the graph reads from their ``graph_tensor``.
        written: States that the step has set, and the static tensor in which each is stored after
            the step. Metrics that share a state share the tensor.
    """

    def __init__(
        self,
        states: MetricStates,
        read: Sequence[MetricState],
        written: Sequence[tuple[MetricState, Tensor]],
    ) -> None:
        self._states = states
        self._read = list(read)
        self._written = list(written)
        self._metrics = list({id(state.metric): state.metric for state, _ in written}.values())
        self._used = list({id(state): state for state in [*read, *dict(written)]}.values())
        self._places = [(state.name, state.attributes) for state in self._used]
        stored = {id(state): tensor for state, tensor in written}
        self._returns = all(stored.get(id(state)) is state.graph_tensor for state in read)
        """Whether each state that is read is written to where the next replay reads it."""
        self._needs_move = True
        self._moves = -1
        self._stage_number = -1

    def _is_in_place(self) -> bool:
        """Return True if the states are still stored where the last replay left them."""
        if self._moves != self._states.moves:
            return False
        for name, attributes in self._places:  # noqa: SIM110  # a generator takes longer
            if name in attributes:
                return False
        return True

    def is_valid(self) -> bool:
        """Return False if a state has another shape or dtype by now, or had one since."""
        return self._is_in_place() or all(map(self._states.fits, self._used))

    def before_replay(self) -> None:
        """Copy states that are stored elsewhere, after a reset for instance, to the graph's."""
        self._needs_move = not self._is_in_place()
        if not self._needs_move:
            return
        moved = [
            state
            for state in self._read
            if state.name in state.attributes or state.location is not state.graph_tensor
        ]
        if moved:
            self._states.copy_in(moved)

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Say that the states are stored where the graph has written them."""
        if not self._needs_move:
            return
        if self._stage_number != self._states.stage_number:
            self._states.intercept(self._metrics)
            self._stage_number = self._states.stage_number
        self._states.move_to_graph(self._written)
        if self._returns:
            self._moves = self._states.moves


class ExpectedAttribute(NamedTuple):
    """An attribute that the step has read before it set it."""

    attributes: Attributes
    name: str
    value: Any


class ExpectAttributes(Effect):
    """Attributes that a graph has frozen, and that no other guard compares."""

    def __init__(self, expected: Sequence[ExpectedAttribute]) -> None:
        self._expected = list(expected)

    def is_valid(self) -> bool:
        """Return False if an attribute has another value by now."""
        return all(attributes.get(name) == value for attributes, name, value in self._expected)


class Counter(NamedTuple):
    """A counter: after the step it is ``source[name] + increment``.

    ``source`` is ``attributes`` itself, unless the step copies the counter of another metric.
    """

    attributes: Attributes
    name: str
    source: Attributes
    increment: int


class AddToCounters(Effect):
    """Counts updates, where the step has done so."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._copied = [counter for counter in counters if counter.source is not counter.attributes]
        self._own = [
            (attributes, name, increment)
            for attributes, name, source, increment in counters
            if source is attributes
        ]

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Count."""
        for attributes, name, source, increment in self._copied:
            attributes[name] = source[name] + increment  # of what it was: sources come later
        for attributes, name, increment in self._own:
            attributes[name] += increment


class Appended(NamedTuple):
    """What comes to one list."""

    attributes: Attributes
    name: str
    number: int
    keeps_list: bool
    """Whether the list stays the same object; else a new one is made of both."""


class AppendToLists(Effect):
    """Tensors that the step has appended to list states."""

    def __init__(self, appended: Sequence[Appended]) -> None:
        self._appended = list(appended)

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Append what the graph has computed."""
        for attributes, name, number, keeps_list in self._appended:
            items = [next(tensors) for _ in range(number)]
            if keeps_list:
                attributes[name].extend(items)
            else:
                attributes[name] = [*attributes[name], *items]


class ComputedAttribute(NamedTuple):
    """An attribute that is set to a container, or to tensors of the graph."""

    attributes: Attributes
    name: str
    template: Any
    """The value with None in the place of each tensor."""
    leaves: list[Any]
    """Leaves of the value; None if they are tensors of the graph."""
    number: int
    """Number of tensors."""


class SetAttributes(Effect):
    """Attributes that the step has set.

    Args:
        constants: For each metric its attributes, and what some of them are set to.
        computed: Attributes that are made anew after each replay.
    """

    def __init__(
        self,
        constants: Sequence[tuple[Attributes, dict[str, Any]]],
        computed: Sequence[ComputedAttribute],
    ) -> None:
        self._constants = list(constants)
        self._computed = list(computed)

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Set the attributes."""
        for attributes, values in self._constants:
            attributes.update(values)
        for attributes, name, template, leaves, number in self._computed:
            attributes[name] = rebuild(template, tensors if number else iter(leaves))


class RestoreLogResults(Effect):
    """What ``self.log`` does at each step beside updating metrics.

    Args:
        logged: The logged values; their step has just run.
        results: The collection that has them.
        attributes: Namespace, name and value of each attribute that ``self.log`` sets. The first
            one says for which hook values are logged.
    """

    def __init__(
        self,
        logged: LoggedValues,
        results: dict[str, Any],
        attributes: Sequence[tuple[dict[str, Any], str, Any]],
    ) -> None:
        self._logged = logged
        self._results = results
        self._items = list(results.items())
        self._attributes = list(attributes)
        self._stage_number = -1

    def is_valid(self) -> bool:
        """Return False if other metrics stand behind the logged values than when captured.

        Lightning replaces them between stages only, so it is looked at once a stage.
        """
        if self._stage_number == self._logged.stage_number:
            return True
        return self._logged.collection is self._results and all(
            self._results.get(key) is metric for key, metric in self._items
        )

    def before_replay(self) -> None:
        """Reset logged values, if this is the first step of an epoch."""
        attributes, name, value = self._attributes[0]
        if attributes[name] != value:
            self._logged.begin()

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Leave what ``self.log`` leaves."""
        if self._stage_number != self._logged.stage_number:
            self._stage_number = self._logged.stage_number
            self._logged.begin_stage()
        for attributes, name, value in self._attributes:
            attributes[name] = value


class RepeatLogCalls(Effect):
    """Calls of ``self.log``: made again after each replay, with the tensors of the replay.

    Args:
        log_calls: Makes the calls.
        calls: The calls of the captured step.

    Raises:
        CaptureError: An argument is nothing that can be given again.
    """

    def __init__(self, log_calls: LogCalls, calls: Calls) -> None:
        self._log_calls = log_calls
        leaves = flatten(calls)[0]
        for leaf in leaves:
            if not (isinstance(leaf, Tensor) or is_plain_value(leaf) or callable(leaf)):
                raise CaptureError(
                    f"self.log was given a {type(leaf).__qualname__}, which cannot be logged again"
                )
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._calls: Calls = rebuild(calls, iter(self._leaves))

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Make the calls."""
        pairs = zip(self._leaves, self._is_tensor, strict=True)
        given = [next(tensors) if is_tensor else leaf for leaf, is_tensor in pairs]
        self._log_calls.make(rebuild(self._calls, iter(given)))


class ReadChecksLater(Effect):
    """Checks that the graph makes on the device. Something else reads them later."""

    def __init__(self, checks: Sequence[DeferredCheck]) -> None:
        self._checks = list(checks)

    def drop(self) -> None:
        """Mark the graph as dropped; what its checks have found is still read."""
        for check in self._checks:
            check.dropped = True
