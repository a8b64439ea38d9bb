"""Globals that are changed by a run for which the user did not ask: they are restored.

Compiled code is run once as it is written, to see what it reads in Python. What it changes there
must not count twice. What cannot be restored, such as an iterator, ends the run before it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import CellType, FrameType, FunctionType
from typing import Any

from torch import nn

from cg_lightning.core.reasons import Reason
from cg_lightning.diagnosis.detectors.global_reads import GlobalReads
from cg_lightning.diagnosis.findings import Finding
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.effects.containers import ContainersSnapshot
from cg_lightning.guards.sources import MISSING, DerivedNamespace, Source


class AbandonedRun(BaseException):
    """The run was ended before it used something that cannot be restored.

    Args:
        reason: What it would have used.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class UndoneReads(GlobalReads):
    """Notes and reports what :class:`GlobalReads` does, and restores what has changed.

    It raises :class:`AbandonedRun` in a function that names what cannot be restored.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._is_abandoned = False
        self._snapshots: dict[tuple[int, str], tuple[Source, Any, ContainersSnapshot]] = {}

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        try:
            with super().around_step():
                yield
        finally:
            for source, value, snapshot in self._snapshots.values():
                _put_back(source, value)
                snapshot.restore()

    def on_call(self, frame: FrameType) -> bool:
        matters = super().on_call(frame)
        problems = [each for found in self._problems.values() for each in found]
        if problems and not self._is_abandoned:
            self._is_abandoned = True  # what cleans up is called, too
            cause, words, location = problems[0]
            raise AbandonedRun(Finding(cause, words, "", location).reason())
        return matters

    def _remember(self, source: Source, location: str) -> None:
        if source.key not in self._snapshots and not source.belongs_to_trainer:
            with self.watch.paused():
                value = source.value()
                snapshot = ContainersSnapshot([(source.path, value)])
            self._snapshots[source.key] = (source, value, snapshot)
        super()._remember(source, location)


def _put_back(source: Source, value: Any) -> None:
    """Let a name refer to a value again, if it refers to another one."""
    holder, name = source.holder, source.name
    if source.value() is value or isinstance(holder, DerivedNamespace):
        return
    if isinstance(holder, CellType):
        if value is MISSING:
            del holder.cell_contents
        else:
            holder.cell_contents = value
    elif isinstance(holder, type):
        if value is MISSING:
            type.__delattr__(holder, name)
        else:
            type.__setattr__(holder, name, value)
    elif isinstance(holder, FunctionType):
        if name != "__dict__":  # its contents are in the snapshot
            setattr(holder, name, value)
    elif isinstance(holder, (dict, nn.Module)) or hasattr(holder, "__dict__"):
        namespace = holder if isinstance(holder, dict) else vars(holder)
        if value is MISSING:
            namespace.pop(name, None)
        else:
            namespace[name] = value
