"""``compile`` and padding together: only what is captured is compiled, for few shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tests.test_compilation import Counted
from tests.test_padding import (
    MANY,
    compare_validation,
    padded_steps,
    rules,
    run,
    texts,
    watched_steps,
)

SIZES = (8, 16, 24, 32)


class Encoder(nn.Module):
    """Encodes texts. With ``reads``, it reads its mask, as transformers do, unless compiled."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.embedding = nn.Embedding(50, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.linear(self.embedding(input_ids))
        if self.reads and not torch.compiler.is_compiling() and attention_mask.all():
            return x.relu()
        return x.relu() * attention_mask[..., None]


class Classifies(LightningModule):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.encoder = Encoder(reads)
        self.scale, self.total = 1.0, 0

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.encoder(**batch).sum(1) * self.scale

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scores = self.predict_step(batch, batch_idx)
        self.log("loss", nn.functional.cross_entropy(scores, batch["input_ids"][:, 0] % 8))
        return scores


def may_read(harness: Any, reads: bool) -> None:
    if reads and harness.backend == "recorder":
        pytest.skip("the recorder captures uncompiled code")


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("stage", ["predict", "validate"])
def test_few_shapes_are_compiled_and_few_steps_watched(harness, monkeypatch, stage, reads):
    """Hazard 11. Other shapes run as they are written, and are compared with that."""
    may_read(harness, reads)
    watched, compiler = watched_steps(monkeypatch), Counted()
    settings = {"pad_dims": rules(SIZES), "compile": {"backend": compiler}}
    check = run if stage == "predict" else compare_validation
    model = Classifies(reads)
    callback = check(harness, model, texts(*MANY), **settings)
    assert padded_steps(callback) > 40, callback.summary()
    assert sum(entry.captures for entry in callback.stats.entries) == len(SIZES)
    # one shape, and one in which the length is any number
    assert 1 <= compiler.graphs <= 2
    # one step, and if it runs in pieces, the first call of the piece
    assert len(watched) == (1 if stage == "predict" else 2)
    assert callback.stats.compile_seconds > 0
    assert not [child for child in model.modules() if "_compiled_call_impl" in vars(child)]


@pytest.mark.parametrize("stage", ["predict", "validate"])
def test_padded_graphs_are_compared_with_the_code_as_it_is_written(harness, stage):
    if harness.backend == "recorder":
        pytest.skip("the recorder captures uncompiled code")
    settings = {"pad_dims": rules(SIZES), "compile": {"backend": Counted(1.1)}}
    check = run if stage == "predict" else compare_validation
    callback = check(harness, Classifies(False), texts(*MANY), **settings)
    assert not padded_steps(callback), callback.summary()
