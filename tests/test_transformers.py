"""Models of transformers: whole steps are one graph, for each kind of mask, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cg_lightning.bench.zoo_models import MODELS, ZooModel
from cg_lightning.core.tree import tensors_in
from tests.harness import Harness, predict, validate

NAMES = [
    *("bert", "roberta", "distilbert", "deberta_v2", "modernbert", "llama", "qwen3", "gpt2"),
    *("t5", "bart", "clip", "vit", "dinov2", "wav2vec2", "whisper_encoder", "segformer"),
]
KINDS, ROUNDS = 3, 4
"""Kinds of masks (ones, padded, none), and batches of each: watched, captured, replayed twice."""


class Model(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return tensors_in(dict(self.net(**batch)))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.net(**batch)
        logits = output["logits"] if "logits" in output else output["logits_per_text"]
        self.log("mean", logits.float().mean(), on_step=True, on_epoch=True)
        return logits


class Batches:
    def __init__(self, model: ZooModel) -> None:
        self._made = [model.inputs(seed) for seed in range(KINDS * ROUNDS)]

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: int) -> Any:
        return self._made[index]


@pytest.mark.slow
@pytest.mark.in_turn("precision")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_one_graph_for_each_kind_of_mask(harness: Harness, name: str, precision: Any):
    model = MODELS[f"hf_{name}"]
    if not model.is_available:
        pytest.skip("transformers is not installed")
    torch.manual_seed(2)
    net = Model(model.make())
    loader = DataLoader(Batches(model), batch_size=None)  # type: ignore[arg-type]
    for job in (validate(loader), predict(loader)):
        callback = harness.callback(warmup_steps=1, verify_replays=0)
        harness.compare(net, job, callback, precision=precision)
        assert callback.stats.steps["FULL"] >= KINDS * (ROUNDS - 1) - 1, callback.summary()


class Tokens:
    """Ids with a padding of zeros in each third sequence, and no mask."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self._made = [torch.randint(1, 500, (4, 16), generator=generator) for _ in range(12)]
        for ids in self._made[1::3]:
            ids[0, 9:] = 0

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: int) -> Any:
        return {"input_ids": self._made[index]}


@pytest.mark.filterwarnings("ignore:We strongly recommend passing in an `attention_mask`")
def test_a_classifier_without_a_mask(harness: Harness):
    """The case ``gpt2_hf`` of the benchmark: it looks for padding in ``input_ids[:, [-1, 0]]``."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(pad_token_id=0, n_layer=2, n_embd=32, n_head=2, vocab_size=500)
    torch.manual_seed(2)
    net = Model(transformers.GPT2ForSequenceClassification(config).eval())
    loader = DataLoader(Tokens(), batch_size=None)  # type: ignore[arg-type]
    for job in (validate(loader), predict(loader)):
        callback = harness.callback(warmup_steps=1, verify_replays=0)
        harness.compare(net, job, callback)
        assert callback.stats.steps["FULL"] >= 9, callback.summary()
