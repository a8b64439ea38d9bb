"""Graphs that do not save time are dropped, and captures that cannot pay are not made."""

from __future__ import annotations

import copy
import json
import time
from time import perf_counter
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from cg_lightning import graphed
from cg_lightning.backends.recorder import RecordedGraph, RecorderBackend
from cg_lightning.core.reasons import Status
from cg_lightning.runtime import target
from cg_lightning.runtime.costs import CostsOfRuns
from cg_lightning.runtime.plans import TOO_SELDOM
from cg_lightning.runtime.trial import BLOCK, BLOCKS, FIRST_LOOK, StepTimes, Trial
from cg_lightning.trainer.stage_length import TrainerStageLength
from tests.harness import features, images, predict, validate
from tests.models import ConvNetClassifier, Predictor
from tests.test_padding import watched_steps

COMPARED = BLOCKS * BLOCK
SHORT, LONG, VERY_LONG = 0.0005, 0.005, 0.04
"""Seconds; what is to be told apart differs by much more than noise."""
BY_THE_CLOCK = pytest.mark.exhaustive
"""Its times are a few milliseconds: a machine that is busy with other work may decide otherwise."""


class HostStopwatch:
    """Takes real time on the host: a replay of the recorder is done when it returns."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._seconds: float | None = None

    def stop(self) -> None:
        self._seconds = perf_counter() - self._began

    def seconds(self) -> float | None:
        return self._seconds


@pytest.fixture
def timed(monkeypatch) -> None:
    """The times of the recorder tell if graphs pay."""
    monkeypatch.setattr(RecorderBackend, "stopwatch", lambda _, began: HostStopwatch(began))


@pytest.fixture
def slow_replays(timed, monkeypatch) -> None:
    replay = RecordedGraph.replay

    def slow(self: RecordedGraph) -> None:
        time.sleep(VERY_LONG)
        replay(self)

    monkeypatch.setattr(RecordedGraph, "replay", slow)


def burn(seconds: float) -> int:
    """Return how often to count for at least so long."""
    fastest = float("inf")
    for _ in range(20):
        began = perf_counter()
        for _ in range(10_000):
            pass
        fastest = min(fastest, perf_counter() - began)
    return int(10_000 * seconds / fastest)


class Slow(nn.Module):
    """Takes long in Python, so its graph saves much."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.count = burn(seconds)

    def forward(self, x):
        for _ in range(self.count):
            pass
        return self.linear(x)


class Many(nn.Module):
    """Many small operations: those of the recorder take longer than eager ones."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.number = number

    def forward(self, x):
        x = self.linear(x)
        for _ in range(self.number):
            x = x + 1
        return x


class Pieces(Predictor):
    """Reads a number on the host between two submodules."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__(nn.ModuleList([first, second]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.net[0](batch[0])
        return self.net[1](x * (1 + float(x.sum().item() > 0)))


class WithMetric(ConvNetClassifier):
    def __init__(self) -> None:
        super().__init__(4)
        self.val_accuracy = MulticlassAccuracy(10)


def reasons(callback) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in callback.stats.reasons:
        key = f"{record.mode}: {record.reason.kind.value}"
        found[key] = found.get(key, 0) + record.steps
    return found


# the decision


class Given:
    """A stopwatch with a given time. None: the device is not done."""

    def __init__(self, seconds: float | None) -> None:
        self.time = seconds

    def stop(self) -> None:
        pass

    def seconds(self) -> float | None:
        return self.time


def steps(*seconds: float | None) -> list[StepTimes]:
    return [StepTimes(lambda _, each=each: Given(each), 0.0) for each in seconds]


def run(trial: Trial, eager: float, graph: float, slow: dict[int, float] | None = None):
    """Run steps until the trial knows what graphs save. Some replays take longer."""
    for step in range(100):
        is_eager = trial.wants_eager()
        seconds = eager if is_eager else (slow or {}).get(step, graph)
        trial.add(steps(seconds)[0], is_eager)
        saving = trial.saving()
        if saving is not None:
            return saving, step + 1
    raise AssertionError("nothing was decided")


def test_a_clear_saving_needs_no_eager_step():
    trial = Trial(0.03, steps(9.0, 10.0))
    saving, number = run(trial, 10.0, 4.0)
    assert (saving.eager, saving.graph, number) == (9.0, 4.0, FIRST_LOOK)


