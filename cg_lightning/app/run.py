"""One run of a task."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig

from cg_lightning.app.config import Task
from cg_lightning.app.tables import print_sentence
from cg_lightning.app.timing import BatchClock
from cg_lightning.backends import resolve_backend
from cg_lightning.callback import CUDAGraphCallback

_Built = TypeVar("_Built", LightningModule, LightningDataModule)
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")  # which a Trainer knows


@dataclasses.dataclass(frozen=True)
class Results:
    """All numbers that a run returned to its user."""

    metrics: dict[str, torch.Tensor]
    predictions: Any
    microseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """The median time of a batch by stage."""

    @property
    def num_predictions(self) -> int:
        """Number of predicted batches."""
        return len(self.predictions or ())


def build(config: DictConfig) -> tuple[LightningModule, LightningDataModule]:
    """Build model and data.

    Raises:
        ValueError: A class is neither a LightningModule nor a LightningDataModule.
    """
    return (
        _build(config, "model", LightningModule),
        _build(config, "data", LightningDataModule),
    )


def _build(config: DictConfig, key: str, kind: type[_Built]) -> _Built:
    made = instantiate(config[key], _convert_="all")
    if not isinstance(made, kind):
        raise ValueError(
            f"{key}._target_={config[key].get('_target_')} makes a {type(made).__name__}, which is "
            f"no lightning.pytorch.{kind.__name__}."
        )
    return made


def require_checkpoint(config: DictConfig) -> None:
    """Check that the file of ``ckpt_path`` is there.

    Raises:
        SystemExit: It is not.
    """
    path = config.ckpt_path
    if path is None or "://" in path or path in _CHECKPOINT_WORDS or Path(path).exists():
        return
    raise SystemExit(f"ckpt_path={path}: there is no such file.")


def require_own_arguments(config: DictConfig) -> None:
    """Check that a class of the user's does not get arguments of the data that it replaces.

    Raises:
        SystemExit: It would, and it does not take them.
    """
    choice = HydraConfig.get().runtime.choices.get("data")
    target = str(config.data.get("_target_"))
    if choice == "custom" or target.startswith("cg_lightning."):
        return
    given = {key: value for key, value in config.data.items() if key != "_target_"}
    try:
        signature = inspect.signature(pkgutil.resolve_name(target))
    except (ImportError, AttributeError, TypeError, ValueError):
        return  # there is none: instantiate says so
    try:
        signature.bind_partial(**given)
    except TypeError as error:
        raise SystemExit(
            f"data._target_={target}: {error}, which data={choice} gives. Add data=custom, and "
            "name your own with +data.ARGUMENT=VALUE."
        ) from error


def require_device(config: DictConfig) -> None:
    """Check that a GPU that the config asks for is there.

    Raises:
        SystemExit: There is no CUDA device.
    """
    if resolve_backend("auto") is not None:
        return
    if config.trainer.get("accelerator") in ("gpu", "cuda"):
        raise SystemExit(
            "trainer=gpu needs a CUDA device, and there is none. trainer=cpu runs without one."
        )
    if config.get("cuda_graph") is not None and config.cuda_graph.backend == "cuda":
        raise SystemExit(
            "cuda_graph.backend=cuda needs a CUDA device, and there is none. "
            "cuda_graph.backend=recorder runs without one."
        )


def choose_backend(config: DictConfig) -> None:
    """Select the recorder for ``backend=auto`` if there is no CUDA device, and print that."""
    graphs = config.get("cuda_graph")
    if graphs is None or graphs.backend != "auto":
        return
    on_cpu = config.trainer.get("accelerator") == "cpu" or resolve_backend("auto") is None
    if on_cpu:
        graphs.backend = "recorder"
        print_sentence(
            "No CUDA device: graphs run on the recorder backend. It shows that results are equal; "
            "it is no speed-up."
        )


def report_at_the_end(config: DictConfig) -> bool:
    """Keep the callback from printing a summary after each stage.

    Return whether one is to be printed at the end.
    """
    graphs = config.get("cuda_graph")
    if graphs is None:
        return True
    reports = bool(graphs.report)
    graphs.report = False
    return reports


def why_skipped(task: str, model: LightningModule, data: LightningDataModule) -> str:
    """Return why ``test`` or ``predict`` cannot follow ``fit``; empty if it can.

    Args:
        task: ``test`` or ``predict``.
        model: The model.
        data: The data.
    """
    step, loader = f"{task}_step", f"{task}_dataloader"
    if not is_overridden(loader, data, LightningDataModule) and not is_overridden(loader, model):
        return f"{type(data).__name__} has no {loader}"
    has_forward = type(model).forward is not LightningModule.forward
    if task == "predict" and not (has_forward or is_overridden(step, model)):
        return f"{type(model).__name__} has neither {step} nor forward"
    if task == "test" and not is_overridden(step, model):
        return f"{type(model).__name__} has no {step}"
    return ""


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
    model, data = build(config)
    clock = BatchClock()
    trainer: Trainer = instantiate(config.trainer, _convert_="all", callbacks=[*callbacks, clock])
    metrics: dict[str, torch.Tensor] = {}
    predictions: Any = None
    task: Task = config.task
    if task is Task.fit:
        trainer.fit(model, datamodule=data)
        metrics.update(trainer.callback_metrics)
    if task is Task.validate:
        trainer.validate(model, datamodule=data, ckpt_path=config.ckpt_path, verbose=False)
        metrics.update(trainer.callback_metrics)
    for follower in (Task.test, Task.predict):
        why = why_skipped(follower.value, model, data) if task is Task.fit else ""
        if why and graphs:
            print(f"No {follower.value} after fit: {why}.")
        if why or task not in (Task.fit, follower):
            continue
        if follower is Task.test:
            trainer.test(model, datamodule=data, ckpt_path=config.ckpt_path, verbose=False)
            metrics.update(trainer.callback_metrics)
        else:
            predictions = trainer.predict(model, datamodule=data, ckpt_path=config.ckpt_path)
    graph_callback = next((c for c in callbacks if isinstance(c, CUDAGraphCallback)), None)
    return Results(metrics, predictions, clock.microseconds()), graph_callback
