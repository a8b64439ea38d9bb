"""Changes that one batch makes and a later one takes back, where a guard could miss them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from tests.harness import Batches, Harness, features, predict, validate


class Part(nn.Module):
    """Calls ``use`` with itself, and holds what ``setup`` gives."""

    def __init__(self, setup: Callable[[], Any], use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.held, self.use = nn.Linear(8, 8), setup(), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.linear(x))


class Runs(LightningModule):
    def __init__(self, part: nn.Module) -> None:
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


class Doubles:
    scale = 1.0

    def method(self, x: Tensor) -> Tensor:
        return x * 2

    @property
    def factor(self) -> float:
        return 2.0

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x * 2

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * 2


class Inherits(Doubles):
    pass


class PartOfModel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.method(x)

    @staticmethod
    def method(x: Tensor) -> Tensor:
        return x * 2


def times_five(*args: Any) -> Tensor:
    return args[-1] * 5


def on_class(cls: type, name: str, value: Any) -> Callable[[Any, bool], None]:
    """Return a change of a class: another value, or the first one of its name."""
    before = vars(cls).get(name)

    def change(_: Any, is_on: bool) -> None:
        if is_on or before is not None:
            setattr(cls, name, value if is_on else before)
        else:
            delattr(cls, name)

    return change


def another_dictionary(part: Part, is_on: bool) -> None:
    part.held.__dict__ = {"scale": 3.0 if is_on else 1.0}


def inside_context(part: Part, x: Tensor) -> Tensor:
    with part.held:
        return part.linear(x).float()


def imports(part: Part, x: Tensor) -> Tensor:
    from imported_and_exchanged import SCALE

    return x * SCALE


FIRST = types.ModuleType("imported_and_exchanged")
FIRST.SCALE = 1.0  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imported_and_exchanged", FIRST)


def exchanges_module(part: Part, is_on: bool) -> None:
    other: Any = types.SimpleNamespace(SCALE=3.0) if is_on else FIRST
    sys.modules["imported_and_exchanged"] = other


class Calls:
    def call(self, x: Tensor) -> Tensor:
        return self.called(x)

    def called(self, x: Tensor) -> Tensor:
        return x * 2


KINDS = {"first": type("First", (Calls,), {}), "second": type("Second", (Calls,), {})}


def calls_each(part: Part, x: Tensor) -> Tensor:
    for kind in KINDS.values():
        x = kind().call(x)
    return x


def defines_in_the_second(part: Part, is_on: bool) -> None:
    if is_on:
        KINDS["second"].called = lambda self, x: x * 3  # type: ignore[attr-defined]
    else:
        del KINDS["second"].called  # type: ignore[attr-defined]


class AnswersAnyName(type):
    def __getattr__(cls, name: str) -> float:
        if name.startswith("__") and name != "__members__":
            raise AttributeError(name)
        return 0.0


class Answers(metaclass=AnswersAnyName):
    def __init__(self) -> None:
        self.scale = 1.0


CHANGES: dict[str, tuple[Any, Any, Any]] = {
    "an attribute, where a metaclass answers": (
        Answers,
        lambda part, x: x * part.held.scale,
        attribute("scale"),
    ),
    "a class whose inherited code ran for another": (
        lambda: None,
        calls_each,
        defines_in_the_second,
    ),
    "what is imported, to an object and back": (lambda: None, imports, exchanges_module),
    "a method of an object": (
        Doubles,
        lambda part, x: part.held.method(x),
        on_class(Doubles, "method", times_five),
    ),
    "a property of an object": (
        Doubles,
        lambda part, x: x * part.held.factor,
        on_class(Doubles, "factor", property(lambda _: 5.0)),
    ),
    "a static method of an object": (
        Doubles,
        lambda part, x: part.held.static(x),
        on_class(Doubles, "static", staticmethod(times_five)),
    ),
    "a static method of a class that is named": (
        lambda: None,
        lambda part, x: Doubles.static(x),
        on_class(Doubles, "static", staticmethod(times_five)),
    ),
    "a class method": (
        lambda: None,
        lambda part, x: Doubles.of_class(x),
        on_class(Doubles, "of_class", classmethod(times_five)),
    ),
    "a first override": (
        Inherits,
        lambda part, x: part.held.method(x),
        on_class(Inherits, "method", times_five),
    ),
    "a first override of what the step makes": (
        lambda: None,
        lambda part, x: Inherits().method(x),
        on_class(Inherits, "method", times_five),
    ),
    "a first __bool__": (
        Inherits,
        lambda part, x: x if part.held else -x,
        on_class(Inherits, "__bool__", lambda _: False),
    ),
    "a first __getattr__": (
        Inherits,
        lambda part, x: x * getattr(part.held, "other", 1.0),
        on_class(Inherits, "__getattr__", lambda *_: 5.0),
    ),
    "a static method of a module": (
        PartOfModel,
        lambda part, x: part.held(x),
        on_class(PartOfModel, "method", staticmethod(times_five)),
    ),
    "a first __call__ of a module": (
        PartOfModel,
        lambda part, x: part.held(x),
        on_class(PartOfModel, "__call__", times_five),
    ),
    "a first value of the class of a module": (
        PartOfModel,
        lambda part, x: part.held(x) * getattr(part.held, "other", 1.0),
        on_class(PartOfModel, "other", 5.0),
    ),
    "another dictionary": (Doubles, lambda part, x: x * part.held.scale, another_dictionary),
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


class HasNoHash(type):
    def __eq__(cls, other: object) -> bool:
        return cls is other


class RaisesForNames(type):
    def __getattr__(cls, name: str) -> Any:
        raise KeyError(name)


class DeadProxy:
    @property
    def __class__(self) -> type:
        raise RuntimeError("nothing is behind it")


class NoHash(Doubles, metaclass=HasNoHash):
    pass


class OfRaising(metaclass=RaisesForNames):
    pass


class HoldsRaising(Doubles):
    inner = OfRaising()


class HoldsProxy(Doubles):
    inner = DeadProxy()


@pytest.mark.parametrize("kind", [NoHash, HoldsRaising, HoldsProxy])
def test_classes_that_raise_do_not_stop_a_step(harness: Harness, kind: type) -> None:
    def use(part: Part, x: Tensor) -> Tensor:
        return doubled(kind(), x)

    callback = harness.callback(warmup_steps=1)
    harness.compare(Runs(Part(lambda: None, use)), predict(features(48)), callback)
    assert callback.stats.steps["NONE"] <= 3, callback.summary()


def doubled(thing: Any, x: Tensor) -> Tensor:
    return thing.method(x)


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


ONE, OTHER = object(), object()


def looks_at_text(module: Any, batch: Any) -> float:
    return float(len(repr(batch["number"])))


def compares_by_identity(module: Any, batch: Any) -> float:
    return 2.0 if batch["thing"] is ONE else 1.0


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("read", [looks_at_text, compares_by_identity])
def test_reads_that_nothing_intercepts(harness: Harness, read: Any, mode: str) -> None:
    class Reads(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.linear(batch["x"]) * read(self, batch)

    def batch(index: int) -> Any:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(index))
        return {"x": x, "number": torch.tensor(10**index), "thing": ONE if index > 7 else OTHER}

    data = DataLoader(Batches(batch, 12), batch_size=None)  # type: ignore[arg-type]
    harness.compare(Reads(), predict(data), harness.callback(mode=mode, verify_replays=0))


def asks_for_sentinel(value: Any, mask: Any = ONE) -> float:
    return 1.0 if mask is ONE else 2.0


def asks_for_class(value: Any) -> float:
    return 1.0 if value.__class__ is nn.Linear else 2.0


def asks_for_dtype(value: Any) -> float:
    return 1.0 if value.weight.dtype is torch.float32 else 2.0


def asks_for_constant(value: Any) -> float:
    return 1.0 if value is None else 2.0


@pytest.mark.parametrize(
    "ask", [asks_for_sentinel, asks_for_class, asks_for_dtype, asks_for_constant]
)
def test_identity_with_objects_of_other_classes_reads_no_value(harness: Harness, ask: Any) -> None:
    class PassesOn(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.linear(batch["x"]) * ask(self.linear), batch["name"]

    def batch(index: int) -> Any:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(index))
        return {"x": x, "name": f"image {index}"}

    data = DataLoader(Batches(batch, 16), batch_size=None)  # type: ignore[arg-type]
    callback = harness.compare(PassesOn(), predict(data), harness.callback(warmup_steps=1))
    assert callback.stats.steps["FULL"] >= 5, callback.summary()


GLOBAL = torch.ones(8)
HELD_TENSORS = {
    "an attribute": lambda part: part.held["kept"],
    "a view of one": lambda part: part.held["kept"][2:],
    "a global": lambda part: GLOBAL,
    "a parameter of a module in a dict": lambda part: part.held["layer"].weight,
}


class AddsToOutputs(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
        with torch.no_grad():
            outputs[1].add_(1)


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("name", HELD_TENSORS)
def test_an_output_that_is_held_elsewhere_is_that_tensor(harness: Harness, name, mode) -> None:
    def returns(part: Part, x: Tensor) -> Any:
        return x, HELD_TENSORS[name](part)

    def job(trainer: Any, module: Any) -> Any:
        GLOBAL.fill_(1)
        trainer.predict(module, features(48))
        return GLOBAL.clone(), module.part.held["kept"], module.part.held["layer"].weight

    if harness.backend == "cuda":
        pytest.skip("these tensors are on the host")
    torch.manual_seed(2)
    model = Runs(Part(lambda: {"kept": torch.ones(8), "layer": nn.Linear(8, 8)}, returns))
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    harness.compare(model, job, callback, lambda: [AddsToOutputs()])
    assert callback.stats.steps[mode.split("_")[0]], callback.summary()


class WidensOutputs(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
        outputs[1].unsqueeze_(0)


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("of", ["a parameter", "an attribute"])
def test_a_view_of_what_is_held_elsewhere_is_a_new_one(harness: Harness, of, mode) -> None:
    def returns(part: Part, x: Tensor) -> Any:
        held = part.linear.weight if of == "a parameter" else part.held["kept"]
        view = held[2:]
        return x, view, view

    if harness.backend == "cuda" and of == "an attribute":
        pytest.skip("this tensor is on the host")
    torch.manual_seed(2)
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    harness.compare(
        Runs(Part(lambda: {"kept": torch.ones(8)}, returns)),
        predict(features(48)),
        callback,
        lambda: [WidensOutputs()],
    )
    assert callback.stats.steps[mode.split("_")[0]], callback.summary()


class Returns(nn.Module):
    """Returns what ``use`` makes of the batch itself."""

    def __init__(self, use: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.use, self.linear = use, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x), *self.use(x)


def views_of_the_batch(x: Tensor) -> Any:
    view = x[:, 2:]
    return view, view


def views_of_what_it_computes(x: Tensor) -> Any:
    computed = x * 2
    view = computed[:, 2:]
    return view, view, computed


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("views", [views_of_the_batch, views_of_what_it_computes])
def test_a_view_that_is_in_an_output_twice_is_one_tensor(harness: Harness, views, mode) -> None:
    torch.manual_seed(2)
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    harness.compare(
        Runs(Returns(views)),
        predict(features(48)),
        callback,
        lambda: [WidensOutputs()],
    )
    assert callback.stats.steps[mode.split("_")[0]], callback.summary()


class SetsDataOfOutputs(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
        outputs[1].data = outputs[1].data + 1


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
def test_a_new_parameter_in_the_output_is_not_that_of_an_earlier_step(
    harness: Harness, mode
) -> None:
    torch.manual_seed(2)
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    harness.compare(
        Runs(Part(dict, lambda part, x: (x, nn.Parameter(part.linear.bias)))),
        predict(features(48)),
        callback,
        lambda: [SetsDataOfOutputs()],
    )


class AppendsToOutputs(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_: Any) -> None:
        if batch_idx == 6:
            outputs[1].append("another")


def exchanges_the_list(part: Part, is_on: bool) -> None:
    if not is_on:  # for one that is equal
        part.held["names"] = list(part.held["names"])


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
def test_a_list_of_an_attribute_in_the_output_is_that_list(harness: Harness, mode) -> None:
    torch.manual_seed(2)
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    harness.compare(
        Runs(Part(lambda: {"names": ["a", "b"]}, lambda part, x: (x, part.held["names"]))),
        predict(features(48)),
        callback,
        lambda: [Changes(exchanges_the_list), AppendsToOutputs()],
    )
    assert callback.stats.steps[mode.split("_")[0]], callback.summary()


class ExchangesTheModule(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx == 6:
            self.first = pl_module
            torch.manual_seed(5)
            other = Runs(Part(dict, lambda part, x: x * 2)).to(pl_module.device).eval()
            other.trainer = trainer
            trainer.strategy.connect(other)
        if batch_idx == 9:
            trainer.strategy.connect(self.first)


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
def test_a_strategy_that_gets_another_module(harness: Harness, mode: str) -> None:
    torch.manual_seed(2)
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    harness.compare(
        Runs(Part(dict, lambda part, x: x)),
        predict(features(48)),
        callback,
        lambda: [ExchangesTheModule()],
    )
    assert callback.stats.steps[mode.split("_")[0]] >= 5, callback.summary()


class Logs(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.metric = nn.Linear(8, 8), MulticlassAccuracy(8)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = self.linear(batch[0])
        self.metric.update(y, y.flip(0).argmax(dim=1))
        self.log("metric", self.metric)
        self.log("mean", y.mean())
        return y


class Hides(Callback):
    """Gives an instance a method of its own in the middle."""

    def __init__(self, find: Callable[[Any], Any], name: str) -> None:
        self.find, self.name = find, name

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        held = vars(self.find(pl_module))
        if batch_idx == 6:
            self.before = held.get(self.name)
            held[self.name] = lambda *_, **__: None
        if batch_idx == 9 and self.before is not None:
            held[self.name] = self.before
        elif batch_idx == 9:
            del held[self.name]


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize(
    ("find", "name"), [(lambda module: module.metric, "update"), (lambda module: module, "log")]
)
def test_a_method_of_one_instance(harness: Harness, find, name, verify_replays) -> None:
    torch.manual_seed(2)
    callback = harness.callback(verify_replays=verify_replays, warmup_steps=1)
    harness.compare(Logs(), validate(features(48)), callback, lambda: [Hides(find, name)])
    assert callback.stats.steps["FULL"], callback.summary()


class Halves(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class CachesWeights(Callback):
    """Lets PyTorch keep computed weights while what they are computed from changes."""

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx == 6:
            self.context = parametrize.cached()
            self.context.__enter__()
        if batch_idx == 7:
            pl_module.part.held.parametrizations.weight.original.data.mul_(3)
        if batch_idx == 9:
            self.context.__exit__(None, None, None)


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
def test_weights_that_pytorch_keeps(harness: Harness, mode: str) -> None:
    def halved() -> nn.Module:
        return parametrize.register_parametrization(nn.Linear(8, 8), "weight", Halves())

    torch.manual_seed(2)
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    model = Runs(Part(halved, lambda part, x: part.held(x)))
    harness.compare(model, predict(features(48)), callback, lambda: [CachesWeights()])
    assert callback.stats.steps[mode.split("_")[0]], callback.summary()


class New:
    def method(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
def test_a_step_that_replaces_a_function_and_uses_a_new_class(harness: Harness, mode: str) -> None:
    """A library may replace functions of PyTorch when it is imported, in the step of one shape."""
    relu = torch.relu

    def use_new(x: Tensor) -> Tensor:
        torch.relu = lambda x: relu(x) + 1
        return New().method(x)

    def use(part: Part, x: Tensor) -> Tensor:
        return use_new(x) if len(x) == 3 else torch.relu(x)

    def batch(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3 if index == 9 else 4, 8, generator=generator)[None]

    def job(trainer: Any, module: Any) -> Any:
        data = DataLoader(Batches(batch, 16), batch_size=None)  # type: ignore[arg-type]
        try:
            return trainer.predict(module, data)
        finally:
            torch.relu = relu

    torch.manual_seed(2)
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    harness.compare(Runs(Part(dict, use)), job, callback)
    assert callback.stats.steps[mode.split("_")[0]] >= 5, callback.summary()


class OwnTensor(Tensor):
    """A class of tensors of the user's."""


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
def test_a_new_tensor_of_the_users_class_is_not_that_of_an_earlier_step(
    harness: Harness, mode
) -> None:
    torch.manual_seed(2)
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    harness.compare(
        Runs(Part(dict, lambda part, x: (x, part.linear.bias.detach().as_subclass(OwnTensor)))),
        predict(features(48)),
        callback,
        lambda: [SetsDataOfOutputs()],
    )


