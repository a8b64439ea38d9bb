"""Tensors of its batch that a step writes to: everybody sees what eager leaves there.

Hazard 35.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from cg_lightning import graphed
from tests.harness import Batches, Harness, assert_same

BATCHES = 12
SETTINGS = [
    {"verify_replays": 0},
    {"verify_replays": 2},
    pytest.param({"mode": "FULL"}, marks=pytest.mark.exhaustive),
    {"mode": "PIECEWISE"},
]


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Net(LightningModule):
    def __init__(self, do: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.net, self.doubles = nn.Linear(3, 3), Doubles()
        self.do = do
        self.mean, self.kept_values = MeanMetric(), CatMetric()
        self.accuracy, self.perplexity = MulticlassAccuracy(3), Perplexity(ignore_index=-100)
        self.seen: list[Any] = []
        self.last: Any = None

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.do(self, batch)


@dataclasses.dataclass
class Inner:
    z: Tensor


def make(index: int, device: str = "cpu") -> Any:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(4, 3, generator=generator)
    labels = torch.randint(0, 3, (4,), generator=generator)
    labels[torch.rand(4, generator=generator) < 0.3] = -100
    made = {"x": x, "labels": labels, "inner": Inner(x * 2), "list": [x - 1]}
    made |= {"turned": torch.randn(3, 4, generator=generator).t()}
    made |= {"wide": torch.ones(1, 3).expand(4, 3), "none": torch.ones(0, 3)}
    return move_data_to_device(made, device)


class Sees(Callback):
    """Keeps the batches of a run as they are after each step, and by reference."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_: Any) -> None:
        flat = {
            **{name: value for name, value in batch.items() if isinstance(value, Tensor)},
            "z": batch["inner"].z,
            "first": batch["list"][0],
        }
        copies = {name: value.clone() for name, value in flat.items()}
        shared = [name for name, value in flat.items() if value is outputs]
        shapes = [(tuple(value.shape), value.stride()) for value in flat.values()]
        self.seen.append((flat, copies, shared, shapes))


def compare(harness: Harness, do: Any, keeps: bool = False, module: Any = None, **settings: Any):
    runs: list[list[Any]] = []

    def others() -> list[Callback]:
        runs.append([])
        return [Sees(runs[-1])]

    def job(trainer, module):
        loader = DataLoader(Batches(make, BATCHES, keeps), batch_size=None)  # type: ignore[arg-type]
        results = [trainer.validate(module, loader, verbose=False) for _ in range(2)]
        return results, module.seen, module.last

    callback = harness.callback(**{"warmup_steps": 1, **settings})
    harness.compare(module or Net(do), job, callback, others)
    assert_same(*runs)
    return callback


def replaces_labels(self: Net, batch: Any) -> Any:
    labels = batch["labels"]
    labels[labels == -100] = 0
    logits = self.net(batch["x"])
    self.log("accuracy", self.accuracy(logits, labels))
    self.log("loss", nn.functional.cross_entropy(logits, labels))


def replaces_labels_and_returns_them(self: Net, batch: Any) -> Any:
    batch["labels"].masked_fill_(batch["labels"] == -100, 1)
    return batch["labels"]


def normalizes(self: Net, batch: Any) -> Any:
    x = batch["x"]
    x.sub_(x.mean()).div_(x.std())
    return self.net(x)


def writes_to_a_view(self: Net, batch: Any) -> Any:
    before = batch["x"].clone()
    batch["x"][1:, 0] = 7
    batch["x"].view(-1)[:2].neg_()
    return before, batch["x"][0], self.net(batch["x"])


def writes_by_data(self: Net, batch: Any) -> Any:
    y = self.net(batch["x"])
    batch["x"].data.add_(y)
    batch["x"].detach().mul_(3)
    return y


def writes_deep(self: Net, batch: Any) -> Any:
    batch["inner"].z.add_(1)
    batch["list"][0].zero_()
    torch.add(batch["x"], 1, out=batch["list"][0])
    return batch["inner"].z, batch["list"][0].sum()


def logs_before(self: Net, batch: Any) -> Any:
    self.log("first", batch["x"][0, 0])
    self.log("mean", batch["x"].mean(), on_step=True, on_epoch=True)
    batch["x"].mul_(-2)
    self.log("after", batch["x"][0, 0])


