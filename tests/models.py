"""Modules with the habits of real modules."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from cg_lightning.app.demo import ConvNetClassifier

FACTOR = 1.0

__all__ = ["Attention", "Body", "ConvNetClassifier", "Predictor", "Recurrent"]


class Predictor(LightningModule):
    """Runs ``net`` on the first tensor of a batch, in every stage."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        self.log("mean", output.float().mean())
        return output

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def Body(size: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, 16), nn.ReLU(inplace=True), nn.Linear(16, size))


class Recurrent(nn.Module):
    """A recurrent layer that maps ``(batch, time, features)`` to the same shape."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = cell(8, 8, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rnn(inputs)[0]


class Attention(nn.Module):
    """Attention of a sequence to itself: the same tensor is passed three times."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs, need_weights=False)[0]
