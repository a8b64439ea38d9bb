"""``diagnose`` draws no random numbers and changes nothing, although it runs the step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from cg_lightning import diagnose
from tests.models import Predictor


class Draws(Predictor):
    """A step that draws from all three, updates buffers and a metric, and logs."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)))
        self.accuracy = MulticlassAccuracy(8)
        self.seen: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.net.train()
        output = self.net(x) + torch.rand(8) + random.random() + np.random.rand()
        self.accuracy.update(output, y)
        self.log("accuracy", self.accuracy)
        return output


def _randomness() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tobytes(), rest, torch.get_rng_state().tolist()


def _state(module: nn.Module) -> Any:
    tensors = {name: value.tolist() for name, value in module.state_dict().items()}
    metrics = [each for each in module.modules() if isinstance(each, MulticlassAccuracy)]
    states = [{n: v.tolist() for n, v in each.metric_state.items()} for each in metrics]
    flags = [(each.training, sorted(vars(each))) for each in module.modules()]
    return tensors, states, flags


def _batch() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator), torch.tensor([0, 1, 2, 3])]


CALLS: dict[str, Callable[[Any], Any]] = {
    "validate": lambda module: diagnose(module, _batch(), stage="validate"),
    "predict": lambda module: diagnose(module, _batch()),
    "a network": lambda module: diagnose(module.net, _batch()[0]),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_diagnose_draws_nothing_and_changes_nothing(name):
    torch.manual_seed(3)
    module = Draws()
    before = _randomness(), _state(module)
    CALLS[name](module)
    assert _randomness()[0] == before[0][0], "Python's"
    assert _randomness()[1:4] == before[0][1:4], "NumPy's"
    assert _randomness()[4] == before[0][4], "PyTorch's"
    assert _state(module) == before[1]


def test_the_comparison_can_fail():
    module = Draws()
    before = _randomness(), _state(module)
    module.net.train()
    module.net(_batch()[0])
    assert _randomness() != before[0]
    assert _state(module) != before[1]
