"""Garbage while a step is watched: old objects stay, and the step does not see it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.diagnosis.garbage import YoungGarbageOnly
from cg_lightning.diagnosis.watcher import StepWatcher
from tests.harness import assert_same, features, predict
from tests.models import Predictor


class Uses(Predictor):
    def __init__(self, use: Callable[[Tensor], Any]) -> None:
        super().__init__(nn.Linear(8, 8))
        self.use = use

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.use(self.net(batch[0]))


class Cycle:
    """An object that only the collector of garbage can free."""

    def __init__(self) -> None:
        self.itself = self


def _read(x: Tensor) -> Tensor:
    return x * gc.get_threshold()[1] * gc.get_threshold()[2]


def _set(x: Tensor) -> Tensor:
    gc.set_threshold(*gc.get_threshold())
    return x * gc.get_threshold()[1] * gc.get_threshold()[2]


@pytest.mark.parametrize("use", [_read, _set])
def test_a_watched_step_sees_the_collector_of_eager(harness, use):
    module, batches = Uses(use), features(24, 8)
    before = gc.get_threshold()
    eager = predict(batches)(harness.trainer(), module)
    for mode in ("FULL_AND_PIECEWISE", "PIECEWISE"):
        callback = harness.callback(mode=mode, warmup_steps=1)
        assert_same(predict(batches)(harness.trainer(callback), module), eager)
        assert gc.get_threshold() == before


@pytest.mark.parametrize("raises", [False, True])
def test_old_objects_are_not_searched(raises):
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    kept = []

    def step() -> None:
        kept.extend([each] for each in range(100_000))
        if raises:
            raise ValueError("of the user's")

    module, before = Uses(_read), gc.get_threshold()
    watcher = StepWatcher(module, RecorderBackend(torch.device("cpu")), effects=None)
    gc.callbacks.append(note)
    try:
        if raises:
            with pytest.raises(ValueError, match="of the user's"):
                watcher.watch(step, None)
        else:
            watcher.watch(step, None)
        assert 0 in generations
        assert 2 not in generations
        generations.clear()
        step_again = [[each] for each in range(100_000)]
        assert 1 in generations, len(step_again)  # the note tells
    finally:
        gc.callbacks.remove(note)
    assert gc.get_threshold() == before


def test_young_garbage_is_collected():
    watcher = StepWatcher(Uses(_read), RecorderBackend(torch.device("cpu")), effects=None)
    cycles, _ = watcher.watch(lambda: [weakref.ref(Cycle()) for _ in range(5000)], None)
    assert sum(each() is not None for each in cycles) < 2500


def test_it_ends_once():
    before, garbage = gc.get_threshold(), YoungGarbageOnly()
    with garbage:
        assert gc.get_threshold() != before
        garbage.end()
        gc.set_threshold(before[0] + 1, *before[1:])
    assert gc.get_threshold() == (before[0] + 1, *before[1:])
    gc.set_threshold(*before)


class Plain:
    """What only an attribute keeps alive."""


class Refers(nn.Module):
    """Asks whether something is alive."""

    def __init__(
        self,
        refer: Callable[[Any], Any],
        is_alive: Callable[[Any], bool],
        make: Callable[[], Any],
        reads: bool,
    ) -> None:
        super().__init__()
        self.linear, self.refer, self.is_alive = nn.Linear(8, 8), refer, is_alive
        self.make, self.reads = make, reads

    def begin(self) -> None:
        self.held = [self.make()]
        self.reference = self.refer(self.held[0])

    def forward(self, x: Tensor) -> Tensor:
        more = len(self.held) if self.reads else 0
        return self.linear(x) * (1.0 if self.is_alive(self.reference) else 3.0) + more


class Drops(Predictor):
    def on_predict_epoch_start(self) -> None:
        self.net.begin()

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 5:
            self.net.held.clear()


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("reads", [False, True], ids=["alone", "and what keeps it"])
@pytest.mark.parametrize("make", [Plain, lambda: torch.ones(4)], ids=["object", "tensor"])
@pytest.mark.parametrize(
    ("refer", "is_alive"),
    [
        (weakref.ref, lambda reference: reference() is not None),
        (lambda held: weakref.WeakSet([held]), lambda held: len(held) > 0),
        (lambda held: weakref.WeakValueDictionary(a=held), lambda held: "a" in held),
    ],
    ids=["reference", "set", "dictionary"],
)
def test_what_the_user_drops_dies_at_once(
    harness, refer, is_alive, make, reads, mode, verify_replays
):
    """A watched step leaves nothing behind that waits for the collector."""
    callback = harness.callback(mode=mode, verify_replays=verify_replays)
    gc.disable()
    try:
        harness.compare(
            Drops(Refers(refer, is_alive, make, reads)), predict(features(40)), callback
        )
    finally:
        gc.enable()


def in_object(held: Any) -> Any:
    holder = Plain()
    holder.parent = weakref.ref(held)
    return holder


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
def test_what_an_object_refers_to_dies_at_once(harness, mode):
    module = Drops(Refers(in_object, lambda holder: holder.parent() is not None, Plain, False))
    callback = harness.callback(mode=mode, verify_replays=0)
    harness.compare(module, predict(features(40)), callback)
    assert callback.stats.replays > 0, callback.summary()


def test_a_step_that_raises_leaves_nothing_behind():
    module = Uses(_read)
    module.held = Plain()
    held = weakref.ref(module.held)
    watcher = StepWatcher(module, RecorderBackend(torch.device("cpu")), effects=None)

    def step() -> None:
        raise ValueError(str(module.held))

    gc.disable()
    try:
        with pytest.raises(ValueError, match="Plain"):
            watcher.watch(step, None)
        del module.held
        assert held() is None
    finally:
        gc.enable()


class CountsReferences(Predictor):
    """Another weak reference to what it keeps is made between two steps."""

    def __init__(self, number: Callable[[Any], int]) -> None:
        super().__init__(nn.Linear(8, 8))
        self.number = number

    def on_predict_epoch_start(self) -> None:
        self.held, self.references = Plain(), []

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 5:
            self.references.append(weakref.WeakSet([self.held]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * (1 + self.number(self.held))


@pytest.mark.parametrize(
    "number", [weakref.getweakrefcount, lambda held: len(weakref.getweakrefs(held))]
)
def test_a_step_may_count_weak_references(harness, number):
    """No guard compares their number."""
    callback = harness.callback(verify_replays=0)
    harness.compare(CountsReferences(number), predict(features(40)), callback)
    assert callback.stats.steps["FULL"] == 0, callback.summary()
