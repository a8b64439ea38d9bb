"""Number of our files that a warm batch passes through (docs/architecture.md).

A batch is warm if its graph has been replayed until the account of its key is full.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from lightning.pytorch import Callback
from torchmetrics.classification import MulticlassAccuracy

from tests.harness import images
from tests.models import ConvNetClassifier
from tests.test_imports import PACKAGE


class Traces(Callback):
    """Records which of our files are entered between start and end of a batch."""

    def __init__(self, batch_idx: int) -> None:
        self._batch_idx = batch_idx
        self.files: set[str] = set()
        self.functions: set[tuple[str, str]] = set()

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(PACKAGE)) and "/app/" not in file:
            self.files.add(str(Path(file).relative_to(PACKAGE)))
            self.functions.add((file, frame.f_code.co_qualname))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx == self._batch_idx:
            sys.setprofile(self._on_event)

    def on_validation_batch_end(self, *_: Any) -> None:
        sys.setprofile(None)


class TwoLogs(ConvNetClassifier):
    """Two input tensors, one metric, two logs."""

    def __init__(self) -> None:
        super().__init__(4)
        self.val_accuracy = MulticlassAccuracy(10)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="co_qualname is of Python 3.11")
@pytest.mark.parametrize(("mode", "most"), [("FULL", 12), ("PIECEWISE", 14)])
def test_files_that_a_warm_batch_passes_through(harness, backend, mode, most):
    callback = harness.callback(mode=mode)
    traces = Traces(11)
    harness.trainer(callback, traces).validate(TwoLogs(), images(48), verbose=False)
    assert callback.stats.steps[mode] >= 8, callback.summary()
    assert len(traces.files) <= most, (
        " ".join(sorted(traces.files))
        + " "
        + " ".join(sorted(f"{Path(f).name}:{n}" for f, n in traces.functions))
    )
