"""Values that a step reads from attributes of any kind, changed between two batches."""

from __future__ import annotations

import array
import collections
import dataclasses
import decimal
import enum
import functools
import logging
import pathlib
import random
import types
import weakref
from collections.abc import Callable as Function
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform
from torchmetrics import MeanMetric

from cg_lightning import CUDAGraphCallback
from cg_lightning.guards.values import FrozenValues
from tests.harness import Harness, assert_same, features, predict
from tests.models import Body, Predictor


@dataclasses.dataclass(slots=True)
class Slotted:
    factor: float = 1.0
    tensor: Any = None


class Plain:
    def __init__(self) -> None:
        self.factor = 1.0
        self.inner = [Slotted()]
        self.tensor = torch.ones(8)


class Scales:
    """A callable object with state."""

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


def with_factor(value: Any) -> Any:
    """Gives a value an attribute."""
    value.factor = 1.0
    return value


def fresh_class() -> Any:
    class Config:
        factor = 1.0

        class Deep:
            factor = 1.0

    return Config


def fresh_module() -> Any:
    module = types.ModuleType("settings_of_a_test")
    module.__file__ = __file__
    module.factor = 1.0  # type: ignore[attr-defined]
    return module


class OwnStr(str):
    pass


class OwnInt(int):
    pass


class OwnDecimal(decimal.Decimal):
    pass


class OwnPath(type(pathlib.Path())):  # type: ignore[misc]
    pass


class OwnSet(set):  # type: ignore[type-arg]
    pass


class OwnArray(np.ndarray):  # type: ignore[type-arg]
    pass


class OwnList(list):  # type: ignore[type-arg]
    pass


class OwnMapping(collections.UserDict):  # type: ignore[type-arg]
    pass


class OwnHandler(logging.Handler):
    pass


def fresh_enum() -> Any:
    return enum.Enum("Phase", {"A": 1, "B": [1.0]}, module=__name__)


def fresh_function() -> Any:
    def function(x: Tensor) -> Tensor:
        return x

    return function


def fresh_closure() -> Any:
    kept = Slotted()

    def function() -> Any:
        return kept

    return function


def cached() -> Any:
    @functools.lru_cache
    def table() -> list[float]:
        return [1.0]

    table()
    return table


def change_item(items: Any) -> None:
    items[0] = 3.0


def first(items: Any) -> Any:
    return next(iter(items))


class Referred:
    def __init__(self) -> None:
        self.factor = 1.0


KEPT: list[Any] = []
"""What only weak references of a model refer to."""


def referred(make: Function[[Any], Any]) -> Function[[], Any]:
    def made() -> Any:
        KEPT.append(Referred())
        return make(KEPT[-1])

    return made


def in_object(make: Function[[Any], Any]) -> Function[[Any], Any]:
    """An object with what ``make`` makes: only in an object may a graph hold a weak reference."""

    def made(value: Any) -> Any:
        holder = Plain()
        holder.weak = make(value)
        return holder

    return made


def set_to(name: str, value: Any) -> Function[[Any], None]:
    def change(kept: Any) -> None:
        setattr(kept, name, value)

    return change


def move(tensor: Tensor) -> None:
    tensor.data = tensor * 3


