"""The user's module and its class stay untouched, whatever their kind."""

from __future__ import annotations

import functools
import types
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch import nn
from torchmetrics import MeanMetric, MeanSquaredError

from cg_lightning import CUDAGraphCallback
from cg_lightning.modules.attributes import names_of_frameworks
from cg_lightning.modules.kinds import is_user_class, is_user_file, lightning_class
from cg_lightning.trainer.preconditions import why_inert
from tests.harness import assert_same, features, predict, validate
from tests.models import Body, Predictor

T = TypeVar("T")
MODES = ["FULL", "PIECEWISE"]


class Halves:
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(8, 8), 0.5

    def forward(self, x):
        return self.linear(x) * self.factor


class Interface(ABC):
    @abstractmethod
    def forward(self, x): ...


class AbstractFirst(ABC, Halves, nn.Module):
    pass


class InterfaceFirst(Halves, Interface, nn.Module):
    pass


class GenericFirst(Generic[T], Halves, nn.Module):
    pass


class WithSlots(Halves, nn.Module):
    __slots__ = ("note",)


class Registry(type(nn.Module)):
    known: list[str] = []  # noqa: RUF012

    def __new__(mcs, name, bases, namespace):
        if name in mcs.known:
            raise TypeError(f"{name} is there already")
        mcs.known.append(name)
        return super().__new__(mcs, name, bases, namespace)

    def __setattr__(cls, name, value):
        if not name.startswith("_abc"):
            raise TypeError("this class is final")
        super().__setattr__(name, value)


class Registered(Halves, nn.Module, metaclass=Registry):
    pass


class OwnCall(Halves, nn.Module):
    def __call__(self, x):
        return super().__call__(x) + 1


KINDS = [AbstractFirst, InterfaceFirst, GenericFirst, WithSlots, Registered, OwnCall]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_submodules_of_all_classes(harness, kind, mode):
    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(Predictor(kind()), validate(features(32)), callback)
    assert callback.stats.steps[mode] >= 6, callback.summary()


class AbstractPredictor(ABC, Predictor):
    pass


class FinalPredictor(Predictor, metaclass=Registry):
    pass


@pytest.mark.parametrize("mode", MODES)
def test_lightning_modules_of_such_classes(harness, mode):
    for kind in (AbstractPredictor, FinalPredictor):
        callback = harness.callback(mode=mode, warmup_steps=1)
        harness.compare(kind(Body()), validate(features(32)), callback)
        assert callback.stats.steps[mode] >= 6, callback.summary()


class ExactTypes(Predictor):
    """Returns another value if a class is not the original one."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8))
        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx):
        exact = (
            type(self) is ExactTypes
            and type(self.net) is nn.Linear
            and type(self.mean) is MeanMetric
            and "validation_step" not in vars(self)
            and not [name for name in vars(type(self)) if "cg_" in name]
        )
        output = self.net(batch[0]) if exact else batch[0] * 100
        self.mean.update(output.mean())
        self.log("mean", self.mean)
        return output


class LooksAtTypes(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_batch_start(self, trainer, pl_module, *_: Any) -> None:
        attributes = (
            sorted(vars(pl_module)),
            sorted(vars(pl_module.net)),
            sorted(vars(pl_module.mean)),
        )
        self.seen.append([type(module).__name__ for module in pl_module.modules()])
        self.seen.append(
            [str(attributes[:2]), pl_module.validation_step.__func__ is ExactTypes.validation_step]
        )
        self.seen.append(type(pl_module.net) is nn.Linear and type(pl_module.mean) is MeanMetric)


@pytest.mark.parametrize("mode", [*MODES, "FULL_AND_PIECEWISE"])
def test_types_hold_in_every_kind_of_step(harness, mode):
    """Watched, warm-up, captured, replayed and verified steps, from inside and outside."""
    callback, seen = harness.callback(mode=mode, warmup_steps=2), []
    for extra in ([callback], []):
        torch.manual_seed(3)
        looks = LooksAtTypes()
        harness.trainer(*extra, looks).validate(ExactTypes(), features(32), verbose=False)
        seen.append(looks.seen)
    assert_same(*seen)
    harness.compare(ExactTypes(), lambda t, m: t.fit(m, features(), features(32)), callback)
    assert callback.stats.replays > 0, callback.summary()


class Partial(Predictor):
    def shared(self, batch, batch_idx, name):
        output = self.net(batch[0])
        self.log(name, output.mean())
        return output

    validation_step = functools.partialmethod(shared, name="val")
    predict_step = functools.partialmethod(shared, name="predict")


class PredictsPartially(Predictor):
    def _predict(self, factor, batch, batch_idx):
        return self.net(batch[0]) * factor

    predict_step = functools.partialmethod(_predict, 3.0)


class Static(Predictor):
    @staticmethod
    def predict_step(batch, batch_idx):
        return batch[0] * 2


class Decorated(Predictor):
    @torch.no_grad()
    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


class Step:
    """A callable object, as class-based decorators return. Lightning reads ``__wrapped__``."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.__wrapped__ = Predictor.predict_step

    def __call__(self, batch, batch_idx):
        return self.net(batch[0]) * 2