def fills_too(self: Net, batch: Any) -> Any:
    batch["x"].mul_(2)
    batch["pred"] = self.net(batch["x"])
    batch["old"] = batch["x"]
    return batch["pred"].sum()


def fills_then_writes(self: Net, batch: Any) -> Any:
    old = batch["x"]
    batch["x"] = old + 1
    old.mul_(2)
    batch["x"].mul_(3)
    return self.net(batch["x"])


def keeps_them(self: Net, batch: Any) -> Any:
    batch["x"].mul_(2)
    self.seen.append(batch["x"])
    self.seen.append(batch["x"] + 1)
    batch["x"].add_(1)


def keeps_the_last(self: Net, batch: Any) -> Any:
    batch["x"].mul_(2)
    self.last = batch["x"]
    return self.net(batch["x"])


def writes_in_a_submodule(self: Net, batch: Any) -> Any:
    return self.net(self.doubles(batch["x"]))


def updates_metrics(self: Net, batch: Any) -> Any:
    self.mean.update(batch["x"])
    batch["x"].mul_(2)
    self.mean.update(batch["x"])
    self.kept_values.update(batch["x"].flatten())
    self.log("mean", self.mean)


def updates_late(self: Net, batch: Any) -> Any:
    batch["labels"][0] = 1
    self.perplexity.update(self.net(batch["x"])[None], batch["labels"][None])
    self.log("perplexity", self.perplexity)


def reads_before(self: Net, batch: Any) -> Any:
    if (batch["labels"] == -100).any():
        batch["labels"].clamp_(min=0)
    return self.net(batch["x"]) * batch["labels"][:, None]


def reads_after(self: Net, batch: Any) -> Any:
    batch["labels"].clamp_(min=0)
    number = int(batch["labels"].sum())
    return self.net(batch["x"]) * number


def exchanges(self: Net, batch: Any) -> Any:
    kept = batch["x"].clone()
    batch["x"].copy_(batch["inner"].z)
    batch["inner"].z.copy_(kept)
    return self.net(batch["x"])


def draws(self: Net, batch: Any) -> Any:
    batch["x"].add_(torch.randn_like(batch["x"]))
    batch["inner"].z.normal_()
    return self.net(nn.functional.dropout(batch["x"], inplace=True))


FULL = [
    *(replaces_labels, replaces_labels_and_returns_them, normalizes, writes_to_a_view),
    *(writes_by_data, writes_deep, logs_before, fills_too, fills_then_writes, keeps_them),
    *(keeps_the_last, writes_in_a_submodule, reads_before, reads_after, exchanges, draws),
]


def writes_to_what_is_not_dense(self: Net, batch: Any) -> Any:
    return self.net(batch["turned"].add_(1))


def writes_by_numpy(self: Net, batch: Any) -> Any:
    batch["x"].add_(1)
    np.asarray(batch["list"][0].cpu())[:] = 5
    return self.net(batch["x"] + batch["list"][0])


def changes_the_shape(self: Net, batch: Any) -> Any:
    batch["x"].add_(1).unsqueeze_(0)
    return self.net(batch["x"])


def changes_the_shape_only(self: Net, batch: Any) -> Any:
    batch["x"].t_()
    return self.net(batch["x"].t())


def resizes(self: Net, batch: Any) -> Any:
    y = self.net(batch["x"])
    batch["x"].resize_(2, 3)
    return y


def gets_other_memory(self: Net, batch: Any) -> Any:
    y = self.net(batch["x"])
    batch["x"].data = y.clone()
    batch["x"].add_(1)
    return y


def sets_other_memory(self: Net, batch: Any) -> Any:
    y = self.net(batch["x"])
    batch["x"].set_(y.clone())
    return y


NOT_FULL = [
    *(writes_to_what_is_not_dense, changes_the_shape, changes_the_shape_only),
    *(resizes, gets_other_memory, sets_other_memory),
]


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("do", FULL)
def test_tensors_that_a_replay_writes_back(harness: Harness, do: Any, settings: Any):
    callback = compare(harness, do, **settings)
    is_full = settings != {"mode": "PIECEWISE"}
    assert bool(callback.stats.steps["FULL"]) is is_full, callback.summary()


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("do", [*NOT_FULL, updates_metrics, updates_late, writes_by_numpy])
def test_other_writes(harness: Harness, do: Any, settings: Any):
    callback = compare(harness, do, **settings)
    assert do not in NOT_FULL or not callback.stats.steps["FULL"], callback.summary()