Case = tuple[Function[[], Any], Function[[Tensor, Any], Tensor], Function[[Any], None]]
"""Functions to make, use and change a value that the module stores."""
CASES: dict[str, Case] = {
    "slots": (Slotted, lambda x, kept: x * kept.factor, set_to("factor", 3.0)),
    **{
        name: (
            lambda make=make: with_factor(make()),  # type: ignore[misc]
            lambda x, kept: x * kept.factor,
            lambda kept: setattr(kept, "factor", 3.0),
        )
        for name, make in {
            "member of an enum": lambda: fresh_enum().A,
            "str": lambda: OwnStr("a"),
            "int": lambda: OwnInt(1),
            "Decimal": lambda: OwnDecimal(1),
            "Path": lambda: OwnPath("a"),
            "set with an attribute": OwnSet,
            "array with an attribute": lambda: np.ones(2).view(OwnArray),
            "list with an attribute": lambda: OwnList([1]),
            "mapping with an attribute": OwnMapping,
            "exception": lambda: ValueError("a"),
            "logger": lambda: logging.Logger("of a test"),
            "handler": OwnHandler,
            "function": fresh_function,
            "partial": lambda: functools.partial(abs),
            "class": fresh_class,
            "module": fresh_module,
        }.items()
    },
    "nested class": (
        fresh_class,
        lambda x, kept: x * kept.Deep.factor,
        lambda kept: set_to("factor", 3.0)(kept.Deep),
    ),
    "class in a dictionary": (
        lambda: {"a": fresh_class()},
        lambda x, kept: x * kept["a"].factor,
        lambda kept: set_to("factor", 3.0)(kept["a"]),
    ),
    "new name in a class": (
        fresh_class,
        lambda x, kept: x * getattr(kept, "other", 1.0),
        set_to("other", 3.0),
    ),
    "class in an object": (
        lambda: types.SimpleNamespace(config=fresh_class()),
        lambda x, kept: x * kept.config.factor,
        lambda kept: set_to("factor", 3.0)(kept.config),
    ),
    "key": (
        lambda: [{Plain(): 1}],
        lambda x, kept: x * first(kept[0]).factor,
        lambda kept: set_to("factor", 3.0)(first(kept[0])),
    ),
    "member of a set": (
        lambda: {Plain()},
        lambda x, kept: x * first(kept).factor,
        lambda kept: set_to("factor", 3.0)(first(kept)),
    ),
    "member of a frozenset": (
        lambda: frozenset([Plain()]),
        lambda x, kept: x * first(kept).factor,
        lambda kept: set_to("factor", 3.0)(first(kept)),
    ),
    "module in a frozenset": (
        lambda: frozenset([with_factor(Body())]),
        lambda x, kept: x * first(kept).factor,
        lambda kept: set_to("factor", 3.0)(first(kept)),
    ),
    "array of objects": (
        lambda: np.array([[Plain()]], dtype=object),
        lambda x, kept: x * kept[0, 0].factor,
        lambda kept: set_to("factor", 3.0)(kept[0, 0]),
    ),
    "value of an enum": (
        lambda: fresh_enum().B,
        lambda x, kept: x * kept.value[0],
        lambda kept: change_item(kept.value),
    ),
    "arguments of an exception": (
        lambda: ValueError(1.0),
        lambda x, kept: x * kept.args[0],
        set_to("args", (3.0,)),
    ),
    "LoggerAdapter": (
        lambda: logging.LoggerAdapter(logging.Logger("of a test"), {"factor": 1.0}),
        lambda x, kept: x * kept.extra["factor"],
        lambda kept: kept.extra.update(factor=3.0),
    ),
    "list with an attribute in a list": (
        lambda: [with_factor(OwnList([1]))],
        lambda x, kept: x * kept[0].factor,
        lambda kept: set_to("factor", 3.0)(kept[0]),
    ),
    "default_factory": (
        lambda: collections.defaultdict(lambda: 1.0),
        lambda x, kept: x * kept.default_factory(),
        set_to("default_factory", lambda: 3.0),
    ),
    "closure of a function that is not called": (
        fresh_closure,
        lambda x, kept: x * kept.__closure__[0].cell_contents.factor,
        lambda kept: set_to("factor", 3.0)(kept.__closure__[0].cell_contents),
    ),
    "slice": (
        lambda: slice(Plain(), 1),
        lambda x, kept: x * kept.start.factor,
        lambda kept: set_to("factor", 3.0)(kept.start),
    ),
    "weak reference": (
        referred(in_object(weakref.ref)),
        lambda x, kept: x * kept.weak().factor,
        lambda kept: set_to("factor", 3.0)(kept.weak()),
    ),
    "WeakSet": (
        referred(in_object(lambda value: weakref.WeakSet([value]))),
        lambda x, kept: x * first(kept.weak).factor,
        lambda kept: set_to("factor", 3.0)(first(kept.weak)),
    ),
    "result in a cache": (
        cached,
        lambda x, kept: x * kept()[0],
        lambda kept: change_item(kept()),
    ),
    "callback of Lightning": (
        lambda: EarlyStopping("loss"),
        lambda x, kept: x * (1 + kept.wait_count),
        set_to("wait_count", 3),
    ),
    "transform of PyTorch": (
        lambda: AffineTransform(0.0, 1.0),
        lambda x, kept: kept(x),
        set_to("scale", 3.0),
    ),
    "metric in a list": (
        lambda: [with_factor(MeanMetric())],
        lambda x, kept: x * kept[0].factor,
        lambda kept: set_to("factor", 3.0)(kept[0]),
    ),
    "tensor in slots": (
        lambda: Slotted(tensor=torch.ones(8)),
        lambda x, kept: x * kept.tensor,
        lambda kept: move(kept.tensor),
    ),
    "object": (Plain, lambda x, kept: x * kept.factor, set_to("factor", 3.0)),
    "object in an object": (
        Plain,
        lambda x, kept: x * kept.inner[0].factor,
        lambda kept: set_to("factor", 3.0)(kept.inner[0]),
    ),
    "tensor in an object": (Plain, lambda x, kept: x * kept.tensor, lambda kept: move(kept.tensor)),
    "callable object": (Scales, lambda x, kept: kept(x), set_to("factor", 3.0)),
    "OmegaConf": (
        lambda: OmegaConf.create({"a": {"factor": 1.0}}),
        lambda x, kept: x * kept.a.factor,
        lambda kept: set_to("factor", 3.0)(kept.a),
    ),
    "set": (lambda: {1.0}, lambda x, kept: x * sum(kept), lambda kept: kept.add(2.0)),
    "deque": (
        lambda: collections.deque([1.0]),
        lambda x, kept: x * kept[0],
        lambda kept: kept.appendleft(3.0),
    ),
    "bytearray": (
        lambda: bytearray(b"\x01"),
        lambda x, kept: x * kept[0],
        lambda kept: kept.__setitem__(0, 3),
    ),
    "array": (
        lambda: array.array("d", [1.0]),
        lambda x, kept: x * kept[0],
        lambda kept: kept.__setitem__(0, 3.0),
    ),
    "NumPy": (
        lambda: np.ones((1, 1)),
        lambda x, kept: x * float(kept[0, 0]),
        lambda kept: kept.__setitem__((0, 0), 3.0),
    ),
    "tensor": (lambda: torch.ones(8), lambda x, kept: x * kept, move),
    "tensor in a list": (
        lambda: [{"a": torch.ones(8)}],
        lambda x, kept: x * kept[0]["a"],
        lambda kept: move(kept[0]["a"]),
    ),
    "weight of a module in a list": (
        lambda: [nn.Linear(8, 8)],
        lambda x, kept: kept[0](x),
        lambda kept: set_to("weight", nn.Parameter(torch.ones(8, 8, device=kept[0].weight.device)))(
            kept[0]
        ),
    ),
    "mode of a module in a list": (
        lambda: [nn.RReLU(-1, -1).eval()],
        lambda x, kept: kept[0](x),
        lambda kept: kept[0].train(),
    ),
}


