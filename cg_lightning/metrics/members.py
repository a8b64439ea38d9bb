"""The metrics of a module, their states and their bookkeeping."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_mean
from torchmetrics.wrappers import MinMaxMetric

from cg_lightning.guards.value_kinds import ValueKind, kind_of
from cg_lightning.modules.attributes import attributes_of, names_of_frameworks
from cg_lightning.modules.kinds import is_metric, is_user_class

_WITHOUT_METRICS = (bool, int, float, str, bytes, type(None), Tensor, nn.Parameter)
_MOST_HELD = 10_000
"""Metrics that come after so many other values are not found."""


def metrics_of(module: nn.Module) -> list[nn.Module]:
    """Return all metrics and collections in ``module``, including nested ones."""
    return [child for child in module.modules() if is_metric(child)]


def metrics_held(module: nn.Module) -> list[nn.Module]:
    """Return the metrics that ``module`` has in containers and objects: they are no submodules."""
    known = set(map(id, metrics_of(module)))
    found: list[nn.Module] = []
    pending: list[Any] = []
    for child in module.modules():
        if not is_metric(child):
            of_frameworks = names_of_frameworks(child)
            pending += [value for name, value in vars(child).items() if name not in of_frameworks]
    seen: set[int] = set()
    for value in pending:  # it grows
        if type(value) in _WITHOUT_METRICS or id(value) in seen:
            continue
        seen.add(id(value))
        if len(seen) > _MOST_HELD:
            break
        if issubclass(type(value), nn.Module):
            if is_metric(value) and id(value) not in known:
                found.append(value)
            continue
        with contextlib.suppress(Exception):  # whatever the user's class raises if it is read
            pending += _held_by(value)
    return found


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return dict.values(value)
    if isinstance(value, (list, tuple, collections.deque)):
        return value
    if kind_of(value) is ValueKind.OBJECT and is_user_class(type(value)):
        return attributes_of(value).values()
    return ()


BOOKKEEPING = frozenset(
    {
        *("_computed", "_dtype", "_forward_cache", "_update_count", "_to_sync", "_should_unsync"),
        *("_is_synced", "_cache", "_enable_grad", "compute_on_cpu", "_state_is_copy", "has_reset"),
    }
)
"""The names of the attributes that torchmetrics and Lightning store for each metric.

A step sets them to values that do not depend on the values before, except for ``_update_count``,
which it increments. ``self.log`` moves a metric to a device, which sets ``_dtype`` to torch's
default dtype at that time.
"""


class _Bare(Metric):
    """A metric without states."""

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> None:
        """Return nothing."""


ATTRIBUTES_OF_METRICS = frozenset({**vars(_Bare()), **vars(MetricCollection({}))})
"""The names of the attributes that each metric and each collection of torchmetrics has."""


_EXTREMES = {"min_val": torch.tensor(torch.inf), "max_val": torch.tensor(-torch.inf)}
"""What ``MinMaxMetric`` keeps. It calls ``add_state`` for neither, so ``reset`` leaves them."""


def state_names(module: nn.Module) -> set[str]:
    """Return the names of the states of a metric. A collection has none."""
    if isinstance(module, MinMaxMetric):
        return {*module._defaults, *_EXTREMES}
    return set(module._defaults) if isinstance(module, Metric) else set()


def states_of(module: nn.Module) -> Mapping[str, object]:
    """Return the default of each state that ``module`` itself stores.

    A wrapper stores none if it only refers to the states of its metric.
    """
    if not isinstance(module, Metric):
        return {}
    if isinstance(module, MinMaxMetric):
        return {**module._defaults, **_EXTREMES}
    passes_on = any(
        isinstance(child, Metric) and child._defaults is module._defaults
        for child in module._modules.values()  # children() reads states: a metric's hash does
    )
    return {} if passes_on else module._defaults


def averages_by_count(module: nn.Module) -> bool:
    """Return True if ``forward`` divides a state by the number of updates.

    That number is a Python number (``Metric._reduce_states``), so a graph would freeze it.
    """
    if (
        not isinstance(module, Metric)
        or module.full_state_update is not False
        or module.dist_sync_on_step
    ):
        return False
    return any(reduction is dim_zero_mean for reduction in module._reductions.values())
