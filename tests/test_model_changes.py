"""Callbacks that change the model between two batches of a stage: every kind, against eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.harness import Harness, features, validate


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(torch.relu(self.first(x)))))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self(batch[0])
        self.log("mean", output.mean())
        return output


class At(Callback):
    """Changes the module before some batches."""

    def __init__(self, changes: dict[int, Callable[[Any], Any]]) -> None:
        self.changes = changes

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx in self.changes:
            with torch.no_grad():
                self.changes[batch_idx](pl_module)


def expands(module: Net) -> None:
    module.first.bias.data = module.first.bias.data[:1].expand(8)


def negates(module: Net) -> None:
    module.first.weight.data = torch._neg_view(module.first.weight.data)


def transposes(module: Net) -> None:
    module.first.weight.data = module.first.weight.data.t()


def narrows(module: Net) -> None:
    module.first.bias.data = module.first.bias.data[:1]


def rounds(module: Net) -> None:
    module.double().half().float()


def moves(module: Net) -> None:
    module.first.weight.data = module.first.weight.data.clone() * 2


def sets(module: Net) -> None:
    module.first.weight.set_(module.first.weight.detach().clone().t())


def loads(module: Net, assign: bool = False) -> None:
    state = {name: value * 2 for name, value in module.state_dict().items()}
    module.load_state_dict(copy.deepcopy(state), assign=assign)


def ties(module: Net) -> None:
    module.last.weight = module.first.weight


def patches(module: Net) -> None:
    module.last.forward = lambda x: x * 3


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 5


def becomes(module: Net) -> None:
    module.last.__class__ = Shifted


def swaps_tensors(module: Net) -> None:
    torch.utils.swap_tensors(module.first.weight, nn.Parameter(torch.eye(8, device=module.device)))


def adds_one(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


def doubles_output(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def replaces(path: str, name: str, **values: Any) -> Callable[[Net], None]:
    """Put another dictionary in place of one of a submodule, and set values in it."""

    def change(module: Net) -> None:
        attributes = vars(module.get_submodule(path))
        moved = {
            key: value.to(module.device) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        attributes[name] = type(attributes[name])({**attributes[name], **moved})

    return change


CHANGES: dict[str, dict[int, Callable[[Any], Any]]] = {
    "expanded": {4: expands},
    "lazily negated": {4: negates},
    "transposed data": {4: transposes, 7: transposes},
    "transposed in place": {4: lambda module: module.first.weight.t_()},
    "narrowed": {4: narrows},
    "another data type and back": {4: rounds},
    "other data": {4: moves},
    "set_": {4: sets},
    "load_state_dict": {3: loads, 6: loads},
    "load_state_dict(assign=True)": {3: lambda module: loads(module, True)},
    "pruned": {
        3: lambda module: prune.l1_unstructured(module.first, "weight", 0.5),
        6: lambda module: prune.remove(module.first, "weight"),
    },
    "weight_norm": {
        3: lambda module: parametrizations.weight_norm(module.first),
        5: lambda module: module.first.parametrizations.weight.original0.mul_(2),
        7: lambda module: parametrize.remove_parametrizations(module.first, "weight"),
    },
    "spectral_norm": {
        3: lambda module: parametrizations.spectral_norm(module.first),
        7: lambda module: parametrize.remove_parametrizations(module.first, "weight"),
    },
    "tied": {4: ties},
    "requires_grad_": {
        3: lambda module: module.first.weight.requires_grad_(False),
        5: lambda module: module.first.weight.requires_grad_(True),
    },
    "another submodule": {4: lambda module: setattr(module, "last", nn.Identity())},
    "no bias": {4: lambda module: setattr(module.last, "bias", None)},
    "a hook": {4: lambda module: module.last.register_forward_hook(lambda _, a, y: y + 1)},
    "training": {
        4: lambda module: module.norm.train(),
        6: lambda module: module.norm.eval(),
    },
    "a forward of its own": {4: patches},
    "another class": {4: becomes},
    "swap_tensors": {4: swaps_tensors},
    "other submodules in a dictionary": {4: replaces("", "_modules", last=nn.Identity())},
    "other parameters in a dictionary": {4: replaces("first", "_parameters", bias=None)},
    "other buffers in a dictionary": {
        4: replaces("norm", "_buffers", running_var=torch.full((8,), 4.0)),
        6: replaces("norm", "_buffers", running_var=torch.full((8,), 9.0)),
    },
    "other hooks in a dictionary": {4: replaces("last", "_forward_hooks", one=adds_one)},
    "another order of hooks": {
        2: lambda module: module.last.register_forward_hook(adds_one),
        3: lambda module: module.last.register_forward_hook(doubles_output),
        6: lambda module: module.last._forward_hooks.move_to_end(
            next(iter(module.last._forward_hooks))
        ),
    },
    "the state of a pickle": {
        4: lambda module: module.last.__setstate__(copy.deepcopy(module.first.__getstate__()))
    },
}


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_batches(
    harness: Harness, name: str, mode: str, verify_replays: int
) -> None:
    """Hazard 4."""
    callback = harness.callback(mode=mode, verify_replays=verify_replays, warmup_steps=1)
    others: Callable[[], Sequence[Callback]] = lambda: [At(CHANGES[name])]
    harness.compare(Net(), validate(features(40)), callback, others)
    assert callback.stats.steps[mode] >= 2, callback.summary()


class Adjacent(Net):
    """Has a sparse buffer, as models of graphs have."""

    def __init__(self, is_used: bool) -> None:
        super().__init__()
        self.register_buffer("adjacency", (torch.eye(8) * 2).to_sparse().coalesce())
        self.is_used = is_used

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = super().validation_step(batch, batch_idx)
        return torch.sparse.mm(self.adjacency, output.t()).t() if self.is_used else output


class ScalesAdjacency(Adjacent):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.adjacency.mul_(1.1)
        return super().validation_step(batch, batch_idx)


class ScalesItsValues(Adjacent):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.adjacency.values().mul_(1.1)
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("make", [ScalesAdjacency, ScalesItsValues])
def test_steps_that_write_to_sparse_buffers(
    harness: Harness, make: type[Adjacent], is_used: bool, verify_replays: int
) -> None:
    """Hazard 4."""
    callback = harness.callback(verify_replays=verify_replays, warmup_steps=1)
    harness.compare(make(is_used), validate(features(40)), callback)


def doubles(module: Adjacent) -> None:
    module.adjacency.values().mul_(2)


def replaces(module: Adjacent) -> None:
    module.adjacency = module.adjacency * 2


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("change", [doubles, replaces])
@pytest.mark.parametrize("is_used", [False, True])
def test_sparse_buffers(harness: Harness, is_used: bool, change: Any, verify_replays: int) -> None:
    """Hazard 4."""
    callback = harness.callback(verify_replays=verify_replays, warmup_steps=1)
    harness.compare(Adjacent(is_used), validate(features(40)), callback, lambda: [At({5: change})])
    assert callback.stats.replays >= 3, callback.summary()
    if not is_used:
        assert callback.stats.steps["FULL"] >= 3, callback.summary()
