"""The dataloaders of a stage, and the number of batches that a Trainer runs of each."""

from __future__ import annotations

import itertools
import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

_STAGES = {
    "validate": (TrainerFn.VALIDATING, "val"),
    "test": (TrainerFn.TESTING, "test"),
    "predict": (TrainerFn.PREDICTING, "predict"),
}
"""The function of the Trainer that runs a stage, and the name of the stage in its attributes."""


def dataloaders(trainer: Trainer, stage: str) -> Any:
    """Return what the user gave for a stage: a dataloader, or several ones."""
    return getattr(trainer, f"{_STAGES[stage][1]}_dataloaders")


def numbers_of_batches(trainer: Trainer, stage: str) -> list[float]:
    """Return how many batches of each dataloader run in a stage."""
    numbers: list[float] = getattr(trainer, f"num_{_STAGES[stage][1]}_batches")
    return numbers


class TrainerStageLength:
    """Asks the Trainer for the number of batches.

    It implements :class:`~cg_lightning.runtime.stage_length.StageLength`. Inside ``fit``, the
    graphs of one validation serve the next ones, so all that are left count as one stage.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def steps_left(self, stage: str, dataloader_idx: int) -> float:
        """See :class:`~cg_lightning.runtime.stage_length.StageLength`."""
        trainer = self._trainer
        is_inside_fit = trainer.state.fn is TrainerFn.FITTING
        if trainer.state.fn is not _STAGES[stage][0] and not is_inside_fit:
            return math.inf
        numbers = numbers_of_batches(trainer, stage)
        if dataloader_idx >= len(numbers):  # dataloaders that give their batches together
            return math.inf
        in_fit = trainer.fit_loop.epoch_loop.val_loop
        loop = in_fit if is_inside_fit else getattr(trainer, f"{stage}_loop")
        done = loop.batch_progress.current.ready - 1  # of all dataloaders
        end, *ends = list(itertools.accumulate(numbers))[dataloader_idx:]
        while done >= end and ends:  # submodules do not know in which dataloader they are called
            end, *ends = ends
            dataloader_idx += 1
        left = float(end - done)
        if is_inside_fit:
            left += numbers[dataloader_idx] * self._validations_left()
        return left

    def _validations_left(self) -> float:
        """Return how many validations of this ``fit`` follow the current one, at the most."""
        trainer = self._trainer
        batches, every = trainer.num_training_batches, trainer.val_check_batch
        if not every or math.inf in (batches, every) or trainer.max_epochs in (None, -1):
            return math.inf
        done = trainer.fit_loop.epoch_loop.batch_idx + 1
        epochs = trainer.max_epochs - trainer.current_epoch
        return (batches * epochs - done) // every
