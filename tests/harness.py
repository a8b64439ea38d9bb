"""Runs the same job with and without the callback, and compares the results."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from torch import Tensor
from torch.utils.data import DataLoader

from cg_lightning import CUDAGraphCallback
from cg_lightning.core.tree import flatten

Job = Callable[[Trainer, LightningModule], Any]


def newer_callback(name: str, **arguments: Any) -> Callback:
    """Make a callback of Lightning; skip the test if this Lightning is older than the callback."""
    if not hasattr(lightning_callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    return getattr(lightning_callbacks, name)(**arguments)


def assert_same(one: Any, other: Any) -> None:
    """Assert equality in structure, types and every bit. NaN equals NaN."""
    leaves, structure = flatten(one)
    others, other_structure = flatten(other)
    assert structure == other_structure
    for leaf, other_leaf in zip(leaves, others, strict=True):
        if isinstance(leaf, Tensor):
            torch.testing.assert_close(leaf, other_leaf, rtol=0, atol=0, equal_nan=True)
        elif isinstance(leaf, np.ndarray):
            assert (leaf.dtype, leaf.shape) == (other_leaf.dtype, other_leaf.shape)
            assert leaf.tobytes() == other_leaf.tobytes()
        else:
            assert leaf == other_leaf


class KeepOutputs(Callback):
    """Keeps every output of every step without a copy, as a user might."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
        self.kept.append(outputs)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


class Batches:
    """Makes its batches anew for each run, unless ``keeps`` is set.

    Args:
        make: Makes the batch with a number.
        number: Number of batches.
        keeps: Whether a batch that comes again is the same object.
    """

    def __init__(self, make: Callable[[int], Any], number: int, keeps: bool = False) -> None:
        self._make = functools.cache(make) if keeps else make
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


class Harness:
    """Trainers on one backend."""

    def __init__(self, backend: str, folder: Path) -> None:
        self.backend = backend
        self._folder = folder

    def callback(self, **settings: Any) -> CUDAGraphCallback:
        # graphs of small models do not always pay, and no test depends on times
        defaults = {"backend": self.backend, "report": False, "min_saving": 0}
        return CUDAGraphCallback(**{**defaults, **settings})

    def trainer(self, *callbacks: Callback, **settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "gpu" if self.backend == "cuda" else "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 2,
            "default_root_dir": self._folder,
            "deterministic": "warn" if self.backend == "cuda" else False,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **settings})

    def compare(
        self,
        model: LightningModule,
        job: Job,
        callback: CUDAGraphCallback | None = None,
        others: Callable[[], Sequence[Callback]] = list,
        **trainer_settings: Any,
    ) -> CUDAGraphCallback:
        """Run ``job`` on ``model``, and on an untouched copy without the callback.

        Everything that users see must be equal. ``others`` makes further callbacks for each of the
        two Trainers.
        """
        callback = callback or self.callback()
        reference = copy.deepcopy(model)
        seen = []
        for module, extra in ((model, [callback]), (reference, [])):
            torch.manual_seed(1)
            kept = KeepOutputs()
            trainer = self.trainer(*extra, kept, *others(), **trainer_settings)
            result = job(trainer, module)
            seen.append(
                (result, kept.kept, dict(trainer.callback_metrics), dict(module.state_dict()))
            )
        assert_same(*seen)
        return callback


def validate(loaders: DataLoader | Sequence[DataLoader]) -> Job:
    return lambda trainer, module: trainer.validate(module, loaders, verbose=False)


def predict(loaders: DataLoader | Sequence[DataLoader]) -> Job:
    return lambda trainer, module: trainer.predict(module, loaders)


def loader(*tensors: Tensor, batch_size: int = 4, **settings: Any) -> DataLoader:
    """Return a loader of tuples of tensors. The last batch may be partial."""
    return DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=batch_size, **settings)


def images(number: int = 20, batch_size: int = 4) -> DataLoader:
    """Return a loader of images ``(batch, 1, 8, 8)`` and labels."""
    generator = torch.Generator().manual_seed(5)
    return loader(
        torch.randn(number, 1, 8, 8, generator=generator),
        torch.randint(0, 10, (number,), generator=generator),
        batch_size=batch_size,
    )


def features(number: int = 20, batch_size: int = 4, size: int = 8) -> DataLoader:
    """Return a loader of tuples of one tensor ``(batch, size)``."""
    generator = torch.Generator().manual_seed(5)
    # a test may have entered another default device
    tensor = torch.randn(number, size, generator=generator, device="cpu")
    return loader(tensor, batch_size=batch_size)
