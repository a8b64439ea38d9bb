"""One step while it is captured: its reads, its writes, and the effects that follow.

``recorder.py`` describes the order of captures, and what must not be reordered.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import flatten, rebuild, tensors_in
from cg_lightning.effects.effect import Effect, Taker
from cg_lightning.effects.kinds import (
    AddToCounters,
    Appended,
    AppendToLists,
    ComputedAttribute,
    Counter,
    ExpectAttributes,
    ExpectedAttribute,
    MoveMetricStates,
    RepeatLogCalls,
    SetAttributes,
)
from cg_lightning.effects.late_updates import (
    CollectedCalls,
    LateStep,
    LateValue,
    MakeLateCalls,
)
from cg_lightning.effects.logged_values import Calls, LoggedValues
from cg_lightning.guards.values import addresses_of
from cg_lightning.metrics.deferred_checks import CheckedCalls
from cg_lightning.metrics.members import state_names, states_of
from cg_lightning.metrics.states import MetricState, MetricStates, WrittenState
from cg_lightning.metrics.support import (
    ListStates,
    unsupported_read,
    unsupported_update,
    unsupported_write,
)
from cg_lightning.modules.interception import Interception, ModuleHandler

_COUNTER = "_update_count"
_READ_BEFORE_SET = frozenset({"_dtype", "_state_is_copy"})
"""Bookkeeping that a step may read before it sets it. The graph then freezes the value."""


class CapturedCount(int):
    """The counter of updates of a metric while its step is captured.

    An addition returns the same type. So at the end of the step, the counter shows from which
    metric it comes and how much was added. If it is a plain number at the end, the step has set it,
    as ``reset`` does. It starts at 1 or more, so that the graph does not freeze whether the step is
    the first one after a reset.
    """

    source: dict[str, Any]
    start: int

    @classmethod
    def of(cls, attributes: dict[str, Any]) -> CapturedCount:
        """Return the counter of the metric with these attributes."""
        start = max(1, attributes[_COUNTER])
        return cls(start)._from(attributes, start)

    def _from(self, source: dict[str, Any], start: int) -> CapturedCount:
        self.source = source
        self.start = start
        return self

    @property
    def increment(self) -> int:
        """The number that the step has added."""
        return int(self) - self.start

    def __add__(self, other: int) -> CapturedCount:
        return CapturedCount(int(self) + other)._from(self.source, self.start)

    __radd__ = __add__

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedCount:
        return self  # a copy of the metric does not count


def _update_of_a_copy(metric: Metric) -> Callable[..., None]:
    def update(*args: Any, **kwargs: Any) -> None:
        copy.deepcopy(metric).update(*args, **kwargs)

    return update


def _checked_update(metric: Metric, original: Any, checked: CheckedCalls) -> Any:
    @functools.wraps(original)
    def update(*args: Any, **kwargs: Any) -> None:
        with checked.during(_update_of_a_copy(metric), args, kwargs):
            original(*args, **kwargs)

    return update


class _RecordedMetric(ModuleHandler):
    """One metric in one captured step: reads states from static tensors, and records writes.

    It is made when the step begins, and removes the states from the attributes of the metric.
    """

    def __init__(self, metric: nn.Module, states: list[MetricState]) -> None:
        self.metric = metric
        self.attributes = vars(metric)
        self.states = {state.name: state for state in states}
        self.read: list[MetricState] = []
        self.written: set[str] = set()
        self.expected: dict[str, Any] = {}
        self.lists: dict[str, list[Any]] = {}
        """List states. They are empty when the step begins, so that appended items are visible."""
        self._list_states = ListStates(metric)
        for name, default in states_of(metric).items():
            self.attributes.pop(name, None)
            if not isinstance(default, Tensor):
                self.attributes[name] = self.lists[name] = []
        if isinstance(metric, Metric):
            self.attributes[_COUNTER] = CapturedCount.of(self.attributes)
        self.before = dict(self.attributes)

    def get_missing(self, name: str) -> Tensor:
        state = self.states.get(name)
        if state is None:
            raise AttributeError(name)
        self.read.append(state)
        self.attributes[name] = state.graph_tensor
        return state.graph_tensor

    def on_read(self, name: str) -> None:
        reason = unsupported_read(self.metric, name, self.written)
        if reason := reason or self._list_states.unsupported_read(name, sys._getframe(2)):
            raise CaptureError(reason)
        if name in _READ_BEFORE_SET and name not in self.written:
            self.expected[name] = self.attributes.get(name)

    def on_write(self, name: str, value: Any) -> None:
        reason = unsupported_write(self.metric, name, value)
        if reason := reason or self._list_states.unsupported_write(name, sys._getframe(2)):
            raise CaptureError(reason)
        self.written.add(name)


class FinishedStep(NamedTuple):
    """What a captured step does besides its output."""

    effects: list[Effect]
    tensors: list[Tensor]
    """What the graph computes for the effects, in order."""
    takers: list[tuple[Taker, list[Any]]]
    """What takes values that the user may have as well, and these values."""
    states: list[tuple[MetricState, Tensor]]
    """The metric states, with their static tensors and their values at the end."""

    def refuse_states_in(self, output: Any) -> None:
        """Raise if the step returns or keeps a state.

        Args:
            output: All that the user gets from the step.

        Raises:
            CaptureError: A later step may write to the state. Then the tensor that eager returns
                changes, but a copy does not.
        """
        states = {
            value.untyped_storage().data_ptr(): state
            for state, value in self.states
            if value.numel()
        }
        for tensor in tensors_in(output):
            if tensor.layout is torch.strided and tensor.numel():
                state = states.get(tensor.untyped_storage().data_ptr())
                if state is not None:
                    what = f"{type(state.metric).__name__}.{state.name}"
                    raise CaptureError(f"the step returns or keeps the state {what}")


class Recording:
    """One captured step. This class itself is for a step without side effects.

    Args:
        checked: Receives the checked calls of the step.
    """

    def __init__(self, checked: CheckedCalls) -> None:
        self.checked = checked

    def finish(self, known: Any = ()) -> FinishedStep:
        """Write new states to static tensors. Return what the step does besides its output.

        Call it once, inside the capture and after the step.

        Args:
            known: What the user has of the step besides metrics: its output and its batch.

        Raises:
            CaptureError: The step has a side effect that a replay cannot do again.
        """
        return FinishedStep([], [], [], [])


class RecordedParts(NamedTuple):
    """What a captured step of a module may change besides attributes of the user's."""

    metrics: list[nn.Module]
    """All metrics that the step may use, and those behind ``self.log``."""
    metric_states: list[MetricState]
    """Their tensor states."""
    states: MetricStates
    """The metric states of the whole run."""
    logged: LoggedValues
    """The logged values."""
    late: LateStep
    """The metrics that are updated after the step."""


