"""``task=diagnose``: why a step is not one graph."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig

from cg_lightning.app.jobs import JobResult
from cg_lightning.app.run import build, why_skipped
from cg_lightning.core.settings import EvaluatingStageName
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

    def __init__(self, stage: EvaluatingStageName) -> None:
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


def fitted(found: Diagnosis, columns: int) -> str:
    """Return the table or, if it is wider than the terminal, paragraphs.

    Args:
        found: The diagnosis.
        columns: The width of the terminal; 0 if there is none.
    """
    table = str(found)
    lines = table.splitlines()
    if not columns or max(map(len, lines)) <= columns:
        return table
    texts = [(line, 0) for line in (found.unkeyable, found.stopped) if line]
    for finding in found.findings:
        texts += [(str(finding), 0), (f"remedy: {finding.remedy}", 2)]
    texts.append((lines[-1], 0))  # the largest capturable submodules
    if not found.findings:
        texts = [(table, 0)]
    return "\n".join(
        textwrap.fill(
            text,
            columns,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for text, indent in dict.fromkeys(texts)
    )


def diagnose_step(config: DictConfig) -> JobResult:
    """Print what prevents one graph for the step of ``config.stage``; failed if something does.

    The Trainer loads one batch and prepares it, so that hooks and transforms of the data apply.

    Args:
        config: A config of the schema :class:`~cg_lightning.app.config.AppConfig`.
    """
    stage: EvaluatingStageName = config.stage.value
    look = _FirstBatch(stage)
    model, data = build(config)
    why = "" if stage == "validate" else why_skipped(stage, model, data)
    if why:
        return JobResult(f"There is no step to diagnose: {why}.")
    settings = {"logger": False, "enable_progress_bar": False, _LIMITS[stage]: 1}
    trainer: Trainer = instantiate(config.trainer, _convert_="all", callbacks=[look], **settings)
    quiet = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(model, datamodule=data, ckpt_path=config.ckpt_path, **quiet)
    if look.found is None:
        return JobResult(f"The data has no batch for stage={stage}.")
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    print(fitted(look.found, columns))
    step = f"{type(model).__name__}.{STEP_METHODS[stage]}"
    return JobResult("" if look.found.capturable() else f"{step} is not one graph.")
