"""Reasons for a lower mode: reported in every mode, for each stage and shape."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.text import perplexity
from torchmetrics.text import Perplexity

from cg_lightning import BatchDescriptor, CaptureError
from cg_lightning.backends import resolve_backend
from cg_lightning.core.causes import Cause
from cg_lightning.core.reasons import Changed, Reason, Status
from cg_lightning.report.counts import MOST_REASONS, MOST_SHAPES, OTHER_SHAPES
from cg_lightning.report.stats import CUDAGraphStats
from cg_lightning.report.summary import render_summary
from cg_lightning.runtime.plans import NEW_KEY
from cg_lightning.runtime.target import reason_of
from tests.harness import Batches, features, predict, validate
from tests.models import Body, Predictor


class LogsAnItem(Predictor):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", 2 * loss.item())


class CountsClasses(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.nn.functional.one_hot(self.net(batch[0]).argmax(1))


LINE = LogsAnItem.validation_step.__code__.co_firstlineno + 2


def test_an_operation_has_a_remedy_of_its_own(harness):
    callback = harness.callback()
    harness.compare(CountsClasses(Body()), predict(features(40)), callback)
    remedies = {r["remedy"] for r in callback.stats.to_dict()["reasons"] if r["mode"] != "NONE"}
    assert remedies == {"give num_classes"}


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
        "operation": record["operation"],
        "submodule": "",
        "location": f"{__file__}:{LINE}",
        "library_location": "",
        "remedy": Cause.HOST_SYNC.remedy,
        "steps": 7,
    }
    assert record["text"].startswith(f"host sync: {record['operation']} ")
    assert record["operation"].startswith("aten::")
    json.dumps(callback.stats.to_dict())
    summary = callback.summary()
    shown = record["text"].replace(f"{Path.cwd()}/", "")
    assert f"7 PIECEWISE (4x8): {shown}" in " ".join(summary.split())
    assert f"remedy: {Cause.HOST_SYNC.remedy}" in " ".join(summary.split())


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
    shown = record.to_dict()
    assert shown["text"] == f"host sync: aten::item in net ({shown['location']})"
    assert (shown["operation"], shown["submodule"]) == ("aten::item", "net")
    line = Inner.forward.__code__.co_firstlineno + 1
    assert shown["location"] == f"{__file__}:{line}"


def test_library_code_shows_the_librarys_line_and_the_users(harness):
    class Perplexed(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.perplexity = Perplexity()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.perplexity(self.net(batch[0])[None], batch[0].argmax(1)[None])

    callback = harness.callback(warmup_steps=1)
    harness.compare(Perplexed(), validate(features()), callback)
    (record,) = [record for record in callback.stats.reasons if record.mode == "PIECEWISE"]
    assert f"({__file__}:" in record.reason.text
    library = record.to_dict()["library_location"]
    assert library.startswith("torchmetrics/functional/text/perplexity.py:")
    assert f", in {library})" in record.reason.text


@pytest.mark.parametrize(
    ("step", "library"),
    [
        (lambda x: x.sum().item(), ""),
        (lambda x: perplexity(x[None], x.argmax(1)[None]), "torchmetrics/functional/text/"),
    ],
)
def test_a_failed_capture_names_the_line_that_failed(step, library):
    x = torch.randn(4, 8)
    with pytest.raises(CaptureError) as caught:
        resolve_backend("recorder", x.device).capture(
            lambda: step(x), collect_garbage=False, capture_error_mode="thread_local"
        )
    reason = reason_of(caught.value)
    assert reason.location == f"{__file__}:{step.__code__.co_firstlineno}"
    assert reason.library_location.startswith(library)
    assert bool(reason.library_location) is bool(library)
    assert reason.location in reason.text
    assert reason_of(CaptureError("not a line of the user's")).location == ""


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL", "PIECEWISE"])
def test_each_mode_names_the_submodule_inside(harness, mode):
    class CountsInside(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(8, 8)
            self.second = torch.nn.Sequential(torch.nn.Linear(8, 8), OneHot())

        def forward(self, x: Any) -> Any:
            return self.second(self.first(x))

    callback = harness.callback(mode=mode)
    harness.compare(Predictor(CountsInside()), predict(features(40)), callback)
    shown = [r for r in callback.stats.to_dict()["reasons"] if r["cause"] != "warm-up"]
    if mode == "PIECEWISE":  # it ran in the mode that was asked for
        assert shown == []
        return
    (record,) = shown
    assert record["mode"] == ("NONE" if mode == "FULL" else "PIECEWISE")
    line = OneHot.forward.__code__.co_firstlineno + 1
    assert record == {
        **record,
        "cause": "host sync",
        "operation": "aten::one_hot",
        "submodule": "net.second.1",
        "location": f"{__file__}:{line}",
        "remedy": "give num_classes",
    }


class OneHot(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.nn.functional.one_hot(x.argmax(1))


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
    reason = callback.stats.reasons[-1].reason
    line = Scaled.predict_step.__code__.co_firstlineno + 1
    assert reason.location == f"{__file__}:{line}"
    assert reason.text == f"changed: self.scale: now 2.0, before 1.0 ({reason.location})"


FACTOR = 1.0
"""Set by a callback."""


class ScaledByAGlobal(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * FACTOR


class ScaledByTheBatch(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * batch[1].max().item()


class AnotherValueEachBatch(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        global FACTOR
        FACTOR = pl_module.scale = float(1 + batch_idx)


def numbered(number: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 8, generator=generator), torch.tensor([n])) for n in range(number)]
    return DataLoader(batches, batch_size=None)


@pytest.mark.parametrize(
    ("model", "varies"),
    [
        (Scaled, "self.scale: now"),
        (ScaledByAGlobal, "FACTOR: now"),
        (ScaledByTheBatch, "aten::item"),
    ],
)
@pytest.mark.parametrize("warmup_steps", [1, 3, 20])
def test_a_value_that_changes_each_batch_leaves_the_submodules_their_graphs(
    harness, model, varies, warmup_steps
):
    callback = harness.callback(warmup_steps=warmup_steps)
    harness.compare(
        model(Body()), predict(numbered(80)), callback, others=lambda: [AnotherValueEachBatch()]
    )
    assert callback.stats.steps["PIECEWISE"] >= 50, callback.summary()
    texts = [str(each.reason) for each in callback.stats.reasons if each.mode == "PIECEWISE"]
    assert texts
    assert all(varies in text for text in texts), texts


class ReadsInside(torch.nn.Module):
    """Reads a value that changes, in the only submodule that could be a piece."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(8))
        self.scale = 1.0

    def forward(self, x: Any) -> Any:
        return x @ self.weight * self.scale


