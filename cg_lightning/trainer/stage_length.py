"""The number of batches that a Trainer runs in a stage."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

_NUMBERS = {
    "validate": (TrainerFn.VALIDATING, "num_val_batches"),
    "test": (TrainerFn.TESTING, "num_test_batches"),
    "predict": (TrainerFn.PREDICTING, "num_predict_batches"),
}


class TrainerStageLength:
    """Asks the Trainer for the number of batches.

    It implements :class:`~cg_lightning.runtime.stage_length.StageLength`. Validation inside ``fit``
    has no end, because the graphs of one epoch serve the next one.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def steps_left(self, stage: str, dataloader_idx: int, batch_idx: int) -> float:
        """See :class:`~cg_lightning.runtime.stage_length.StageLength`."""
        function, name = _NUMBERS[stage]
        if self._trainer.state.fn is not function:
            return math.inf
        numbers = getattr(self._trainer, name)
        if dataloader_idx >= len(numbers):  # dataloaders that give their batches together
            return math.inf
        return float(numbers[dataloader_idx] - batch_idx)
