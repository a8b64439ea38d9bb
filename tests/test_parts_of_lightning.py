"""The callback with every part of Lightning: what users see is what they see without it."""

from __future__ import annotations

import copy
import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    DeviceStatsMonitor,
    EarlyStopping,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.optim.swa_utils import get_ema_avg_fn

from cg_lightning import CUDAGraphCallback
from tests.harness import (
    Harness,
    Job,
    assert_same,
    features,
    images,
    newer_callback,
    predict,
    validate,
)
from tests.models import Body, ConvNetClassifier, Predictor

# two processes of ddp: test_two_processes_of_ddp in test_hazards.py


class Twice:
    """Runs a job with the callback and without it, on copies of one model."""

    def __init__(self, harness: Harness, model: LightningModule, folder: Path) -> None:
        self._harness = harness
        self._model = model
        self._folder = folder
        self.callback = harness.callback()

    def run(self, job: Any, *parts: Any, **settings: Any) -> list[Any]:
        """Return what ``job(trainer, module, *parts)`` gives: with the callback, and without.

        Each of ``parts`` makes a callback.
        """
        seen = []
        for name, extra in (("with", [self.callback]), ("without", [])):
            torch.manual_seed(1)
            made = [part() for part in parts]
            given = dict(settings)
            if "logger" in given:
                given["logger"] = given["logger"](self._folder / name)
            trainer = self._harness.trainer(
                *extra, *made, **{"default_root_dir": self._folder / name, **given}
            )
            seen.append(job(trainer, copy.deepcopy(self._model), *made))
        return seen

    def assert_same(self, job: Any, *parts: Any, **settings: Any) -> Any:
        """Assert that both runs give the same, and that graphs were used; return it."""
        one, other = self.run(job, *parts, **settings)
        assert_same(one, other)
        assert self.callback.stats.replays > 0, self.callback.summary()
        return one


@pytest.fixture
def twice(harness, tmp_path) -> Twice:
    return Twice(harness, ConvNetClassifier(4), tmp_path)


def fit(trainer: Trainer, module: LightningModule) -> Any:
    trainer.fit(module, images(), images(24))
    return dict(trainer.callback_metrics), dict(module.state_dict())


@pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary])
def test_the_model_summary(twice, capsys, caplog, summary):
    def job(trainer: Trainer, module: LightningModule, _: Callback) -> str:
        trainer.validate(module, images(), verbose=False)
        trainer.fit(module, images(), images(24))
        written = capsys.readouterr().out + "\n".join(record.message for record in caplog.records)
        caplog.clear()
        return "\n".join(line for line in written.splitlines() if "net" in line or "params" in line)

    with caplog.at_level("INFO"):
        shown = twice.assert_same(job, lambda: summary(max_depth=2))
    assert "net" in shown
    assert "Trainable params" in shown


def test_the_model_checkpoint(twice):
    def job(trainer: Trainer, module: LightningModule, checkpoint: ModelCheckpoint) -> Any:
        trainer.fit(module, images(), images(24))
        state = torch.load(checkpoint.best_model_path, weights_only=False)
        name = Path(checkpoint.best_model_path).name
        return name, checkpoint.best_model_score, state["state_dict"], sorted(state)

    name, score, *_ = twice.assert_same(
        job,
        lambda: ModelCheckpoint(monitor="val_loss", filename="{epoch}-{val_loss:.4f}"),
        enable_checkpointing=True,
        max_epochs=3,
    )
    assert "val_loss=" in name
    assert score > 0


def test_early_stopping(twice):
    def job(trainer: Trainer, module: LightningModule, stopping: EarlyStopping) -> Any:
        trainer.fit(module, images(), images(24))
        return trainer.current_epoch, stopping.stopped_epoch, stopping.best_score

    epochs, *_ = twice.assert_same(
        job, lambda: EarlyStopping("val_loss", min_delta=10.0, patience=2), max_epochs=9
    )
    assert 0 < epochs < 9


def test_weight_averaging(twice):
    def job(trainer: Trainer, module: LightningModule, _: Callback) -> Any:
        return fit(trainer, module)

    twice.assert_same(
        job, lambda: newer_callback("WeightAveraging", avg_fn=get_ema_avg_fn(0.5)), max_epochs=3
    )


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_a_progress_bar(twice, capsys, bar):
    class Shows(bar):
        """Keeps the values that it shows."""

        def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            super().on_validation_batch_end(trainer, *args, **kwargs)
            shown.append(dict(trainer.progress_bar_metrics))

    shown: list[dict[str, Any]] = []

    def job(trainer: Trainer, module: LightningModule, made: ProgressBar) -> Any:
        trainer.fit(module, images(), images(24))
        trainer.validate(module, images(24), verbose=True)
        out, err = capsys.readouterr()
        seen, shown[:] = list(shown), []
        table = [line for line in out.splitlines() if re.search(r"val_(loss|acc)", line)]
        return seen, table, "Validation" in out + err

    _, table, _ = twice.assert_same(job, Shows, enable_progress_bar=True)
    assert table


