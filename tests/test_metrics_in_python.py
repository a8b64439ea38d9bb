"""Metrics of the user's that keep something in Python: no graph loses or freezes it.

Hazard 7.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, SumMetric

from tests.harness import features


class Kept(NamedTuple):
    """What a metric keeps beside its states."""

    make: Callable[[], Any]
    update: Callable[[Any, Tensor], Any] = lambda kept, x: None
    factor: Callable[[Any], Any] = lambda kept: 1.0
    """What is read of it in an update."""
    change: Callable[[Any, float], Any] = lambda metric, value: None
    """What a callback does to the metric between two batches."""
    shown: Callable[[Any], Any] = lambda kept: 0.0
    """What the computed value has of it, as a number."""


class Meter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1


def _sum(values: Any) -> Any:
    return sum(float(value) for value in values)


def _set(key: Any) -> Callable[[Any, float], Any]:
    return lambda metric, value: metric.kept.__setitem__(key, value)


KEPT = {
    "list": Kept(list, lambda kept, x: kept.append(x.mean()), shown=_sum),
    "sizes": Kept(list, lambda kept, x: kept.append(x.shape[0]), shown=sum),
    "dict": Kept(
        lambda: {"n": 0},
        lambda kept, x: kept.update(n=kept["n"] + 1),
        shown=lambda kept: kept["n"],
    ),
    "dict of lists": Kept(
        lambda: collections.defaultdict(list),
        lambda kept, x: kept["all"].append(x.sum()),
        shown=lambda kept: _sum(kept["all"]),
    ),
    "deque": Kept(
        lambda: collections.deque(maxlen=3), lambda kept, x: kept.append(x.sum()), shown=_sum
    ),
    "counter": Kept(
        collections.Counter, lambda kept, x: kept.update(["x"]), shown=lambda kept: kept["x"]
    ),
    "set": Kept(set, lambda kept, x: kept.add(len(kept)), shown=len),
    "object": Kept(Meter, lambda kept, x: kept.add(), shown=lambda kept: kept.count),
    "array": Kept(lambda: np.zeros(1), lambda kept, x: kept.__iadd__(1), shown=_sum),
    "tensor in a dict": Kept(
        lambda: {"sum": 0.0},
        lambda kept, x: kept.update(sum=kept["sum"] + x.sum()),
        shown=lambda kept: float(kept["sum"]),
    ),
    "read in a dict": Kept(lambda: {"k": 1.0}, factor=lambda kept: kept["k"], change=_set("k")),
    "read in a list": Kept(lambda: [1.0], factor=lambda kept: kept[0], change=_set(0)),
    "length": Kept(
        lambda: [1.0], factor=len, change=lambda metric, value: metric.kept.append(value)
    ),
    "read in an object": Kept(
        lambda: types.SimpleNamespace(k=1.0),
        factor=lambda kept: kept.k,
        change=lambda metric, value: setattr(metric.kept, "k", value),
    ),
    "tensor": Kept(
        lambda: torch.ones(()),
        factor=lambda kept: kept,
        change=lambda metric, value: setattr(metric, "kept", torch.tensor(value)),
    ),
    "function": Kept(
        lambda: lambda: 1.0,
        factor=lambda kept: kept(),
        change=lambda metric, value: setattr(metric, "kept", lambda: value),
    ),
}


def metric_that(keeps: Kept) -> Metric:
    class Own(Metric):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.zeros(()), "sum")
            self.kept = keeps.make()

        def update(self, x: Tensor) -> None:
            self.total += (x * keeps.factor(self.kept)).sum()
            keeps.update(self.kept, x)

        def compute(self) -> Tensor:
            return self.total + keeps.shown(self.kept)

    return Own()


class Net(LightningModule):
    def __init__(self, metric: Metric, how: str) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)
        self.metric, self.how = metric, how
        self.all = MetricCollection({"own": metric, "sum": SumMetric(nan_strategy="disable")})

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch[0])
        if self.how == "logged":
            self.metric.update(y)
            self.log("metric", self.metric)
        elif self.how == "in a collection":
            self.all.update(y)
        elif self.how == "used":
            return self.metric(y)
        else:
            self.metric(y)
        return y

    def on_validation_epoch_end(self) -> None:
        if self.how != "logged":
            self.log("end", self.metric.compute())


class Changes(Callback):
    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, _=0) -> None:
        if batch_idx in (4, 8):  # no longer compared with eager
            self.kept.change(pl_module.metric, 1.0 + batch_idx)


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("how", ["logged", "called", "used", "in a collection"])
@pytest.mark.parametrize("name", list(KEPT))
def test_what_a_metric_keeps_in_python(harness, name, how, verify_replays):
    kept = KEPT[name]

    def job(trainer, module):
        return [trainer.validate(module, features(48), verbose=False) for _ in range(2)]

    callback = harness.callback(verify_replays=verify_replays, warmup_steps=1)
    harness.compare(
        Net(metric_that(kept), how), job, callback, lambda: [Changes(kept)], num_sanity_val_steps=0
    )
    if how == "logged":  # the update follows each replay
        assert callback.stats.steps["FULL"], callback.summary()