class AnotherValueInside(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        pl_module.net.scale = float(1 + batch_idx)


def test_submodules_that_never_run_a_graph_are_left_alone(harness, monkeypatch):
    from cg_lightning.runtime.submodule_runner import SubmoduleRunner

    looked_at = []
    plan = SubmoduleRunner._plan
    monkeypatch.setattr(SubmoduleRunner, "_plan", lambda *a: looked_at.append(1) or plan(*a))
    callback = harness.callback()
    harness.compare(
        Predictor(ReadsInside()),
        predict(numbered(200)),
        callback,
        others=lambda: [AnotherValueInside()],
    )
    assert callback.stats.eager == 200
    assert 0 < len(looked_at) < 25
    assert all("self.net.scale: now" in str(r) for r in callback.stats.reasons[1:])


class Thing:
    """An object that cannot be part of a key."""

    def __init__(self, number: int) -> None:
        self.number = number


class Times(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: Any, number: int) -> Any:
        return self.linear(x) * number


@pytest.mark.parametrize("calls_repeat", [True, False])
def test_a_batch_without_a_key_says_so_from_its_warm_up_on(harness, calls_repeat):
    class ReadsAThing(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"], batch["thing"].number * (not calls_repeat))

    def make(number: int) -> Any:
        generator = torch.Generator().manual_seed(number)
        return {"x": torch.randn(4, 8, generator=generator), "thing": Thing(number)}

    callback = harness.callback()
    data = DataLoader(Batches(make, 24), batch_size=None)
    harness.compare(ReadsAThing(Times()), predict(data), callback)
    assert bool(callback.stats.steps["PIECEWISE"]) is calls_repeat
    records = [each for each in callback.stats.reasons if each.shapes == "-"]
    assert sum(each.steps for each in records) > 16
    for record in records:
        assert "batch['thing'] is a value of type tests.test_reasons.Thing" in str(record.reason)
        assert record.reason.remedy == Status.NO_KEY.remedy
    assert (callback.stats.reasons[-1].reason.kind is Status.NO_KEY) is calls_repeat


def test_strict_waits_for_the_warm_up_of_a_batch_without_a_key(harness):
    class ReadsAThing(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"], batch["thing"].number)

    data = DataLoader([{"x": torch.randn(4, 8), "thing": Thing(2)}] * 12, batch_size=None)
    callback = harness.callback(strict=True, mode="PIECEWISE")
    harness.compare(ReadsAThing(Times()), predict(data), callback)
    assert callback.stats.steps["PIECEWISE"] > 8


class MovesAWeight(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx == 6:
            weight = pl_module.net[0].weight
            weight.data = weight.data * 2


class Varies(Callback):
    """Makes another key from the twelfth batch on."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx != 12:
            return
        if self.what == "requires_grad":
            pl_module.net[0].weight.requires_grad_(False)
        elif self.what == "training":
            pl_module.net[1].train()
        elif self.what == "a switch":
            torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic


VARIED = {
    "requires_grad": "self.{net}0.weight.requires_grad: now False, before True",
    "training": "self.{net}1.training: now True, before False",
    "a switch": "torch.backends.cudnn.deterministic: now ",
    "shape": "{x}.shape: now (2, 8), before (4, 8)",
    "dtype": "{x}.dtype: now torch.float64, before torch.float32",
    "value": "{n}: now 7, before 3",
    "keys": "other containers, keys or lengths in the batch",
}


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("what", VARIED)
def test_a_graph_for_another_key_says_what_has_changed(harness, monkeypatch, what, mode):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)

    class Converts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Body()

        def __getitem__(self, index: int) -> Any:
            return self.layers[index]

        def forward(self, x: Any, n: Any) -> Any:
            return self.layers(x.float()) * (n if isinstance(n, int) else 1)

    class Passes(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"], batch.get("n"))

    def make(number: int) -> Any:
        is_late = number >= 12
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(2 if is_late and what == "shape" else 4, 8, generator=generator)
        batch = {"x": x.double() if is_late and what == "dtype" else x}
        batch["n"] = 7 if is_late and what == "value" else 3
        if is_late and what == "keys":
            batch["n"] = {"more": 1}
        return batch

    callback = harness.callback(mode=mode)
    others = lambda: [Varies(what)]
    data = DataLoader(Batches(make, 24), batch_size=None)
    harness.compare(Passes(Converts()), predict(data), callback, others=others)
    is_full = mode != "PIECEWISE"
    names = {"net": "net.layers." if is_full else "layers."}
    names |= (
        {"x": "batch['x']", "n": "batch['n']"}
        if is_full
        else {"x": "arguments[0][0]", "n": "arguments[0][1]"}
    )
    first, *later = callback.stats.entries
    assert first.why_again == ""
    assert later, callback.summary()
    changed = VARIED[what].format(**names)
    assert later[-1].why_again.startswith(changed), later
    assert later[-1].why_again in callback.stats.to_dict()["entries"][-1]["why_again"]
    assert f"captured again: {changed}" in " ".join(callback.summary().split())


def test_a_graph_of_a_new_run_says_so(harness):
    callback = harness.callback(warmup_steps=1)
    trainer, module = harness.trainer(callback), Predictor(Body())
    trainer.predict(module, features(40))
    mark = callback.stats.copy()
    trainer.predict(module, features(40))
    assert callback.stats.entries[0].why_again.startswith("a new run")
    assert callback.stats.since(mark).entries[0].why_again == ""


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_a_graph_that_is_captured_again_says_why(harness, mode):
    callback = harness.callback(mode=mode)
    others = lambda: [MovesAWeight()]
    harness.compare(Predictor(Body()), predict(features(40)), callback, others=others)
    (entry,) = callback.stats.entries
    assert entry.captures == 2
    weight = "net.0.weight" if mode == "FULL" else "0.weight"
    assert entry.why_again == f"parameters or buffers are at new addresses: {weight}"
    assert f"captured again: {entry.why_again}" in " ".join(callback.summary().split())


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_a_graph_that_is_captured_again_after_a_replacement_says_so(harness, mode, monkeypatch):
    class Replaces(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
            if batch_idx == 6:
                monkeypatch.setattr(torch, "sin", torch.cos)

    class Sines(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(super().forward(x))

    callback = harness.callback(mode=mode, warmup_steps=1)
    trainer = harness.trainer(callback, Replaces())
    trainer.predict(Predictor(nn.Sequential(Sines(8, 8))), features(40))
    (entry,) = callback.stats.entries
    assert entry.captures == 2
    assert entry.why_again == "a function or class was replaced: torch.sin"


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


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11 warns its own users
def test_the_hooks_of_a_profiler_are_named(harness, tmp_path):
    from lightning.pytorch.profilers import PyTorchProfiler

    callback = harness.callback()
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="with", export_to_chrome=False)
    harness.trainer(callback, profiler=profiler).predict(Predictor(Body()), features(40))
    assert callback.stats.steps["FULL"] == 0
    kinds = {record.reason.kind for record in callback.stats.reasons}
    assert kinds == {Status.WARM_UP, Cause.PROFILER_HOOK}, callback.summary()
    text = callback.summary()
    assert "hooks of a profiler: PyTorchProfiler in net" in text
    assert "PyTorchProfiler(record_module_names=False)" in text
    assert "test_reasons.py" not in text
    callback = harness.callback()
    profiler = PyTorchProfiler(
        dirpath=tmp_path, filename="without", export_to_chrome=False, record_module_names=False
    )
    harness.trainer(callback, profiler=profiler).predict(Predictor(Body()), features(40))
    assert callback.stats.steps["FULL"] == 7, callback.summary()


def test_hooks_of_the_users_own_beside_those_of_a_profiler():
    from lightning.pytorch.profilers.pytorch import RegisterRecordFunction

    from cg_lightning import diagnose

    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    net[0].register_forward_hook(lambda *_: None)
    with RegisterRecordFunction(net):
        causes = {finding.cause for finding in diagnose(net, torch.randn(2, 8)).findings}
    assert causes == {Cause.PROFILER_HOOK, Cause.FORWARD_HOOK}


def ragged(lengths: range) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        [(torch.randn(length, 8, generator=generator),) for length in lengths], batch_size=None
    )


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. .* batches of stage")
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
    others = {record.shapes for record in stats.reasons if record.is_of_other_shapes}
    assert others == {OTHER_SHAPES}
    lines = render_summary(stats, "recorder", ["validate"]).splitlines()
    assert len(lines) <= 22
    assert "5000 PIECEWISE" in "\n".join(lines)


def test_reasons_that_differ_in_values_are_counted_together():
    stats = CUDAGraphStats()
    for number in range(300):
        changed = Changed("self.x", f"self.x: now {number + 1}, before {number}")
        stats.ran("predict", "NONE", f"{number % 2}x8", Reason.of_change(Status.CHANGED, changed))
        stats.ran("predict", "NONE", "2x8", Reason(Status.CHANGED, "another", subject="self.y"))
    assert [(r.shapes, r.steps, str(r.reason)) for r in stats.reasons] == [
        ("0x8", 150, "self.x: now 299, before 298"),
        ("2x8", 300, "another"),
        ("1x8", 150, "self.x: now 300, before 299"),
    ]
    assert sum(stats.eager_reasons.values()) == stats.eager == 600
    text = render_summary(stats, "recorder", ["predict"])
    assert "300 eager (0x8 | 1x8): self.x: now 300, before 299" in text
    assert "other reasons" not in text
    assert stats.since(stats.copy()).reasons == []
    mark = stats.copy()
    stats.ran("predict", "NONE", "2x8", Reason(Status.CHANGED, "once more", subject="self.y"))
    (record,) = stats.since(mark).reasons
    assert (record.steps, str(record.reason)) == (1, "once more")
    assert pickle.loads(pickle.dumps(stats)).to_dict() == stats.to_dict()


def test_a_value_of_each_batch_is_one_line_of_the_summary(harness):
    callback = harness.callback()
    others = lambda: [AnotherValueEachBatch()]
    harness.compare(Scaled(Body()), predict(numbered(60)), callback, others=others)
    texts = [str(record.reason) for record in callback.stats.reasons]
    assert len(texts) == 3, texts  # the first step, watched ones, and those in pieces
    assert sum("changed: self.scale: now" in text for text in texts) == 1
    assert "other reasons" not in callback.summary()


def steps_record(stats: CUDAGraphStats, kind: Cause | Status, text: str, steps: int = 1) -> None:
    for _ in range(steps):
        stats.ran("validate", "NONE", "4x8", Reason(kind, text))


def test_the_summary_fits_80_columns(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stats = CUDAGraphStats()
    for number in range(12):
        text = (
            f"host sync {number}: aten::item in encoder.layers.{number} "
            f"({tmp_path}/models/net.py:{number}), " + "and " * 60
        )
        steps_record(stats, Cause.HOST_SYNC, text, 12 - number)
    key = BatchDescriptor.from_batch(
        [torch.empty(1, 2, 3, 4, 5) for _ in range(9)], stage="validate"
    )
    entry = stats.entry("PIECEWISE", "encoder.layers.11.attention.self.projection", key)
    entry.captured(0.5, 2**31, "")
    entry.replays = 123456
    lines = render_summary(stats, "cuda", ["validate"]).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 22
    text = "\n".join(lines)
    assert "models/net.py:0" in text
    assert str(tmp_path) not in text
    assert "other reasons: see stats.reasons" in lines[-1]
    assert "encoder." in text
    assert "..." in lines[4]
    assert "123456" in text


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. .* batches of stage")
def test_many_shapes_in_few_batches_get_a_hint(harness):
    callback = harness.callback()
    shapes = [*range(1, 51), *range(1, 41)]  # 90 batches
    data = DataLoader(
        [(torch.randn(length, 8),) for length in shapes], batch_size=None, shuffle=False
    )
    harness.trainer(callback).predict(Predictor(Body()), data)
    hint = (
        "50 shapes in 90 batches, so most steps are warm-ups: "
        "pad batches to fewer shapes, or set warmup_steps=1"
    )
    assert hint in " ".join(callback.summary().split())
    callback = harness.callback()
    harness.trainer(callback).predict(Predictor(Body()), features(10))
    assert "warm-ups" not in callback.summary()  # few batches of two shapes


def test_counts_of_a_run_and_of_all_runs(harness, capsys):
    callback = harness.callback(report=True)
    trainer = harness.trainer(callback)
    module = Predictor(Body())
    trainer.predict(module, features(40))
    first = capsys.readouterr().out
    trainer.predict(module, features(32))
    second = capsys.readouterr().out
    assert "predict: 7 steps FULL, 3 steps eager" in first
    assert ", run " not in first
    assert f"CUDA graphs (backend: {harness.backend}), run 2 only" in second
    assert "predict: 5 steps FULL, 3 steps eager" in second
    assert "  3 eager (4x8): warm-up" in second
    assert callback.stats.steps == {"NONE": 6, "PIECEWISE": 0, "FULL": 12}
    assert f"CUDA graphs (backend: {harness.backend}), all 2 runs" in callback.summary()
    assert "predict: 12 steps FULL, 6 steps eager" in callback.summary()
    (entry,) = callback.stats.since(callback.stats.copy()).entries
    assert (entry.captures, entry.replays, entry.timed) == (0, 0, 0)
    assert callback.stats.since(CUDAGraphStats()).to_dict() == callback.stats.to_dict()


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_host_time_of_eager_and_of_graphs(harness, mode):
    callback = harness.callback(mode=mode, warmup_steps=4)
    harness.trainer(callback).predict(Predictor(Body()), features(80))
    times = callback.stats.comparison("predict", mode)
    assert times is not None
    assert 0 < times.graph < 1
    assert 0 < times.eager < 1
    recorder = harness.backend == "recorder"
    factor = "recorder: means nothing" if recorder else f"factor {times.eager / times.graph:.1f}"
    assert f"{mode} {times.graph * 1e3:.3f} ms ({factor})" in " ".join(callback.summary().split())
    assert (
        callback.stats.comparison("predict", "FULL" if mode == "PIECEWISE" else "PIECEWISE") is None
    )
    assert f"(factor {times.eager / times.graph:.1f})" in render_summary(
        callback.stats, "cuda", ["predict"]
    )
    # what was watched, captured or compared with eager is left out
    if mode == "FULL":
        (entry,) = callback.stats.entries
        assert entry.timed == entry.replays - 2 == 14


def test_without_an_eager_step_there_is_no_comparison(harness):
    callback = harness.callback(warmup_steps=1)
    harness.trainer(callback).predict(Predictor(Body()), features(40))
    assert callback.stats.comparison("predict", "FULL") is None
    assert "host time" not in callback.summary()


def test_one_shape_stays_one_shape_with_many_reasons():
    stats = CUDAGraphStats()
    for step in range(4 * (MOST_REASONS + MOST_SHAPES)):
        stats.ran("predict", "NONE", "8x4", Reason(Status.CHANGED, f"value {step}"))
    assert {record.shapes for record in stats.reasons} == {"8x4"}


class Weights:
    scale = 1.0


WEIGHT = {"w": 1.0}


class ReadsElsewhere(Predictor):
    """Values that are no attributes of the module."""

    kind = "global"

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        if self.kind == "global":
            return out * WEIGHT["w"]
        return out * Weights.scale


class SetsWeights(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        value = float(1 + batch_idx // 2 % 2)
        if pl_module.kind == "global":
            WEIGHT["w"] = value
        else:
            Weights.scale = value


@pytest.mark.parametrize(("kind", "offset"), [("global", 3), ("class", 4)])
def test_the_reason_names_the_line_that_reads_a_global(harness, kind, offset):
    model = ReadsElsewhere(Body())
    model.kind = kind
    callback = harness.callback(mode="FULL")
    harness.compare(model, predict(features()), callback, others=lambda: [SetsWeights()])
    reasons = [each.reason for each in callback.stats.reasons]
    (reason,) = [each for each in reasons if each.kind is Status.CHANGED]
    first = ReadsElsewhere.predict_step.__code__.co_firstlineno
    assert reason.location == f"{__file__}:{first + offset}", reason