@pytest.mark.in_turn("verify")
@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("do", [*FULL, *NOT_FULL[:1]])
def test_batches_that_come_again_as_they_were_left(harness: Harness, do: Any, verify: int):
    compare(harness, do, keeps=True, verify_replays=verify)


@pytest.mark.in_turn("verify")
@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("do", FULL)
def test_batches_that_the_loader_makes_on_the_device(
    harness: Harness, device: torch.device, do: Any, verify: int
):
    """Without a copy by Lightning, the loader's own tensors are written."""

    def job(trainer, module):
        batches = Batches(functools.partial(make, device=str(device)), BATCHES, keeps=True)
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        for _ in range(2):
            trainer.validate(module, loader, verbose=False)
        return [batches[index] for index in range(BATCHES)]

    callback = harness.callback(warmup_steps=1, verify_replays=verify)
    harness.compare(Net(do), job, callback)
    assert callback.stats.steps["FULL"], callback.summary()


@pytest.mark.parametrize("verify", [0, 2])
def test_a_batch_that_the_module_holds(harness: Harness, device: torch.device, verify: int):
    """What is written is read by another name in the same step."""

    class Holds(Net):
        def __init__(self) -> None:
            super().__init__(replaces_labels)
            self.register_buffer("table", torch.ones(4, 3))

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            batch.add_(1)
            return self.net(batch) + self.table

    def job(trainer, module):
        module.to(device)
        batches = [module.table] * BATCHES
        return trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)

    callback = harness.callback(warmup_steps=1, verify_replays=verify)
    harness.compare(Holds(), job, callback)
    assert not callback.stats.steps["FULL"], callback.summary()


@pytest.mark.parametrize("verify", [0, 2])
def test_captured_ahead(harness: Harness, verify: int):
    settings = {"verify_replays": verify, "capture_ahead": True}
    callback = compare(harness, replaces_labels, **settings)
    assert callback.stats.steps["FULL"], callback.summary()


@pytest.mark.parametrize("verify", [0, 2])
def test_a_batch_that_is_padded_is_written_as_in_eager(harness: Harness, verify: int):
    class Predicts(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch["x"]
            self.seen.append(x)
            return self.net(x.mul_(2))

    loader = DataLoader(Batches(make, BATCHES), batch_size=None)  # type: ignore[arg-type]
    settings = {"capture_sizes": [8], "verify_tolerance": "close", "verify_replays": verify}
    callback = harness.callback(warmup_steps=1, **settings)
    harness.compare(
        Predicts(normalizes),
        lambda trainer, module: (trainer.predict(module, loader), module.seen),
        callback,
    )


def mixes(self: Any, batch: Any) -> Any:
    batch["x"].mul_(0.5).add_(batch["x"].flip(0), alpha=0.5)
    y = self.net(batch["x"])
    batch["labels"].clamp_(min=0)
    return nn.functional.cross_entropy(y, batch["labels"])


def writes_what_backward_needs_not(self: Any, batch: Any) -> Any:
    loss = self.net(batch["x"] * 1).square().mean()
    batch["x"].zero_()
    return loss


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("do", [mixes, writes_what_backward_needs_not])
def test_in_training(harness: Harness, do: Any, verify: int):
    class Trains(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 3)
            self.seen: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return do(self, batch)

        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            self.seen.append((batch["x"].clone(), batch["labels"].clone(), outputs["loss"]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def job(trainer, module):
        trainer.fit(module, DataLoader(Batches(make, BATCHES), batch_size=None))  # type: ignore[arg-type]
        return module.seen, [parameter.detach().clone() for parameter in module.parameters()]

    callback = harness.callback(stages=["train"], verify_replays=verify, warmup_steps=1)
    harness.compare(Trains(), job, callback, max_epochs=2)
    assert callback.stats.steps["FULL"], callback.summary()


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_a_trainer(backend: str, device: torch.device, context: Any, verify: int):
    net = nn.Sequential(Doubles(), nn.Linear(3, 3)).to(device)
    xs = [torch.full((4, 3), float(index), device=device) for index in range(8)]
    with context(), graphed(net, backend=backend, verify_replays=verify, min_saving=0) as run:
        outputs = [run(x) for x in xs]
        assert_same(outputs, [net[1](x) for x in xs])
    assert [x[0, 0].item() for x in xs] == [2.0 * index for index in range(8)]
