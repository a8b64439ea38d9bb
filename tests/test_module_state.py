"""Changes of a module from outside. Sampling is off, so only guards can notice them."""

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics.classification import BinaryAccuracy

from tests.harness import Harness, assert_same, features, predict, validate
from tests.models import Body, Predictor

MODES = ("FULL", "PIECEWISE")


class Scaled(nn.Module):
    """The scale is an attribute of the class, or of the object that shadows it."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.act = nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.linear(x))) * self.scale


FORWARD = Scaled.forward


def changes_of(net: nn.Module) -> dict[str, Any]:
    return {
        "forward hook": lambda: net.act.register_forward_hook(
            lambda module, inputs, output: output * 3
        ),
        "forward pre-hook": lambda: net.norm.register_forward_pre_hook(
            lambda module, inputs: (inputs[0] * 3,)
        ),
        "attribute of the class": lambda: setattr(type(net), "scale", 3.0),
        "attribute that shadows it": lambda: setattr(net, "scale", 3.0),
        "another activation": lambda: setattr(net, "act", nn.Tanh()),
        "another parameter": lambda: setattr(
            net.linear, "bias", nn.Parameter(torch.ones_like(net.linear.bias))
        ),
        "setting of a layer": lambda: setattr(net.norm, "eps", 3.0),
        "another forward": lambda: setattr(net.act, "forward", torch.tanh),
        "forward of a user's module": lambda: setattr(net, "forward", lambda x: net.linear(x)),
        "forward of a user's class": lambda: setattr(
            type(net), "forward", lambda self, x: self.linear(x)
        ),
    }


AT_ONCE = list(changes_of(Scaled()))[:6]
NEXT_EPOCH = list(changes_of(Scaled()))[6:]


class Changes(Callback):
    def __init__(self, what: str, batch_idx: int | None = None) -> None:
        self.what, self.batch_idx = what, batch_idx

    def on_predict_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if batch_idx == self.batch_idx:
            changes_of(pl_module.net)[self.what]()

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            changes_of(pl_module.net)[self.what]()


@pytest.fixture(autouse=True)
def the_class_is_as_it_was():
    yield
    Scaled.scale, Scaled.forward = 1.0, FORWARD


class PutsBack(Callback):
    def on_predict_end(self, *_: Any) -> None:
        Scaled.scale, Scaled.forward = 1.0, FORWARD

    on_fit_end = on_predict_end


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", AT_ONCE)
def test_seen_at_the_next_step(harness: Harness, mode, what):
    """Hazards 7 and 20."""
    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    harness.compare(
        Predictor(Scaled()),
        predict(features(48)),
        callback,
        others=lambda: [Changes(what, 4), PutsBack()],
    )
    assert callback.stats.replays >= 4, callback.summary()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", [*AT_ONCE, *NEXT_EPOCH])
def test_seen_in_the_next_epoch(harness: Harness, mode, what):
    """Hazards 7 and 20."""

    def fit(trainer, module):
        trainer.fit(module, features(8), features(24))
        return dict(trainer.callback_metrics)

    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    others = lambda: [Changes(what), PutsBack()]
    harness.compare(
        Predictor(Scaled()), fit, callback, others=others, max_epochs=3, num_sanity_val_steps=0
    )
    assert callback.stats.replays >= 4, callback.summary()


def test_that_such_a_change_is_frozen_without_the_guards(harness: Harness, monkeypatch):
    from cg_lightning.guards.guard_set import GuardSet

    monkeypatch.setattr(GuardSet, "check", lambda self: True)
    callback = harness.callback(mode="FULL", warmup_steps=1, verify_replays=0)
    with pytest.raises(AssertionError):
        harness.compare(
            Predictor(Scaled()),
            predict(features(48)),
            callback,
            others=lambda: [Changes(AT_ONCE[3], 4)],
        )


class CountsOnItsClass(Predictor):
    steps = 0
    seen: ClassVar[list[int]] = []

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        type(self).steps += 1
        return self.net(batch[0]) * self.steps

    def on_predict_end(self) -> None:
        type(self).steps = 0


class AppendsToItsClass(CountsOnItsClass):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(1)
        return self.net(batch[0]) * len(self.seen)

    def on_predict_end(self) -> None:
        self.seen.clear()


@pytest.mark.parametrize(
    ("model", "name"), [(CountsOnItsClass, "steps"), (AppendsToItsClass, "seen")]
)
@pytest.mark.parametrize("verify_replays", [0, 2])
def test_what_a_step_changes_on_its_class(harness: Harness, model, name, verify_replays):
    """Hazard 6."""
    callback = harness.callback(
        mode="FULL_AND_PIECEWISE", warmup_steps=1, verify_replays=verify_replays
    )
    harness.compare(model(Scaled()), predict(features(32)), callback)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(model(Scaled()), predict(features(32)), callback)
    assert any(
        f"module state rebound: CountsOnItsClass.{name}" in reason
        for reason in callback.stats.eager_reasons
    )


class RebindsABuffer(Predictor):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("count", torch.zeros(()))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.count = self.count + 1
        return self.net(batch[0]) / self.count


class MovesAWeight(Callback):
    def on_validation_batch_start(self, trainer, pl_module, *_: Any) -> None:
        pl_module.net.linear.weight.data = pl_module.net.linear.weight.data * 1.01


@pytest.mark.parametrize("mode", MODES)
def test_what_changes_with_each_step_is_not_captured_in_each_step(harness: Harness, mode):
    """Hazard 21: the reason is not a warm-up, and it names the tensor."""
    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(
        Predictor(Scaled()), validate(features(160)), callback, others=lambda: [MovesAWeight()]
    )
    assert callback.stats.captures <= 8  # of 39
    reason = "would not pay: parameters or buffers are at new addresses"
    weight = "net.linear.weight" if mode == "FULL" else "linear.weight"
    assert any(f"{reason}: {weight}" in said for said in callback.stats.eager_reasons), (
        callback.summary()
    )
    assert callback.stats.eager_reasons["warm-up"] < 16


def test_a_buffer_that_the_step_rebinds_does_not_concern_its_submodules(harness: Harness):
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(RebindsABuffer(Scaled()), validate(features(160)), callback)
    assert callback.stats.captures == 0
    assert any(
        said.startswith("module state rebound: _buffers.count")
        for said in callback.stats.eager_reasons
    )
    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.compare(RebindsABuffer(Scaled()), validate(features(160)), callback)
    assert callback.stats.captures == 1
    assert callback.stats.steps["PIECEWISE"] == 39


@pytest.mark.filterwarnings(
    "ignore:.*is not a leaf Tensor"
)  # PyTorch warns if a Trainer moves such a module
@pytest.mark.parametrize(
    "make",
    [torch.jit.script, lambda net: torch.jit.trace(net, torch.randn(4, 8))],
    ids=["script", "trace"],
)
def test_modules_of_torch_jit(harness: Harness, make):
    """Their members are not dictionaries, and calls of children bypass Python."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    callback = harness.callback(mode="FULL_AND_PIECEWISE", warmup_steps=1)
    harness.compare(Predictor(make(net)), predict(features(32)), callback)
    assert callback.stats.steps["FULL"] == 7, callback.summary()
    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.compare(Predictor(make(net)), predict(features(32)), callback)
    assert any("torch.jit" in reason for reason in callback.stats.eager_reasons)


