"""To which hook ``self.log`` belongs after an error of the user's: to that of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cg_lightning.core.stages import TRAIN
from tests.harness import features
from tests.models import Predictor


class Raising(torch.autograd.Function):
    calls = 0
    last = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Raising.calls += 1
        if Raising.calls == Raising.last:
            raise ValueError("of the user's")
        return gradient


class Stops(Predictor):
    """Raises an error at the batch ``last``, in a step or in its backward."""

    def __init__(self, last: int, where: str, stage: str = TRAIN) -> None:
        super().__init__(nn.Linear(8, 8))
        self.last, self.where, self.stage, self.number = last, where, stage, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._may_stop("step")
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        return Raising.apply(loss) if self.where == "backward" else loss

    def on_after_backward(self) -> None:
        self._may_stop("after")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.stage == "validate":
            self._may_stop("step")
        return super().validation_step(batch, batch_idx)

    def _may_stop(self, where: str) -> None:
        if where == self.where:
            self.number += 1
            if self.number == self.last:
                raise ValueError("of the user's")


def _left(harness: Any, module: Stops, stage: str, extra: list[Any]) -> Any:
    trainer, batches = harness.trainer(*extra, max_epochs=1), features(48, 4)
    Raising.calls, Raising.last = 0, module.last if module.where == "backward" else 0
    run = trainer.validate if stage != TRAIN else lambda *args: trainer.fit(*args, batches)
    with pytest.raises(ValueError, match="of the user's"):
        run(module, batches)
    return module._current_fx_name


@pytest.mark.parametrize("last", [1, 2, 3, 7])
@pytest.mark.parametrize("where", ["step", "backward", "after"])
def test_after_an_error_in_training(harness, where, last):
    module = Stops(last, where)
    callback = harness.callback(stages=["train"], warmup_steps=1)
    eager = _left(harness, copy.deepcopy(module), TRAIN, [])
    assert _left(harness, module, TRAIN, [callback]) == eager
    assert eager == {"step": "training_step", "after": "on_after_backward"}.get(where, "backward")


@pytest.mark.parametrize("last", [1, 2, 3, 7])
def test_after_an_error_in_an_evaluation(harness, last):
    module = Stops(last, "step", "validate")
    eager = _left(harness, copy.deepcopy(module), "validate", [])
    assert _left(harness, module, "validate", [harness.callback(warmup_steps=1)]) == eager