@pytest.mark.parametrize("slow_step", range(FIRST_LOOK + COMPARED))
def test_one_slow_replay_drops_no_graph(slow_step):
    saving, _ = run(Trial(0.03, steps(10.0, 10.0)), 10.0, 5.0, {slow_step: 1000.0})
    assert saving.share == pytest.approx(0.5)


def test_slow_first_replays_drop_no_graph():
    slow = dict.fromkeys(range(FIRST_LOOK + 2 * BLOCK), 1000.0)
    saving, number = run(Trial(0.03, steps(10.0, 10.0)), 10.0, 5.0, slow)
    assert saving.share == pytest.approx(0.5)
    assert number == FIRST_LOOK + COMPARED


@pytest.mark.parametrize("graph", [9.8, 10.0, 20.0])
def test_what_does_not_save_enough_is_known_after_a_comparison(graph):
    saving, number = run(Trial(0.03, steps(10.0, 10.0)), 10.0, graph)
    assert saving.share < 0.03
    assert number == FIRST_LOOK + COMPARED


def test_slow_warm_up_steps_hide_no_loss():
    saving, _ = run(Trial(0.03, steps(12.0, 11.0)), 10.0, 10.5)
    assert saving.share < 0


def test_without_warm_up_times_are_compared():
    saving, number = run(Trial(0.03, []), 10.0, 5.0)
    assert (saving.share, number) == (0.5, FIRST_LOOK + COMPARED)


def test_nothing_is_decided_before_the_device_is_done():
    trial = Trial(0.03, steps(10.0))
    late = steps(*[None] * FIRST_LOOK)
    for each in late:
        trial.add(each, False)
        assert trial.saving() is None
    for each in late:
        each._whole.time = 4.0
    assert trial.saving() == (10.0, 4.0)


# whole steps


def test_a_whole_step_that_costs_time_runs_eagerly(harness, slow_replays):
    callback = harness.callback(min_saving=0.03)
    harness.compare(WithMetric(), validate(images(4 * 50)), callback)
    if harness.backend == "cuda":
        return
    full = 2 + FIRST_LOOK + COMPARED // 2
    assert callback.stats.steps == {"NONE": 50 - full, "PIECEWISE": 0, "FULL": full}
    assert reasons(callback) == {
        "NONE: warm-up": 3,
        "NONE: timed against its graph": COMPARED // 2,
        "NONE: no gain": 50 - 3 - full - COMPARED // 2,
    }
    (entry,) = callback.stats.to_dict()["entries"]
    assert entry["saving"] < 0
    assert entry["graph_seconds"] > VERY_LONG > entry["eager_seconds"] > 0
    (text,) = [text for text in callback.stats.eager_reasons if text.startswith("no gain")]
    assert text == (
        f"no gain: {entry['graph_seconds'] * 1e6:.0f} us from graphs, "
        f"{entry['eager_seconds'] * 1e6:.0f} us eagerly"
    )
    json.dumps(callback.stats.to_dict())
    assert text in callback.summary()


@pytest.mark.parametrize("copy_outputs", [True, False])
def test_the_graph_of_a_step_without_gain_is_freed(harness, slow_replays, copy_outputs):
    """Unless its latest output may still be read: without copies, that is in its memory."""
    callback = harness.callback(min_saving=0.03, copy_outputs=copy_outputs)
    seen = []

    class Looks(Predictor):
        def on_predict_batch_end(self, *_: Any) -> None:
            seen.append(len(callback.graphs("FULL")))

    trainer = harness.trainer(callback)
    trainer.predict(Looks(Slow(SHORT)), features(4 * 40), return_predictions=False)
    if harness.backend != "cuda":
        assert reasons(callback)["NONE: no gain"] > 0
        assert max(seen) == 1
        assert seen[-1] == (0 if copy_outputs else 1)


def test_a_whole_step_that_saves_much_is_kept(harness, timed):
    callback = harness.callback(min_saving=0.03)
    harness.compare(Predictor(Slow(LONG)), predict(features(4 * 40)), callback)
    (entry,) = callback.stats.entries
    assert 0.03 < entry.saving < 1
    assert "NONE: no gain" not in reasons(callback)
    assert callback.stats.steps["FULL"] >= 37 - COMPARED // 2