def on(kept: Any, device: torch.device) -> Any:
    """Moves values that a LightningModule does not move."""
    if isinstance(kept, Tensor):
        return kept.to(device)
    if type(kept) is list:
        return [on(item, device) for item in kept]
    if type(kept) is dict:
        return {name: on(item, device) for name, item in kept.items()}
    if isinstance(kept, nn.Module):
        return kept.to(device)
    if getattr(kept, "tensor", None) is not None:
        kept.tensor = kept.tensor.to(device)
    return kept


class Keeps(Predictor):
    def __init__(self, case: Case, device: torch.device, batch: int) -> None:
        super().__init__(Body())
        make, self.use, self.change = case
        self.batch = batch
        self.__dict__["kept"] = on(make(), device)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.use(self.net(batch[0]), self.kept)

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == self.batch:
            self.change(self.kept)


def compare(harness: Harness, make: Function[[], Predictor], callback: CUDAGraphCallback) -> None:
    """Compare with eager. No copy is made: it would share classes and functions."""
    seen = []
    for extra in ([callback], []):
        torch.manual_seed(2)
        module = make()
        torch.manual_seed(1)
        result = harness.trainer(*extra).predict(module, features(32))
        seen.append((result, dict(module.state_dict())))
    assert_same(*seen)


@pytest.mark.parametrize("name", CASES)
def test_changed_between_two_batches(harness: Harness, device, name):
    """Hazards 4 and 7: guards find it before each replay, verification is off."""
    callback = harness.callback(warmup_steps=1, verify_replays=0)
    compare(harness, lambda: Keeps(CASES[name], device, 4), callback)
    assert callback.stats.steps["NONE"] < 4, callback.summary()


