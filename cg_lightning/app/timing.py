"""The time of a batch in each stage of a run."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cg_lightning.backends import cuda


class BatchClock(Callback):
    """Measures the median time from the end of one batch to the end of the next, in each stage.

    It waits for the device after each batch. The sanity check before ``fit`` does not count.
    """

    def __init__(self) -> None:
        self._intervals: defaultdict[str, list[float]] = defaultdict(list)
        self._previous: float | None = None

    def microseconds(self) -> dict[str, float]:
        """Return the median time of a batch by stage. Stages with one batch have no time."""
        return {
            stage: statistics.median(intervals) * 1e6
            for stage, intervals in self._intervals.items()
        }

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._previous = None

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _begin

    def _read(self, stage: str, trainer: Trainer) -> None:
        if trainer.sanity_checking:
            return
        if trainer.strategy.root_device.type == "cuda":
            cuda.cuda_backend(trainer.strategy.root_device).synchronize()
        now = time.perf_counter()
        if self._previous is not None:
            self._intervals[stage].append(now - self._previous)
        self._previous = now

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read the time."""
        self._read("validate", trainer)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read the time."""
        self._read("test", trainer)

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read the time."""
        self._read("predict", trainer)