@pytest.mark.parametrize("settings", [{"min_saving": 0}, {"min_saving": 0.03, "strict": True}])
def test_every_graph_may_be_kept(harness, slow_replays, settings):
    callback = harness.callback(**settings)
    harness.compare(Predictor(nn.Linear(8, 8)), predict(features(4 * 40)), callback)
    assert callback.stats.steps == {"NONE": 3, "PIECEWISE": 0, "FULL": 37}
    assert callback.stats.entries[0].saving is None


def test_the_recorder_drops_nothing_by_itself(harness):
    if harness.backend == "cuda":
        pytest.skip("the recorder")
    callback = harness.callback(min_saving=0.9)
    harness.compare(Predictor(Many(50)), predict(features(4 * 40)), callback)
    assert callback.stats.steps == {"NONE": 3, "PIECEWISE": 0, "FULL": 37}


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
def test_steps_that_are_compared_give_the_numbers_of_eager(
    harness, slow_replays, mode, verify_replays
):
    """The state of metrics, logged values and Python goes from graphs to eager steps and back."""

    class Counts(WithMetric):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0
            self.sums: list[Any] = []

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            x, labels = batch
            logits = self(x)
            self.val_accuracy.update(logits, labels)
            self.log("accuracy", self.val_accuracy)
            self.log("mean", logits.mean())
            self.sums.append(logits.sum())
            return {"logits": logits}

        def on_validation_epoch_end(self) -> None:
            self.log("sum", torch.stack(self.sums).sum())
            self.log("seen", float(self.seen))

    callback = harness.callback(min_saving=0.03, mode=mode, verify_replays=verify_replays)
    harness.compare(Counts(), validate(images(4 * 45 + 2)), callback)
    if harness.backend != "cuda":
        assert reasons(callback)["NONE: timed against its graph"] == COMPARED // 2
        assert reasons(callback)["NONE: no gain"] > 0