class CallableObject(Predictor):
    def __init__(self) -> None:
        super().__init__(Body())
        self.predict_step = Step(self.net)


class PartialObject(Predictor):
    def __init__(self) -> None:
        super().__init__(Body())
        self.predict_step = functools.partial(self.helper, factor=2.0)

    def helper(self, batch, batch_idx, factor):
        return self.net(batch[0]) * factor


@pytest.mark.parametrize("mode", [*MODES, "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize(
    ("make", "job", "full"),
    [
        (lambda: Partial(Body()), validate, True),
        (lambda: PredictsPartially(Body()), predict, True),
        (lambda: Decorated(Body()), predict, True),
        (lambda: Static(Body()), predict, False),
        (CallableObject, predict, False),
        (PartialObject, predict, False),
    ],
    ids=["partialmethod", "partialmethod_args", "decorated", "static", "object", "partial"],
)
def test_steps_of_all_kinds(harness, make, job, full, mode):
    seen = []
    callback = harness.callback(mode=mode, warmup_steps=1)
    for extra in ([callback], []):
        torch.manual_seed(3)
        trainer, model = harness.trainer(*extra), make()
        seen.append((job(features(32))(trainer, model), dict(trainer.callback_metrics)))
    assert_same(*seen)
    if full and mode != "PIECEWISE":
        assert callback.stats.steps["FULL"] >= 6, callback.summary()
    elif not isinstance(model, Static) and mode != "FULL":
        assert callback.stats.steps["PIECEWISE"] >= 6, callback.summary()


def test_the_summary_names_the_step(harness):
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.trainer(callback).validate(Partial(Body()), features(32), verbose=False)
    assert {entry.target for entry in callback.stats.entries} == {"validation_step"}


class ReplacesItsStep(Callback):
    """Replaces the step of the module in the middle of a stage."""

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 4:
            pl_module.predict_step = lambda batch, batch_idx: pl_module.net(batch[0]) * 7


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_replaced_meanwhile(harness, mode):
    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(Predictor(Body()), predict(features(40)), callback, lambda: [ReplacesItsStep()])
    assert callback.stats.replays > 0


class StepOfAProperty(Predictor):
    """Its step is made anew at each access, from what the module and the Trainer know then."""

    scale = 1.0

    @property
    def validation_step(self):
        scale = self.scale

        def step(batch, batch_idx):
            return self.net(batch[0]) * scale

        return step


class ChangesTheScale(Callback):
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        pl_module.scale = 1.0 if batch_idx < 5 else 2.0


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_a_property(harness, mode):
    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    module, job = StepOfAProperty(Body()), validate(features(48))
    harness.compare(module, job, callback, lambda: [ChangesTheScale()])


class LooksAtTheStrategy(Callback):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_predict_batch_end(self, trainer, *_: Any) -> None:
        self.seen.append("predict_step" in vars(trainer.strategy))


def test_the_strategy_is_as_before_after_each_stage(harness):
    looks, callback = LooksAtTheStrategy(), harness.callback(warmup_steps=1)
    trainer = harness.trainer(callback, looks)
    before = set(vars(trainer.strategy))
    trainer.predict(Predictor(Body()), features())
    assert looks.seen == [True] * 5
    assert set(vars(trainer.strategy)) == before


class OwnStep(SingleDeviceStrategy):
    def predict_step(self, *args, **kwargs):
        return super().predict_step(*args, **kwargs) * 2


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback is inert")
def test_a_strategy_with_a_step_of_its_own(harness, device):
    seen, callback = [], harness.callback(warmup_steps=1)
    for extra in ([callback], []):
        torch.manual_seed(3)
        trainer = harness.trainer(*extra, strategy=OwnStep(device), accelerator="auto")
        seen.append(trainer.predict(Predictor(Body()), features()))
    assert_same(*seen)
    assert list(callback.stats.eager_reasons) == [
        "OwnStep.predict_step is not Lightning's own, so it may do more than run the step"
    ]


def test_strategies_of_both_packages_are_known_by_name():
    other = type("FSDPStrategy", (), {"__module__": "pytorch_lightning.strategies.fsdp"})
    mine = type("FSDPStrategy", (), {"__module__": "my.strategies"})
    derived = type("Mine", (FSDPStrategy,), {})
    assert lightning_class(type("Mine", (other,), {}), "FSDPStrategy") is other
    assert lightning_class(mine, "FSDPStrategy") is None
    assert lightning_class(derived, "FSDPStrategy") is FSDPStrategy


def test_a_trainer_of_the_package_pytorch_lightning(harness):
    """Our callback is one of ``lightning.pytorch``, and runs in Trainers of both packages."""
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class Mine(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Body()
            self.seen = MeanSquaredError()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            output = self.net(batch[0])
            self.seen.update(output, batch[0])
            self.log("seen", self.seen)
            self.log("square", output.square().mean())

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    seen, callback, module = [], harness.callback(), Mine()
    accelerator = "gpu" if harness.backend == "cuda" else "cpu"
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    for extra in ([callback], []):
        trainer = pl.Trainer(
            callbacks=extra, accelerator=accelerator, devices=1, **dict.fromkeys(quiet, False)
        )
        metrics = trainer.validate(module, features(40), verbose=False)
        seen.append((metrics, trainer.predict(module, features(40))))
    assert_same(*seen)
    assert callback.stats.steps["FULL"] == 14, callback.summary()


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_strategies_that_move_parameters_are_refused_in_both_packages(package, name):
    strategies = pytest.importorskip(f"{package}.strategies", reason=f"{package} is not installed")
    strategy = object.__new__(getattr(strategies, name))
    trainer = types.SimpleNamespace(strategy=strategy)
    assert why_inert(trainer, Body()).startswith(f"{name} moves parameters between steps")


def test_whose_a_name_a_class_or_a_file_is(tmp_path, monkeypatch):
    assert "_trainer" in names_of_frameworks(Predictor(Body()))
    assert "_trainer" not in names_of_frameworks(Body())
    assert is_user_class(Predictor)
    assert not is_user_class(nn.Linear)
    assert not is_user_class(type("M", (), {"__module__": "pytorch_lightning.core.module"}))
    assert is_user_file(__file__)
    assert is_user_file(str(tmp_path / "torch_of_mine.py"))
    assert not is_user_file(torch.__file__)
    elsewhere = tmp_path / "src" / "torch"  # torch outside Python's folders
    monkeypatch.setattr(torch, "__file__", str(elsewhere / "__init__.py"))
    assert not is_user_file(str(elsewhere / "nn" / "modules" / "linear.py"))
    assert CUDAGraphCallback.__module__.startswith("cg_lightning")
