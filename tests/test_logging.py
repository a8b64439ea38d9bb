"""Whole steps that log: Lightning shows, stores, logs and decides as without the callback."""

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)

from cg_lightning.trainer.logged_results import LoggedResults
from tests.harness import KeepOutputs, features, images, loader, validate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Logs(LightningModule):
    """Logs a loss and metrics in all supported ways."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.accuracy = MulticlassAccuracy(10)
        self.f1 = MulticlassF1Score(10)
        self.several = MetricCollection(
            [MulticlassAccuracy(10, average="micro"), MulticlassF1Score(10, average="micro")]
        )
        self.accuracy.persistent(True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, torch.Tensor]:
        x, y = batch
        logits = self.net(x)
        loss = cross_entropy(logits, y)
        self.accuracy.update(logits, y)
        self.f1(logits, y)
        self.several.update(logits, y)
        self.log("loss", loss, prog_bar=True)
        self.log("stepped", loss * 2, on_step=True, on_epoch=True, prog_bar=True)
        self.log("only_steps", loss * 3, on_step=True, on_epoch=False, logger=True)
        self.log("smallest", loss, reduce_fx="min", add_dataloader_idx=dataloader_idx > 0)
        self.log("largest", logits.max(), reduce_fx=torch.max, sync_dist=True)
        self.log("total", (y > 4).sum(), reduce_fx="sum", batch_size=7)
        self.log_dict({"accuracy": self.accuracy, "f1": self.f1}, on_epoch=True)
        self.log_dict(self.several, on_step=True)
        return {"loss": loss, "logits": logits}

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


class Listens(Logger):
    """Stores every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    name = "listens"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((step, dict(metrics)))


class Reads(Callback):
    """Stores what a Trainer shows after each batch and epoch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _keep(self, trainer, *_: Any) -> None:
        shown = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        self.seen.append([dict(metrics) for metrics in shown])

    on_validation_batch_end = on_validation_epoch_end = on_validation_end = on_test_batch_end = (
        on_test_end
    ) = _keep


def shown(trainer: Any) -> list[Any]:
    reads = next(callback for callback in trainer.callbacks if isinstance(callback, Reads))
    return [reads.seen, [logger.calls for logger in trainer.loggers]]


def fit(trainer, module):
    trainer.fit(module, images(40), images(22))
    checkpoint, stopping = trainer.checkpoint_callback, trainer.early_stopping_callback
    decisions = [
        checkpoint.best_model_score,
        checkpoint.current_score,
        stopping.best_score,
        stopping.stopped_epoch,
    ]
    return [*shown(trainer), decisions]


def decide(folder):
    return lambda: [
        Reads(),
        ModelCheckpoint(folder, monitor="loss"),
        EarlyStopping("f1", mode="max", patience=2),
    ]


@pytest.mark.parametrize(
    "settings",
    [{}, {"val_check_interval": 0.5}, {"limit_val_batches": 4}, {"precision": "bf16-mixed"}],
)
def test_three_epochs_of_fit(harness, tmp_path, settings):
    callback = harness.callback(mode="FULL", warmup_steps=1)
    settings = {
        "max_epochs": 3,
        "num_sanity_val_steps": 2,
        "enable_checkpointing": True,
        "log_every_n_steps": 3,
        **settings,
    }
    harness.compare(Logs(), fit, callback, others=decide(tmp_path), logger=Listens(), **settings)
    assert callback.stats.steps["FULL"] > callback.stats.eager, callback.summary()


def test_the_first_log_of_a_value_is_no_obstacle(harness):
    """The first ``self.log`` creates a value on the CPU and moves it: step two is watched too."""
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(Logs(), validate(images(20)), callback)
    assert callback.stats.eager_reasons == {"warm-up": 2}
    assert callback.stats.steps["FULL"] == 3


class LogsEpochs(Logs):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.accuracy.update(logits, batch[1])
        self.log("loss", cross_entropy(logits, batch[1]), prog_bar=True)
        self.log("accuracy", self.accuracy)


class LogsInAHook(Callback):
    """From the sixth batch on, also log for each step."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        results = trainer._results
        stands_in = "metrics" in vars(results)
        if stands_in:  # Lightning's own answer is the same
            assert results.metrics(True) == type(results).metrics(results, True)
        if batch_idx > 5:
            pl_module.log("in_a_hook", batch[0].mean(), on_step=True, on_epoch=True, prog_bar=True)
        self.stood_in = getattr(self, "stood_in", False) or stands_in

    def on_validation_end(self, trainer, pl_module) -> None:
        self.results = trainer._results


