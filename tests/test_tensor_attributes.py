"""What steps read of tensors beside their values, and of the process: against eager."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from cg_lightning import diagnose
from cg_lightning.core.causes import Cause
from tests.harness import Harness, features, validate


class Net(LightningModule):
    """Its step calls ``use`` with the module and what its layers give."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.use, self.first, self.last = use, nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("table", torch.ones(8))
        self.held = torch.ones(8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.last(self.first(batch[0])).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.use(self, self.last(self.first(batch[0])))
        self.log("mean", output.mean())
        return output


class Changes(Callback):
    """Changes something before each batch; it has two values."""

    def __init__(self, change: Callable[[Any, int], Any]) -> None:
        self.change = change

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        self.change(pl_module, batch_idx // 4 + 1)


def sets(name: str, attribute: str, make: Callable[[int], Any]) -> Callable[[Any, int], None]:
    def change(module: Any, value: int) -> None:
        setattr(module.get_parameter(name), attribute, make(value))

    return change


def sets_where_there_was_none(module: Any, value: int) -> None:
    if value > 1:
        module.first.weight.scale = float(value)


def appends(module: Any, value: int) -> None:
    if not hasattr(module.first.weight, "scales"):
        module.first.weight.scales = []
    if len(module.first.weight.scales) < value:
        module.first.weight.scales.append(float(value))


def sets_variable(_: Any, value: int) -> None:
    os.environ["CG_LIGHTNING_SCALE"] = str(value)


def sets_tensor(module: Any, value: int) -> None:
    if getattr(module.last.bias, "value", 0) != value:
        module.last.bias.value = value
        module.last.bias.scale = torch.full((8,), float(value), device=module.device)


GUARDED: dict[str, tuple[Any, Any]] = {
    "a number of a parameter": (
        sets("first.weight", "scale", float),
        lambda self, y: y * self.first.weight.scale,
    ),
    "a number of a buffer": (
        lambda module, value: setattr(module.table, "scale", float(value)),
        lambda self, y: y * self.table.scale,
    ),
    "a number of a tensor in an attribute": (
        lambda module, value: setattr(module.held, "scale", float(value)),
        lambda self, y: y * self.held.scale,
    ),
    "a tensor of a parameter": (
        sets_tensor,
        lambda self, y: y * self.last.bias.scale,
    ),
    "a list of a parameter": (appends, lambda self, y: y * sum(self.first.weight.scales)),
    "what is not there at first": (
        sets_where_there_was_none,
        lambda self, y: y * getattr(self.first.weight, "scale", 1.0),
    ),
    "what a tensor in an attribute has not at first": (
        lambda module, value: value > 1 and setattr(module.held, "scale", float(value)),
        lambda self, y: y * getattr(self.held, "scale", 1.0),
    ),
    "os.environ": (sets_variable, lambda self, y: y * float(os.environ["CG_LIGHTNING_SCALE"])),
    "os.getenv": (sets_variable, lambda self, y: y * float(os.getenv("CG_LIGHTNING_SCALE", "1"))),
    "in os.environ": (
        lambda _, value: sets_variable(_, value) if value > 1 else None,
        lambda self, y: y * (2 if "CG_LIGHTNING_SCALE" in os.environ else 1),
    ),
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CG_LIGHTNING_SCALE", "0")
    monkeypatch.delenv("CG_LIGHTNING_SCALE")


def compare(harness: Harness, use: Any, change: Any, mode: str, verify_replays: int) -> Any:
    callback = harness.callback(mode=mode, verify_replays=verify_replays, warmup_steps=1)

    def job(trainer: Any, module: Any) -> Any:
        os.environ.pop("CG_LIGHTNING_SCALE", None)
        return validate(features(48))(trainer, module)

    others: Callable[[], Sequence[Callback]] = lambda: [Changes(change)]
    return harness.compare(Net(use), job, callback, others)


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
@pytest.mark.parametrize("name", GUARDED)
def test_values_are_guarded(harness: Harness, name: str, mode: str, verify_replays: int) -> None:
    """Hazard 7."""
    change, use = GUARDED[name]
    callback = compare(harness, use, change, mode, verify_replays)
    assert callback.stats.steps[mode] >= 4, callback.summary()


class Uses(nn.Module):
    """A submodule that reads an attribute of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.weight.scale


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_in_a_submodule(harness: Harness, mode: str) -> None:
    """Hazard 7."""
    module = Net(lambda self, y: self.part(y))
    module.part = Uses()
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    others = lambda: [Changes(sets("part.weight", "scale", float))]
    harness.compare(module, validate(features(48)), callback, others)
    assert callback.stats.steps[mode] >= 4, callback.summary()


class OfBatch(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.first(batch["x"][0]) * batch["x"][0].scale


class SetsOnBatch(Callback):
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        batch["x"][0].scale = batch_idx // 4


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_attributes_of_tensors_of_the_batch(harness: Harness, verify_replays: int) -> None:
    """Hazard 3: no key has them."""
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": [torch.randn(4, 8, generator=generator)]} for _ in range(12)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    callback = harness.callback(verify_replays=verify_replays, warmup_steps=1)
    harness.compare(OfBatch(max), validate(loader), callback, lambda: [SetsOnBatch()])
    assert callback.stats.steps["FULL"] == 0
    assert callback.stats.steps["PIECEWISE"] >= 8, callback.summary()


def sets_gradients(module: Any, value: int) -> None:
    module.first.weight.grad = torch.full_like(module.first.weight, float(value))


def touches(folder: Path) -> Callable[[Any, int], None]:
    def change(_: Any, value: int) -> None:
        path = folder / "flag"
        path.touch() if value > 1 else path.unlink(missing_ok=True)

    return change


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", ["gradient", "file", "folder", "threads", "all variables"])
def test_what_nobody_can_guard(
    harness: Harness, tmp_path: Path, monkeypatch, name: str, verify_replays: int
) -> None:
    """Hazard 7."""
    for folder in ("1", "22"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    change, use = {
        "gradient": (sets_gradients, lambda self, y: y + self.first.weight.grad.mean()),
        "file": (
            touches(tmp_path),
            lambda self, y: y * (2 if (tmp_path / "flag").exists() else 1),
        ),
        "folder": (
            lambda _, value: os.chdir(tmp_path / ["1", "22", "22"][value - 1]),
            lambda self, y: y * len(os.getcwd()),
        ),
        "threads": (
            lambda _, value: torch.set_num_threads(value),
            lambda self, y: y * torch.get_num_threads(),
        ),
        "all variables": (sets_variable, lambda self, y: y * len(dict(os.environ))),
    }[name]
    try:
        callback = compare(harness, use, change, "FULL_AND_PIECEWISE", verify_replays)
    finally:
        torch.set_num_threads(threads)
    assert callback.stats.steps["FULL"] == 0
    assert callback.stats.steps["PIECEWISE"] >= 4, callback.summary()
    assert "opaque object used" in callback.summary()


def test_gradients_of_training_in_an_evaluation(harness: Harness) -> None:
    """Hazard 7: training replaces gradients."""

    def norms(self: Any, y: Tensor) -> Tensor:
        gradients = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        return y + sum(gradients, torch.zeros((), device=y.device))

    def fit(trainer: Any, module: Any) -> None:
        trainer.fit(module, features(12), features(24))

    callback = harness.callback(verify_replays=0, warmup_steps=1)
    harness.compare(Net(norms), fit, callback, max_epochs=3, num_sanity_val_steps=0)
    assert "self.first.weight.grad" in callback.summary()


def counts(self: Any, y: Tensor) -> Tensor:
    self.first.weight.scale += 1.0
    return y * self.first.weight.scale


def marks(self: Any, y: Tensor) -> Tensor:
    self.first.weight.seen = True
    return y


def collects(self: Any, y: Tensor) -> Tensor:
    self.first.weight.scales.append(1.0)
    return y


@pytest.mark.parametrize(
    ("use", "where"),
    [
        (counts, "self.first.weight.scale"),
        (marks, "self.first.weight.seen"),
        (collects, "self.first.weight.scales"),
    ],
)
def test_a_step_that_changes_them(harness: Harness, use: Any, where: str) -> None:
    class SetsUp(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.first.weight.scale, pl_module.first.weight.scales = 1.0, []

    callback = harness.callback(verify_replays=0, warmup_steps=1)
    harness.compare(Net(use), validate(features(24)), callback, lambda: [SetsUp()])
    assert callback.stats.steps["FULL"] == 0
    assert f"module state rebound: {where}" in callback.summary()


def test_what_is_not_read_costs_nothing(harness: Harness) -> None:
    def change(module: Any, value: int) -> None:
        module.first.weight.scale = float(value)
        module.first.weight.grad = None

    callback = compare(harness, lambda self, y: y, change, "FULL", 0)
    assert callback.stats.captures == 1, callback.summary()


def test_the_class_of_tensors_is_as_before() -> None:
    before = dict(vars(torch.Tensor))
    module = Net(lambda self, y: y * self.first.weight.scale)
    module.first.weight.scale = 1.0
    diagnosis = diagnose(module, [torch.ones(2, 8)], stage="validate", backend="recorder")
    assert dict(vars(torch.Tensor)) == before
    assert vars(module.first.weight) == {"scale": 1.0}
    assert not [each for each in diagnosis.findings if each.cause is Cause.OPAQUE]
