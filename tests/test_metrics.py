"""Metrics and logged values inside one graph with the step: equal to eager at every batch."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torchmetrics.wrappers import MetricTracker

from cg_lightning.core.causes import Cause
from tests.harness import loader
from tests.metrics import CASES, CLASSES, Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def data(number: int = 44, batch_size: int = 4) -> Any:
    generator = torch.Generator().manual_seed(7)
    features, labels = (
        torch.randn(number, 8, generator=generator),
        torch.randint(0, CLASSES, (number,), generator=generator),
    )
    return loader(features, labels, batch_size=batch_size)


class Measured(LightningModule):
    def __init__(self, case: Case, how: str) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)
        self.metric, self.case, self.how = case.make(), case, how
        if isinstance(self.metric, MetricTracker):
            self.metric.increment()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, label = batch
        return self.case.call(getattr(self.metric, self.how), self.net(x), label)


class Computes(Callback):
    """Reads metrics in mid-epoch, and stores the values without a copy."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if batch_idx % 4 == 3:
            self.seen.append(pl_module.metric.compute())

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.seen.append(pl_module.metric.compute())
        pl_module.metric.reset()


@pytest.mark.parametrize("how", ["update", "forward"])
@pytest.mark.parametrize("name", list(CASES))
def test_metrics_are_eagers_over_two_epochs(harness, name, how):
    def job(trainer, module):
        for _ in range(2):
            trainer.validate(module, data(), verbose=False)
        return next(
            callback for callback in trainer.callbacks if isinstance(callback, Computes)
        ).seen

    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(Measured(CASES[name], how), job, callback, others=lambda: [Computes()])
    reasons = [reason for reason in callback.stats.eager_reasons if reason != "warm-up"]
    reason = CASES[name].reason if how == "update" else CASES[name].forward_reason
    if reason is None:
        assert callback.stats.steps["FULL"] >= 15, callback.summary()
    else:
        assert callback.stats.steps["FULL"] == 0
        # on a GPU another obstacle may come first, such as a copy from the host
        expected = (
            Cause
            if harness.backend == "cuda"
            else reason
            if isinstance(reason, tuple)
            else [reason]
        )
        causes = tuple(cause.value for cause in expected)
        assert reasons
        assert all(text.startswith(causes) for text in reasons)