def test_values_of_epochs_beside_one_of_steps(harness):
    """Lightning skips its scan at each batch as long as no value is logged for each step."""
    hooks: list[LogsInAHook] = []

    def others():
        hooks.append(LogsInAHook())
        return [Reads(), hooks[-1]]

    job = lambda trainer, module: (
        [trainer.validate(module, images(44), verbose=False) for _ in range(2)] + shown(trainer)
    )
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(LogsEpochs(), job, callback, others=others, logger=Listens())
    assert callback.stats.steps["FULL"] > 8, callback.summary()
    assert [hook.stood_in for hook in hooks] == [True, False]
    assert "metrics" not in vars(hooks[0].results)


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_several_dataloaders_twice(harness, mode):
    def job(trainer, module):
        results = [
            trainer.validate(module, [images(22), images(13, 3)], verbose=False) for _ in range(2)
        ]
        return [results, trainer.test(module, images(22), verbose=False), shown(trainer)]

    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(Logs(), job, callback, others=lambda: [Reads()], logger=Listens())
    assert callback.stats.steps["FULL"] >= 10, callback.summary()


class Peeks(Callback):
    """Reads metrics in mid-epoch, as users do, and stores the values without a copy."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if batch_idx == 5:
            self.seen += [
                pl_module.accuracy.compute(),
                pl_module.f1.compute(),
                pl_module.several.compute(),
            ]
            self.seen += [pl_module.accuracy.tp, pl_module.state_dict()["accuracy.tp"]]
            copied, pickled = (
                copy.deepcopy(pl_module.accuracy),
                pickle.loads(pickle.dumps(pl_module.accuracy)),
            )
            self.seen += [copied.compute(), pickled.compute(), pickled.update_count]
            one, other = pl_module.several.values(copy_state=False)
            self.seen.append(one.tp is other.tp)
        if batch_idx == 7:
            pl_module.f1.reset()
        if batch_idx == 8:
            ones = torch.ones(10, dtype=torch.long, device=pl_module.device)
            pl_module.accuracy.load_state_dict(dict.fromkeys(("tp", "fp", "tn", "fn"), ones))


def test_metrics_are_read_reset_and_loaded_in_mid_epoch(harness):
    def job(trainer, module):
        result = trainer.validate(module, images(48), verbose=False)
        return [
            result,
            next(callback for callback in trainer.callbacks if isinstance(callback, Peeks)).seen,
        ]

    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(Logs(), job, callback, others=lambda: [Peeks()])
    assert callback.stats.steps["FULL"] >= 10, callback.summary()


def test_a_value_that_somebody_keeps_is_not_overwritten(harness):
    """The check can fail, because states change from batch to batch."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Keeps(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_: Any) -> None:
            kept.append((pl_module.accuracy.tp, pl_module.accuracy.tp.clone()))

    harness.trainer(harness.callback(mode="FULL", warmup_steps=1), Keeps()).validate(
        Logs(), images(40), verbose=False
    )
    assert all(torch.equal(value, then) for value, then in kept)
    assert not torch.equal(kept[3][0], kept[9][0])


class Refuses(LightningModule):
    """A metric that checks its targets."""

    def __init__(self, metric: Any) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)
        self.metric = metric

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        score, label = batch
        self.metric.update(score, label)
        self.log("metric", self.metric)


REJECTED = {
    "binary": (BinaryAccuracy, torch.rand(32), 2, [0, 1, 3, 1]),
    "multiclass labels": (
        lambda: MulticlassF1Score(3),
        torch.randint(0, 3, (32,)),
        3,
        [0, 1, 2, 5],
    ),
    "multiclass scores": (lambda: MulticlassF1Score(3), torch.rand(32, 3), 3, [0, 1, -1, 1]),
    "curve": (lambda: MulticlassAUROC(2, thresholds=5), torch.rand(32, 2), 2, [0, 1, 2, 1]),
}


@pytest.mark.parametrize("name", list(REJECTED))
def test_a_rejected_value_raises_what_eager_raises(harness, name):
    torch.manual_seed(3)
    make, scores, classes, bad = REJECTED[name]
    labels = torch.randint(0, classes, (32,))
    labels[20:24] = torch.tensor(bad)
    errors = []
    for extra in ([harness.callback(mode="FULL", warmup_steps=1, verify_replays=0)], []):
        with pytest.raises(RuntimeError) as caught:
            harness.trainer(*extra, deterministic=False).validate(
                Refuses(make()), loader(scores, labels), verbose=False
            )
        errors.append(str(caught.value))
        assert not extra or extra[0].stats.replays > 4
    assert errors[0] == errors[1]


class OnlyUpdates(Refuses):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metric.update(*batch)


class Stops(Callback):
    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if batch_idx == 6:
            raise ArithmeticError("mine")


