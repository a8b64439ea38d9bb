"""Why a step ran in a lower mode than asked: told in every mode, for each stage and shape, in the default mode too."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from cg_lightning.core.causes import Cause
from cg_lightning.core.reasons import Reason, Status
from cg_lightning.report.stats import MOST_REASONS, MOST_SHAPES, OTHER_SHAPES, CUDAGraphStats
from cg_lightning.report.summary import render_summary
from cg_lightning.runtime.dispatcher import NEW_KEY
from tests.harness import features, predict, validate
from tests.models import Body, Predictor


class LogsAnItem(Predictor):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss.item())


LINE = LogsAnItem.validation_step.__code__.co_firstlineno + 2


def test_a_step_in_pieces_says_why_it_is_not_one_graph(harness):
    callback = harness.callback()
    harness.compare(LogsAnItem(Body()), validate(features(40)), callback)
    assert callback.stats.steps == {"NONE": 3, "PIECEWISE": 7, "FULL": 0}
    assert callback.stats.eager_reasons == {"warm-up": 3}
    (record,) = [r for r in callback.stats.to_dict()["reasons"] if r["mode"] == "PIECEWISE"]
    assert record == {
        "stage": "validate",
        "mode": "PIECEWISE",
        "shapes": "4x8",
        "cause": "host sync",
        "text": record["text"],
        "location": f"{__file__}:{LINE}",
        "remedy": Cause.HOST_SYNC.remedy,
        "steps": 7,
    }
    assert record["text"].startswith("host sync: aten::")
    json.dumps(callback.stats.to_dict())
    summary = callback.summary()
    assert f"7 PIECEWISE (4x8): {record['text']}" in summary
    assert f"remedy: {Cause.HOST_SYNC.remedy}" in summary


def test_a_submodule_that_stays_eager_is_named(harness):
    class Waits(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return self.linear(x) * x.sum().item()

    callback = harness.callback(warmup_steps=1)
    harness.compare(Waits(Inner()), predict(features()), callback)
    (record,) = [record for record in callback.stats.reasons if record.mode == "PIECEWISE"]
    assert record.reason.kind is Cause.HOST_SYNC
    assert " in net (" in record.reason.text
    assert record.reason.location.startswith(f"{__file__}:")


def test_library_code_shows_the_librarys_line_and_the_users(harness):
    class Perplexed(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.perplexity = Perplexity()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.perplexity.update(self.net(batch[0])[None], batch[0].argmax(1)[None])

    callback = harness.callback(warmup_steps=1)
    harness.compare(Perplexed(), validate(features()), callback)
    (record,) = [record for record in callback.stats.reasons if record.mode == "PIECEWISE"]
    assert f"({__file__}:" in record.reason.text
    assert ", in torchmetrics/functional/text/perplexity.py:" in record.reason.text


class Scaled(Predictor):
    scale = 1.0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * self.scale


class Toggles(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        pl_module.scale = float(1 + batch_idx // 2 % 2)


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_an_attribute_that_toggles_has_two_graphs(harness, mode):
    callback = harness.callback(mode=mode)
    harness.compare(Scaled(Body()), predict(features(160)), callback, others=lambda: [Toggles()])
    assert callback.stats.captures == 2
    assert callback.stats.steps["FULL"] == 37, callback.summary()
    changed = [record.reason for record in callback.stats.reasons]
    assert Reason(Status.CHANGED, "changed: self.scale: now 2.0, before 1.0") in changed


class MovesAWeight(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx == 6:
            weight = pl_module.net[0].weight
            weight.data = weight.data * 2


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_a_graph_that_is_captured_again_says_why(harness, mode):
    callback = harness.callback(mode=mode)
    others = lambda: [MovesAWeight()]
    harness.compare(Predictor(Body()), predict(features(40)), callback, others=others)
    (entry,) = callback.stats.entries
    assert entry.captures == 2
    weight = "net.0.weight" if mode == "FULL" else "0.weight"
    assert entry.why_again == f"parameters or buffers lie at new addresses: {weight}"
    assert f"captured again: {entry.why_again}" in callback.summary()


def test_a_submodule_whose_attribute_toggles_has_two_graphs(harness):
    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return self.linear(x) * self.scale

    class TogglesInner(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
            pl_module.net.scale = float(1 + batch_idx // 2 % 2)

    callback = harness.callback(mode="PIECEWISE")
    harness.compare(
        Predictor(Inner()), predict(features(160)), callback, others=lambda: [TogglesInner()]
    )
    assert callback.stats.captures == 2
    assert callback.stats.steps["PIECEWISE"] >= 34, callback.summary()
    texts = [str(record.reason) for record in callback.stats.reasons]
    assert any("self.net.scale: now 2.0, before 1.0" in text for text in texts), texts


def ragged(lengths: range) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        [(torch.randn(length, 8, generator=generator),) for length in lengths], batch_size=None
    )


def test_batches_that_never_repeat_a_shape_are_left_alone(harness, monkeypatch):
    """Hazard 45."""
    from cg_lightning.diagnosis.watcher import StepWatcher

    watched = []
    original = StepWatcher.watch
    monkeypatch.setattr(StepWatcher, "watch", lambda *args: watched.append(1) or original(*args))
    callback = harness.callback()
    harness.compare(Predictor(Body()), predict(ragged(range(1, 121))), callback)
    assert len(watched) <= 4
    assert callback.stats.eager_reasons == {"warm-up": 4, str(NEW_KEY): 116}
    assert callback.stats.captures == 0
    assert len(callback.summary().splitlines()) <= 22


def test_the_summary_groups_what_is_alike(harness):
    callback = harness.callback(warmup_steps=1, verify_replays=0)
    data = DataLoader([batch for batch in ragged(range(1, 41)) for _ in range(3)], batch_size=None)
    harness.compare(Predictor(Body()), predict(data), callback)
    assert callback.stats.captures == 40
    lines = callback.summary().splitlines()
    assert len(lines) <= 22
    assert any("40 shapes" in line and " 80 " in line for line in lines), callback.summary()


def test_many_reasons_and_shapes_stay_a_short_summary():
    stats = CUDAGraphStats()
    for number in range(5000):
        reason = Reason(Status.CHANGED, f"self.x: now {number}")
        stats.ran("validate", "NONE", f"{number}x8", reason)
        stats.ran("validate", "PIECEWISE", f"{number}x8", Reason(Cause.HOST_SYNC, "a sync"))
    assert len(stats.reasons) <= MOST_REASONS + 2 * (MOST_SHAPES + 1)
    assert stats.steps == {"NONE": 5000, "PIECEWISE": 5000, "FULL": 0}
    assert sum(stats.eager_reasons.values()) == stats.eager == 5000
    assert any(record.shapes == OTHER_SHAPES for record in stats.reasons)
    lines = render_summary(stats, "recorder", ["validate"]).splitlines()
    assert len(lines) <= 22
    assert "5000 PIECEWISE" in "\n".join(lines)


def test_one_shape_stays_one_shape_with_many_reasons():
    stats = CUDAGraphStats()
    for step in range(4 * (MOST_REASONS + MOST_SHAPES)):
        stats.ran("predict", "NONE", "8x4", Reason(Status.CHANGED, f"value {step}"))
    assert {record.shapes for record in stats.reasons} == {"8x4"}
