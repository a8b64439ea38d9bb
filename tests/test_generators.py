"""Random generators of the user's on the device: a graph draws from them what eager draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from cg_lightning import graphed
from cg_lightning.backends import resolve_backend
from cg_lightning.core.errors import CaptureError
from tests.harness import Harness, assert_same, features
from tests.models import Body, Predictor

Use = Callable[[Any, Tensor], Any]
KEPT: dict[str, Any] = {}
SETTINGS = [
    {"verify_replays": 0},
    {"verify_replays": 2},
    pytest.param({"mode": "FULL"}, marks=pytest.mark.exhaustive),
    {"mode": "PIECEWISE"},
]


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.randn(x.shape, device=x.device, generator=generator)


class Holder:
    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator


class Draws(Predictor):
    """Returns what ``use`` makes of its output."""

    def __init__(self, use: Use, device: torch.device) -> None:
        super().__init__(Body())
        self.use = use
        self.g = torch.Generator(device).manual_seed(3)
        self.h = torch.Generator(device).manual_seed(4)
        self.both = {"one": [self.g], "other": Holder(self.h)}
        KEPT["g"] = self.g

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.use(self, self.net(batch[0]))


def twice(m: Any, x: Tensor) -> Any:
    return noise(x, m.g), noise(noise(x, m.h), m.g), torch.rand(8, device=x.device)


def rows(m: Any, x: Tensor) -> Any:
    order = torch.randperm(len(x), device=x.device, generator=m.g)
    return x[order], torch.empty_like(x).normal_(generator=m.h)


DRAWN: dict[str, Use] = {
    "an attribute": lambda m, x: noise(x, m.g),
    "two": twice,
    "a permutation": rows,
    "in a dictionary": lambda m, x: noise(x, m.both["one"][0]),
    "in an object": lambda m, x: noise(x, m.both["other"].generator),
    "a global": lambda m, x: noise(x, KEPT["g"]),
    "dropped rows": lambda m, x: x * torch.empty_like(x).bernoulli_(0.5, generator=m.g),
    "and the default one": lambda m, x: nn.functional.dropout(noise(x, m.g)),
}
LOWER: dict[str, Use] = {
    "seeded in the step": lambda m, x: noise(x, m.g.manual_seed(5)),
    "made in the step": lambda m, x: noise(x, torch.Generator(x.device)),
    "made and seeded": lambda m, x: noise(x, torch.Generator(x.device).manual_seed(1)),
    "its seed": lambda m, x: noise(x, m.g) * m.g.initial_seed(),
    "state set": lambda m, x: (noise(x, m.g), m.h.set_state(m.g.get_state()))[0],
    "a number": lambda m, x: x * torch.rand((), device=x.device, generator=m.g).item(),
}


class Seeds(Callback):
    """Does what users do to generators between batches."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx in (6, 9):
            self.change(pl_module)


def swap(m: Any) -> None:
    m.g, m.h = m.h, m.g


BETWEEN: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "seeded": lambda m: m.g.manual_seed(9),
    "drawn": lambda m: torch.rand(3, device=m.g.device, generator=m.g),
    "state": lambda m: m.g.set_state(m.h.get_state()),
    "swapped": swap,
    "another": lambda m: setattr(m, "g", torch.Generator(m.device).manual_seed(2)),
    "others": lambda m: setattr(m, "both", {"one": [m.h], "other": Holder(m.g)}),
}


def run(harness: Harness, device: torch.device, use: Use, *callbacks: Any) -> Any:
    torch.manual_seed(1)
    module = Draws(use, device)
    trainer = harness.trainer(*callbacks)
    outputs = [trainer.predict(module, features(56)) for _ in range(2)]
    return outputs, module.g.get_state(), module.h.get_state(), torch.rand(2, device=device)