class StepRecording(Recording):
    """One captured step of a module with metrics or logged values.

    Args:
        checked: See :class:`Recording`.
        parts: What the step may change.
        effects: Effects that are known already.
    """

    def __init__(
        self, checked: CheckedCalls, parts: RecordedParts, effects: Sequence[Effect] = ()
    ) -> None:
        super().__init__(checked)
        metrics, self._metric_states, self._states, self._logged, self._late = parts
        self._effects = list(effects)
        self._metrics = [
            _RecordedMetric(metric, [each for each in self._metric_states if each.metric is metric])
            for metric in metrics
        ]
        self.log_calls: Calls = []
        """The calls of ``self.log`` in the step, if a replay has to repeat them."""
        self.late_calls = CollectedCalls()
        """The calls of metrics that the step leaves out."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While this is entered, metrics are intercepted, and their updates are checked."""
        with contextlib.ExitStack() as stack:
            for recorded in self._metrics:
                metric, attributes = recorded.metric, recorded.attributes
                stack.callback(Interception(metric, recorded).remove)
                if isinstance(metric, Metric):
                    update = attributes["update"]
                    stack.callback(attributes.__setitem__, "update", update)
                    attributes["update"] = _checked_update(metric, update, self.checked)
            yield

    def finish(self, known: Any = ()) -> FinishedStep:
        """See :class:`Recording`."""
        for recorded in self._metrics:
            if reason := unsupported_update(recorded.metric, recorded.written):
                raise CaptureError(reason)
        log, expected = self._log_effect(), self._expected_attributes()
        final = [
            (state, state.attributes[state.name])
            for state in self._metric_states
            if state.name in state.attributes
        ]
        moved, counters = self._moved_states(final), self._counters()
        appended, items = self._appended()
        # what a callback writes to its output or batch, it writes to the state
        is_shared = not addresses_of(tensors_in(known)).isdisjoint(addresses_of(items))
        takers: list[tuple[Taker, list[Any]]] = []
        if appended is not None and is_shared:
            takers.append((appended, items))
        tensors = [] if is_shared else [*items]
        set_attributes, late_values = self._set_attributes(tensors)
        found = [
            log,
            expected,
            moved,
            counters,
            None if is_shared else appended,
            set_attributes,
            self._log_calls(tensors),
        ]
        if self.late_calls.calls:
            late = MakeLateCalls(self._late.updates, self.late_calls.calls, late_values)
            takers.append((late, self.late_calls.arguments))
        effects = [*[effect for effect in found if effect is not None], *self._effects]
        states = [(state, state.graph_tensor) for state in self._metric_states]
        return FinishedStep(effects, tensors, takers, [*states, *final])

    def _log_effect(self) -> Effect | None:
        logged = set(map(id, self._logged.metrics()))
        if not logged <= {id(recorded.metric) for recorded in self._metrics}:
            raise CaptureError("a value was logged for the first time")
        is_logged = any(
            recorded.written and id(recorded.metric) in logged for recorded in self._metrics
        )
        return self._logged.effect() if is_logged else None

    def _expected_attributes(self) -> Effect | None:
        expected = [
            ExpectedAttribute(recorded.attributes, name, value)
            for recorded in self._metrics
            for name, value in recorded.expected.items()
        ]
        return ExpectAttributes(expected) if expected else None

    def _moved_states(self, final: list[tuple[MetricState, Tensor]]) -> Effect | None:
        """Write the final values of states to static tensors."""
        read = [state for recorded in self._metrics for state in recorded.read]
        storages = {
            state.graph_tensor.untyped_storage().data_ptr() for state in self._metric_states
        }
        tensors: dict[int, Tensor] = {
            id(value): value for state, value in final if value is state.graph_tensor
        }
        """For each final value, the static tensor that stores it after a replay."""
        in_place = set(tensors)
        copies: list[tuple[Tensor, Tensor]] = []
        for state, value in final:
            static = state.graph_tensor
            if (value.shape, value.dtype, value.device) != (
                static.shape,
                static.dtype,
                static.device,
            ):
                raise CaptureError(
                    f"the state {type(state.metric).__name__}.{state.name} changes its shape,"
                    " dtype or device"
                )
            if id(value) not in tensors:
                tensors[id(value)] = static
                overlaps = value.untyped_storage().data_ptr() in storages
                copies.append((static, value.clone() if overlaps else value))
        if copies:
            torch._foreach_copy_([static for static, _ in copies], [value for _, value in copies])
        written = [
            WrittenState(
                state,
                tensors[id(value)],
                None if id(value) in in_place else value.is_inference(),
            )
            for state, value in final
        ]
        return MoveMetricStates(self._states, read, written) if written else None

    def _counters(self) -> Effect | None:
        counters = []
        for recorded in self._metrics:
            value = recorded.attributes.get(_COUNTER)
            if _COUNTER in recorded.written and isinstance(value, CapturedCount):
                counters.append(
                    Counter(recorded.attributes, _COUNTER, value.source, value.increment)
                )
        return AddToCounters(counters) if counters else None

    def _appended(self) -> tuple[AppendToLists | None, list[Tensor]]:
        """Return what appends to list states, and the items."""
        appended, all_items = [], list[Tensor]()
        for recorded in self._metrics:
            for name, empty in recorded.lists.items():
                items = recorded.attributes[name]
                if not isinstance(items, list) or not all(
                    isinstance(item, Tensor) for item in items
                ):
                    raise CaptureError(
                        f"the state {type(recorded.metric).__name__}.{name} is not a list of "
                        "tensors"
                    )
                if items:
                    appended.append(Appended(recorded.attributes, name, len(items), items is empty))
                    all_items.extend(items)
        return (AppendToLists(appended) if appended else None), all_items

    def _set_attributes(
        self, tensors: list[Tensor]
    ) -> tuple[SetAttributes | None, list[tuple[dict[str, Any], LateValue]]]:
        """Return what sets attributes of metrics, and the attributes that late calls set.

        Args:
            tensors: Receives the tensors that the graph computes for it.
        """
        constants = []
        late_values: list[tuple[dict[str, Any], LateValue]] = []
        computed: list[ComputedAttribute] = []
        for recorded in self._metrics:
            values: dict[str, Any] = {}
            for name in sorted(recorded.written - state_names(recorded.metric)):
                value = recorded.attributes.get(name)
                if name == _COUNTER and isinstance(value, CapturedCount):
                    continue
                if isinstance(value, LateValue):
                    late_values.append((recorded.attributes, value))
                    continue
                leaves = flatten(value)[0]
                of_graph = _tensors_of_graph(recorded, name, leaves)
                if not of_graph and len(leaves) == 1 and leaves[0] is value:
                    values[name] = value
                    continue
                template = rebuild(value, iter([0] * len(leaves)))
                computed.append(
                    ComputedAttribute(
                        recorded.attributes,
                        name,
                        template,
                        [] if of_graph else leaves,
                        len(of_graph),
                    )
                )
                tensors.extend(of_graph)
            if values:
                constants.append((recorded.attributes, values))
        effect = SetAttributes(constants, computed) if constants or computed else None
        return effect, late_values

    def _log_calls(self, tensors: list[Tensor]) -> Effect | None:
        if not self.log_calls:
            return None
        effect = RepeatLogCalls(self._logged.calls, self.log_calls)
        tensors.extend(tensors_in(self.log_calls))
        return effect


def _tensors_of_graph(recorded: _RecordedMetric, name: str, leaves: list[Any]) -> list[Tensor]:
    """Return the tensors of an attribute's new value. The value has only tensors, or none."""
    what = f"{type(recorded.metric).__name__}.{name}"
    if not all(
        isinstance(leaf, Tensor)
        or (is_plain_value(leaf) and not isinstance(leaf, CapturedCount))
        or leaf is recorded.before.get(name)
        for leaf in leaves
    ):
        raise CaptureError(f"{what} is set to a value that a replay cannot make")
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if tensors and len(tensors) != len(leaves):
        raise CaptureError(f"{what} contains both tensors and other values")
    return tensors