def test_a_rejected_value_does_not_hide_another_exception(harness):
    make, scores, classes, bad = REJECTED["binary"]
    labels = torch.randint(0, classes, (32,))
    labels[20:24] = torch.tensor(bad)
    callback = harness.callback(mode="FULL", warmup_steps=1, verify_replays=0)
    with pytest.raises(ArithmeticError, match="mine"):
        harness.trainer(callback, Stops()).validate(
            OnlyUpdates(make()), loader(scores, labels), verbose=False
        )
    assert callback.stats.replays > 4


def test_clean_values_are_not_rejected(harness):
    make, scores, classes, _ = REJECTED["binary"]
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(
        Refuses(make()), validate(loader(scores, torch.randint(0, classes, (32,)))), callback
    )
    assert callback.stats.steps["FULL"] > 4


class LogsAFloat(Logs):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen = getattr(self, "seen", 0) + 1
        self.log("seen", float(self.seen))
        self.log("loss", self.net(batch[0]).mean())


class MetricOnTheHost(Logs):
    def on_validation_start(self) -> None:
        self.f1.cpu()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.f1.update(self.net(batch[0]).cpu(), batch[1].cpu())


def test_a_float_that_changes_goes_lower(harness):
    callback = harness.callback(mode="FULL_AND_PIECEWISE", warmup_steps=1)
    harness.compare(LogsAFloat(), validate(images(40)), callback)
    assert callback.stats.steps["FULL"] == 0
    assert callback.stats.steps["PIECEWISE"] > 0


def test_a_metric_on_another_device_is_updated_late(harness):
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(MetricOnTheHost(), validate(images(40)), callback)
    assert callback.stats.steps["FULL"] > 4


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_results_that_are_kept_in_another_way(harness, monkeypatch, verify_replays):
    """The structure of the private collection is checked first: once known, once unknown."""
    known = []

    class Asks(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_: Any) -> None:
            known.append(LoggedResults(pl_module).collection is not None)

    harness.trainer(Asks()).validate(Logs(), images(4), verbose=False)
    assert known == [True], "this Lightning keeps logged values in another way"

    def job(trainer, module):
        result = [trainer.validate(module, images(42), verbose=False) for _ in range(2)]
        return [result, shown(trainer)]

    callback = harness.callback(mode="FULL", warmup_steps=1, verify_replays=verify_replays)
    monkeypatch.setattr(LoggedResults, "is_known", lambda self, results: False)
    harness.compare(Logs(), job, callback, others=lambda: [Reads()], logger=Listens())
    assert callback.stats.steps["FULL"] > 10, callback.summary()


class LogsValue(Logs):
    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.f1(self.net(batch[0]), batch[1])


def test_the_replacements_can_be_switched_off(harness):
    """Metrics then wait for the device, and are updated after each replay if that is possible."""
    for model, is_full in ((Logs(), True), (LogsValue(), False)):
        callback = harness.callback(warmup_steps=1, sync_free_metrics=False)
        # without deterministic algorithms, which count without waiting
        harness.compare(model, validate(images(40)), callback, deterministic=False)
        assert (callback.stats.steps["FULL"] > 0) is is_full
        assert (callback.stats.steps["PIECEWISE"] == 0) is is_full


