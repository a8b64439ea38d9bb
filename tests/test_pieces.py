"""PIECEWISE: which submodules run from graphs where the whole step cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from cg_lightning import diagnose
from cg_lightning.capture.static_inputs import StaticInputs
from tests.harness import features, predict
from tests.models import Predictor


class Cache:
    """An object that is handed through all blocks."""

    def __init__(self) -> None:
        self.seen = 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x, cache=None):
        return x + self.mlp(self.norm(x))


class Transformer(nn.Module):
    """Waits between its blocks, or at its end, or hands a cache through."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 8)
        self.how = how

    def forward(self, x):
        cache = Cache() if "cache" in self.how else None
        for block in self.blocks:
            x = block(x, cache)
            if self.how == "between":
                x = x * (1 + float(x.sum().item() > 0))
        if self.how in ("end", "end, cache"):
            x = x * (1 + float(x.sum().item() > 0))
        return self.head(x)


class Waits(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.net(batch[0])
        return x * (1 + float(x.sum().item() > 0))


BLOCKS = ["net.blocks.0", "net.blocks.1", "net.head"]
PARTS = ["net.blocks.0.norm", "net.blocks.0.mlp", "net.blocks.1.norm", "net.blocks.1.mlp"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("", ["net"]),
        ("cache", ["net"]),
        ("between", BLOCKS),
        ("end", BLOCKS),
        ("end, cache", [*PARTS, "net.head"]),
    ],
)
def test_pieces_are_as_large_as_the_findings_allow(harness, how, expected):
    """An argument that can be part of no key keeps a call out of a graph, and not those in it."""
    model = Waits(Transformer(how))
    assert diagnose(model, (torch.randn(4, 8),)).largest_capturable() == expected
    callback = harness.compare(model, predict(features(40)))
    assert callback.stats.steps["PIECEWISE"] >= 6, callback.summary()
    assert {entry.target for entry in callback.stats.entries} == set(expected)


class Scales(nn.Module):
    """Reads a value of its own between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.first(x) * self.scale)


class ChangesTheScale(Callback):
    def __init__(self, values: int) -> None:
        self._values = values

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        pl_module.net.scale = 1.0 + batch_idx % self._values


@pytest.mark.parametrize(
    ("model", "number"),
    [pytest.param(Waits, 80, id="a wait"), pytest.param(Predictor, 160, id="a whole step")],
)
def test_layers_inside_a_submodule_that_reads_a_value_that_varies(harness, model, number):
    others = lambda: [ChangesTheScale(1000)]
    callback = harness.callback()
    harness.compare(model(Scales()), predict(features(4 * number)), callback, others=others)
    assert callback.stats.steps["PIECEWISE"] > number // 2, callback.summary()
    assert {entry.target for entry in callback.stats.entries} == {"net.first", "net.last"}


def test_a_submodule_whose_value_takes_two_values_stays_one_piece(harness):
    others = lambda: [ChangesTheScale(2)]
    callback = harness.callback()
    harness.compare(Waits(Scales()), predict(features(160)), callback, others=others)
    assert {entry.target for entry in callback.stats.entries} == {"net"}
    assert callback.stats.steps["PIECEWISE"] > 20, callback.summary()


# without copies of outputs, a graph reads its input where the graph before it has left it


class Chain(nn.Module):
    """Waits at its end, so each layer is a piece. Its outputs are made after the last piece."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.calls = 0
        self.kept: Any = None

    def forward(self, x):
        self.calls += 1
        return self.end(self.run(x))

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def end(self, x):
        return x * (1 + float(x.sum().item() > 0))


class KeepsBoth(Chain):
    def run(self, x):
        first = self.layers[0](x)
        second = self.layers[1](first)
        return self.layers[2](second) + first - second


class Writes(Chain):
    def run(self, x):
        first = self.layers[0](x)
        first.mul_(1.0 + self.calls)
        second = self.layers[1](first)
        first.sub_(second)
        return self.layers[2](first) + second


class WritesInEvadingWays(Chain):
    """No version counter knows of these."""

    def run(self, x):
        first = self.layers[0](x)
        first.data.add_(self.calls)
        torch.from_dlpack(first.detach()).mul_(0.5)
        return self.layers[2](self.layers[1](first))


