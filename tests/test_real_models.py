"""Networks that people use, with random weights, in float32: equal to eager to the last bit."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from tests.harness import Harness, assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CLASSES, BATCHES = 10, 24


def resnet18() -> nn.Module:
    return pytest.importorskip(
        "torchvision.models", reason="torchvision is not installed"
    ).resnet18(num_classes=CLASSES)


def vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(num_labels=CLASSES, vocab_size=1000)
    )


class Model(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.accuracy = MulticlassAccuracy(CLASSES)

    def logits(self, batch: Any) -> torch.Tensor:
        if "pixels" in batch:
            return self.net(batch["pixels"])
        return self.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.logits(batch)
        self.accuracy.update(logits, batch["label"])
        self.log_dict(
            {"loss": cross_entropy(logits, batch["label"]), "accuracy": self.accuracy},
            batch_size=len(logits),
        )
        return logits

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.logits(batch)


def batches(name: str) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    size = 4 if name == "bert" else 8

    def batch(number: int) -> dict[str, torch.Tensor]:
        label = torch.randint(0, CLASSES, (number,), generator=generator)
        if name != "bert":
            return {"pixels": torch.randn(number, 3, 224, 224, generator=generator), "label": label}
        ids = torch.randint(0, 1000, (number, 128), generator=generator)
        mask = (torch.arange(128) < torch.randint(64, 128, (number, 1), generator=generator)).long()
        return {"input_ids": ids, "attention_mask": mask, "label": label}

    return DataLoader(
        [batch(size if index < BATCHES - 1 else size - 1) for index in range(BATCHES)],
        batch_size=None,
    )


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize(("name", "make"), [("resnet18", resnet18), ("vit", vit), ("bert", bert)])
def test_loss_accuracy_and_predictions_are_eagers(name, make, mode, tmp_path):
    harness = Harness("cuda", tmp_path)
    model = Model(make())
    data = batches(name)
    job = lambda trainer, module: (
        trainer.validate(module, data, verbose=False),
        trainer.predict(module, data),
    )
    # without deterministic kernels, two runs of cuDNN may differ in the last bit
    assert_same(*[harness.trainer().predict(copy.deepcopy(model), data) for _ in range(2)])
    callback = harness.compare(model, job, harness.callback(mode=mode))
    assert callback.stats.replays >= 2 * (BATCHES - 1 - 3), callback.summary()
    assert (callback.stats.steps["FULL"] > 0) is (mode != "PIECEWISE"), callback.summary()