def test_a_count_of_updates_that_a_step_reads_is_not_frozen(harness):
    class Counts(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.f1.update(self.net(batch[0]), batch[1])
            return batch[0] * self.f1.update_count

    callback = harness.callback(mode="FULL", warmup_steps=1, verify_replays=0)
    harness.compare(Counts(), validate(images(40)), callback)
    assert any("update_count is read" in reason for reason in callback.stats.eager_reasons)


class First(Metric):
    """Keeps its first value only, as it knows from its own counter."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x: torch.Tensor) -> None:
        if self._update_count == 1:
            self.total = x.sum()

    def compute(self) -> torch.Tensor:
        return self.total


class WithMetric(Logs):
    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        output = self.net(batch[0])
        self.metric.update(output)
        return output

    def on_validation_epoch_end(self) -> None:
        self.log("total", self.metric.compute())
        self.metric.reset()


def fit_three_epochs(trainer: Any, module: Any) -> None:
    trainer.fit(module, images(8), images(40))


class FirstOfAnEpoch(WithMetric):
    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        is_first = not self.metric.update_called
        return super().validation_step(batch, batch_idx) * (5 if is_first else 1)


@pytest.mark.parametrize("name", ["_update_count", "update_called"])
def test_whether_a_metric_was_updated_is_not_frozen(harness, name):
    kinds = {"_update_count": WithMetric, "update_called": FirstOfAnEpoch}
    callback = harness.callback(mode="FULL", warmup_steps=1, verify_replays=0)
    harness.compare(kinds[name](First()), fit_three_epochs, callback, max_epochs=3)
    if name == "_update_count":  # the metric alone reads it, so it is updated after each replay
        assert callback.stats.steps["FULL"] > 10, callback.summary()
    else:
        assert any("is read" in reason for reason in callback.stats.eager_reasons)


class ResetsToANumber(WithMetric):
    """Resets a state to a number, which torchmetrics would add to as well."""

    def on_validation_epoch_start(self) -> None:
        self.metric.sum_value = 0.5

    def on_validation_epoch_end(self) -> None:
        self.log("total", self.metric.compute())


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_a_state_that_is_reset_to_a_number(harness, verify_replays):
    module = ResetsToANumber(SumMetric(nan_strategy="disable"))
    callback = harness.callback(mode="FULL", warmup_steps=1, verify_replays=verify_replays)
    harness.compare(module, fit_three_epochs, callback, max_epochs=3)
    assert callback.stats.captures > 0


class ResetsAndComputes(Logs):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.net(batch[0])
        if self.how == "resets":
            self.f1.reset()
        if self.how != "computes only":
            self.f1.update(logits, batch[1])
        return self.f1.compute()


class Disturbs(Callback):
    """Uses a metric in ways that change its count or its cached result."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self.seen += [outputs, pl_module.f1.update_count]
        if batch_idx == 6:
            pl_module.f1.reset()
        if batch_idx == 7:
            pl_module.f1.update(torch.ones(4, 10, device=pl_module.device), batch[1])


@pytest.mark.parametrize(
    ("how", "runs_full"), [("", True), ("resets", True), ("computes only", False)]
)
def test_metrics_that_are_reset_and_computed_in_the_step(harness, how, runs_full):
    def job(trainer, module):
        module.f1.update(torch.ones(4, 10), torch.arange(4))
        trainer.validate(module, images(40), verbose=False)
        return next(
            callback for callback in trainer.callbacks if isinstance(callback, Disturbs)
        ).seen

    callback = harness.callback(mode="FULL", warmup_steps=1, verify_replays=0)
    harness.compare(ResetsAndComputes(how), job, callback, others=lambda: [Disturbs()])
    assert (callback.stats.steps["FULL"] > 0) is runs_full, callback.summary()


class LogsAMetric(LightningModule):
    """The first ``self.log`` of a stage moves the metric, which sets its dtype to the default."""

    def __init__(self, reads_dtype: bool) -> None:
        super().__init__()
        self.net = nn.Linear(8, 4)
        self.accuracy = MulticlassAccuracy(4)
        self.mean = MeanMetric(nan_strategy="error") if reads_dtype else None

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.net(batch[0].to(self.net.weight.dtype))
        self.accuracy.update(logits, batch[1])
        loss = cross_entropy(logits, batch[1])
        if self.mean is not None:  # casts to its dtype, which differs at the first step
            self.mean.update(logits.float().exp().mean())
            self.log("mean", self.mean)
        self.log("accuracy", self.accuracy)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("reads_dtype", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "64-true"])
def test_true_precisions_run_full(harness, precision, reads_dtype):
    generator = torch.Generator().manual_seed(4)
    data = loader(
        torch.randn(48, 8, generator=generator), torch.randint(0, 4, (48,), generator=generator)
    )
    job = lambda trainer, module: [trainer.validate(module, data, verbose=False) for _ in range(2)]
    callback = harness.callback(mode="FULL")
    harness.compare(LogsAMetric(reads_dtype), job, callback, precision=precision)
    assert callback.stats.steps["FULL"] >= 18, callback.summary()


class ReturnsWhatItLogs(Logs):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def log(self, name: str, value: Any, **settings: Any) -> Any:
        super().log(name, value, **settings)
        return value * 2

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        mean = self.net(batch[0]).mean()
        if self.how == "log":
            return self.log("mean", mean)
        if self.how == "log_dict":
            return self.log_dict({"mean": mean, "twice": mean * 2})
        return {"loss": LightningModule.log(self, "mean", mean), "twice": self.log("twice", mean)}


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("how", ["log", "log_dict", "both"])
def test_a_step_that_returns_what_log_returns(harness, monkeypatch, how, is_known):
    if not is_known:
        monkeypatch.setattr(LoggedResults, "is_known", lambda self, results: False)
    job = lambda trainer, module: [trainer.validate(module, images(40), verbose=False)]
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(ReturnsWhatItLogs(how), job, callback)
    assert callback.stats.steps["FULL"] >= 8, callback.summary()


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", ["log", "log_dict", "print", "all_gather"])
def test_methods_that_a_step_returns(harness, name, verify_replays):
    """Issue 11: forks of latent-diffusion ``return self.log_dict``."""

    class Returns(LightningModule):
        def validation_step(self, batch, batch_idx):
            self.log("mean", batch[0].mean())
            return getattr(self, name)

    model, kept = Returns(), KeepOutputs()
    callback = harness.callback(verify_replays=verify_replays)
    harness.trainer(callback, kept).validate(model, features(40), verbose=False)
    assert len(kept.kept) == 10
    assert all(method == getattr(model, name) for method in kept.kept)
