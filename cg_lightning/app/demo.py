"""Small models and real data, for the default run, the notebooks and the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

_Batch = Sequence[Tensor]


class Classifier(LightningModule):
    """A classifier with any network. It logs loss and accuracy, and predicts logits.

    Args:
        net: Maps a batch of inputs to logits of shape ``(batch, classes)``.
        num_classes: Number of classes.
        learning_rate: Learning rate of Adam.
    """

    def __init__(self, net: nn.Module, num_classes: int = 10, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate
        self.val_accuracy = MulticlassAccuracy(num_classes)
        self.test_accuracy = MulticlassAccuracy(num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: _Batch, batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        inputs, labels = batch
        return cross_entropy(self(inputs), labels)

    def validation_step(self, batch: _Batch, batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        inputs, labels = batch
        logits = self(inputs)
        self.val_accuracy.update(logits, labels)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_accuracy", self.val_accuracy)

    def test_step(self, batch: _Batch, batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        inputs, labels = batch
        logits = self(inputs)
        self.test_accuracy.update(logits, labels)
        self.log("test_loss", cross_entropy(logits, labels))
        self.log("test_accuracy", self.test_accuracy)

    def predict_step(self, batch: _Batch, batch_idx: int) -> Tensor:
        """Return the logits."""
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an Adam optimizer."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class ConvNetClassifier(Classifier):
    """Three convolutions with batch norm, for images of shape ``(batch, 1, 8, 8)``.

    Args:
        channels: Number of channels of the first convolution.
        learning_rate: Learning rate of Adam.
    """

    def __init__(self, channels: int = 16, learning_rate: float = 1e-3) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in (
            (1, channels),
            (channels, 2 * channels),
            (2 * channels, 2 * channels),
        ):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * channels * 16, 10)]
        super().__init__(nn.Sequential(*layers), learning_rate=learning_rate)


class MLPClassifier(Classifier):
    """A multi-layer perceptron for inputs of 64 features in any shape.

    Args:
        width: Number of features of each hidden layer.
        depth: Number of hidden layers.
        learning_rate: Learning rate of Adam.
    """

    def __init__(self, width: int = 128, depth: int = 4, learning_rate: float = 1e-3) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs in (64, *[width] * (depth - 1)):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        super().__init__(nn.Sequential(*layers, nn.Linear(width, 10)), learning_rate=learning_rate)


class DigitsDataModule(LightningDataModule):
    """scikit-learn's handwritten digits: 1797 images ``(1, 8, 8)`` in [0, 1], with labels.

    Args:
        batch_size: Number of images in a batch.
        num_workers: Number of worker processes of each dataloader.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """

    def __init__(self, batch_size: int = 8, num_workers: int = 0) -> None:
        super().__init__()
        self._batch_size = batch_size
        self._num_workers = num_workers

    def setup(self, stage: str) -> None:
        """Split the data 1200 : 297 : 300, in its own order."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            message = (
                "The handwritten digits are part of scikit-learn, which is not installed: "
                "pip install 'cg-lightning[demo]'"
            )
            raise ModuleNotFoundError(message, name="sklearn") from error
        images, labels = load_digits(return_X_y=True)
        inputs = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        targets = torch.tensor(labels)
        self._train, self._val, self._test = (
            TensorDataset(inputs[part], targets[part])
            for part in (slice(1200), slice(1200, 1497), slice(1497, None))
        )

    def _loader(
        self, dataset: TensorDataset, shuffle: bool = False
    ) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            dataset, batch_size=self._batch_size, shuffle=shuffle, num_workers=self._num_workers
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training images, shuffled."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation images, in order."""
        return self._loader(self._val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test images, in order."""
        return self._loader(self._test)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test images."""
        return self._loader(self._test)
