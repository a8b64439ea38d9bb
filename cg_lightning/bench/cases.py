"""The networks to measure, each with its batch.

The first ones need nothing but ``torch.nn``. The others are the models of torchvision, timm and
transformers, with random weights; each needs its library.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.settings import check_names

CLASSES = 10


class _Block(nn.Module):
    """A block of a ResNet (He et al., 2015): the basic one, or the ``bottleneck`` of deep ones."""

    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        inner = outputs // 4 if bottleneck else outputs
        shapes = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
        if not bottleneck:
            shapes = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        layers: list[nn.Module] = []
        for given, made, size, step in shapes:
            layers += [
                nn.Conv2d(given, made, size, step, size // 2, bias=False),
                nn.BatchNorm2d(made),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers[:-1])
        same = inputs == outputs and stride == 1
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map images to images; only the channels and, by the stride, the size change."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> nn.Module:
    """Return a network that maps images ``(batch, 3, height, width)`` to logits."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
    ]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for stage, number in enumerate(blocks):
        width = 64 * 2**stage * (4 if bottleneck else 1)
        for index in range(number):
            layers.append(_Block(channels, width, 2 if stage and not index else 1, bottleneck))
            channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
    )


def mlp() -> nn.Module:
    """Return a network that maps vectors ``(batch, 512)`` to logits."""
    layers = [layer for _ in range(12) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, CLASSES))


class Transformer(nn.Module):
    """An encoder of image patches or of tokens; a linear head classifies the mean over positions.

    Args:
        width: Number of features.
        depth: Number of layers.
        heads: Number of attention heads.
        length: Number of positions.
        tokens: Size of the vocabulary. 0: the input is images ``(batch, 3, 224, 224)``.
    """

    def __init__(self, width: int, depth: int, heads: int, length: int, tokens: int = 0) -> None:
        super().__init__()
        self.embed: nn.Module = (
            nn.Embedding(tokens, width) if tokens else nn.Conv2d(3, width, 16, 16)
        )
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.embed(x)
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.encoder(x + self.position).mean(1))
        return logits


class GRULoop(nn.Module):
    """A GRU cell in a Python loop over sequences ``(batch, time, features)``."""

    def __init__(self, features: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.cell = nn.GRUCell(features, hidden)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        hidden = x.new_zeros(len(x), self.cell.hidden_size)
        for step in range(x.shape[1]):
            hidden = self.cell(x[:, step], hidden)
        logits: Tensor = self.head(hidden)
        return logits


class Logits(nn.Module):
    """A classifier of transformers that returns its logits alone.

    Args:
        net: Maps its first argument to an object with ``logits``.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(x).logits
        return logits


def _transformers(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return a function that makes a classifier of transformers with random weights."""

    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        settings_of_model = getattr(library, config)(num_labels=CLASSES, **settings)
        return Logits(getattr(library, model)(settings_of_model))

    return make


def _torchvision_resnet18() -> nn.Module:
    net: nn.Module = importlib.import_module("torchvision.models").resnet18(num_classes=CLASSES)
    return net


def _timm_vit() -> nn.Module:
    timm = importlib.import_module("timm")
    net: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES)
    return net


@dataclasses.dataclass(frozen=True)
class Case:
    """One network and the shape of its batch."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0
    """Size of the vocabulary of the input. 0: the input is normally distributed."""
    max_batches: int | None = None
    """Upper limit for the batches in one measurement, for cases that take long."""
    title: str = ""
    """The name in charts; two lines at most."""
    library: str = ""
    """The library that has the network; empty: PyTorch."""

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, CLASSES, self.shape[:1], generator=generator)
        if self.tokens:
            return torch.randint(0, self.tokens, self.shape, generator=generator), labels
        return torch.randn(self.shape, generator=generator), labels


CASES = {
    "mlp": Case(mlp, (32, 512), title="MLP 12 x 512\nbatch 32"),
    "resnet18": Case(
        lambda: resnet((2, 2, 2, 2), False), (8, 3, 224, 224), title="ResNet-18\nbatch 8, 224 px"
    ),
    "vit": Case(
        lambda: Transformer(192, 12, 3, 196), (8, 3, 224, 224), title="ViT-tiny\nbatch 8, 224 px"
    ),
    "bert": Case(
        lambda: Transformer(768, 12, 12, 128, 30522),
        (4, 128),
        30522,
        title="BERT-base size\nbatch 4, 128 tokens",
    ),
    "gru": Case(GRULoop, (32, 64, 64), title="GRUCell, 64 steps\nbatch 32"),
    "saturated": Case(
        lambda: resnet((3, 4, 6, 3), True),
        (256, 3, 224, 224),
        max_batches=20,
        title="ResNet-50-like\nbatch 256, 224 px",
    ),
    "resnet18_torchvision": Case(
        _torchvision_resnet18,
        (8, 3, 224, 224),
        title="ResNet-18 of torchvision\nbatch 8, 224 px",
        library="torchvision",
    ),
    "vit_timm": Case(
        _timm_vit, (8, 3, 224, 224), title="ViT-tiny of timm\nbatch 8, 224 px", library="timm"
    ),
    "vit_hf": Case(
        _transformers("ViTForImageClassification", "ViTConfig"),
        (8, 3, 224, 224),
        title="ViT-base of transformers\nbatch 8, 224 px",
        library="transformers",
    ),
    "bert_hf": Case(
        _transformers("BertForSequenceClassification", "BertConfig"),
        (4, 128),
        30522,
        title="BERT-base of transformers\nbatch 4, 128 tokens",
        library="transformers",
    ),
    "gpt2_hf": Case(
        _transformers("GPT2ForSequenceClassification", "GPT2Config", pad_token_id=0),
        (4, 128),
        50257,
        title="GPT-2 of transformers\nbatch 4, 128 tokens",
        library="transformers",
    ),
}
"""The networks by name. ``saturated`` keeps the GPU busy, so graphs have little to gain there."""


def check_cases(names: Sequence[str]) -> None:
    """Raise an error if a case is unknown, or if its library is not installed.

    Raises:
        ValueError: It names the case, and the library to install.
    """
    check_names("bench.cases", names, tuple(CASES))
    for name in names:
        library = CASES[name].library
        if library and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"bench.cases={name} is a model of {library}, which is not installed: "
                f"pip install {library}"
            )
