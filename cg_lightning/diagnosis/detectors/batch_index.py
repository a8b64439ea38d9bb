"""Whether a step does anything with the number of its batch, other than comparing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.stages import STEP_METHODS
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.uses_of_argument import ArgumentUses
from cg_lightning.guards.comparisons import ComparedNumber, ComparisonNotes

_POSITION = 1
"""The position of ``batch_idx`` in a call of a step: after the batch."""


class BatchIndex(Detector):
    """Reports a step of a LightningModule that uses ``batch_idx``: a graph would freeze it.

    It reads code, so it finds nothing in a step that no stage of the forward context names. If the
    step only compares the number, the comparisons are noted, and guarded.
    """

    causes = (Cause.BATCH_INDEX_USED,)

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._notes = ComparisonNotes(self._used)
        context = current_forward_context()
        key = None if context is None else context.batch_descriptor
        self._step = None if key is None else STEP_METHODS.get(key.stage or "")
        self._used_at: str | None = None
        self._compared_at: str | None = None
        if watch.is_lightning and self._step is not None:
            uses = ArgumentUses(watch.root)
            self._used_at = uses.find(self._step, _POSITION)
            self._compared_at = uses.compared_at

    def arguments(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        if self._used_at is not None or self._compared_at is None:
            return arguments
        if not arguments or type(arguments[0]) is not int:
            self._used_at = self._compared_at  # nobody can note the comparisons
            return arguments
        return (ComparedNumber.of(arguments[0], self._notes), *arguments[1:])

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        if self._used_at is not None:
            assert self._step is not None
            self.watch.report(Cause.BATCH_INDEX_USED, self._step, location=self._used_at)
        yield
        self.watch.step.comparisons.update(self._notes.outcomes)

    def _used(self, words: str) -> None:
        self.watch.report(Cause.BATCH_INDEX_USED, f"batch_idx {words}", calls=[self.watch.step])


def find_use_of_batch_index(module: nn.Module, step_name: str) -> str | None:
    """Return the line of a step that does more with ``batch_idx`` than compare it, or None."""
    return ArgumentUses(module).find(step_name, _POSITION)


def uses_batch_index(module: nn.Module, step_name: str) -> bool:
    """Return whether a step may do more with ``batch_idx`` than comparing it."""
    return find_use_of_batch_index(module, step_name) is not None
