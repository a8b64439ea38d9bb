"""Values where hardly anybody keeps one, changed between two batches or by the step itself."""

from __future__ import annotations

import abc
import builtins
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import logging
import math
import operator
import pickle
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import CatMetric, Metric

from tests.harness import Harness, features, predict, validate
from tests.models import Body, Predictor

SETTINGS = [("FULL_AND_PIECEWISE", 0), ("FULL_AND_PIECEWISE", 2), ("PIECEWISE", 0)]
LOG = logging.getLogger("tests.everybody")
Step = Callable[[Any, Tensor], Any]


@dataclasses.dataclass
class Case:
    """A step, and what changes before the fifth batch."""

    step: Step
    change: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda module: None
    """What the module is given."""
    start: Callable[[], Any] = lambda: None
    """What is set elsewhere before each of the two runs."""


def at(holder: Any, name: str) -> dict[str, Any]:
    """Set a value of a namespace to 1, and later to 3."""
    return {
        "start": lambda: setattr(holder, name, 1.0),
        "change": lambda _: setattr(holder, name, 3.0),
    }


class Config:
    scale = 1.0


class Inherits(Config):
    pass


class Kind(type):
    scale = 1.0


class OfKind(metaclass=Kind):
    pass


class Named:
    """Equal to each other one."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named)

    def __hash__(self) -> int:
        return 1


def plain(x: Tensor) -> Tensor:
    return x


@functools.singledispatch
def dispatched(_: Any, x: Tensor) -> Tensor:
    return x


class Whole(int):
    pass


def configuration() -> type:
    return Config


def derived() -> Any:
    return type("Derived", (Config,), {})


def made() -> Any:
    return Config()


def first_of(*args: Any, **kwargs: Any) -> float:
    return float([*args, *kwargs.values()][0].scale)


def scale_of(module: nn.Module) -> Any:
    return object.__getattribute__(module, "scale")


def read_in_submodule(module: Any, x: Tensor) -> Tensor:
    return module.net(x)


class Unseen(nn.Module):
    """Reads beside all interceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * object.__getattribute__(self, "scale") * torch.of_tests


