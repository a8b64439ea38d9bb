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
