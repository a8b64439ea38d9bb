"""The number of batches that a Trainer runs in a stage."""

from __future__ import annotations

import itertools
import math

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

_STAGES = {
    "validate": (TrainerFn.VALIDATING, "num_val_batches", "validate_loop"),
    "test": (TrainerFn.TESTING, "num_test_batches", "test_loop"),
    "predict": (TrainerFn.PREDICTING, "num_predict_batches", "predict_loop"),
}
"""The function of the Trainer, and its attributes with the numbers of batches and the loop."""


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
        function, name, loop = _STAGES[stage]
        is_inside_fit = trainer.state.fn is TrainerFn.FITTING
        if trainer.state.fn is not function and not is_inside_fit:
            return math.inf
        numbers = getattr(trainer, name)
        if dataloader_idx >= len(numbers):  # dataloaders that give their batches together
            return math.inf
        runs = trainer.fit_loop.epoch_loop.val_loop if is_inside_fit else getattr(trainer, loop)
        done = runs.batch_progress.current.ready - 1  # of all dataloaders
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
