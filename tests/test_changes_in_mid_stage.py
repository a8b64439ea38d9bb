"""Changes that one batch makes and a later one takes back, where a guard could miss them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from tests.harness import Harness, features, predict


class Part(nn.Module):
    """Calls ``use`` with itself, and holds what ``setup`` gives."""

    def __init__(self, setup: Callable[[], Any], use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.held, self.use = nn.Linear(8, 8), setup(), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.linear(x))


class Runs(LightningModule):
    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.part(batch[0])


class Changes(Callback):
    """Calls ``change(part, True)`` before batch 6, and ``change(part, False)`` before batch 9."""

    def __init__(self, change: Callable[[Any, bool], Any]) -> None:
        self.change = change

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx in (6, 9):
            self.change(pl_module.part, batch_idx == 6)


def attribute(name: str) -> Callable[[Any, bool], None]:
    """Return a change of an attribute of what is held: 3 in place of 1."""
    return lambda part, is_on: setattr(part.held, name, 3.0 if is_on else 1.0)


def inside_context(part: Part, x: Tensor) -> Tensor:
    with part.held:
        return part.linear(x).float()


CHANGES: dict[str, tuple[Any, Any, Any]] = {
    "autocast, its type": (
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        inside_context,
        lambda part, is_on: setattr(
            part.held, "fast_dtype", torch.float16 if is_on else torch.bfloat16
        ),
    ),
    "autocast, on or off": (
        lambda: torch.autocast("cpu", enabled=False),
        inside_context,
        lambda part, is_on: setattr(part.held, "_enabled", is_on),
    ),
}


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(harness: Harness, name: str, mode: str) -> None:
    setup, use, change = CHANGES[name]
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    harness.compare(
        Runs(Part(setup, use)), predict(features(48)), callback, lambda: [Changes(change)]
    )
    assert callback.stats.steps[mode.split("_")[0]], callback.summary()  # or else nothing was tried


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "record_function": lambda: torch.profiler.record_function("part"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_that_is_entered_again_costs_no_graph(harness: Harness, name: str) -> None:
    callback = harness.callback(warmup_steps=1)
    harness.compare(Runs(Part(CONTEXTS[name], inside_context)), predict(features(48)), callback)
    assert callback.stats.steps["FULL"] >= 10, callback.summary()