def compare(
    harness: Harness,
    device: torch.device,
    use: Use,
    change: Callable[[Any], Any] = lambda m: None,
    **settings: Any,
) -> Any:
    callback = harness.callback(**settings)
    found = run(harness, device, use, callback, Seeds(change))
    assert_same(found, run(harness, device, use, Seeds(change)))
    return callback


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_those_of_eager(harness, device, name, settings):
    """Hazard 9: of watched, verified and captured runs, the user's generator sees one."""
    callback = compare(harness, device, DRAWN[name], **settings)
    is_full = callback.stats.steps["FULL"] > 10
    assert is_full or settings.get("mode") == "PIECEWISE", callback.summary()


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("name", ["two", "in a dictionary"])
def test_what_happens_to_generators_between_steps(harness, device, name, change, settings):
    """Hazard 9."""
    compare(harness, device, DRAWN[name], BETWEEN[change], **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", LOWER)
def test_what_else_a_step_does_with_a_generator(harness, device, name, settings):
    callback = compare(harness, device, LOWER[name], **settings)
    assert callback.stats.steps["FULL"] == 0, callback.summary()


def test_a_submodule_that_draws(harness, device):
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.g = torch.Generator(device).manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return noise(self.linear(x), self.g)

    def use(m: Any, x: Tensor) -> Any:
        y = m.noise(x)
        return y * float(y.sum())  # the step is no graph

    class Inside(Draws):
        def __init__(self) -> None:
            super().__init__(use, device)
            self.noise = Noise()

    for settings in SETTINGS[:2]:
        seen = []
        for callbacks in ([harness.callback(**settings)], []):
            torch.manual_seed(1)
            module = Inside()
            outputs = harness.trainer(*callbacks).predict(module, features(40))
            seen.append((outputs, module.noise.g.get_state()))
        assert_same(*seen)


class Trained(LightningModule):
    """Draws in training and in validation, and copies constants from the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.net = Body()
        self.g = torch.Generator(device).manual_seed(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = noise(self.net(noise(batch[0], self.g)), self.g)[:, [0, 1, -1]]
        loss = (x * torch.tensor([1.0, 2.0, 3.0]).to(x)).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("v", noise(self.net(batch[0]), self.g)[:, [1, 0]].mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.001)


@pytest.mark.parametrize(
    "settings",
    [
        {"stages": ("train", "validate")},
        {"stages": ("train", "validate"), "verify_replays": 0},
        {"capture_ahead": True},
        {"capture_sizes": [4], "verify_tolerance": "close"},
        {"verify_every": 3, "warmup_steps": 1},
    ],
    ids=str,
)
def test_generators_in_all_stages(harness, device, settings):
    """Hazard 9."""
    seen = []
    for callbacks in ([harness.callback(**settings)], []):
        torch.manual_seed(0)
        module = Trained(device)
        trainer = harness.trainer(*callbacks, max_epochs=3)
        trainer.fit(module, features(41), features(41))
        result = trainer.validate(module, features(41), verbose=False)
        metrics = dict(trainer.callback_metrics)
        seen.append((result, metrics, dict(module.state_dict()), module.g.get_state()))
        assert not callbacks or callbacks[0].stats.steps["FULL"] > 20, callbacks[0].summary()
    assert_same(*seen)


def test_a_failed_capture_leaves_generators_as_they_were(backend, device):
    used = resolve_backend(backend, device)
    assert used is not None
    generator = torch.Generator(device).manual_seed(3)
    used.follow(generator)
    before = generator.get_state()

    def draw() -> Tensor:
        return torch.rand(3, device=device, generator=generator)

    def fail() -> None:
        draw()
        raise ValueError("the user's")

    with pytest.raises(CaptureError):
        used.capture(fail, collect_garbage=False, capture_error_mode="thread_local")
    assert_same(generator.get_state(), before)
    expected = [draw() for _ in range(3)]
    generator.set_state(before)
    graph, found = used.capture(draw, collect_garbage=False, capture_error_mode="thread_local")
    assert_same(generator.get_state(), before)
    for each in expected:
        graph.replay()
        assert_same(found.clone(), each)


def test_without_a_trainer(backend, device):
    def forward(x: Tensor) -> Tensor:
        return noise(x, KEPT["g"])

    x = torch.ones(4, 8, device=device)
    seen = []
    for is_graphed in (True, False):
        KEPT["g"] = torch.Generator(device).manual_seed(3)
        with torch.no_grad():
            if is_graphed:
                with graphed(forward, module=nn.Linear(1, 1).to(device), backend=backend) as fast:
                    seen.append([fast(x) for _ in range(9)])
                assert fast.stats.steps["FULL"] > 0, fast.summary()
            else:
                seen.append([forward(x) for _ in range(9)])
    assert_same(*seen)


class RecurrentTraining(LightningModule):
    """Trains a recurrent network with dropout, and validates it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.rnn(batch[0].unsqueeze(1).repeat(1, 3, 1))[0].square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("stages", [["validate"], ["train", "validate"]], ids=str)
def test_dropout_of_a_recurrent_network_with_validation_from_graphs(harness, stages):
    """Hazard 9: cuDNN has a state of its own, which PyTorch seeds anew if a generator is set."""
    callback = harness.callback(stages=stages)

    def fit(trainer: Any, module: LightningModule) -> Any:
        trainer.fit(module, features(24), features(24))
        return torch.rand(4, device=module.device)

    harness.compare(RecurrentTraining(), fit, callback, max_epochs=3)
    assert callback.stats.steps_of("validate")["FULL"] >= 8, callback.summary()
