"""The kinds of effects: of metrics, and of ``self.log``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import flatten, rebuild
from cg_lightning.effects.effect import Effect
from cg_lightning.effects.logged_values import Calls, LogCalls, LoggedValues
from cg_lightning.metrics.deferred_checks import DeferredCheck
from cg_lightning.metrics.states import MetricState, MetricStates, WrittenState

Attributes = dict[str, Any]
"""The ``__dict__`` of a metric. It is never replaced by another dictionary."""


class MoveMetricStates(Effect):
    """Moves metric states to the static tensors in which the graph reads and writes them.

    Usually nothing has used the states since the last replay of the same graph. Then nothing has to
    move, and one dictionary lookup for each state shows it.

    Args:
        states: All metric states of the run.
        read: States that the graph reads from their ``graph_tensor``.
        written: States that the step sets. Metrics that share a state share the tensor.
    """

    def __init__(
        self,
        states: MetricStates,
        read: Sequence[MetricState],
        written: Sequence[WrittenState],
    ) -> None:
        self._states = states
        self._read = list(read)
        # a state that becomes that of another metric comes after it
        self._written = sorted(written, key=lambda set_: set_.tensor is not set_.state.graph_tensor)
        set_states = [state for state, _, _ in written]
        self._metrics = list({id(state.metric): state.metric for state in set_states}.values())
        self._used = list({id(state): state for state in [*read, *set_states]}.values())
        self._places = [(state.name, state.attributes) for state in self._used]
        stored = {id(state): tensor for state, tensor, _ in written}
        self._returns = all(stored.get(id(state)) is state.graph_tensor for state in read)
        """True if every state is written to the tensor from which the next replay reads it."""
        self._needs_move = True
        self._moves = -1
        self._stage_number = -1

    def _is_in_place(self) -> bool:
        """Return True if all states are still stored in the tensors that the last replay wrote."""
        if self._moves != self._states.moves:
            return False
        for name, attributes in self._places:  # noqa: SIM110  # a generator takes longer
            if name in attributes:
                return False
        return True

    def is_valid(self) -> bool:
        """Return False if the shape or dtype of a state has changed since the capture."""
        return self._is_in_place() or all(map(self._states.fits, self._used))

    def before_replay(self) -> None:
        """Copy states that are stored elsewhere, for example after a reset, to the graph."""
        self._needs_move = not self._is_in_place()
        if not self._needs_move:
            return
        self._states.separate(self._written)
        moved = [
            state
            for state in self._read
            if state.name in state.attributes or state.location is not state.graph_tensor
        ]
        if moved:
            self._states.copy_in(moved)

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Mark the states as stored in the tensors that the graph has written."""
        if not self._needs_move:
            return
        if self._stage_number != self._states.stage_number:
            self._states.intercept(self._metrics)
            self._stage_number = self._states.stage_number
        self._states.move_to_graph(self._written)
        if self._returns:
            self._moves = self._states.moves


class ExpectedAttribute(NamedTuple):
    """An attribute that the step reads before it sets it."""

    attributes: Attributes
    name: str
    value: Any


class ExpectAttributes(Effect):
    """Checks attributes that the graph has frozen and that no other guard compares."""

    def __init__(self, expected: Sequence[ExpectedAttribute]) -> None:
        self._expected = list(expected)

    def is_valid(self) -> bool:
        """Return False if an attribute has another value than in the capture."""
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
    """Increments the update counters that the step increments."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._copied = [counter for counter in counters if counter.source is not counter.attributes]
        self._own = [
            (attributes, name, increment)
            for attributes, name, source, increment in counters
            if source is attributes
        ]

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Increment the counters."""
        for attributes, name, source, increment in self._copied:
            attributes[name] = source[name] + increment  # before the sources are incremented
        for attributes, name, increment in self._own:
            attributes[name] += increment


class Appended(NamedTuple):
    """Tensors that are appended to one list."""

    attributes: Attributes
    name: str
    number: int
    keeps_list: bool
    """True if the list is extended in place. False if it is replaced by a longer list."""


class AppendToLists(Effect):
    """Appends tensors to list states, as the step does."""

    def __init__(self, appended: Sequence[Appended]) -> None:
        self._appended = list(appended)

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Append the tensors that the graph has computed."""
        for attributes, name, number, keeps_list in self._appended:
            items = [next(tensors) for _ in range(number)]
            if keeps_list:
                attributes[name].extend(items)
            else:
                attributes[name] = [*attributes[name], *items]

    def take(self, built: tuple[Any, list[Tensor]]) -> Any:
        """Append tensors that the user gets as well; see :class:`Taker`."""
        output, items = built
        self.after_replay(iter(items))
        return output


class ComputedAttribute(NamedTuple):
    """An attribute that is set to a container, or to tensors of the graph."""

    attributes: Attributes
    name: str
    template: Any
    """The value with None in place of each leaf."""
    leaves: list[Any]
    """The leaves of the value; empty if they are tensors of the graph."""
    number: int
    """Number of tensors of the graph in the value."""


class SetAttributes(Effect):
    """Sets attributes of metrics, as the step does.

    Args:
        constants: For each metric, its ``__dict__`` and the values to set.
        computed: Attributes whose value is built after each replay.
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
    """Restores the attributes that ``self.log`` sets at each step.

    Args:
        logged: The logged values of the step that was just captured.
        results: The collection that stores them.
        attributes: Namespace, name and value of each attribute that ``self.log`` sets. The first
            one is the hook for which values are logged.
        hooks: The hooks that log, in this order.
    """

    def __init__(
        self,
        logged: LoggedValues,
        results: dict[str, Any],
        attributes: Sequence[tuple[dict[str, Any], str, Any]],
        hooks: Sequence[str],
    ) -> None:
        self._logged = logged
        self._hooks = list(hooks)
        self._results = results
        self._items = list(results.items())
        self._attributes = list(attributes)
        self._stage_number = -1

    def is_valid(self) -> bool:
        """Return False if the metrics behind the logged values were replaced since the capture.

        Lightning replaces them only between stages, so this is checked once per stage.
        """
        if self._stage_number == self._logged.stage_number:
            return True
        return self._logged.collection is self._results and all(
            self._results.get(key) is metric for key, metric in self._items
        )

    def before_replay(self) -> None:
        """Reset logged values if this is the first step of an epoch."""
        attributes, name, value = self._attributes[0]
        if attributes[name] != value or len(self._hooks) > 1:
            self._logged.begin(self._hooks)

    def after_replay(self, tensors: Iterator[Tensor]) -> None:
        """Set the attributes that ``self.log`` sets."""
        if self._stage_number != self._logged.stage_number:
            self._stage_number = self._logged.stage_number
            self._logged.begin_stage()
        for attributes, name, value in self._attributes:
            attributes[name] = value


class RepeatLogCalls(Effect):
    """Repeats the calls of ``self.log`` after each replay, with the tensors of the replay.

    Args:
        log_calls: Makes the calls.
        calls: The calls of the captured step.

    Raises:
        CaptureError: An argument cannot be passed again.
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
    """Deferred checks that the graph makes on the device. Other code reads them later."""

    def __init__(self, checks: Sequence[DeferredCheck]) -> None:
        self._checks = list(checks)

    def calls(self) -> set[Callable[..., Any]]:
        """Return the checked calls."""
        return {check.call for check in self._checks}

    def drop(self) -> None:
        """Mark the graph as dropped. Its pending checks are still read later."""
        for check in self._checks:
            check.dropped = True
