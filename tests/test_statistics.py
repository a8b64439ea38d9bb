"""Statistics for loggers, and the figure of the time of each batch."""

from __future__ import annotations

import csv
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from cg_lightning import BatchDescriptor, CUDAGraphCallback
from cg_lightning.core.reasons import WARM_UP, Reason, Status
from cg_lightning.report import counts
from cg_lightning.report.stats import CUDAGraphStats
from cg_lightning.report.timeline import MOST_BATCHES, Ran, Timeline
from tests.harness import features, images, predict
from tests.models import Body, ConvNetClassifier, Predictor

DTYPES = (torch.float32, torch.int64)


class Syncs(Predictor):
    """Waits for the device in every step."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return super().predict_step(batch, batch_idx) * batch[0].sum().item()


def rows_of(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


# counts


def test_steps_that_are_counted_later_have_their_place(monkeypatch):
    """Shapes are printed when a user asks for them, with the same result."""
    monkeypatch.setattr(counts, "MOST_UNSORTED", 50)
    at_once, later = CUDAGraphStats(), CUDAGraphStats()
    earlier = later.copy()
    reasons = [WARM_UP, Reason(Status.NO_KEY, "no key"), Reason(Status.UNPROFITABLE, "again")]
    for step in range(3 * counts.MOST_SHAPES):
        key = BatchDescriptor.from_batch(torch.zeros(step % 100 + 1, dtype=DTYPES[step % 2]))
        reason, seconds = reasons[step % 7 % 3], 1e-6 * step
        at_once.host_time("validate", "NONE", key.shapes()).add(seconds)
        at_once.ran("validate", "NONE", key.shapes(), reason)
        if step % 11:
            later.ran_once("validate", key.fields, seconds, reason)
        else:
            later.host_time("validate", "NONE", key.shapes()).add(seconds)
            later.ran("validate", "NONE", key.shapes(), reason)
    ways = [later.since(earlier), pickle.loads(pickle.dumps(later)), later]
    for found in ways:
        assert found.to_dict() == at_once.to_dict()
        assert found.host_times("validate") == at_once.host_times("validate")
        assert found.eager == 3 * counts.MOST_SHAPES
    assert any(record.is_of_other_shapes for record in later.reasons)


# loggers


def test_a_csv_logger_gets_the_statistics(harness, tmp_path):
    logger = CSVLogger(tmp_path)
    callback = harness.callback(log_stats=True, warmup_steps=4)
    harness.trainer(callback, logger=logger).predict(Predictor(Body()), features(40))
    (row,) = rows_of(tmp_path)
    assert float(row["cuda_graph/predict/replays"]) == callback.stats.replays == 6
    assert float(row["cuda_graph/predict/eager/warm_up"]) == callback.stats.eager == 4
    for unit in ("us_per_replay", "us_per_eager_step"):
        assert 1 < float(row[f"cuda_graph/predict/{unit}"]) < 1e6
    mib = callback.stats.graph_bytes / 2**20
    assert float(row["cuda_graph/predict/graph_mib"]) == pytest.approx(mib)


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_eager_steps_are_logged_by_cause(harness, tmp_path, mode):
    callback = harness.callback(mode=mode, log_stats=True)
    trainer = harness.trainer(callback, logger=CSVLogger(tmp_path))
    trainer.predict(Syncs(Body()), features(40))
    (row,) = rows_of(tmp_path)
    replays, us = float(row["cuda_graph/predict/replays"]), "cuda_graph/predict/us_per_replay"
    if mode == "PIECEWISE":
        assert replays == callback.stats.replays > 0
        assert float(row[us]) > 1
    else:
        assert replays == 0
        assert float(row["cuda_graph/predict/eager/host_sync"]) == 7
        assert us not in row


def test_each_validation_of_a_fit_is_logged_at_its_step(harness, tmp_path):
    loggers = [CSVLogger(tmp_path / "one"), CSVLogger(tmp_path / "two")]
    callback = harness.callback(log_stats=True)
    trainer = harness.trainer(callback, logger=loggers)
    trainer.fit(ConvNetClassifier(4), images(), images())
    for folder in ("one", "two"):
        rows = [row for row in rows_of(tmp_path / folder) if row.get("cuda_graph/validate/replays")]
        assert [int(row["step"]) for row in rows] == [5, 10]
        replays = [float(row["cuda_graph/validate/replays"]) for row in rows]
        assert replays[0] < replays[1] == callback.stats.replays


def test_a_second_run_logs_its_own_numbers(harness, tmp_path):
    callback = harness.callback(log_stats=True)
    for name in ("first", "second"):
        trainer = harness.trainer(callback, logger=CSVLogger(tmp_path / name))
        trainer.predict(Predictor(Body()), features(40))
    (first,), (second,) = rows_of(tmp_path / "first"), rows_of(tmp_path / "second")
    assert first["cuda_graph/predict/replays"] == second["cuda_graph/predict/replays"] == "7.0"


def test_tensorboard_gets_the_statistics(harness, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    callback = harness.callback(log_stats=True)
    harness.trainer(callback, logger=logger).validate(
        ConvNetClassifier(4), images(40), verbose=False
    )
    read = events.EventAccumulator(logger.log_dir)
    read.Reload()
    tags = read.Tags()["scalars"]
    assert {tag for tag in tags if tag.startswith("cuda_graph/")} >= {
        "cuda_graph/validate/replays",
        "cuda_graph/validate/eager/warm_up",
        "cuda_graph/validate/us_per_replay",
        "cuda_graph/validate/graph_mib",
    }
    (event,) = read.Scalars("cuda_graph/validate/replays")
    assert event.value == callback.stats.replays > 0


def test_by_default_nothing_of_ours_is_logged(harness, tmp_path):
    trainer = harness.trainer(harness.callback(), logger=CSVLogger(tmp_path))
    trainer.validate(ConvNetClassifier(4), images(40), verbose=False)
    assert not any("cuda_graph" in key for row in rows_of(tmp_path) for key in row)


def test_a_callback_that_is_inert_logs_why(harness, tmp_path):
    callback = harness.callback(mode="NONE", log_stats=True)
    harness.trainer(callback, logger=CSVLogger(tmp_path)).predict(Predictor(Body()), features(8))
    (row,) = rows_of(tmp_path)
    assert float(row["cuda_graph/predict/eager/callback_inert"]) == 2


class NoMetrics(CSVLogger):
    log_metrics = None


@pytest.mark.parametrize(
    ("logger", "parts"),
    [
        (lambda folder: False, ["the Trainer has no logger", "log_stats=False"]),
        (NoMetrics, ["NoMetrics has no method log_metrics", "loggers.Logger", "log_stats=False"]),
    ],
    ids=["none", "no log_metrics"],
)
def test_a_logger_that_takes_no_numbers_is_named_once(harness, tmp_path, logger, parts):
    callback = harness.callback(log_stats=True)
    trainer = harness.trainer(callback, logger=logger(tmp_path))
    with pytest.warns(UserWarning, match="log_stats=True") as caught:
        trainer.predict(Predictor(Body()), features(8))
    (warning,) = [str(each.message) for each in caught if "log_stats" in str(each.message)]
    for part in parts:
        assert part in warning
    trainer.predict(Predictor(Body()), features(8))  # warnings are errors here


def test_log_stats_is_true_or_false():
    with pytest.raises(ValueError, match=r"log_stats=\['replays'\] must be True or False"):
        CUDAGraphCallback(log_stats=["replays"])


def test_what_the_page_says_runs(harness, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "statistics.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    known: dict[str, Any] = {
        "CUDAGraphCallback": harness.callback,
        "Trainer": lambda callbacks, logger: harness.trainer(*callbacks, logger=logger),
        "CSVLogger": CSVLogger,
        "TensorBoardLogger": TensorBoardLogger,
    }
    exec(first, known)
    known["trainer"].predict(Predictor(Body()), features(40))
    exec(second, known)
    assert Path("batches.png").stat().st_size > 0
    (row,) = rows_of(tmp_path)
    logged = {re.sub("predict", "<stage>", name) for name in row if name.startswith("cuda_graph")}
    in_page = set(re.findall(r"^\| `(cuda_graph/<stage>/[^`]*)`", page, re.MULTILINE))
    assert {name.replace("/warm_up", "/<cause>") for name in logged} == in_page


# the figure


def legend(figure: Any, number: int = 0) -> str:
    texts = figure.axes[number].get_legend().get_texts()
    return " ".join(" ".join(text.get_text() for text in texts).split())


def points(figure: Any, number: int = 0) -> int:
    return sum(len(each.get_offsets()) for each in figure.axes[number].collections)


def test_the_figure_has_every_batch(harness, tmp_path):
    pytest.importorskip("matplotlib")
    callback = harness.callback()
    harness.compare(Predictor(Body()), predict(features(42)), callback)
    harness.trainer(callback).validate(ConvNetClassifier(4), images(40), verbose=False)
    figure = callback.stats.plot()
    assert [axes.get_title().split(":")[0] for axes in figure.axes] == ["predict", "validate"]
    assert (points(figure, 0), points(figure, 1)) == (11, 10)
    shown = legend(figure)
    for part in ("warm-up: 4,", "capture: 1,", "replay: 5,", "compared with eager: 1,", "median"):
        assert part in shown
    figure.savefig(tmp_path / "batches.png")
    labels = [each.get_text() for each in figure.axes[0].get_yticklabels()]
    assert labels
    assert all(re.fullmatch(r"[\d,]+", label) for label in labels)  # 1,000, and no power of ten
    assert len(callback.stats.plot("validate").axes) == 1


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_the_figure_says_why_batches_were_eager(harness, mode):
    pytest.importorskip("matplotlib")
    callback = harness.callback(mode=mode)
    harness.trainer(callback).predict(Syncs(Body()), features(40))
    shown = legend(callback.stats.plot("predict"))
    if mode == "FULL":
        assert "eager, host sync: aten::" in shown
        assert ": 7, median" in shown
    else:
        # a capture, a comparison, and replays
        assert "pieces, captured or compared with eager: 2, median" in shown
        assert "pieces from graphs: 5, median" in shown


def test_a_watched_step_that_is_no_warm_up_is_drawn_as_eager():
    pytest.importorskip("matplotlib")
    stats = CUDAGraphStats()
    for reason in (WARM_UP, Reason(Status.CHANGED, "self.scale: now 2.0, before 1.0"), WARM_UP):
        stats.timeline.add("predict", Ran.WARM_UP, 0.0, reason)
    shown = legend(stats.plot())
    assert "warm-up: 2," in shown
    assert "eager, self.scale: now 2.0, before 1.0: 1, median" in shown


def test_times_of_batches_without_a_key_and_without_graphs(harness):
    callback = harness.callback(mode="NONE")
    harness.trainer(callback).predict(Predictor(Body()), features(8))
    (first, _) = callback.stats.timeline.batches
    assert (first.stage, first.how) == ("predict", Ran.EAGER)
    assert "mode=NONE" in str(first.reason)
    assert first.seconds > 0


def test_what_cannot_be_plotted(harness):
    pytest.importorskip("matplotlib")
    callback = harness.callback()
    with pytest.raises(ValueError, match="no batch has run yet"):
        callback.stats.plot()
    with pytest.raises(ValueError, match="stage='validate' has not run any batch; no stage has"):
        callback.stats.plot("validate")
    harness.trainer(callback).predict(Predictor(Body()), features(8))
    with pytest.raises(ValueError, match="stage='val' has not run any batch; choose from predict"):
        callback.stats.plot("val")


def test_the_steps_of_an_unknown_stage():
    with pytest.raises(ValueError, match="stage='val' is unknown; choose from validate, test"):
        CUDAGraphStats().steps_of("val")


def test_without_matplotlib_there_is_one_sentence(harness, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "cg_lightning.report.plot", raising=False)
    callback = harness.callback()
    harness.trainer(callback).predict(Predictor(Body()), features(8))
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"cg-lightning\[plot\]\""):
        callback.stats.plot()


def test_a_notebook_shows_the_figure(harness):
    pytest.importorskip("matplotlib")
    callback = harness.callback()
    harness.trainer(callback).predict(Predictor(Body()), features(20))
    assert callback.stats.plot()._repr_png_().startswith(b"\x89PNG")


def test_old_batches_are_forgotten():
    timeline = Timeline()
    for _ in range(MOST_BATCHES + 5):
        timeline.add("predict", Ran.EAGER, 0.0)
    assert len(pickle.loads(pickle.dumps(timeline)).batches) == MOST_BATCHES