def test_variants_are_compared_each_by_itself(harness, slow_replays):
    class Alternates(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            return x + 1 if batch_idx % 2 else x - 1

    callback = harness.callback(min_saving=0.03)
    harness.compare(Alternates(Slow(SHORT)), predict(features(4 * 120)), callback)
    if harness.backend != "cuda":
        assert reasons(callback)["NONE: no gain"] > 60


@BY_THE_CLOCK
def test_each_stage_and_each_shape_is_decided_by_itself(harness, slow_replays):
    class TwoSpeeds(Predictor):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            x = batch[0]
            if x.shape[0] == 4:
                for _ in range(self.net.count):
                    pass
            return self.net.linear(x)

    callback = harness.callback(min_saving=0.03)
    loaders = [features(4 * 40), features(2 * 40, 2)]
    harness.compare(TwoSpeeds(Slow(2 * VERY_LONG)), predict(loaders), callback)
    if harness.backend != "cuda":
        large, small = callback.stats.entries
        assert large.saving > 0.03 > 0 > small.saving
        assert large.replays >= 37 - COMPARED // 2
        assert reasons(callback)["NONE: no gain"] == 40 - 3 - 2 - FIRST_LOOK - COMPARED


class Scaled(nn.Module):
    """Its large batches save nothing, since replays are slow, and its small ones much."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow, self.norm = Slow(SHORT), Slow(2 * VERY_LONG), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.fast(x) if x.shape[0] == 4 else self.slow(x))


class ChangesEps(Callback):
    """Changes a setting of a layer, which no key and no value of the user's code shows."""

    def __init__(self, batches: list[int]) -> None:
        self._batches = batches

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx in self._batches:
            pl_module.net.norm.eps += 0.5


@pytest.mark.parametrize("changes", [[], [35, 38, 62, 77, 80]])
def test_nothing_is_intercepted_for_steps_that_save_nothing(harness, slow_replays, changes):
    """Until a step of another shape comes. Settings that change before and after count in it."""
    generator = torch.Generator().manual_seed(5)
    sizes = [4] * 40 + [2] * 36 + [4, 2] * 4
    data = [(torch.randn(size, 8, generator=generator),) for size in sizes]
    intercepted = []

    class Looks(Callback):
        def on_predict_batch_end(self, trainer, pl_module, *_: Any) -> None:
            intercepted.append("__setattr__" in vars(nn.LayerNorm))

    callback = harness.callback(min_saving=0.03)
    harness.compare(
        Predictor(Scaled()),
        predict(DataLoader(data, batch_size=None)),
        callback,
        others=lambda: [Looks(), ChangesEps(changes)],
    )
    if harness.backend != "cuda":
        seen = intercepted[: len(sizes)]
        settled = 3 + 2 + FIRST_LOOK + COMPARED
        assert all(seen[3:settled])
        assert not any(seen[settled + 6 : 40])
        assert all(seen[46:])
        assert callback.stats.entries[1].replays > (5 if not changes else 0), callback.summary()


# submodules


@BY_THE_CLOCK
def test_a_submodule_that_costs_time_is_left_alone(harness, timed):
    callback = harness.callback(min_saving=0.03)
    model = Pieces(Slow(LONG), Many(1000))
    harness.compare(model, predict(features(4 * 80)), callback)
    if harness.backend == "cuda":
        return
    slow, many = callback.stats.entries
    assert (slow.target, many.target) == ("net.0", "net.1")
    assert slow.saving > 0.03
    assert many.saving < 0
    assert slow.replays - many.replays > 30
    assert callback.stats.steps["PIECEWISE"] == 80 - 3 - COMPARED


@BY_THE_CLOCK
def test_a_step_whose_submodules_all_cost_time_runs_eagerly(harness, timed):
    callback = harness.callback(min_saving=0.03)
    model = Pieces(Many(300), Many(300))
    harness.compare(model, predict(features(4 * 60)), callback)
    if harness.backend == "cuda":
        return
    assert reasons(callback)["NONE: no gain"] == 60 - 3 - 2 - FIRST_LOOK - COMPARED
    assert all(entry.saving < 0 for entry in callback.stats.entries)


@BY_THE_CLOCK
def test_submodules_that_save_much_are_kept(harness, timed):
    callback = harness.callback(min_saving=0.03)
    model = Pieces(Slow(LONG), Slow(SHORT))
    harness.compare(model, predict(features(4 * 60)), callback)
    assert callback.stats.steps["PIECEWISE"] == 60 - 3 - COMPARED // 2
    assert all(entry.saving > 0 for entry in callback.stats.entries)


# the length of a stage


def test_a_stage_that_is_too_short_is_not_watched(harness, timed):
    callback = harness.callback(min_saving=0.03)
    harness.compare(Predictor(Slow(SHORT)), predict(features(4 * 7)), callback)
    assert callback.stats.eager_reasons == {str(reason): 7 for reason in [too_short(callback)]}


def too_short(callback):
    found = [r.reason for r in callback.stats.reasons if r.reason.kind is Status.TOO_SHORT]
    return found[0] if found else None


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
def test_the_shortest_stage_that_captures(harness, timed, warmup_steps, verify_replays):
    """One batch fewer, and even replays that take no time would not win back the capture."""
    least = max(warmup_steps, 1) + 1 + 2 + verify_replays
    for number in (least - 1, least):
        callback = harness.callback(
            min_saving=0.03, warmup_steps=warmup_steps, verify_replays=verify_replays
        )
        harness.compare(Predictor(Slow(LONG)), predict(features(4 * number)), callback)
        assert callback.stats.captures == (number == least)


@pytest.mark.parametrize("number", [8, pytest.param(20, marks=BY_THE_CLOCK)])
def test_a_stage_that_cannot_win_back_its_first_graph_is_not_watched(
    harness, timed, monkeypatch, number
):
    """Steps of some 50 microseconds: less than 5 milliseconds in all."""
    watched = watched_steps(monkeypatch)
    callback = harness.callback(min_saving=0.03)
    harness.compare(Predictor(nn.Linear(8, 8)), predict(features(4 * number)), callback)
    if harness.backend != "cuda":
        assert not watched
        assert reasons(callback) == {"NONE: warm-up": 2, "NONE: stage too short": number - 2}


def test_the_first_watched_step_of_a_stage_finds_no_one_time_work(harness, timed, monkeypatch):
    """What Lightning does for the first log is done before, so one step is watched, and not two."""
    watched = watched_steps(monkeypatch)
    callback = harness.callback(min_saving=0.03)
    harness.compare(WithMetric(), validate(images(4 * 60)), callback)
    assert len(watched) == 1
    assert callback.stats.steps["FULL"] >= 57 - COMPARED // 2


def test_what_earlier_runs_have_cost_decides_if_a_module_is_watched(harness, timed, monkeypatch):
    """Two runs show what its graph costs: the times of the first one are those of libraries too."""
    watched = watched_steps(monkeypatch)
    model, captures = Predictor(Slow(SHORT)), []
    costs = CostsOfRuns()
    for kind in ("watch", "capture") * 2:
        costs.add(kind, 0.5)
    for _ in range(2):
        callback = harness.callback(min_saving=0.03)
        harness.compare(model, predict(features(4 * 40)), callback)
        captures.append(callback.stats.captures)
        monkeypatch.setitem(target._costs_of_runs, model, costs)
    assert captures == [1, 0]
    assert len(watched) == 1
    callback = harness.callback(min_saving=0.03)
    harness.compare(copy.deepcopy(model), predict(features(4 * 40)), callback)
    assert callback.stats.captures == 1, "another module"


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback")  # it proposes sizes
@pytest.mark.parametrize("pads", [False, True])
def test_many_shapes_in_few_batches_cost_one_watched_step(harness, timed, monkeypatch, pads):
    """Twenty batches of twenty lengths: nothing comes again, so nothing can be won back."""
    watched = watched_steps(monkeypatch)
    settings = {"capture_sizes": [10, 21], "verify_tolerance": "close"} if pads else {}
    callback = harness.callback(min_saving=0.03, **settings)
    generator = torch.Generator().manual_seed(5)
    data = [(torch.randn(size, 8, generator=generator),) for size in range(1, 21)]
    loader = DataLoader(data, batch_size=None)
    harness.compare(Predictor(Slow(SHORT)), predict(loader), callback)
    assert len(watched) == 1
    assert callback.stats.captures == 0
    assert callback.stats.eager == 20


class OwnSizes(nn.Module):
    """Takes long in Python, and its rows are independent."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = Slow(SHORT)

    def forward(self, x):
        return self.slow(x).tanh()


class LossAfterIt(Predictor):
    """Reduces over its batch, so only its submodule is padded."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.net(batch[0]).square().mean(), batch_size=len(batch[0]))


@pytest.mark.parametrize(("rare", "left_out"), [([2, 3], 0), ([30, 33], 1)], ids=["early", "late"])
@pytest.mark.parametrize("stage", ["predict", "validate"])
def test_a_shape_is_compared_if_enough_batches_of_it_are_expected(
    harness, timed, stage, rare, left_out
):
    """It has come twice in the first 4 of 40 batches, or in the first 34."""
    generator = torch.Generator().manual_seed(5)
    sizes = [7 if number in rare else 9 for number in range(40)]
    data = [(torch.randn(size, 8, generator=generator),) for size in sizes]
    settings = {"capture_sizes": [10], "verify_tolerance": "close", "verify_replays": 0}
    callback = harness.callback(min_saving=0.03, **settings)
    run = {"predict": predict, "validate": validate}[stage]
    harness.compare(LossAfterIt(OwnSizes()), run(DataLoader(data, batch_size=None)), callback)
    assert sum(padding.steps for padding in callback.stats.padding) > 30
    seldom = [record.steps for record in callback.stats.reasons if record.reason == TOO_SELDOM]
    assert sum(seldom) == left_out


class StepsLeft(Callback):
    """Notes what the length of a stage says before each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float]] = []

    def note(self, trainer: Any, stage: str, loader: int) -> None:
        length = TrainerStageLength(trainer)
        left = length.steps_left(stage, loader)
        self.seen.append((stage, loader, left))
        assert length.steps_left(stage, 0) == left  # so ask padded submodules

    def on_validation_batch_start(self, trainer, _module, _batch, _index, dataloader_idx=0):
        self.note(trainer, "validate", dataloader_idx)

    def on_test_batch_start(self, trainer, _module, _batch, _index, dataloader_idx=0):
        self.note(trainer, "test", dataloader_idx)

    def on_predict_batch_start(self, trainer, _module, _batch, _index, dataloader_idx=0):
        self.note(trainer, "predict", dataloader_idx)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_the_steps_that_are_left_in_each_dataloader(harness, stage):
    class Step(Predictor):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            pass

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            return batch

    noted = StepsLeft()
    loaders = [features(4 * 3), features(4 * 2)]
    for _ in range(2):
        getattr(harness.trainer(noted), stage)(Step(nn.Linear(8, 8)), loaders)
    once = [(stage, 0, 3.0), (stage, 0, 2.0), (stage, 0, 1.0), (stage, 1, 2.0), (stage, 1, 1.0)]
    assert noted.seen == once * 2


def test_the_steps_that_are_left_of_all_validations_of_fit(harness):
    class Trains(WithMetric):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    noted = StepsLeft()
    trainer = harness.trainer(noted, max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(Trains(), images(8), images(8))
    assert [left for _, _, left in noted.seen] == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def test_a_step_without_batch_idx_may_be_too_short_as_well(harness, timed):
    class Step(Predictor):
        def predict_step(self, batch: Any) -> Any:
            return self.net(batch[0])

    callback = harness.callback(min_saving=0.03)
    harness.compare(Step(Slow(SHORT)), predict(features(4 * 7)), callback)
    assert callback.stats.eager_reasons == {str(reason): 7 for reason in [too_short(callback)]}


def test_a_last_partial_batch_is_not_watched(harness, timed):
    callback = harness.callback(min_saving=0.03)
    harness.compare(Predictor(Slow(LONG)), predict(features(4 * 20 + 3)), callback)
    assert {(r.shapes, r.reason.kind) for r in callback.stats.reasons} == {
        ("4x8", Status.WARM_UP),
        ("3x8", Status.TOO_SHORT),
    }


def test_times_are_compared_only_if_enough_batches_are_left_to_use_the_result(harness, timed):
    for number, timed_steps in ((4 * 30, 0), (4 * 45, COMPARED // 2)):
        callback = harness.callback(min_saving=0.03)
        module = Pieces(Slow(SHORT), Slow(SHORT))
        harness.compare(module, predict(features(number)), callback)
        assert reasons(callback).get("NONE: timed against its graph", 0) == timed_steps


def test_a_comparison_is_not_begun_for_a_whole_step_either(harness, slow_replays):
    callback = harness.callback(min_saving=0.03)
    harness.compare(Predictor(Slow(SHORT)), predict(features(4 * 30)), callback)
    assert reasons(callback) == {"NONE: warm-up": 3}
    assert callback.stats.steps["FULL"] == 27


@pytest.mark.parametrize(("epochs", "captures"), [(1, 0), (2, 1), (-1, 1)])
def test_all_validations_of_fit_count_as_one_stage(harness, timed, epochs, captures):
    class Trains(WithMetric):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    callback = harness.callback(min_saving=0.03)
    harness.compare(
        Trains(),
        lambda trainer, module: trainer.fit(module, images(8), images(20)),
        callback,
        num_sanity_val_steps=0,
        max_epochs=epochs,
        max_steps=4,
    )
    assert callback.stats.captures == captures
    assert (too_short(callback) is not None) == (not captures)


def test_a_plain_loop_has_no_length(backend, device, timed):
    net = Slow(SHORT).to(device)
    with torch.inference_mode(), graphed(net, backend=backend) as call:
        for _ in range(5):
            call(torch.ones(4, 8, device=device))
    assert call.stats.captures == 1


def test_training_is_not_compared(harness, slow_replays):
    callback = harness.callback(min_saving=0.03, stages=["train"])
    harness.compare(
        Predictor(nn.Linear(8, 8)),
        lambda trainer, module: trainer.fit(module, features(4 * 40), features(8)),
        callback,
        max_epochs=1,
    )
    assert callback.stats.captures == 1
    assert "NONE: timed against its graph" not in reasons(callback)


@pytest.mark.usefixtures("slow_replays")
def test_pieces_of_steps_whose_value_changes_each_batch_must_save_time(harness):
    class Scaled(Predictor):
        scale = 0.0

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) * self.scale

    class AnotherScale(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
            pl_module.scale = float(batch_idx)

    callback = harness.callback(min_saving=0.03)
    harness.compare(
        Scaled(Slow(LONG)), predict(features(4 * 100)), callback, others=lambda: [AnotherScale()]
    )
    found = reasons(callback)
    if harness.backend != "cuda":
        assert found["NONE: captures do not pay"] > 50, callback.summary()
        assert found["PIECEWISE: captures do not pay"] < 30, callback.summary()
