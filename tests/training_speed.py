"""Microseconds of an iteration of ``fit``, eager and with closures from graphs, and equal weights.

Run it on a GPU: ``python -m tests.training_speed [mlp resnet18 vit bert]``. It prints a line for
each model and precision, and says whether all weights and buffers are equal in every bit.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cg_lightning import CUDAGraphCallback

ITERATIONS, MEASURED_FROM = 140, 40


def mlp():
    layers = [nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU()) for _ in range(12)]
    return nn.Sequential(*layers, nn.Linear(512, 10)), torch.randn(32, 512)


def resnet18():
    import torchvision

    return torchvision.models.resnet18(num_classes=10), torch.randn(8, 3, 224, 224)


def vit():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    return model, torch.randn(8, 3, 224, 224)


class Bert(nn.Module):
    def __init__(self):
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        self.bert = BertForSequenceClassification(BertConfig(num_labels=10))

    def forward(self, ids):
        return self.bert(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def bert():
    return Bert(), torch.randint(0, 30000, (4, 128))


class Classifier(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y, label_smoothing=0.1)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3, fused=True)


class Clock(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == MEASURED_FROM:
            torch.cuda.synchronize()
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        self.microseconds = seconds / (ITERATIONS - MEASURED_FROM) * 1e6


def fit(net, batches, precision, *callbacks):
    model, clock = Classifier(copy.deepcopy(net)), Clock()
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[clock, *callbacks],
        precision=precision,
        gradient_clip_val=1.0 if precision == "32-true" else None,
    )
    torch.manual_seed(2)
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return clock.microseconds, {k: v.cpu() for k, v in model.state_dict().items()}


def main(names):
    torch.set_float32_matmul_precision("high")
    for name in names:
        torch.manual_seed(0)
        net, example = {"mlp": mlp, "resnet18": resnet18, "vit": vit, "bert": bert}[name]()
        is_float = example.is_floating_point()
        inputs = [
            torch.randn_like(example) if is_float else torch.randint_like(example, 30000)
            for _ in range(8)
        ]
        data = [(x, torch.randint(0, 10, (len(x),))) for x in inputs]
        batches = [data[index % 8] for index in range(ITERATIONS)]
        for precision in ("32-true", "bf16-mixed"):
            callback = CUDAGraphCallback(stages=["train"], report=False)
            eager, expected = fit(net, batches, precision)
            again, repeated = fit(net, batches, precision)
            ours, found = fit(net, batches, precision, callback)
            repeats = all(torch.equal(expected[key], repeated[key]) for key in expected)
            equal = all(torch.equal(expected[key], found[key]) for key in expected)
            print(
                f"{name} {precision}: eager {eager:.0f} {again:.0f}, ours {ours:.0f} us; "
                f"equal {equal}, eager repeats {repeats}; {callback.stats.steps} "
                f"{callback.stats.eager_reasons}",
                flush=True,
            )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(sys.argv[1:] or ("mlp", "resnet18", "vit", "bert"))
