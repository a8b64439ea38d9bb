"""Settings of layers and metrics that a callback or the step itself sets during a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAccuracy

from tests.harness import features, validate


class OwnNorm(nn.LayerNorm):
    """Its forward is that of torch, so torch reads the settings."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.own = OwnNorm(8)
        self.no_submodule = [nn.LayerNorm(8)]

    def forward(self, x: Tensor) -> Tensor:
        return self.no_submodule[0](self.own(self.norm(self.linear(x))))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.accuracy = BinaryAccuracy()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        self.accuracy.update(out[:, 0].sigmoid(), (out[:, 1] > 0).int())
        self.log("accuracy", self.accuracy)
        return out

    def transfer_batch_to_device(self, batch: Any, device: torch.device, _: int) -> Any:
        self.net.no_submodule[0].to(device)
        return super().transfer_batch_to_device(batch, device, _)


class Around(Model):
    """The step sets a setting for one call."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        before, self.net.norm.eps = self.net.norm.eps, 2.0
        first = self.net(batch[0])
        self.net.norm.eps = before
        return first + self.net(batch[0] + 1)


class Grows(Model):
    """The step sets a setting that stays."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        self.net.norm.eps = self.net.norm.eps * 2 + 0.1
        return out


class GrowsUnseen(Model):
    """The step writes a setting to a dictionary, where no interception sees it."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        settings = vars(self.net.norm)
        settings["eps"] = settings["eps"] * 2 + 0.1
        return out


class Sets(Callback):
    def __init__(self, setter: Callable[[Model, int], None]) -> None:
        self._set = setter

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        self._set(pl_module, batch_idx)


def at(number: int, setter: Callable[[Model], None]) -> Callable[[Model, int], None]:
    return lambda model, batch_idx: setter(model) if batch_idx == number else None


def replace_forward_for_a_while(model: Model, batch_idx: int) -> None:
    if batch_idx == 6:
        model.net.norm.forward = lambda x: x * 2
    if batch_idx == 9:
        del model.net.norm.forward


SETTERS = {
    "once": at(6, lambda model: setattr(model.net.norm, "eps", 5.0)),
    "of a class of one's own": at(6, lambda model: setattr(model.net.own, "eps", 5.0)),
    "of no submodule": at(6, lambda model: setattr(model.net.no_submodule[0], "eps", 5.0)),
    "of a metric": at(6, lambda model: setattr(model.accuracy, "threshold", 0.9)),
    "each time": lambda model, batch_idx: setattr(
        model.net.norm, "eps", (1e-5, 3.0)[batch_idx % 2]
    ),
    "always new": lambda model, batch_idx: setattr(model.net.norm, "eps", 0.1 + batch_idx),
    "forward": replace_forward_for_a_while,
    "forward of a net": at(6, lambda model: setattr(model.net, "forward", lambda x: x * 2)),
    "in its dictionary": at(6, lambda model: vars(model.net.norm).update(eps=5.0)),
    "in the dictionary of a class of one's own": at(
        6, lambda model: vars(model.net.own).update(eps=5.0)
    ),
    "in the dictionary of no submodule": at(
        6, lambda model: vars(model.net.no_submodule[0]).update(eps=5.0)
    ),
    "in its dictionary each time": lambda model, batch_idx: vars(model.net.norm).update(
        eps=(1e-5, 3.0)[batch_idx % 2]
    ),
    "forward in its dictionary": at(
        6, lambda model: vars(model.net.norm).update(forward=lambda x: x * 2)
    ),
    "as an object": at(6, lambda model: object.__setattr__(model.net.norm, "eps", 5.0)),
    "another dictionary": at(
        6, lambda model: setattr(model.net.norm, "__dict__", {**vars(model.net.norm), "eps": 5.0})
    ),
    "another dictionary of no submodule": at(
        6,
        lambda model: setattr(
            model.net.no_submodule[0],
            "__dict__",
            {**vars(model.net.no_submodule[0]), "eps": 5.0},
        ),
    ),
    "never": lambda model, batch_idx: None,
}
MODES = [
    *[(mode, verify) for mode in ("FULL_AND_PIECEWISE", "PIECEWISE") for verify in (0, 2)],
    ("FULL", 0),
]


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize(("mode", "verify_replays"), MODES)
@pytest.mark.parametrize("name", SETTERS)
def test_a_setting_that_a_callback_sets_counts_from_then_on(harness, name, mode, verify_replays):
    """Hazards 6 and 8."""
    callback = harness.callback(mode=mode, verify_replays=verify_replays)
    harness.compare(
        Model(), validate(features(48)), callback, lambda: [Sets(SETTERS[name])], max_epochs=1
    )
    if mode == "FULL" and name not in ("always new", "never", "another dictionary"):
        assert callback.stats.steps["NONE"] <= 4, callback.summary()
    assert callback.stats.replays or name == "always new"


@pytest.mark.parametrize(("mode", "verify_replays"), MODES)
@pytest.mark.parametrize("model", [Around, Grows, GrowsUnseen])
def test_a_setting_that_the_step_sets(harness, model, mode, verify_replays):
    callback = harness.callback(mode=mode, verify_replays=verify_replays)
    harness.compare(model(), validate(features(48)), callback)


def test_two_stages_with_other_settings(harness):
    def job(trainer, model):
        results = trainer.validate(model, features(48), verbose=False)
        model.net.norm.eps = 1.0
        results += trainer.validate(model, features(48), verbose=False)
        model.net.norm.eps = 1e-5
        return results + trainer.validate(model, features(48), verbose=False)

    setter = at(5, lambda model: setattr(model.net.norm, "eps", 3.0))
    harness.compare(Model(), job, None, lambda: [Sets(setter)])


def test_another_value_is_named(harness):
    callback = harness.callback(mode="PIECEWISE")
    harness.compare(Model(), validate(features(48)), callback, lambda: [Sets(SETTERS["once"])])
    assert "self.net.norm.eps: now 5.0, before 1e-05" in str(callback.summary())


class Late(Model):
    """The first batches do not call the net. They are of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def on_train_epoch_start(self) -> None:
        self.net.norm.eps = 1e-5

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.other(batch[0])
        return self.net(out) if len(out) == 4 else out


def test_a_setting_that_was_set_before_the_first_watched_call(harness):
    """No graph looked at it then; the next epoch begins with the value that was before."""
    batches = [*features(4, 2), *features(24)]
    loader = DataLoader(batches, batch_size=None)

    def set_in_first_epoch(model: Model, batch_idx: int) -> None:
        if batch_idx == 1 and model.current_epoch == 0:
            model.net.norm.eps = 3.0

    callback = harness.compare(
        Late(),
        lambda trainer, model: trainer.fit(model, features(4), loader),
        harness.callback(mode="PIECEWISE"),
        lambda: [Sets(set_in_first_epoch)],
        max_epochs=3,
        num_sanity_val_steps=0,
    )
    assert callback.stats.steps["PIECEWISE"], callback.summary()
