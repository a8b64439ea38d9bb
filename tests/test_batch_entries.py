"""Entries that a step adds to its batch: callbacks see what eager leaves, in each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.text import CharErrorRate

from tests.harness import Batches, Harness, assert_same, predict, validate

BATCHES = 12
SETTINGS = [
    {"verify_replays": 0},
    {"verify_replays": 2},
    pytest.param({"mode": "FULL"}, marks=pytest.mark.exhaustive),
    {"mode": "PIECEWISE"},
]


class Net(LightningModule):
    def __init__(self, do: Callable[[Any, Any, Tensor], Any]) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.do = do
        self.count = 0
        self.kept: list[Any] = []

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.do(self, batch, self.net(batch["x"]))


def make(index: int) -> Any:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(index))
    return {"x": x, "y": x + 1, "inner": {"z": x * 2, "list": [x - 1]}, "name": "same"}


class Sees(Callback):
    """Keeps what a callback sees of batch and output, without a copy."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, *_: Any) -> None:
        shared = [
            name
            for name, value in batch.items()
            if value is outputs or (isinstance(outputs, dict) and value is outputs.get(name))
        ]
        self.seen.append((dict(batch), dict(batch["inner"]), list(batch), shared, outputs is batch))


def compare(harness: Harness, do: Any, keeps: bool = False, **settings: Any) -> Any:
    runs: list[list[Any]] = []

    def others() -> list[Callback]:
        runs.append([])
        return [Sees(runs[-1])]

    def job(trainer, module):
        loader = DataLoader(Batches(make, BATCHES, keeps), batch_size=None)  # type: ignore[arg-type]
        return trainer.predict(module, loader), trainer.predict(module, loader)

    callback = harness.callback(warmup_steps=1, **settings)
    harness.compare(Net(do), job, callback, others)
    assert_same(*runs)
    return callback


def adds(module: Any, batch: Any, y: Tensor) -> Any:
    batch["pred"] = y
    return y.mean()


def adds_and_returns(module: Any, batch: Any, y: Tensor) -> Any:
    batch["pred"] = y
    return {"pred": y, "mean": batch["pred"].mean()}


def returns_batch(module: Any, batch: Any, y: Tensor) -> Any:
    batch["pred"] = y
    return batch


def updates(module: Any, batch: Any, y: Tensor) -> Any:
    batch.update(pred=y, loss=y.mean())
    batch.setdefault("other", y.sum())
    return batch["loss"]


def replaces(module: Any, batch: Any, y: Tensor) -> Any:
    batch["x"] = batch["x"] * 2
    return batch["x"] + 1


def replaces_a_container(module: Any, batch: Any, y: Tensor) -> Any:
    batch["inner"] = {**batch["inner"], "y": y}
    return y


def deep(module: Any, batch: Any, y: Tensor) -> Any:
    batch["inner"]["pred"] = {"y": y, "more": [y.mean(), (y.sum(), None)]}
    return y


def swaps(module: Any, batch: Any, y: Tensor) -> Any:
    batch["x"], batch["y"] = batch["y"], batch["x"]
    return y


def aliases(module: Any, batch: Any, y: Tensor) -> Any:
    batch["same"], batch["list"] = batch["x"], batch["inner"]["list"]
    return batch["list"]


def twice(module: Any, batch: Any, y: Tensor) -> Any:
    batch["pred"] = y
    batch["pred"] = batch["pred"] * 2
    batch["pred"].add_(1)
    return y


def plain(module: Any, batch: Any, y: Tensor) -> Any:
    batch["name"] = batch["name"] + "!"
    batch["number"] = 3.5
    return y


def views(module: Any, batch: Any, y: Tensor) -> Any:
    batch["first"], batch["all"] = y[0], y
    return y[1:]


def parameter(module: Any, batch: Any, y: Tensor) -> Any:
    batch["weight"] = module.net.weight
    return y


def puts_and_takes(module: Any, batch: Any, y: Tensor) -> Any:
    batch["tmp"] = y
    return batch.pop("tmp") * 2


def keeps_too(module: Any, batch: Any, y: Tensor) -> Any:
    batch["pred"] = y
    module.kept.append(y)
    return y


def pops(module: Any, batch: Any, y: Tensor) -> Any:
    return (y[:, :1] - batch.pop("y")).mean(), batch.pop("name") == "same"


def deletes(module: Any, batch: Any, y: Tensor) -> Any:
    del batch["y"], batch["inner"]["z"]
    return y


def renames(module: Any, batch: Any, y: Tensor) -> Any:
    batch["labels"] = batch.pop("y")
    batch["pred"] = y
    return batch


def pops_a_container(module: Any, batch: Any, y: Tensor) -> Any:
    inner = batch["other"] = batch.pop("inner")
    batch["inner"] = {}
    inner.pop("z")
    inner["list"][0] = inner["list"][0] * 2
    return y


def replaces_in_a_list(module: Any, batch: Any, y: Tensor) -> Any:
    batch["inner"]["list"][0] = y
    return y


def swaps_into_a_list(module: Any, batch: Any, y: Tensor) -> Any:
    batch["inner"]["list"][0], batch["y"] = batch.pop("y"), batch["inner"]["list"][0]
    return y


def writes_and_pops(module: Any, batch: Any, y: Tensor) -> Any:
    labels = batch.pop("y")
    labels[labels > 1] = 0
    return y.sum() + labels.sum(), labels


