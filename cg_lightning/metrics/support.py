"""The changes of a metric that a replay can reproduce."""

from __future__ import annotations

from typing import Any

from torch import nn

from cg_lightning.metrics.members import averages_by_count, bookkeeping, state_names
from cg_lightning.modules.attributes import is_same_value


def unsupported_write(metric: nn.Module, name: str, value: Any) -> str:
    """Return why a replay cannot reproduce this attribute write, or an empty string."""
    if name in state_names(metric) or name in bookkeeping():
        return ""
    if is_same_value(vars(metric).get(name), value):
        return ""
    return f"{type(metric).__name__}.{name} is kept in Python"


def unsupported_read(metric: nn.Module, name: str, written: set[str]) -> str:
    """Return why a replay cannot reproduce a step that reads this attribute, or an empty string.

    Args:
        metric: The metric.
        name: The attribute that is read.
        written: Attributes of the metric that the step has set before.
    """
    if name == "update_count":  # the property; torchmetrics itself reads ``_update_count``
        return f"{type(metric).__name__}.update_count is read"
    if name == "_computed" and name not in written and vars(metric).get(name) is not None:
        return f"{type(metric).__name__} gives the result of an earlier step"
    return ""


def unsupported_update(metric: nn.Module, written: set[str]) -> str:
    """Return why a replay cannot reproduce what the whole step did to a metric, or an empty string.

    Args:
        metric: The metric.
        written: Attributes of the metric that the step has set.
    """
    if "_forward_cache" in written and averages_by_count(metric):
        return f"{type(metric).__name__}.forward averages by a Python count"
    return ""
