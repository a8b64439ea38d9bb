"""One run of a task."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from omegaconf import DictConfig

from cg_lightning.app.config import Task
from cg_lightning.backends import resolve_backend
from cg_lightning.callback import CUDAGraphCallback


@dataclasses.dataclass(frozen=True)
class Results:
    """All numbers that a run returned to its user."""

    metrics: dict[str, torch.Tensor]
    predictions: Any

    @property
    def num_predictions(self) -> int:
        """Number of predicted batches."""
        return len(self.predictions or ())


def choose_backend(config: DictConfig) -> None:
    """Select the recorder for ``backend=auto`` if there is no CUDA device, and print that."""
    graphs = config.get("cuda_graph")
    if graphs is None or graphs.backend != "auto":
        return
    on_cpu = config.trainer.get("accelerator") == "cpu" or resolve_backend("auto") is None
    if on_cpu:
        graphs.backend = "recorder"
        print(
            "No CUDA device: graphs run on the recorder backend. It shows that results are equal; "
            "it is no speed-up."
        )


def _callbacks(config: DictConfig, graphs: bool) -> list[Callback]:
    made = [
        instantiate(node, _convert_="all")
        for node in (config.callbacks or {}).values()
        if "_target_" in node
    ]
    return [callback for callback in made if graphs or not isinstance(callback, CUDAGraphCallback)]


def run(config: DictConfig, *, graphs: bool = True) -> tuple[Results, CUDAGraphCallback | None]:
    """Seed, build all objects from ``config``, and run the task.

    Args:
        config: The composed config.
        graphs: If False, :class:`~cg_lightning.CUDAGraphCallback` is left out.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    callbacks = _callbacks(config, graphs)
    model: LightningModule = instantiate(config.model, _convert_="all")
    data: LightningDataModule = instantiate(config.data, _convert_="all")
    trainer: Trainer = instantiate(config.trainer, _convert_="all", callbacks=callbacks)
    metrics: dict[str, torch.Tensor] = {}
    predictions: Any = None
    task: Task = config.task
    if task is Task.fit:
        trainer.fit(model, datamodule=data)
        metrics.update(trainer.callback_metrics)
    if task is Task.validate:
        trainer.validate(model, datamodule=data, ckpt_path=config.ckpt_path)
        metrics.update(trainer.callback_metrics)
    if task in (Task.fit, Task.test):
        trainer.test(model, datamodule=data, ckpt_path=config.ckpt_path)
        metrics.update(trainer.callback_metrics)
    if task in (Task.fit, Task.predict):
        predictions = trainer.predict(model, datamodule=data, ckpt_path=config.ckpt_path)
    graph_callback = next((c for c in callbacks if isinstance(c, CUDAGraphCallback)), None)
    return Results(metrics, predictions), graph_callback