@pytest.mark.parametrize("name", CASES)
def test_without_a_change_nothing_is_captured_anew(harness: Harness, device, name):
    callback = harness.callback(warmup_steps=1, mode="FULL")
    compare(harness, lambda: Keeps(CASES[name], device, 99), callback)
    assert callback.stats.captures == 1


class Nested:
    def __init__(self) -> None:
        self.inner = Slotted()


def bump(kept: Any) -> float:
    kept.inner.factor += 1
    return kept.inner.factor


def bump_first(kept: Any) -> float:
    kept[0][0] += 1
    return float(kept[0][0])


def keep_last(kept: Any) -> float:
    kept.append(kept[-1] + 1)  # of a fixed length
    return kept[0]


def counted(holder: Any) -> float:
    holder.factor += 1
    return holder.factor


CHANGED_BY_THE_STEP: dict[str, tuple[Function[[], Any], Function[[Any], float]]] = {
    "object in an object": (Nested, bump),
    "list in a list": (lambda: [[0.0]], bump_first),
    "class": (fresh_class, counted),
    "nested class": (fresh_class, lambda kept: counted(kept.Deep)),
    "module": (fresh_module, counted),
    "key": (lambda: {Plain(): 1}, lambda kept: counted(first(kept))),
    "member of a set": (lambda: frozenset([Plain()]), lambda kept: counted(first(kept))),
    "array of objects": (
        lambda: np.array([Plain()], dtype=object),
        lambda kept: counted(kept[0]),
    ),
    "member of an enum": (lambda: with_factor(fresh_enum().A), counted),
    "str": (lambda: with_factor(OwnStr("a")), counted),
    "function": (lambda: with_factor(fresh_function()), counted),
    "weak reference": (referred(weakref.ref), lambda kept: counted(kept())),
    "metric in a list": (
        lambda: [with_factor(MeanMetric())],
        lambda kept: counted(kept[0]),
    ),
    "NumPy array": (lambda: np.zeros((1, 1)), bump_first),
    "deque": (lambda: collections.deque([1.0, 2.0], maxlen=2), keep_last),
    "random.Random": (lambda: random.Random(3), lambda kept: kept.random()),
    "NumPy generator": (lambda: np.random.default_rng(3), lambda kept: float(kept.random())),
}


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", CHANGED_BY_THE_STEP)
def test_changed_by_the_step_itself(harness: Harness, name, verify_replays):
    """Hazards 6 and 9: the step is not captured, and nothing is counted or drawn twice."""
    make, change = CHANGED_BY_THE_STEP[name]

    class Changes(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.kept = make()

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) * change(self.kept)

    callback = harness.callback(warmup_steps=1, verify_replays=verify_replays)
    compare(harness, Changes, callback)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()


def replaced(value: list[Any]) -> None:
    value[0] = {"a": [1, 3]}


CHANGES_OF_ITEMS: dict[str, tuple[Function[[], Any], Function[[Any], object], bool]] = {
    # what is held, what changes, whether the values are other ones then
    "from one list to the next": (
        lambda: [[1, 2], [3]],
        lambda value: value[1].insert(0, value[0].pop()),
        True,
    ),
    "item of an inner list": (lambda: ([1, [2]],), lambda value: value[0][1].append(3), True),
    "value of an inner dictionary": (lambda: [{"a": 1}], lambda value: value[0].update(a=2), True),
    "key": (lambda: [{"a": 1}], lambda value: value[0].update(b=value[0].pop("a")), True),
    "0.0 and -0.0": (lambda: [0.0], lambda value: value.__setitem__(0, -0.0), True),
    "1 and True": (lambda: [1], lambda value: value.__setitem__(0, True), True),
    "deque": (lambda: collections.deque([1, 2]), lambda value: value.rotate(), True),
    "ordered": (
        lambda: collections.OrderedDict(a=1, b=2),
        lambda value: value.move_to_end("a"),
        True,
    ),
    "not a number": (
        lambda: [float("nan")],
        lambda value: value.__setitem__(0, float("nan")),
        False,
    ),
    "equal number": (lambda: [1000.5], lambda value: value.__setitem__(0, float("1000.5")), False),
    "equal dictionary": (
        lambda: [{"a": [1, 2]}],
        lambda value: value.insert(0, dict(value.pop())),
        False,
    ),
    "inside an equal dictionary": (lambda: [{"a": [1, 2]}], replaced, True),
    "dictionary of a class of its own": (
        lambda: OmegaConf.to_object(OmegaConf.create({"a": 1})),
        lambda value: value.update(a=2),
        True,
    ),
}


