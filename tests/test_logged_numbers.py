"""``self.log`` of Python numbers: FULL, if the number is explained by what is guarded."""

from __future__ import annotations

import datetime
import gc
import os
import random
import time
import uuid
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from cg_lightning.core.causes import Cause
from tests.harness import features, loader, validate
from tests.models import Body, Predictor

WEIGHT = 0.3
START = time.perf_counter()


class Logs(Predictor):
    """Logs what its function says."""

    step: Any = None

    def __init__(self) -> None:
        super().__init__(Body())
        self.scale = 0.7
        self.seen = 0
        self.losses: list[float] = []
        self.mean = MeanMetric()
        self.accuracy = MulticlassAccuracy(8)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.net(batch[0])
        self.log("x", x.mean())
        type(self).step(self, x)
        return x


def floats(self, x):
    self.log("tenth", 0.1)
    self.log("third", 1 / 3, on_step=True, on_epoch=True)
    self.log("infinite", float("inf"))


def not_a_number(self, x):
    self.log("nan", float("nan"))


def integers(self, x):
    self.log("three", 3)
    self.log("yes", True, prog_bar=True)
    self.log("many", 2**40 + 1, reduce_fx="sum")


def lengths(self, x):
    self.log("size", len(x))
    self.log("width", float(x.shape[1]), batch_size=2)


def attributes(self, x):
    self.log("scale", self.scale)
    self.log("weight", WEIGHT, reduce_fx="max")


def of_trainer(self, x):
    self.log("epoch", self.current_epoch)
    self.log("steps", float(self.trainer.global_step))


def dictionaries(self, x):
    self.log_dict({"one": 1.0, "mean": x.mean(), "two": 2}, on_step=False, on_epoch=True)


def by_keyword(self, x):
    self.log(name="one", value=1.5, add_dataloader_idx=False)


def sums(self, x):
    self.log("weighted", 2 * self.scale + WEIGHT * len(x), sync_dist=False)


EXPLAINED = [
    *(floats, integers, lengths, attributes, of_trainer, dictionaries, by_keyword),
    sums,
]


def item(self, x):
    self.log("sum", x.sum().item())


def converted(self, x):
    self.log("sum", float(x.sum()))


def clock(self, x):
    self.log("seconds", time.perf_counter() - START)


def wall_clock(self, x):
    self.log("minutes", time.time() // 60)


def date(self, x):
    self.log("year", float(datetime.datetime.now().year))


def memory(self, x):
    self.log("bytes", float(torch.cuda.memory_allocated()))


def objects(self, x):
    self.log("objects", float(len(gc.get_objects()) > 10))


def entropy(self, x):
    self.log("odd", float(uuid.uuid4().int >= 0))
    self.log("bytes", float(len(os.urandom(3))))


def drawn(self, x):
    self.log("random", random.random())


def drawn_by_numpy(self, x):
    self.log("random", float(np.random.rand()))


def counted(self, x):
    self.seen += 1
    self.log("seen", self.seen)


def collected(self, x):
    self.losses.append(1.0)
    self.log("collected", len(self.losses))


def updates(self, x):
    self.mean.update(x.mean())
    self.log("updates", float(self.mean._update_count))


def updates_of_a_property(self, x):
    self.mean.update(x.mean())
    self.log("updates", self.mean.update_count)


def large(self, x):
    self.log("large", 2**60 + 1)


def numpy_number(self, x):
    self.log("three", np.float64(3))


OTHERS = [
    *(item, converted, clock, wall_clock, date, memory, objects, entropy, drawn, drawn_by_numpy),
    *(counted, collected, updates, updates_of_a_property, large, numpy_number),
]
SAME_EACH_TIME = [each for each in OTHERS if each is not clock]


def module_with(step: Any) -> Logs:
    return type("Steps", (Logs,), {"step": step})()


def test_not_a_number(harness):
    def job(trainer, module):
        trainer.validate(module, features(40), verbose=False)

    callback = harness.compare(module_with(not_a_number), job)
    assert callback.stats.steps["FULL"] == 7, callback.summary()


@pytest.mark.parametrize("step", EXPLAINED, ids=lambda step: step.__name__)
@pytest.mark.parametrize(("mode", "verify"), [("FULL", 2), ("FULL_AND_PIECEWISE", 0)])
def test_explained_numbers(harness, step, mode, verify):
    callback = harness.callback(mode=mode, verify_replays=verify)
    harness.compare(module_with(step), validate(features(40)), callback)
    assert callback.stats.steps["FULL"] == 7, callback.summary()


def seeded(trainer, module):
    random.seed(1)
    np.random.seed(1)
    return trainer.validate(module, features(40), verbose=False)


@pytest.mark.parametrize("step", SAME_EACH_TIME, ids=lambda step: step.__name__)
@pytest.mark.parametrize("verify", [0, 2])
def test_other_numbers(harness, step, verify):
    if step is memory and harness.backend == "cuda":
        pytest.skip("graphs take memory of the device, so its number differs")
    callback = harness.callback(verify_replays=verify)
    harness.compare(module_with(step), seeded, callback)


@pytest.mark.parametrize(
    "step", [converted, clock, date, memory, objects, entropy], ids=lambda step: step.__name__
)
def test_numbers_that_nobody_can_guard_are_no_graph(harness, step):
    callback = harness.callback(mode="FULL", verify_replays=0)
    validate(features(40))(harness.trainer(callback), module_with(step))
    assert callback.stats.steps["FULL"] == 0, callback.summary()
    (reason,) = {record.reason for record in callback.stats.reasons if record.steps > 3}
    assert reason.kind in (Cause.HOST_SYNC, Cause.OPAQUE)


def test_a_number_that_a_hook_changes(harness):
    class Changes(Logs):
        def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0):
            self.scale = float(batch_idx % 2)

        step = attributes

    callback = harness.compare(Changes(), validate(features(80)))
    assert callback.stats.steps["FULL"] >= 10, callback.summary()


def test_an_override_of_log(harness):
    class Overrides(Logs):
        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            super().log(f"my_{name}", value * 2, *args, **kwargs)

        step = floats

    callback = harness.compare(Overrides(), validate(features(40)))
    assert callback.stats.steps["FULL"] == 7, callback.summary()


def test_a_default_dtype_of_the_users(harness):
    torch.set_default_dtype(torch.float64)
    try:
        callback = harness.callback()
        harness.compare(module_with(floats), validate(features(40)), callback)
        assert callback.stats.steps["FULL"] == 7, callback.summary()
    finally:
        torch.set_default_dtype(torch.float32)


def test_numbers_that_the_batch_decides(harness):
    """A count of the batch is a host value: part of what selects the graph, and so is its log."""

    class Counts(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            count = int((batch[1] > 0).sum().item())
            self.log("count", count)
            if batch_idx < count:
                x = x * 2
            self.log("x", x.mean())
            return x

    flags = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]] * 8).flatten()
    data = loader(torch.randn(96, 8), flags)
    callback = harness.compare(Counts(), validate(data))
    assert callback.stats.steps["FULL"] >= 10, callback.summary()
