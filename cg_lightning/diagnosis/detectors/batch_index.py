"""Whether a step does anything with the number of its batch, other than comparing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from cg_lightning.core.causes import Cause
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.stages import STEP_METHODS
from cg_lightning.diagnosis.conditions import BranchCondition
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.uses_of_argument import ArgumentUse, ArgumentUses
from cg_lightning.guards.comparisons import ComparedNumber, ComparisonNotes

_POSITION = 1
"""The position of ``batch_idx`` in a call of a step: after the batch."""


class BatchIndex(Detector):
    """Reports a step of a LightningModule that uses ``batch_idx``: a graph would freeze it.

    It reads code, so it finds nothing in a step that no stage of the forward context names. If the
    step only compares the number, the comparisons are noted, and guarded. What a branch does with
    it is reported in steps that may take the branch.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._notes = ComparisonNotes(self._used)
        context = current_forward_context()
        key = None if context is None else context.batch_descriptor
        self._step = None if key is None else STEP_METHODS.get(key.stage or "")
        self._uses: list[ArgumentUse] = []
        """Where the step may use the number."""
        self._left_out: list[tuple[ArgumentUse, list[BranchCondition]]] = []
        """The uses whose lines do not run in this step, since these conditions do not hold."""
        self._used_at: str | None = None
        self._compared_at: str | None = None
        if watch.is_lightning and self._step is not None:
            uses = ArgumentUses(watch.root)
            self._uses = uses.find(self._step, _POSITION)
            self._compared_at = uses.compared_at

    def arguments(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not arguments or type(arguments[0]) is not int:  # its comparisons cannot be recorded
            self._used_at = self._uses[0].line if self._uses else self._compared_at
            return arguments
        number = arguments[0]
        for use in self._uses:
            failing = [each for each in use.conditions if not each.holds(number)]
            if not failing:
                self._used_at = use.line
                compared = [each for one in use.conditions for each, _ in one.outcomes]
                self._notes.outcomes.update({each: each.outcome(number) for each in compared})
                return arguments
            self._left_out.append((use, failing))
        if self._compared_at is None:
            return arguments
        return (ComparedNumber.of(number, self._notes), *arguments[1:])

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        if self._used_at is not None:
            self._report_use(self._used_at)
        yield
        made = self._notes.outcomes
        for use, failing in [] if self._used_at is not None else self._left_out:
            if not any(each.is_constant or not each.may_have_held(made) for each in failing):
                self._report_use(use.line)
        self.watch.step.comparisons.update(made)

    def _report_use(self, line: str) -> None:
        assert self._step is not None
        calls = [self.watch.step]
        self.watch.report(Cause.BATCH_INDEX_USED, self._step, location=line, calls=calls)

    def _used(self, words: str) -> None:
        self.watch.report(Cause.BATCH_INDEX_USED, f"batch_idx {words}", calls=[self.watch.step])