FULL = [
    *(pops, deletes, renames, replaces_in_a_list, writes_and_pops),
    *(adds, adds_and_returns, returns_batch, updates, replaces, replaces_a_container, deep, swaps),
    *(aliases, twice, plain, views, parameter, puts_and_takes),
]


def moves(module: Any, batch: Any, y: Tensor) -> Any:
    batch["x"] = batch.pop("x")
    return y


def appends(module: Any, batch: Any, y: Tensor) -> Any:
    batch["inner"]["list"].append(y)
    return y


def marks(module: Any, batch: Any, y: Tensor) -> Any:
    batch["pred"] = y
    batch["x"].mark = 1
    return y


def shortens(module: Any, batch: Any, y: Tensor) -> Any:
    batch["inner"]["list"].pop()
    return y


def odd_key(module: Any, batch: Any, y: Tensor) -> Any:
    batch["pred", 1] = y
    return y


def counts(module: Any, batch: Any, y: Tensor) -> Any:
    module.count += 1
    batch["number"] = module.count
    return y


def odd_value(module: Any, batch: Any, y: Tensor) -> Any:
    batch["part"] = slice(0, 3)
    return y


def shares(module: Any, batch: Any, y: Tensor) -> Any:
    batch["pred"] = made = {"y": y}
    return {"pred": made}


def shares_twice(module: Any, batch: Any, y: Tensor) -> Any:
    batch["one"] = batch["two"] = [y]
    return y


NOT_FULL = [
    moves,
    appends,
    shortens,
    swaps_into_a_list,
    pops_a_container,
    marks,
    odd_key,
    counts,
    odd_value,
    shares,
    shares_twice,
]


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("do", FULL)
def test_entries_that_a_replay_sets(harness: Harness, do: Any, settings: Any):
    callback = compare(harness, do, **settings)
    is_full = settings != {"mode": "PIECEWISE"}
    assert bool(callback.stats.steps["FULL"]) is is_full, callback.summary()


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("do", NOT_FULL)
def test_changes_of_the_batch_that_keep_a_step_eager(harness: Harness, do: Any, settings: Any):
    callback = compare(harness, do, **settings)
    assert not callback.stats.steps["FULL"], callback.summary()


@pytest.mark.in_turn("verify")
@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("do", [*FULL, keeps_too])
def test_batches_that_come_again_as_they_were_left(harness: Harness, do: Any, verify: int):
    compare(harness, do, keeps=True, verify_replays=verify)


def test_outputs_that_are_not_copied(harness: Harness):
    compare(harness, adds, copy_outputs=False, verify_replays=0)


def test_a_metric_that_is_updated_late_reads_the_batch(harness: Harness):
    class Reads(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)
            self.mean, self.errors = MeanMetric(), CharErrorRate()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            batch["pred"] = self.net(batch["x"])
            self.mean.update(batch["pred"])
            self.errors.update([batch["name"]], ["some"])
            self.log_dict({"mean": self.mean, "errors": self.errors})

        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            self.log("end", batch["pred"].sum())

    loader = DataLoader(Batches(make, BATCHES), batch_size=None)  # type: ignore[arg-type]
    callback = harness.compare(Reads(), validate(loader))
    assert callback.stats.steps["FULL"], callback.summary()


def test_entries_that_only_some_batches_get(harness: Harness):
    class Some(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            y = self.net(batch["x"])
            if batch_idx % 3 == 0:
                batch["pred"] = y
            return y, batch.get("pred")

    loader = DataLoader(Batches(make, BATCHES), batch_size=None)  # type: ignore[arg-type]
    harness.compare(Some(adds), predict(loader), harness.callback(warmup_steps=1))


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("detaches", [True, False])
def test_entries_in_training(harness: Harness, detaches: bool, verify: int):
    class Trains(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)
            self.seen: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            y = self.net(batch["x"])
            batch["pred"] = y.detach() if detaches else y
            return y.square().mean()

        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            self.seen.append((batch["pred"].detach(), batch["pred"].requires_grad))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def job(trainer, module):
        trainer.fit(module, DataLoader(Batches(make, BATCHES), batch_size=None))  # type: ignore[arg-type]
        return module.seen, [parameter.detach().clone() for parameter in module.parameters()]

    callback = harness.callback(stages=["train"], verify_replays=verify, warmup_steps=1)
    harness.compare(Trains(), job, callback, max_epochs=1)


@pytest.mark.parametrize(
    "settings", [*SETTINGS[:2], {"capture_sizes": [8], "verify_tolerance": "close"}], ids=str
)
def test_a_batch_that_is_a_list(harness: Harness, settings: Any):
    class Takes(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)
            self.seen: list[Any] = []

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0] = batch[0] * 2
            if isinstance(batch[1], dict):
                return self.net(batch[0]) - batch[1].pop("y")
            return self.net(batch[0])

        def on_predict_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            self.seen.append([batch[0], dict(batch[1])])

    def make_list(index: int) -> Any:
        x = torch.randn(6 + index % 2, 3, generator=torch.Generator().manual_seed(index))
        return [x, {"y": x[:, :1] + 1, "z": x + 2}]

    def job(trainer, module):
        loader = DataLoader(Batches(make_list, BATCHES), batch_size=None)  # type: ignore[arg-type]
        return trainer.predict(module, loader), module.seen

    callback = harness.compare(Takes(), job, harness.callback(warmup_steps=1, **settings))
    if "capture_sizes" not in settings:
        assert callback.stats.steps["FULL"], callback.summary()
