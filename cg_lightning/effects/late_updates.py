"""Updates of metrics that no graph can hold: they run eagerly after each replay.

The step does not use any value that such a call returns or changes
(``diagnosis/detectors/late_updates.py`` decides that). So the captured step leaves the call out,
and returns its arguments like outputs. Then the call is the same as in eager, with the same
arguments, in the same order.

What is hard here: ``self.log`` of such a metric moves the metric to its device, and copies the
metric's latest value. So ``to`` is a late call as well, and a :class:`LateValue` stands for the
value until the calls are made. ``self.log_dict`` of a collection calls its ``items``, which gives
all metrics of a compute group their states: this too is made late.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from torchmetrics import Metric

from cg_lightning.core.kernel_flags import CallModes
from cg_lightning.core.tree import flatten, leaf_paths
from cg_lightning.effects.attributes import AttributesSnapshot
from cg_lightning.metrics.units import MetricCall, MetricUnit, calls_from_outside
from cg_lightning.modules.interception import Interception, ModuleHandler

VALUE = "_forward_cache"
"""The attribute in which torchmetrics stores the value of the latest ``metric(...)``."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LateCall(NamedTuple):
    """A call of a metric, without its arguments."""

    metric: nn.Module
    method: str
    modes: CallModes
    """The modes in which the step would have made the call."""


class LateValue:
    """Replaces the latest value of a metric until its late calls are made."""

    def __init__(self, metric: nn.Module) -> None:
        self.metric = metric

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LateValue) and other.metric is self.metric

    def __hash__(self) -> int:
        return id(self.metric)

    def get(self) -> Any:
        """Return the value."""
        return vars(self.metric)[VALUE]


class _ValueReader(ModuleHandler):
    """Returns a :class:`LateValue` when the latest value is read."""

    def __init__(self, value: LateValue) -> None:
        self._value = value

    def get_missing(self, name: str) -> LateValue:
        if name != VALUE:
            raise AttributeError(name)
        return self._value


class CollectedCalls:
    """The calls that one run of a step left out."""

    def __init__(self) -> None:
        self.calls: list[LateCall] = []
        self.arguments: list[Arguments] = []

    def add(self, call: MetricCall) -> Any:
        """Store a call. Return what the step expects: it does not use the value of an update."""
        self.calls.append(LateCall(call.metric, call.method, CallModes.now()))
        self.arguments.append((call.args, call.kwargs))
        if call.method == "items":
            return call.original(**{**call.kwargs, "copy_state": False})
        return call.metric if call.method == "to" else None


class LateUpdates:
    """Collects late calls, and makes them. There is one for each run."""

    def __init__(self) -> None:
        self._is_held = False
        self._latest: tuple[Sequence[LateCall], list[Arguments]] = ([], [])
        """The calls of the latest run that left its calls out."""

    @contextlib.contextmanager
    def collected(self, units: Sequence[MetricUnit]) -> Iterator[CollectedCalls]:
        """While this is entered, a step leaves out all calls of the metrics in ``units``."""
        found = CollectedCalls()
        if self._is_held:
            self._latest = (found.calls, found.arguments)
        if not units:
            yield found
            return
        metrics = [m for unit in units for m in unit.metrics if isinstance(m, Metric)]
        with contextlib.ExitStack() as stack:
            stack.callback(AttributesSnapshot(m for unit in units for m in unit.metrics).restore)
            for metric in metrics:
                del vars(metric)[VALUE]
                reader = _ValueReader(LateValue(metric))
                stack.callback(Interception(metric, reader).remove)
            stack.enter_context(calls_from_outside(units, found.add))
            yield found

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While this is entered, :meth:`make` only stores the calls: a verified step runs twice."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self._latest = ([], [])

    def make(self, calls: Sequence[LateCall], arguments: list[Arguments]) -> bool:
        """Make the calls, or store them. Return True if they were made."""
        if self._is_held:
            self._latest = (calls, arguments)
            return False
        for call, (args, kwargs) in zip(calls, arguments, strict=True):
            with call.modes.entered():
                getattr(call.metric, call.method)(*args, **kwargs)
        return True

    def latest(self) -> tuple[Sequence[LateCall], list[Arguments]]:
        """Return the latest calls that were left out, and their arguments."""
        return self._latest

    def latest_arguments(self) -> list[tuple[str, Any]]:
        """Return names and values of the arguments of the latest calls that were left out."""
        found = []
        for call, given in zip(*self._latest, strict=True):
            name = f"argument of {type(call.metric).__name__}.{call.method}: "
            paths = [f"{name}{path}" for path in leaf_paths(given, "")]
            found += list(zip(paths, flatten(given)[0], strict=True))
        return found

    def fill(self, metrics: Iterable[nn.Module]) -> None:
        """Replace each :class:`LateValue` in ``metrics`` by the value of its metric."""
        for metric in metrics:
            value = vars(metric).get(VALUE)
            if isinstance(value, LateValue):
                vars(metric)[VALUE] = value.get()


class LateStep(NamedTuple):
    """A step, for which it was decided which metrics are updated after it."""

    updates: LateUpdates
    units: Sequence[MetricUnit]

    def collected(self) -> contextlib.AbstractContextManager[CollectedCalls]:
        """While this is entered, the step leaves out all calls of these metrics."""
        return self.updates.collected(self.units)

    def is_late(self, metric: nn.Module) -> bool:
        """Return True if ``metric`` is updated after the step."""
        return any(other is metric for unit in self.units for other in unit.metrics)


class MakeLateCalls:
    """The late calls of one captured step. They are made after each replay, and come last.

    Args:
        updates: Makes them.
        calls: The calls, in order.
        values: Attributes of logged values, with the value that each stands for.
    """

    def __init__(
        self,
        updates: LateUpdates,
        calls: Sequence[LateCall],
        values: Sequence[tuple[dict[str, Any], LateValue]],
    ) -> None:
        self._updates = updates
        self._calls = list(calls)
        self._values = list(values)

    def take(self, built: tuple[Any, list[Arguments]]) -> Any:
        """Make the calls; see :class:`~cg_lightning.effects.effect.Taker`.

        Args:
            built: The output, and the arguments of each call.
        """
        output, arguments = built
        is_made = self._updates.make(self._calls, arguments)
        for attributes, value in self._values:
            attributes[VALUE] = value.get() if is_made else value
        return output
