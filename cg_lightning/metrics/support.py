"""What a replay can bring up to date of what a step does to a metric, and what not."""

from __future__ import annotations

from typing import Any

from torch import nn

from cg_lightning.metrics.members import averages_by_count, bookkeeping, state_names
from cg_lightning.modules.attributes import is_same_value
from cg_lightning.modules.interception import plain_class


def unsupported_write(metric: nn.Module, name: str, value: Any) -> str:
    """Why a replay could not bring up to date what a step has set an attribute to; empty where it can."""
    if name in state_names(metric) or name in bookkeeping():
        return ""
    if is_same_value(vars(metric).get(name), value):
        return ""
    return f"{type(metric).__name__}.{name} is kept in Python"


def unsupported_read(metric: nn.Module, name: str, written: set[str]) -> str:
    """Why a replay could not do what a step that reads an attribute does; empty where it can."""
    if name == "update_count":  # the property; torchmetrics itself reads ``_update_count``
        return f"{plain_class(metric).__name__}.update_count is read"
    if name == "_computed" and name not in written and vars(metric).get(name) is not None:
        return f"{plain_class(metric).__name__} gives the result of an earlier step"
    return ""


def unsupported_update(metric: nn.Module, written: set[str]) -> str:
    """Why a replay could not do what a step did; empty where it can."""
    if "_forward_cache" in written and averages_by_count(metric):
        return f"{type(metric).__name__}.forward averages by a Python count"
    return ""
