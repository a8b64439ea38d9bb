"""Metrics and logged values inside one graph with the step: equal to eager at every batch."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.functional import classification
from torchmetrics.wrappers import MetricTracker, MinMaxMetric

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


@pytest.mark.in_turn("how")
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


class Extremes(LightningModule):
    """Returns and logs the value of a batch, the lowest and the highest."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.extremes = MinMaxMetric(MeanMetric(nan_strategy="disable").set_dtype(dtype))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        found = self.extremes(batch[0])
        self.log_dict(found, on_step=True, on_epoch=True)
        return found, self.extremes(-batch[0])


class KeepsExtremes(Callback):
    """Reads what a metric keeps, resets it between two batches, and sets what it keeps."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        metric = pl_module.extremes
        self.seen.append(repr(outputs))
        if batch_idx % 3 == 2:
            self.seen.append(repr((metric.min_val, metric.max_val, metric.compute())))
        if batch_idx == 10:
            metric.reset()
            metric.max_val = torch.full_like(metric.max_val, 0.25)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.seen.append(repr((pl_module.extremes.compute(), pl_module.extremes.min_val)))
        pl_module.extremes.reset()


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 24), (torch.float64, 10)])
@pytest.mark.parametrize(
    "values",
    [
        [1.0, 2.0, 2.0, -0.0, 0.0, NAN, 3.0, -1.0, 0.5, NAN, -INFINITE, 0.0, -0.0, INFINITE, 7.0],
        [NAN, NAN, NAN, NAN, 0.0, -0.0, 0.0, -0.0, 1e-45, 5.0, NAN, 5.0, -5.0, -5.0, 0.0],
    ],
)
def test_the_lowest_and_the_highest_value(harness, values, dtype, least, verify_replays):
    """Ties, both zeros and NaN: the text of a tensor shows each bit of such numbers."""

    def job(trainer, module):
        for _ in range(2):
            trainer.validate(module, loader(torch.tensor(values), batch_size=1), verbose=False)
        return [each.seen for each in trainer.callbacks if isinstance(each, KeepsExtremes)]

    callback = harness.callback(mode="FULL", verify_replays=verify_replays)
    harness.compare(Extremes(dtype), job, callback, others=lambda: [KeepsExtremes()])
    assert callback.stats.steps["FULL"] >= least, callback.summary()


class Counts(LightningModule):
    """Logs what a function of torchmetrics gives for three classes."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)
        self.function = function

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("value", self.function(logits, batch[1], num_classes=3).float().mean())


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize(
    "name",
    ["confusion_matrix", "stat_scores", "accuracy", "f1_score", "jaccard_index", "cohen_kappa"],
)
def test_a_label_that_is_no_class_raises_the_error_of_eager(harness, name, verify_replays):
    """A batch of few labels passes the checks of torchmetrics; its counts are too many."""
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(40) % 3
    labels[30] = 5
    module = Counts(getattr(classification, f"multiclass_{name}"))
    raised = []
    for extra in ([harness.callback(verify_replays=verify_replays)], []):
        # deterministic algorithms count only what there is room for, and raise nothing
        trainer = harness.trainer(*extra, deterministic=False)
        with pytest.raises(RuntimeError) as caught:
            trainer.validate(copy.deepcopy(module), loader(x, labels), verbose=False)
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]