@pytest.mark.parametrize("name", CHANGES_OF_ITEMS)
def test_items_of_containers(name):
    make, change, differs = CHANGES_OF_ITEMS[name]
    value = make()
    frozen = FrozenValues([value], ["self.kept"])
    assert frozen.hold()
    change(value)
    assert frozen.hold() is not differs
    assert bool(frozen.explain()) is differs


@pytest.mark.parametrize("items", [3, 1000])
def test_containers_of_any_size(items):
    for make, change in (
        (lambda: list(range(items)), lambda kept: kept.append(1)),
        (lambda: np.zeros(items), lambda kept: kept.__setitem__(0, 1)),
        (lambda: set(range(items)), lambda kept: kept.add(-1)),
    ):
        kept: Any = make()
        values = FrozenValues([kept])
        assert values.hold()
        change(kept)
        assert not values.hold()


def test_what_is_weakly_referred_to_is_not_kept_alive():
    """A step would see it die in eager."""
    kept = Referred()
    values = FrozenValues([weakref.ref(kept)], ["self.kept"])
    assert values.hold()
    del kept
    assert not values.hold()


def test_what_refers_to_itself():
    kept = Plain()
    kept.inner.append(kept)
    values = FrozenValues([kept])
    assert values.hold()
    kept.factor = 2.0
    assert not values.hold()


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.factor = 1.0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class CountsInScript(Scripted):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class ChangesScript(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 4:
            pl_module.net.factor = 3.0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("kind", [Scripted, CountsInScript])
def test_attributes_of_scripted_modules(harness: Harness, kind, verify_replays):
    """Hazards 6 and 7, in a module that stores its attributes outside Python."""
    torch.manual_seed(2)
    net = kind()
    seen = []
    callback = harness.callback(warmup_steps=1, verify_replays=verify_replays)
    for extra in ([callback], []):
        torch.manual_seed(3)
        module = Predictor(torch.jit.script(net))
        seen.append(harness.trainer(*extra, ChangesScript()).predict(module, features(32)))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    # the step is watched once, and once more after the change
    assert callback.stats.steps["FULL"] == (6 if kind is Scripted else 0), callback.summary()


class ReadsItsClass(Predictor):
    factor = 1.0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * type(self).factor * self.__class__.factor


class ReadsItsDictionary(Predictor):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.factor = 1.0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * vars(self)["factor"] * self.__dict__["factor"]


@pytest.mark.parametrize("kind", [ReadsItsClass, ReadsItsDictionary])
def test_attributes_that_nobody_sees_being_read(harness: Harness, kind):
    """Hazard 7."""

    class Changes(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            owner = kind if kind is ReadsItsClass else pl_module
            owner.factor = 3.0 if batch_idx >= 4 else 1.0

        def on_predict_end(self, *_: Any) -> None:
            ReadsItsClass.factor = 1.0

    callback = harness.callback(warmup_steps=1, verify_replays=0)
    harness.compare(kind(Body()), predict(features(32)), callback, lambda: [Changes()])
    assert callback.stats.steps["FULL"] == 6  # watched once, and once more after the change


class Ensemble(Predictor):
    """Runs three networks at once with ``torch.func``."""

    def __init__(self) -> None:
        super().__init__(Body())
        weights = {
            name: torch.stack([value, 2 * value, 3 * value])
            for name, value in self.net.named_parameters()
        }
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): value.detach() for name, value in weights.items()}
        )

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        weights = {name.replace("/", "."): value for name, value in self.weights.items()}
        run = lambda weights, x: torch.func.functional_call(self.net, weights, (x,))
        return torch.vmap(run, (0, None))(weights, batch[0])


class Derives(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.inference_mode(False):
            return torch.func.jvp(
                nn.functional.relu, (batch[0].clone(),), (torch.ones_like(batch[0]),)
            )


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("kind", [Ensemble, lambda: Derives(Body())])
def test_transforms_of_torch_func(harness: Harness, kind, mode):
    """Batched tensors have no own memory, so only the whole step can be a graph."""
    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(kind(), predict(features(32)), callback)
    if kind is Ensemble and mode == "PIECEWISE":
        assert any(
            "inside a transform of torch.func" in reason for reason in callback.stats.eager_reasons
        )
