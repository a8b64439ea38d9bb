"""PIECEWISE: which submodules run from graphs where the whole step cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from cg_lightning import diagnose
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
