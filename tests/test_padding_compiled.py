"""``compile`` and padding together: only what is captured is compiled, for few shapes."""

from __future__ import annotations

import pytest
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
    """Encodes texts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.linear(self.embedding(input_ids))
        return x.relu() * attention_mask[..., None]


class Classifies(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.scale, self.total = 1.0, 0

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.encoder(**batch).sum(1) * self.scale

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scores = self.predict_step(batch, batch_idx)
        self.log("loss", nn.functional.cross_entropy(scores, batch["input_ids"][:, 0] % 8))
        return scores


@pytest.mark.parametrize("stage", ["predict", "validate"])
def test_few_shapes_are_compiled_and_few_steps_watched(harness, monkeypatch, stage):
    """Hazard 11. Other shapes run as they are written, and are compared with that."""
    watched, compiler = watched_steps(monkeypatch), Counted()
    settings = {"pad_dims": rules(SIZES), "compile": {"backend": compiler}}
    check = run if stage == "predict" else compare_validation
    model = Classifies()
    callback = check(harness, model, texts(*MANY), **settings)
    assert padded_steps(callback) > 40, callback.summary()
    assert sum(entry.captures for entry in callback.stats.entries) == len(SIZES)
    # one shape, and one in which the length is any number
    assert 1 <= compiler.graphs <= 2
    # one step, and if it runs in pieces, the first call of the piece
    assert len(watched) == (1 if stage == "predict" else 2)
    assert callback.stats.compile_seconds > 0
    assert not [child for child in model.modules() if "_compiled_call_impl" in vars(child)]


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. a replay differed")
@pytest.mark.parametrize("stage", ["predict", "validate"])
def test_padded_graphs_are_compared_with_the_code_as_it_is_written(harness, stage):
    if harness.backend == "recorder":
        pytest.skip("the recorder captures uncompiled code")
    settings = {"pad_dims": rules(SIZES), "compile": {"backend": Counted(1.1)}}
    check = run if stage == "predict" else compare_validation
    callback = check(harness, Classifies(), texts(*MANY), **settings)
    assert not padded_steps(callback), callback.summary()