class ReadsStatically(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = 1.0

    @property
    def factor(self) -> float:
        return float(inspect.getattr_static(self, "scale"))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class ReadsOther(nn.Module):
    """Reads an attribute of another module, which it is not given."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        other.scale = 1.0
        vars(self)["other"] = other

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.look()

    def look(self) -> Any:
        return object.__getattribute__(self.other, "scale")


class ReadsOtherStatically(ReadsOther):
    def look(self) -> Any:
        return inspect.getattr_static(self.other, "scale")


LOOK_UP = object.__getattribute__
LOOK_UPS = [inspect.getattr_static]


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module.part)).scale


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class CopiesItself(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * copy.copy(self).scale


PAST_INTERCEPTIONS: dict[str, Callable[[Any], Any]] = {
    "copy": lambda module: copy.copy(module.part).scale,
    "deepcopy": lambda module: copy.deepcopy(module.part).scale,
    "deepcopy of a list": lambda module: copy.deepcopy([module.part])[0].scale,
    "pickle": pickled,
    "__getstate__": lambda module: module.part.__getstate__()["scale"],
    "global alias": lambda module: LOOK_UP(module.part, "scale"),
    "global list": lambda module: LOOK_UPS[0](module.part, "scale"),
    "getattr of object": lambda module: getattr(object, NAME)(module.part, "scale"),
    "attribute": lambda module: module.look_up(module.part, "scale"),
    "partial": lambda module: module.partial("scale"),
    "descriptor": lambda module: nn.Module.__dict__["__dict__"].__get__(module.part)["scale"],
    "gc": lambda module: next(
        each["scale"]
        for each in gc.get_referents(module.part)
        if isinstance(each, dict) and "scale" in each
    ),
    "global function": lambda _: object.__getattribute__(MODULES[-1].part, "scale"),
    "a name that is new": lambda module: getattr(copy.copy(module.part), "factor", 1.0),
}
MODULES: list[Any] = []
NAME = "__getattribute__"


class ReadsPast(Predictor):
    def __init__(self, read: Callable[[Any], Any], part: type[Part] = Part) -> None:
        super().__init__(nn.Identity())
        self.part, self.read = part(), read

    def on_predict_start(self) -> None:
        MODULES.append(self)
        self.part.scale, self.look_up = 1.0, LOOK_UP
        self.partial = functools.partial(LOOK_UP, self.part)

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 5:
            self.part.scale = self.part.factor = 3.0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.part(batch[0]) * self.read(self)


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_a_submodule_that_copies_itself(harness: Harness, verify_replays):
    callback = harness.callback(mode="PIECEWISE", verify_replays=verify_replays)
    module = ReadsPast(lambda _: 1.0, CopiesItself)
    harness.compare(module, predict(features(48)), callback)
    assert callback.stats.steps["PIECEWISE"] > 4, callback.summary()


@pytest.mark.parametrize("settings", [{"mode": "FULL", "verify_replays": 0}, {}])
@pytest.mark.parametrize("name", PAST_INTERCEPTIONS)
def test_reads_past_all_interceptions(harness: Harness, name, settings):
    """Copies of modules, and functions that look up attributes by other names than their own."""
    callback = harness.callback(**settings)
    harness.compare(ReadsPast(PAST_INTERCEPTIONS[name]), predict(features(48)), callback)
    if not (name == "pickle" and harness.backend == "cuda"):  # which copies to the host
        assert callback.stats.steps["FULL"] > 4, callback.summary()


def register() -> None:
    global Protocol, dispatched

    class Protocol(abc.ABC):  # noqa: B024
        pass

    @functools.singledispatch
    def dispatched(_: Any, x: Tensor) -> Tensor:
        return x


def register_tensor() -> None:
    global KEPT
    with torch.inference_mode(False):  # others count what is written to them
        KEPT = torch.ones(8)


def replace_member(module: Any) -> None:
    module.kept.clear()
    module.kept.add((Named(3.0), 2))


def replace_key(module: Any) -> None:
    module.kept.clear()
    module.kept[Named(3.0)] = 1


def keep(value: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda module: setattr(module, "kept", value())


def of_kept(read: Callable[[Any], Any]) -> Step:
    return lambda module, x: module.net(x) * read(next(iter(module.kept)))


def times(read: Callable[[Any], Any]) -> Step:
    return lambda module, x: module.net(x) * read(module)


CASES: dict[str, Case] = {
    # namespaces of libraries and of Python
    "torch": Case(times(lambda _: torch.of_tests), **at(torch, "of_tests")),
    "a module in torch": Case(
        times(lambda _: nn.functional.of_tests), **at(nn.functional, "of_tests")
    ),
    "numpy": Case(times(lambda _: np.of_tests), **at(np, "of_tests")),
    "sys": Case(times(lambda _: sys.of_tests), **at(sys, "of_tests")),
    "builtins": Case(times(lambda _: of_tests), **at(builtins, "of_tests")),  # noqa: F821
    "a constant of Python": Case(
        times(lambda _: math.pi),
        lambda _: setattr(math, "pi", 3.0),
    ),
    "a class of torch": Case(times(lambda _: nn.Linear.of_tests), **at(nn.Linear, "of_tests")),
    "a class of torch, by a layer": Case(
        times(lambda module: module.net[0].of_tests), **at(nn.Linear, "of_tests")
    ),
    "LightningModule": Case(
        times(lambda module: module.of_tests), **at(LightningModule, "of_tests")
    ),
    "tensors": Case(lambda module, x: module.net(x) * x.of_tests, **at(Tensor, "of_tests")),
    "a name that is set later": Case(
        times(lambda _: getattr(torch, "of_tests", 1.0)),
        lambda _: setattr(torch, "of_tests", 3.0),
    ),
    "a name that is asked for": Case(
        times(lambda _: 3 if hasattr(torch, "of_tests") else 1),
        lambda _: setattr(torch, "of_tests", 3.0),
    ),
    "arguments of the program": Case(
        times(lambda _: len(sys.argv)), lambda _: sys.argv.append("more")
    ),
    "in a submodule": Case(
        read_in_submodule,
        **at(torch, "of_tests"),
        prepare=lambda module: setattr(module, "net", Unseen()),
    ),
    # reads that nothing intercepts
    "object.__getattribute__": Case(
        read_in_submodule,
        lambda module: setattr(module.net, "scale", 3.0),
        lambda module: setattr(module, "net", Unseen()),
        lambda: setattr(torch, "of_tests", 1.0),
    ),
    "inspect.getattr_static": Case(
        read_in_submodule,
        lambda module: setattr(module.net, "scale", 3.0),
        lambda module: setattr(module, "net", ReadsStatically()),
    ),
    "object.__getattribute__ of another module": Case(
        read_in_submodule,
        lambda module: setattr(module, "scale", 3.0),
        lambda module: setattr(module, "net", ReadsOther(module)),
    ),
    "inspect.getattr_static of another module": Case(
        read_in_submodule,
        lambda module: setattr(module, "scale", 3.0),
        lambda module: setattr(module, "net", ReadsOtherStatically(module)),
    ),
    # modules that are no submodules
    "a new attribute of a module in a list": Case(
        times(lambda module: getattr(module.kept[0], "of_tests", 1.0)),
        lambda module: setattr(module.kept[0], "of_tests", 3.0),
        keep(lambda: [Part()]),
    ),
    "a new attribute inside a module in a list": Case(
        times(lambda module: 3.0 if hasattr(module.kept[0].linear, "of_tests") else 1.0),
        lambda module: setattr(module.kept[0].linear, "of_tests", 3.0),
        keep(lambda: [Part()]),
    ),
    "a new buffer of a module in a dictionary": Case(
        times(lambda module: len(list(module.kept["a"].buffers())) + 1.0),
        lambda module: module.kept["a"].register_buffer("of_tests", torch.ones(())),
        keep(lambda: {"a": Part()}),
    ),
    "__getattribute__ in a function": Case(
        times(scale_of),
        lambda module: setattr(module, "scale", 3.0),
        lambda module: setattr(module, "scale", 1.0),
    ),
    # classes that code hands on
    "a class in *args": Case(times(lambda _: first_of(*[configuration()])), **at(Config, "scale")),
    "a class in **kwargs": Case(
        times(lambda _: first_of(a=configuration())), **at(Config, "scale")
    ),
    "a class that is returned": Case(times(lambda _: configuration().scale), **at(Config, "scale")),
    "a class that the step makes": Case(times(lambda _: derived().scale), **at(Config, "scale")),
    "an object that the step makes": Case(times(lambda _: made().scale), **at(Config, "scale")),
    "a subclass that is looked for": Case(
        times(lambda _: Config.__subclasses__()[0].scale), **at(Config, "scale")
    ),
    "a metaclass": Case(times(lambda _: OfKind.scale), **at(Kind, "scale")),
    # functions without attributes
    "a first attribute": Case(
        times(lambda _: getattr(plain, "scale", 1.0)), lambda _: setattr(plain, "scale", 3.0)
    ),
    "a first attribute of a function that is held": Case(
        times(lambda module: getattr(module.kept[0], "scale", 1.0)),
        lambda _: setattr(plain, "scale", 3.0),
        keep(lambda: [plain]),
    ),
    "a first attribute of a method": Case(
        times(lambda module: getattr(module.configure_optimizers, "scale", 1.0)),
        lambda _: setattr(Predictor.configure_optimizers, "scale", 3.0),
    ),
    # equal, and not the same
    "an equal key": Case(
        of_kept(lambda key: key.scale), replace_key, keep(lambda: {Named(1.0): 1})
    ),
    "an equal member": Case(
        of_kept(lambda member: member[0].scale), replace_member, keep(lambda: {(Named(1.0), 2)})
    ),
    "an equal key that is plain": Case(
        of_kept(lambda key: 1 if key is True else 3),
        lambda module: (module.kept.clear(), module.kept.update({True: 1})),
        keep(lambda: {1: 1}),
    ),
    "a zero with another sign": Case(
        of_kept(lambda key: math.copysign(1, key)),
        lambda module: (module.kept.clear(), module.kept.add(-0.0)),
        keep(lambda: {0.0}),
    ),
    # what is asked
    "isEnabledFor": Case(
        times(lambda _: 3 if LOG.isEnabledFor(logging.DEBUG) else 1),
        lambda _: LOG.setLevel(logging.DEBUG),
    ),
    "the level of a parent": Case(
        times(lambda _: LOG.getEffectiveLevel()),
        lambda _: logging.getLogger("tests").setLevel(logging.DEBUG),
    ),
    "logging.disable": Case(
        times(lambda _: 3 if LOG.isEnabledFor(logging.ERROR) else 1),
        lambda _: logging.disable(logging.CRITICAL),
    ),
    "the level itself": Case(times(lambda _: LOG.level), lambda _: LOG.setLevel(logging.DEBUG)),
    "sys.getrecursionlimit": Case(
        times(lambda _: sys.getrecursionlimit()), lambda _: sys.setrecursionlimit(4000)
    ),
    "ABC.register": Case(
        times(lambda _: 3 if issubclass(Named, Protocol) else 1),
        lambda _: Protocol.register(Named),
        start=register,
    ),
    "singledispatch": Case(
        lambda module, x: dispatched(Whole(), module.net(x)),
        lambda _: dispatched.register(Whole, lambda _, x: x * 3),
        start=register,
    ),
    "_version": Case(
        times(lambda _: KEPT._version), lambda _: KEPT.add_(1), start=lambda: register_tensor()
    ),
}
BY_THE_STEP: dict[str, Step] = {
    "determinism": lambda module, x: (
        torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled()),
        module.net(x) * (2 if torch.are_deterministic_algorithms_enabled() else 1),
    )[1],
    "precision": lambda module, x: (
        module.net(x) * len(torch.get_float32_matmul_precision()),
        torch.set_float32_matmul_precision(
            "high" if torch.get_float32_matmul_precision() == "highest" else "highest"
        ),
    )[0],
    "anomalies": lambda module, x: (
        module.net(x) * (2 if torch.is_anomaly_enabled() else 1),
        torch.autograd.set_detect_anomaly(not torch.is_anomaly_enabled(), check_nan=False),
    )[0],
    "is_inference": lambda module, x: module.net(x) * (2 if x.is_inference() else 1),
}
FULL_ALWAYS: dict[str, Step] = {
    "itemgetter": lambda module, x: module.net(operator.itemgetter("x")({"x": x})),
    "itemgetter that is kept": lambda module, x: module.net(GETTER([x])),
    "methodcaller that is kept": lambda module, x: CALLER(module.net(x)),
    "Struct": lambda module, x: module.net(x) * PACKED.size,
    "a shape in the output": lambda module, x: (module.net(x), x.shape),
}
GETTER, CALLER, PACKED = operator.itemgetter(0), operator.methodcaller("mul", 2), struct.Struct("f")


class Steps(Predictor):
    def __init__(self, step: Step) -> None:
        super().__init__(Body())
        self.taken = [step]

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.taken[0](self, batch[0])


class Changes(Callback):
    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 4:
            self.change(pl_module)

    def on_predict_start(self, *_: Any) -> None:
        reset()


def reset() -> None:
    for holder in (torch, nn.functional, np, sys, builtins, nn.Linear, LightningModule, Tensor):
        if "of_tests" in vars(holder):
            delattr(holder, "of_tests")
    math.pi = 3.141592653589793
    Config.scale = Kind.scale = 1.0
    vars(plain).clear()
    vars(Predictor.configure_optimizers).clear()
    logging.disable(logging.NOTSET)
    LOG.setLevel(logging.NOTSET)
    logging.getLogger("tests").setLevel(logging.NOTSET)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.autograd.set_detect_anomaly(False)


@pytest.fixture(autouse=True)
def as_they_were() -> Iterator[None]:
    reset()
    yield
    reset()


class Starts(Changes):
    def __init__(self, case: Case) -> None:
        super().__init__(case.change)
        self.start = case.start
        self.arguments, self.limit = list(sys.argv), sys.getrecursionlimit()

    def on_predict_start(self, *_: Any) -> None:
        reset()
        self.start()

    def on_predict_end(self, *_: Any) -> None:
        sys.argv[:] = self.arguments
        sys.setrecursionlimit(self.limit)


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize(("mode", "verify_replays"), SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_values_in_odd_places(harness: Harness, name, mode, verify_replays):
    """Hazard 7."""
    case = CASES[name]
    module = Steps(case.step)
    case.prepare(module)
    callback = harness.callback(mode=mode, verify_replays=verify_replays, warmup_steps=1)
    harness.compare(module, predict(features(40)), callback, lambda: [Starts(case)])


@pytest.mark.parametrize(("mode", "verify_replays"), SETTINGS)
@pytest.mark.parametrize("name", BY_THE_STEP)
def test_switches_of_pytorch_in_a_step(harness: Harness, name, mode, verify_replays):
    """Hazard 6."""
    callback = harness.callback(mode=mode, verify_replays=verify_replays, warmup_steps=1)
    others = lambda: [Changes(lambda _: None)]
    harness.compare(Steps(BY_THE_STEP[name]), predict(features(40)), callback, others)


@pytest.mark.parametrize("name", FULL_ALWAYS)
def test_what_cannot_change_is_in_the_graph(harness: Harness, name):
    callback = harness.callback(warmup_steps=1)
    harness.compare(Steps(FULL_ALWAYS[name]), predict(features(40)), callback)
    assert callback.stats.steps["FULL"] == 9, callback.summary()


class Keeps(Metric):
    """Keeps what it is given."""

    kept: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", [], "cat")

    def update(self, values: Tensor) -> None:
        self.kept.append(values)

    def compute(self) -> Tensor:
        return torch.cat([each.flatten() for each in self.kept])


class Shares(Predictor):
    """Gives a metric its output, a view of it or its batch; a hook changes all of them."""

    def __init__(self, metric: Metric, select: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(Body())
        self.metric, self.select = metric, select

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        self.metric.update(self.select(output, batch[0]))
        return {"output": output}

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        outputs["output"].mul_(2)
        batch[0].mul_(3)

    def on_validation_epoch_end(self) -> None:
        self.log("kept", self.metric.compute().sum())
        self.metric.reset()


SELECTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "output": lambda output, _: output,
    "view": lambda output, _: output[:, 0],
    "batch": lambda _, x: x,
    "view of the batch": lambda _, x: x.flatten(),
    "neither": lambda output, x: output + x,
}


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("copy_outputs", [True, False])
@pytest.mark.parametrize("kind", [Keeps, CatMetric])
@pytest.mark.parametrize("name", SELECTED)
def test_states_that_share_memory_with_an_output(
    harness: Harness, name, kind, copy_outputs, verify_replays
):
    """Hazard 32."""
    callback = harness.callback(
        warmup_steps=1, verify_replays=verify_replays, copy_outputs=copy_outputs
    )
    model = Shares(kind(), SELECTED[name])
    kept = lambda trainer, module: [
        trainer.validate(module, features(40), verbose=False) for _ in range(2)
    ]
    if copy_outputs:
        harness.compare(model, validate(features(40)), callback)
    else:  # outputs live until the next replay
        trainer = harness.trainer(callback)
        reference = Shares(kind(), SELECTED[name])
        reference.load_state_dict(model.state_dict())
        assert kept(trainer, model) == kept(harness.trainer(), reference)
    assert callback.stats.steps["FULL"] >= 9, callback.summary()


class Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


class CountsOperations(Predictor):
    def __init__(self, keeps: bool) -> None:
        super().__init__(Body())
        self.mode = [Counts()] if keeps else []

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        mode = self.mode[0] if self.mode else Counts()
        with mode if batch_idx >= 0 else contextlib.nullcontext():
            output = self.net(batch[0])
        return output * mode.number


@pytest.mark.parametrize(("mode", "verify_replays"), SETTINGS)
@pytest.mark.parametrize("keeps", [True, False])
def test_dispatch_modes_of_the_user(harness: Harness, keeps, mode, verify_replays):
    callback = harness.callback(mode=mode, verify_replays=verify_replays, warmup_steps=1)
    harness.compare(CountsOperations(keeps), predict(features(40)), callback)