@pytest.mark.parametrize("interval", ["batch", "epoch"])
def test_a_prediction_writer(twice, tmp_path, interval):
    class Writes(BasePredictionWriter):
        def __init__(self) -> None:
            super().__init__(interval)
            self.written: list[Any] = []

        def write_on_batch_end(
            self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, loader
        ) -> None:
            self.written.append((prediction, batch_indices, batch, batch_idx))

        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices) -> None:
            self.written.append((predictions, batch_indices))

    def job(trainer: Trainer, module: LightningModule, writer: Writes) -> Any:
        trainer.predict(module, features(), return_predictions=False)
        return writer.written

    twice._model = Predictor(Body())
    written = twice.assert_same(job, Writes)
    assert len(written) == (5 if interval == "batch" else 1)


def test_the_device_stats_monitor(twice, tmp_path):
    pytest.importorskip("psutil", reason="DeviceStatsMonitor needs psutil on the CPU")

    def job(trainer: Trainer, module: LightningModule, _: Callback) -> Any:
        trainer.fit(module, images(), images(24))
        (file,) = Path(trainer.logger.log_dir).glob("metrics.csv")
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
        values = [{key: row[key] for key in row if key in ("val_loss", "step")} for row in rows]
        return sorted({key for row in rows for key in row}), values

    keys, _ = twice.assert_same(
        job, lambda: DeviceStatsMonitor(cpu_stats=True), logger=CSVLogger, log_every_n_steps=1
    )
    assert any("DeviceStatsMonitor" in key for key in keys)


@pytest.mark.filterwarnings("ignore:.*barebones=True.*:UserWarning")
def test_barebones(harness, twice, tmp_path):
    """Such a Trainer logs nothing, and allows no bar, no checkpoint and no summary."""
    callback = harness.callback()
    accelerator = "gpu" if harness.backend == "cuda" else "cpu"
    seen = []
    model = Predictor(Body())
    for extra in ([callback], []):
        trainer = Trainer(barebones=True, accelerator=accelerator, devices=1, callbacks=extra)
        seen.append(trainer.predict(copy.deepcopy(model), features(40)))
        trainer.validate(copy.deepcopy(twice._model), images(40), verbose=False)
    assert_same(*seen)
    assert callback.stats.steps["FULL"] >= 7, callback.summary()


@pytest.mark.parametrize("batches", [True, 6])
def test_fast_dev_run(twice, batches):
    one, other = twice.run(fit, fast_dev_run=batches)
    assert_same(one, other)
    assert (twice.callback.stats.replays > 0) is (batches == 6)


def test_overfit_batches(twice):
    twice.assert_same(fit, overfit_batches=4, max_epochs=3)


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_without_inference_mode(twice, stage):
    jobs: dict[str, Job] = {"validate": validate(images(40)), "predict": predict(features(40))}
    if stage == "predict":
        twice._model = Predictor(Body())
    twice.assert_same(jobs[stage], inference_mode=False)


class HasRate(ConvNetClassifier):
    """Its learning rate is an attribute, for the Tuner."""

    def __init__(self) -> None:
        super().__init__(4)
        self.lr = 0.01

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_the_tuner(twice):
    def job(trainer: Trainer, module: HasRate) -> Any:
        found = Tuner(trainer).lr_find(module, images(80), images(24), num_training=20)
        trainer.validate(module, images(24), verbose=False)
        return found.results, module.lr, dict(trainer.callback_metrics)

    twice._model = HasRate()
    twice.assert_same(job, max_epochs=1)


def test_all_of_them_at_once(harness, twice):
    parts = [
        lambda: ModelSummary(),
        lambda: TQDMProgressBar(),
        lambda: EarlyStopping("val_loss", patience=5),
        lambda: ModelCheckpoint(monitor="val_loss"),
        lambda: newer_callback("WeightAveraging", avg_fn=get_ema_avg_fn(0.5)),
    ]

    def job(trainer: Trainer, module: LightningModule, *_: Callback) -> Any:
        result = fit(trainer, module)
        return result, trainer.validate(module, images(24), verbose=False)

    twice.callback = CUDAGraphCallback(
        backend=harness.backend, log_stats=True, capture_ahead=True, report=True
    )
    settings = {"enable_progress_bar": True, "enable_checkpointing": True, "max_epochs": 3}
    twice.assert_same(job, *parts, logger=CSVLogger, **settings)