class DeeplyConfigured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model=SimpleNamespace(scales=[{"one": SimpleNamespace(scale=1.0)}])
        )
        self.config.itself = self.config
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) * self.config.model.scales[0]["one"].scale


@pytest.mark.parametrize("mode", MODES)
def test_objects_in_objects_are_watched(harness: Harness, mode):
    """Hazard 7."""

    class ChangesDeeply(Callback):
        def on_predict_batch_end(
            self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
        ) -> None:
            if batch_idx == 5:
                pl_module.net.config.model.scales[0]["one"].scale = 3.0

    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    harness.compare(
        Predictor(DeeplyConfigured()),
        predict(features(48)),
        callback,
        others=lambda: [ChangesDeeply()],
    )
    assert callback.stats.captures == 2


class ReadsATable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = [1.0] * 1000
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) * self.table[7]


class ChangesTheTable(Callback):
    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            pl_module.net.table[7] = 3.0


@pytest.mark.parametrize("mode", MODES)
def test_large_containers_are_compared_once_an_epoch(harness: Harness, mode):
    """Hazard 7."""

    def fit(trainer, module):
        trainer.fit(module, features(8), features(40))
        return dict(trainer.callback_metrics)

    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    others = lambda: [ChangesTheTable()]
    harness.compare(
        Predictor(ReadsATable()), fit, callback, others=others, max_epochs=3, num_sanity_val_steps=0
    )
    assert callback.stats.captures == 2


