"""Metrics that are updated together, and their calls from outside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from cg_lightning.metrics.members import metrics_held, metrics_of
from cg_lightning.modules.interception import (
    Interception,
    ModuleHandler,
    can_intercept,
    replaced_method,
)
from cg_lightning.modules.kinds import is_metric

METHODS = ("update", "to", "items")
"""The methods of a metric, other than its call, that code outside of a metric calls.

``self.log`` calls ``to``, and ``self.log_dict`` calls ``items`` of a collection.
"""


class MetricCall(NamedTuple):
    """A call of a metric from outside."""

    metric: nn.Module
    method: str
    original: Callable[..., Any]
    """The method as the metric has it."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


OnCall = Callable[[MetricCall], Any]
"""Replaces a call, and returns what the caller gets."""


class MetricUnit:
    """Metrics of one module that change each other: a wrapper or collection, and those inside."""

    def __init__(self, metrics: list[nn.Module]) -> None:
        self.metrics = metrics


def units_of(module: nn.Module) -> list[MetricUnit]:
    """Return all metrics of ``module``, in units that share no metric.

    Those that it has in containers and objects, and that are no submodules, are among them.
    """
    units: list[dict[int, nn.Module]] = []
    for metric in [*metrics_of(module), *metrics_held(module)]:
        inside = {id(child): child for child in metric.modules() if is_metric(child)}
        for unit in [unit for unit in units if unit.keys() & inside.keys()]:
            units.remove(unit)
            inside = unit | inside
        units.append(inside)
    return [
        MetricUnit(list(unit.values())) for unit in units if all(map(can_intercept, unit.values()))
    ]


class _CallHandler(ModuleHandler):
    def __init__(self, metric: nn.Module, on_call: OnCall) -> None:
        self._metric = metric
        self._on_call = on_call

    def on_call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return self._on_call(MetricCall(self._metric, "__call__", original, args, kwargs))


@contextlib.contextmanager
def calls_from_outside(units: Iterable[MetricUnit], on_call: OnCall) -> Iterator[None]:
    """While this is entered, ``on_call`` replaces calls of metrics, but not those that it makes.

    Replaced are ``metric(...)`` and the methods :data:`METHODS`.
    """
    is_inside = False

    def outermost(call: MetricCall) -> Any:
        nonlocal is_inside
        if is_inside:
            return call.original(*call.args, **call.kwargs)
        is_inside = True
        try:
            return on_call(call)
        finally:
            is_inside = False

    with contextlib.ExitStack() as stack:
        for metric in [metric for unit in units for metric in unit.metrics]:
            stack.callback(Interception(metric, _CallHandler(metric, outermost)).remove)
            for method in [name for name in METHODS if hasattr(type(metric), name)]:
                stack.enter_context(_replaced(metric, method, outermost))
        yield


@contextlib.contextmanager
def _replaced(metric: nn.Module, name: str, on_call: OnCall) -> Iterator[None]:
    attributes = vars(metric)
    if name not in attributes:  # torchmetrics stores ``update`` in each metric, but no collection

        def replacement(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return on_call(MetricCall(metric, name, original, args, kwargs))

        cls = next(cls for cls in type(metric).__mro__ if name in vars(cls))
        with replaced_method(metric, name, replacement, cls=cls):
            yield
        return
    original = attributes[name]

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return on_call(MetricCall(metric, name, original, args, kwargs))

    attributes[name] = method
    try:
        yield
    finally:
        attributes[name] = original
