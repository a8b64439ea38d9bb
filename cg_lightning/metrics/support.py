"""The changes of a metric that a replay can reproduce."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import nn

from cg_lightning.metrics.members import averages_by_count, bookkeeping, state_names
from cg_lightning.modules.attributes import is_same_value

_COUNTS = frozenset({"update_count", "_update_count", "update_called", "_update_called"})
"""The counter of updates, and what is made of it. Frameworks read it to count up, and to warn."""


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
    if name in _COUNTS and not _is_read_by_a_framework():
        return f"{type(metric).__name__}.{name} is read"
    if name == "_computed" and name not in written and vars(metric).get(name) is not None:
        return f"{type(metric).__name__} returns the result of an earlier step"
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


def _is_read_by_a_framework() -> bool:
    """Return True if the innermost function that is not ours is of torchmetrics or Lightning."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if package != "cg_lightning":
            return package in ("torchmetrics", "lightning", "pytorch_lightning")
        frame = frame.f_back
    return False
