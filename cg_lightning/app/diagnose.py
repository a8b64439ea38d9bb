"""``task=diagnose``: why a step is not one graph."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig

from cg_lightning.app.jobs import JobResult
from cg_lightning.app.run import why_skipped
from cg_lightning.core.stages import STEP_METHODS
from cg_lightning.diagnosis.report import Diagnosis
from cg_lightning.offline import diagnose

_LIMITS = {
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}


class _FirstBatch(Callback):
    """Diagnoses the step on the first batch, just before the Trainer runs it."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self.found: Diagnosis | None = None

    def _look(self, module: LightningModule, batch: Any) -> None:
        if self.found is None:
            self.found = diagnose(module, batch, stage=self._stage)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        """Diagnose the validation step."""
        self._look(pl_module, batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        """Diagnose the test step."""
        self._look(pl_module, batch)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        """Diagnose the predict step."""
        self._look(pl_module, batch)


def diagnose_step(config: DictConfig) -> JobResult:
    """Print what prevents one graph for the step of ``config.stage``; failed if something does.

    The Trainer loads one batch and prepares it, so that hooks and transforms of the data apply.

    Args:
        config: A config of the schema :class:`~cg_lightning.app.config.AppConfig`.
    """
    stage: str = config.stage.value
    look = _FirstBatch(stage)
    model: LightningModule = instantiate(config.model, _convert_="all")
    data: LightningDataModule = instantiate(config.data, _convert_="all")
    why = "" if stage == "validate" else why_skipped(stage, model, data)
    if why:
        return JobResult(f"There is no step to diagnose: {why}.")
    settings = {"logger": False, "enable_progress_bar": False, _LIMITS[stage]: 1}
    trainer: Trainer = instantiate(config.trainer, _convert_="all", callbacks=[look], **settings)
    quiet = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(model, datamodule=data, ckpt_path=config.ckpt_path, **quiet)
    if look.found is None:
        return JobResult(f"The data has no batch for stage={stage}.")
    print(look.found)
    step = f"{type(model).__name__}.{STEP_METHODS[stage]}"
    return JobResult("" if look.found.capturable() else f"{step} is not one graph.")