class HandsOnViews(Chain):
    def run(self, x):
        first = self.layers[0](x)
        second = self.layers[1](first[1:])
        return torch.cat([second, self.layers[2](first.view(4, 1, 8))[:1, 0]])


class Turns(Chain):
    """A tensor gets another shape, and the layer is given this very tensor."""

    def run(self, x):
        second = self.layers[1](self.layers[0](x).view_as(x))
        return self.layers[2](second.unsqueeze_(0)).squeeze(0)


class Swaps(Chain):
    def run(self, x):
        order = [0, 1, 2] if self.calls % 3 else [1, 0, 2]
        for number in order:
            x = self.layers[number](x)
        return x


class CallsTwice(Chain):
    def run(self, x):
        return self.layers[1](self.layers[0](self.layers[0](x)))


class GivesAnotherTensor(Chain):
    """The second layer is given the output of the first one, unless the step says otherwise."""

    def run(self, x):
        first = self.layers[0](x)
        second = self.layers[1](x + 1 if self.calls in (6, 9) else first)
        return self.layers[2](second) + first


class GivesAnEarlierOne(Chain):
    """The second layer is given what the first one computed in the step before."""

    def run(self, x):
        before = self.kept
        self.kept = self.layers[0](x).clone()
        return self.layers[1](self.kept if before is None else before)


class GivesItTwice(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(8, 8, 8)

    def run(self, x):
        first = self.layers[0](x)
        return self.both(first, first) + self.both(first, first.view_as(first))


class MovesAWeight(Chain):
    """The first layer is captured anew, so what it computes lies elsewhere."""

    def run(self, x):
        if self.calls == 6:
            weight = self.layers[0].weight
            weight.data = weight.data + 1
        return super().run(x)


class ChangesAPiece(Chain):
    """The layer in the middle is not in a graph for some steps."""

    def run(self, x):
        if self.calls == 6:
            self.handle = self.layers[1].register_forward_hook(lambda *given: given[2] + 1)
        if self.calls == 12:
            self.handle.remove()
        return super().run(x)


CHAINS = [
    *(Chain, KeepsBoth, Writes, WritesInEvadingWays, HandsOnViews, Turns, Swaps, CallsTwice),
    *(GivesAnotherTensor, GivesAnEarlierOne, GivesItTwice, MovesAWeight, ChangesAPiece),
]


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("copy_outputs", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_what_a_piece_is_given_is_what_it_is_given_in_eager(
    harness, chain, copy_outputs, inference_mode
):
    """Hazard 3."""
    callback = harness.callback(copy_outputs=copy_outputs)
    model = Predictor(chain())
    harness.compare(model, predict(features(4 * 20)), callback, inference_mode=inference_mode)
    assert callback.stats.steps["PIECEWISE"] >= 5, callback.summary()


@pytest.fixture
def copied(monkeypatch) -> list[int]:
    """The number of inputs that each replay has copied."""
    numbers: list[int] = []
    copy_from = StaticInputs.copy_from

    def count(self: StaticInputs, leaves: list[Any]) -> None:
        at = {index: address for g in self._groups.values() for index, _, address, _ in g}
        numbers.append(sum(leaves[i].data_ptr() != address for i, address in at.items()))
        copy_from(self, leaves)

    monkeypatch.setattr(StaticInputs, "copy_from", count)
    return numbers


@pytest.mark.parametrize(("copy_outputs", "last_step"), [(True, [1, 1, 1]), (False, [1, 0, 0])])
def test_neighbours_hand_on_their_outputs(harness, copied, copy_outputs, last_step):
    callback = harness.callback(copy_outputs=copy_outputs)
    harness.compare(Predictor(Chain()), predict(features(4 * 10)), callback)
    assert copied[-3:] == last_step
    assert callback.stats.captures == 3


@pytest.mark.parametrize(
    ("chain", "last_step"), [(GivesAnotherTensor, [1, 1, 0]), (MovesAWeight, [1, 0, 0])]
)
def test_an_input_from_elsewhere_costs_a_capture(harness, copied, chain, last_step):
    callback = harness.callback(copy_outputs=False)
    harness.compare(Predictor(chain()), predict(features(4 * 20)), callback)
    captures = {entry.target: entry.captures for entry in callback.stats.entries}
    assert captures["net.layers.1"] == 2, callback.summary()
    assert copied[-3:] == last_step