class ChangesContainers(Callback):
    """Changes a container of each output in place, and keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
        one, other = outputs[:2] if isinstance(outputs, list) else (outputs["a"], outputs["b"])
        if isinstance(one, list):
            one.append(len(one))
        else:
            one["new"] = len(one)
        self.seen.append((one is other, len(one), len(other)))


def _deep(x: Tensor) -> list[Any]:
    inner = {"x": x}
    return [{"y": [inner]}, {"z": inner}, inner]


REPEATED: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda x: (lambda each: {"a": each, "b": each, "c": x})([x, x + 1]),
    "dictionary": lambda x: (lambda each: [each, each])({"q": x}),
    "empty": lambda x: (lambda each: [each, each, x])([]),
    "deep": _deep,
    "two": lambda x: {"a": [x], "b": [x]},
}


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("name", list(REPEATED))
def test_a_new_container_that_is_in_the_output_twice_is_one(harness: Harness, name, mode) -> None:
    torch.manual_seed(2)
    make = REPEATED[name]
    model = Runs(Part(dict, lambda part, x: make(x)))
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    seen = []
    for extra in ([callback], []):
        changes = ChangesContainers()
        trainer = harness.trainer(*extra, changes)
        outputs = predict(features(48))(trainer, model)
        inside = [each[0]["y"][0] is each[2] for each in outputs] if name == "deep" else []
        seen.append((changes.seen, inside))
    assert seen[0] == seen[1], callback.summary()
    assert callback.stats.steps[mode.split("_")[0]] >= 10
