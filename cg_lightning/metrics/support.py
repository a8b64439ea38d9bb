"""The changes of a metric that a replay can reproduce."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.metrics.members import (
    ATTRIBUTES_OF_METRICS,
    BOOKKEEPING,
    averages_by_count,
    state_names,
    states_of,
)
from cg_lightning.modules.attributes import is_same_value
from cg_lightning.modules.kinds import is_user_class, is_value_of_class

_COUNTS = frozenset({"update_count", "_update_count", "update_called", "_update_called"})
"""The counter of updates, and values computed from it. Frameworks read it to count, and to warn."""


def unsupported_write(metric: nn.Module, name: str, value: Any) -> str:
    """Return why a replay cannot reproduce this attribute write, or an empty string."""
    if name in state_names(metric) or name in BOOKKEEPING:
        return ""
    if is_same_value(vars(metric).get(name), value):
        return ""
    return f"{type(metric).__name__}.{name} is kept in Python"


def unsupported_read(metric: nn.Module, name: str, written: set[str]) -> str:
    """Return why a replay cannot reproduce a step that reads this attribute, or an empty string.

    The step has set the attributes ``written`` before.
    """
    if name in _COUNTS and not _is_read_by_a_framework():
        return f"{type(metric).__name__}.{name} is read"
    if name == "_computed" and name not in written and vars(metric).get(name) is not None:
        return f"{type(metric).__name__} returns the result of an earlier step"
    if name not in written and _is_kept_by_user(metric, name):
        return f"{type(metric).__name__}.{name} is kept in Python"
    return ""


def _is_kept_by_user(metric: nn.Module, name: str) -> bool:
    """Return True for what a metric of the user's holds that is neither a state nor a plain value.

    No guard compares it, and no replay does again what an update does to a list or dictionary. Its
    parameters, buffers and submodules are seen otherwise.
    """
    # what this function itself reads comes here too
    if name.startswith("__") or name in ATTRIBUTES_OF_METRICS:
        return False
    if not is_user_class(type(metric)) or name in state_names(metric):
        return False
    if name in vars(metric):
        return not is_plain_value(vars(metric)[name])
    holders = [cls for cls in type(metric).__mro__ if name in vars(cls)]
    if not holders or not is_user_class(holders[0]):
        return False
    value = vars(holders[0])[name]
    return not is_plain_value(value) and is_value_of_class(value)


def unsupported_update(metric: nn.Module, written: set[str]) -> str:
    """Return why a replay cannot reproduce that a step has set these attributes, or nothing."""
    if "_forward_cache" in written and averages_by_count(metric):
        return f"{type(metric).__name__}.forward averages by a Python count"
    return ""


class ListStates:
    """The list states of one metric in one step that is watched or captured.

    A capture begins with empty lists, and a replay appends what the step has appended. So the step
    must not see what is in a list, unless ``forward`` has emptied it for the value of the batch.
    """

    def __init__(self, metric: nn.Module) -> None:
        self._metric = metric
        self._names = {
            name for name, default in states_of(metric).items() if not isinstance(default, Tensor)
        }
        self._emptied: set[str] = set()

    def unsupported_read(self, name: str, reader: FrameType) -> str:
        """Return why a replay cannot reproduce a step that reads this attribute, or nothing."""
        if name not in self._names or _is_ours(reader):
            return ""
        module, function = reader.f_globals.get("__name__"), reader.f_code.co_name
        if (module, function) == ("torchmetrics.metric", "reset"):
            if not _is_in_forward(reader):
                return f"{type(self._metric).__name__}.{name} is reset"
            self._emptied.add(name)
        elif (
            name not in self._emptied
            and (module not in _MAY_MOVE_STATES or function in _SHOW_STATES)
            and not _appends(reader.f_code, reader.f_lasti)
        ):
            return f"{type(self._metric).__name__}.{name} is read"
        return ""

    def unsupported_write(self, name: str, writer: FrameType) -> str:
        """Return why a replay cannot reproduce a step that sets this attribute, or nothing."""
        if name not in self._names:
            return ""
        self._emptied.discard(name)
        while _is_ours(writer) and writer.f_back is not None:
            writer = writer.f_back
        if writer.f_globals.get("__name__") in _MAY_MOVE_STATES:
            return ""
        return f"{type(self._metric).__name__}.{name} is set"


_MAY_MOVE_STATES = ("torchmetrics.metric", "torchmetrics.collections")
_SHOW_STATES = ("metric_state", "<dictcomp>")  # the latter inside the former, before Python 3.12


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("cg_lightning.")


def _is_in_forward(reset: FrameType) -> bool:
    """Return True if ``Metric.forward`` has called this ``reset``."""
    frame: FrameType | None = reset
    while frame is not None and (frame.f_code.co_name == "reset" or _is_ours(frame)):
        frame = frame.f_back
    return (
        frame is not None
        and frame.f_globals.get("__name__") == "torchmetrics.metric"
        and frame.f_code.co_name.startswith("_forward_")
    )


def _appends(code: CodeType, offset: int) -> bool:
    """Return True if the line appends to the list that this instruction reads."""
    following = following_instructions(code).get(offset)
    return (
        following is not None
        and following.opname in ("LOAD_METHOD", "LOAD_ATTR")
        and following.argval in ("append", "extend")
    )


@functools.lru_cache(maxsize=256)
def following_instructions(code: CodeType) -> dict[int, dis.Instruction]:
    """Return the instruction after each instruction, by the offset of the earlier one."""
    pairs = itertools.pairwise(dis.get_instructions(code))
    return {instruction.offset: following for instruction, following in pairs}


def _is_read_by_a_framework() -> bool:
    """Return True if the innermost function that is not ours is of torchmetrics or Lightning."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if package != "cg_lightning":
            return package in ("torchmetrics", "lightning", "pytorch_lightning")
        frame = frame.f_back
    return False