class Thresholded(Predictor):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.accuracy = BinaryAccuracy(threshold=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy.update(self.net(batch[0])[:, 0].sigmoid(), batch[0][:, 0] > 0)
        self.log("accuracy", self.accuracy)


class ChangesBetweenEpochs(Callback):
    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            pl_module.accuracy.threshold = 0.6
            weight = pl_module.net.linear.weight
            weight.data = weight.data.t()  # has the same address


def test_settings_of_metrics_and_the_layout_of_weights(harness: Harness):
    """Hazards 4 and 7."""

    def fit(trainer, module):
        trainer.fit(module, features(8), features(40))
        return dict(trainer.callback_metrics)

    callback = harness.callback(mode="FULL", warmup_steps=1, verify_replays=0)
    others = lambda: [ChangesBetweenEpochs()]
    harness.compare(
        Thresholded(Scaled()), fit, callback, others=others, max_epochs=3, num_sanity_val_steps=0
    )
    assert callback.stats.captures == 2
    assert callback.stats.steps["FULL"] > 20, callback.summary()


class SetsAFlagInItsStep(Predictor):
    """Stores a value of the first batch of each epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.net.scale = 3.0 if batch_idx == 0 else 1.0
        output = self.net(batch[0])
        self.log("mean", output.mean())
        return output


class SwapsWeightsInItsStep(Predictor):
    """Swaps tensors for others at new addresses, as a moving average may."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        weight = self.net.linear.weight
        before, weight.data = weight.data, weight.data * (batch_idx + 1)
        output = self.net(batch[0])
        weight.data = before
        return output


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("model", [SetsAFlagInItsStep, SwapsWeightsInItsStep])
def test_what_a_step_changes_before_it_calls_a_submodule(harness: Harness, mode, model):
    """Hazards 4 and 7: the change comes after the start of the step."""

    def fit(trainer, module):
        trainer.fit(module, features(8), features(40))
        return dict(trainer.callback_metrics)

    callback = harness.callback(mode=mode, warmup_steps=3, verify_replays=0)
    harness.compare(model(Scaled()), fit, callback, max_epochs=3, num_sanity_val_steps=0)
    if model is SetsAFlagInItsStep:
        assert callback.stats.replays > 10, callback.summary()


class OwnLookup(nn.Module):
    """Looks up attributes itself, so nobody sees which ones it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.half = nn.Linear(8, 8), 0.5

    def __getattribute__(self, name):
        return (
            super().__getattribute__("half") * 2
            if name == "scale"
            else super().__getattribute__(name)
        )

    def forward(self, x):
        return self.linear(x) * self.scale


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is torch.nn.functional.linear else output


class ChangesBetweenBatches(Callback):
    def __init__(self) -> None:
        self.mode = Doubled()

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 6:
            pl_module.net.half = 2.0
        if batch_idx == 8:
            self.mode.__enter__()
        if batch_idx == 10:
            self.mode.__exit__(None, None, None)


@pytest.mark.parametrize("mode", MODES)
def test_what_nobody_sees_being_read(harness: Harness, mode):
    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    module, others = Predictor(OwnLookup()), lambda: [ChangesBetweenBatches()]
    harness.compare(module, predict(features(60)), callback, others=others)
    assert callback.stats.replays >= 4, callback.summary()


class Configuration:
    scale = 1.0


class Configured(nn.Module):
    shared = Configuration

    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear, self.own, self.name = nn.Linear(8, 8), Configuration, name

    def forward(self, x):
        config = self.own if self.name == "own" else self.shared
        return self.linear(x) * config.scale


class Configures(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        Configuration.scale = 1.0 if batch_idx < 6 else 2.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["own", "shared"])
def test_a_class_as_a_configuration(harness: Harness, mode, name):
    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    module, others = Predictor(Configured(name)), lambda: [Configures()]
    harness.compare(module, predict(features(60)), callback, others=others)
    assert callback.stats.replays >= 4, callback.summary()


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_a_buffer_that_nobody_can_write_to(harness, mode):
    """An expanded buffer, and one that was made under inference mode and is met outside of it."""

    class Masked(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.register_buffer("mask", torch.ones(1).expand(4, 8))
            with torch.inference_mode():
                self.register_buffer("made", torch.ones(8))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return super().predict_step(batch, batch_idx) * self.mask * self.made

    callback = harness.callback(mode=mode)
    module, reference = Masked(), Masked()
    reference.net.load_state_dict(module.net.state_dict())
    outputs = [
        harness.trainer(*extra, inference_mode=False).predict(net, features(40))
        for net, extra in ((module, [callback]), (reference, []))
    ]
    assert_same(*outputs)
    assert callback.stats.steps[mode] == 7, callback.summary()


class Converts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        self.linear.double()
        x = self.linear(x.double()).float()
        self.linear.float()
        return x


class ReplacesData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        self.linear.weight.data = self.linear.weight.data * 0.5
        return self.linear(x)


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("kind", [Converts, ReplacesData])
def test_a_step_that_gives_weights_other_memory(harness, kind, mode, verify_replays):
    """Freed memory is used again, so an address may be the same by chance."""
    callback = harness.callback(mode=mode, verify_replays=verify_replays)
    harness.compare(Predictor(kind()), predict(features(32)), callback)
    assert callback.stats.steps["FULL"] == 0, callback.summary()
    assert any("other memory" in str(each.reason) for each in callback.stats.reasons)


class SlottedBody(nn.Module):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class CountsInASlot(SlottedBody):
    def forward(self, x: Tensor) -> Tensor:
        self.scale += 1
        return super().forward(x)


class CountsUnreadInASlot(SlottedBody):
    def forward(self, x: Tensor) -> Tensor:
        self.scale += 1
        return self.linear(x)


class ReadsItsDictionary(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return super().predict_step(batch, batch_idx) * self.__dict__.get("extra", 1.0)


class ReadsItsNames(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return super().predict_step(batch, batch_idx) * (2.0 if "extra" in vars(self) else 1.0)


class ReadsItsExample(Predictor):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.example_input_array = torch.ones(8)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().predict_step(batch, batch_idx)
        return output * self.example_input_array.to(output.device)


def not_a_number(module: Any, batch: int) -> None:
    module.scale = float("nan")


class ReadsNotANumber(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return super().predict_step(batch, batch_idx) * (1.0 if math.isnan(self.scale) else 2.0)


def at(batch: int, name: str, value: Any, where: str = "") -> Any:
    def change(module: Any, now: int) -> None:
        if now == batch:
            setattr(module.get_submodule(where), name, value)

    return change


def toggle_slot(module: Any, batch: int) -> None:
    module.net.scale = 1.0 + batch // 2 % 2


UNUSUAL_ATTRIBUTES: dict[str, tuple[Any, Any, int]] = {
    # the module, what is done before each of 16 batches, captures of mode FULL
    "slot": (lambda: Predictor(SlottedBody()), at(8, "scale", 3.0, "net"), 2),
    "slot that toggles": (lambda: Predictor(SlottedBody()), toggle_slot, 2),
    "slot that the step counts in": (lambda: Predictor(CountsInASlot()), None, 0),
    "slot that the step only counts": (lambda: Predictor(CountsUnreadInASlot()), None, 0),
    "new name": (lambda: ReadsItsDictionary(Body()), at(8, "extra", 3.0), 2),
    "names": (lambda: ReadsItsNames(Body()), at(8, "extra", 3.0), 2),
    "attribute of Lightning": (
        lambda: ReadsItsExample(Body()),
        at(8, "example_input_array", torch.full((8,), 3.0)),
        2,
    ),
    "not a number": (lambda: ReadsNotANumber(Body()), not_a_number, 1),
}


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", UNUSUAL_ATTRIBUTES)
def test_attributes_that_are_found_in_unusual_places(harness: Harness, name, mode, verify_replays):
    """Hazards 6 and 7: slots, the names in a dictionary, what Lightning stores, NaN."""
    make, change, captures = UNUSUAL_ATTRIBUTES[name]

    class Changes(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if change is not None:
                change(pl_module, batch_idx)

    callback = harness.callback(warmup_steps=1, mode=mode, verify_replays=verify_replays)
    seen = []
    for extra in ([callback], []):  # made anew: a copy of a module loses its slots
        torch.manual_seed(2)
        module = make()
        result = harness.trainer(*extra, Changes()).predict(module, features(64))
        seen.append((result, getattr(module.net, "scale", None)))
    assert_same(*seen)
    if mode == "FULL":
        assert callback.stats.captures == captures, callback.summary()
