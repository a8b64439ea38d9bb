"""Functions and classes that are replaced, or changed in place, between two steps of a stage."""

from __future__ import annotations

import builtins
import collections
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from cg_lightning.guards.library_code import LibraryCode
from cg_lightning.modules.interception import Interception, ModuleHandler
from tests.harness import assert_same, features, predict
from tests.models import Predictor

NUMBERS = (1, 2, 3)
Pair = collections.namedtuple("Pair", "first second", defaults=(2,))


def doubled(x: Tensor) -> Tensor:
    return x * 2


def tripled(x: Tensor) -> Tensor:
    return x * 3


def scaled(x: Tensor, factor: float = 2) -> Tensor:
    return x * factor


held = functools.partial(scaled, factor=2)


class Doubles(nn.Module):
    def change(self, x: Tensor) -> Tensor:
        return x * 2


class Triples(nn.Module):
    def change(self, x: Tensor) -> Tensor:
        return x * 3


class Changes(Doubles):
    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def net(x: Tensor) -> Tensor:
    return x


def add_method(_: Any) -> Callable[[], None]:
    Tensor.doubled_for_test = lambda x: x * 2  # type: ignore[attr-defined]
    return lambda: delattr(Tensor, "doubled_for_test")


def replace(holder: Any, name: str, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what replaces an attribute, and returns what puts it back."""

    def change(_: Any) -> Callable[[], None]:
        is_inherited = name == "__call__" and name not in vars(holder)
        before = getattr(holder, name)
        setattr(holder, name, make(before))
        if is_inherited:
            return lambda: delattr(holder, name)
        return lambda: setattr(holder, name, before)

    return change


def becomes(module: nn.Module, cls: type) -> Callable[[], None]:
    module.__class__ = cls
    return lambda: None


def exchange_partial(_: Any) -> Callable[[], None]:
    before = (held.func, held.args, held.keywords, None)
    held.__setstate__((scaled, (), {"factor": 3}, None))
    return lambda: held.__setstate__(before)


def exchange_module(_: Any) -> Callable[[], None]:
    other = types.ModuleType("imported_for_test")
    other.FACTOR = 3.0  # type: ignore[attr-defined]
    before = sys.modules["imported_for_test"]
    sys.modules["imported_for_test"] = other
    return lambda: sys.modules.update(imported_for_test=before)


def remove_module(_: Any) -> Callable[[], None]:
    before = sys.modules.pop("imported_for_test")
    return lambda: sys.modules.update(imported_for_test=before)


def imports(x: Tensor) -> Tensor:
    try:
        import imported_for_test
    except ImportError:
        return x
    return x * imported_for_test.FACTOR


def asks_for_method(x: Tensor) -> Tensor:
    return x.doubled_for_test() if hasattr(x, "doubled_for_test") else x  # type: ignore[attr-defined]


def other_forward(before: Any) -> Any:
    return lambda self, x: before(self, x) * 3


def times_three(_: Any) -> Any:
    return lambda *args, **kwargs: args[0] * 3


# what the step does with the output of its modules, and the change
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Callable[[], None]]]] = {
    "a function of torch": (lambda x: torch.relu(x), replace(torch, "relu", times_three)),
    "a function that a module of torch calls": (net, replace(F, "relu", times_three)),
    "forward of a class of torch": (net, replace(nn.Linear, "forward", other_forward)),
    "the first __call__ of a class of torch": (net, replace(nn.ReLU, "__call__", other_forward)),
    "a method of tensors": (lambda x: x.tanh(), replace(Tensor, "tanh", times_three)),
    "an operator of tensors": (lambda x: x + 1, replace(Tensor, "__add__", times_three)),
    "the first method of its name of tensors": (asks_for_method, add_method),
    "a builtin": (
        lambda x: x * len(NUMBERS),
        replace(builtins, "len", lambda n: lambda of: 7 if of is NUMBERS else n(of)),
    ),
    "the code of a function": (
        lambda x: doubled(x),
        replace(doubled, "__code__", lambda _: tripled.__code__),
    ),
    "the code of a function of torch": (
        net,
        replace(nn.ReLU.forward, "__code__", lambda _: (lambda self, input: input * 3).__code__),
    ),
    "the defaults of a named tuple": (
        lambda x: x * Pair(1).second,
        replace(Pair.__new__, "__defaults__", lambda _: (3,)),
    ),
    "the bases of a class": (
        lambda x: Changes()(x),
        replace(Changes, "__bases__", lambda _: (Triples,)),
    ),
    "the class of the LightningModule": (net, lambda module: becomes(module, Other)),
    "what a partial holds": (lambda x: held(x), exchange_partial),
    "another module under its name": (imports, exchange_module),
    "a module that is gone": (imports, remove_module),
}


@pytest.fixture(autouse=True)
def _module() -> Iterator[None]:
    module = types.ModuleType("imported_for_test")
    module.FACTOR = 2.0  # type: ignore[attr-defined]
    sys.modules["imported_for_test"] = module
    yield
    del sys.modules["imported_for_test"]


class Runs(Predictor):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        torch.manual_seed(3)
        super().__init__(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
        self.function = function

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.function(self.net(batch[0]))


class Other(Runs):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]) * 7


class ChangesAt(Callback):
    """Changes something before a step, and puts it back at the end."""

    def __init__(self, number: int, change: Callable[[Any], Callable[[], None]]) -> None:
        self._number, self._change = number, change
        self._put_back: Callable[[], None] | None = None

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self._number:
            self._put_back = self._change(pl_module)

    def put_back(self) -> None:
        if self._put_back is not None:
            self._put_back()


def run(harness, function, change, *callbacks) -> Any:
    changes = ChangesAt(6, change)
    try:
        return harness.trainer(*callbacks, changes).predict(Runs(function), features(48))
    finally:
        changes.put_back()


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_what_is_replaced_in_mid_stage_counts(harness, name, verify_replays):
    function, change = CASES[name]
    callback = harness.callback(verify_replays=verify_replays)
    eager = run(harness, function, change)
    assert not torch.equal(eager[6], run(harness, function, lambda _: lambda: None)[6])
    assert_same(run(harness, function, change, callback), eager)
    assert callback.stats.steps["FULL"] >= 3, callback.summary()  # those before the change


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_submodules_are_captured_again(harness, mode):
    """Also where the step itself is no graph."""

    def reads(x: Tensor) -> Tensor:
        return x * float(x.sum() > 0)

    callback = harness.callback(mode=mode)
    change = replace(nn.ReLU, "forward", other_forward)
    assert_same(run(harness, reads, change, callback), run(harness, reads, change))
    assert callback.stats.steps["PIECEWISE"] + callback.stats.steps["FULL"] >= 5, callback.summary()


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_a_step_that_rewrites_a_function_itself_is_no_graph(harness, verify_replays):
    codes = (doubled.__code__, tripled.__code__)

    def swaps(x: Tensor) -> Tensor:
        doubled.__code__ = codes[doubled.__code__ is codes[0]]
        return doubled(x)

    callback = harness.callback(verify_replays=verify_replays)
    try:
        eager = run(harness, swaps, lambda _: lambda: None)
        doubled.__code__ = codes[0]
        assert_same(run(harness, swaps, lambda _: lambda: None, callback), eager)
    finally:
        doubled.__code__ = codes[0]
    assert callback.stats.steps["NONE"] == len(eager), callback.summary()
    assert "doubled.__code__" in callback.summary()


CODES = (doubled.__code__, tripled.__code__)


class Unkeyable:
    """An object that cannot be part of a key."""


class RewritesWithoutAKey(Predictor):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        doubled.__code__ = CODES[doubled.__code__ is CODES[0]]
        return doubled(self.net(batch["x"])), isinstance(batch["thing"], Unkeyable)


def test_a_step_without_a_key_that_rewrites_a_function_has_no_pieces(harness, monkeypatch):
    """A submodule may call the function, so its graph would have the code of an earlier step."""
    monkeypatch.setattr(doubled, "__code__", CODES[0])
    batches = [{"x": torch.randn(4, 8), "thing": Unkeyable()} for _ in range(12)]
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    callback = harness.callback(mode="PIECEWISE")
    harness.compare(RewritesWithoutAKey(), predict(data), callback)
    assert callback.stats.steps == {"NONE": 12, "PIECEWISE": 0, "FULL": 0}, callback.summary()


class CallsDoubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.layer(x))


class RewritesInOneShape(Predictor):
    def __init__(self) -> None:
        super().__init__(CallsDoubled())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch) == 5:
            doubled.__code__ = CODES[1]
        return self.net(batch)


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
def test_a_step_that_rewrites_a_function_ends_the_graphs_of_other_shapes(
    harness, monkeypatch, mode
):
    batches = [torch.randn(size, 8) for size in (*[4] * 8, *[5] * 3, *[4] * 8)]
    results = []
    for callbacks in ([harness.callback(mode=mode)], []):
        monkeypatch.setattr(doubled, "__code__", CODES[0])
        torch.manual_seed(0)
        data = torch.utils.data.DataLoader(batches, batch_size=None)
        results.append(harness.trainer(*callbacks).predict(RewritesInOneShape(), data))
        if callbacks:
            graphs = callbacks[0].stats.steps
            assert graphs["FULL"] + graphs["PIECEWISE"] >= 10, callbacks[0].summary()
    assert_same(*results)


def test_the_reason_names_what_was_replaced(harness):
    callback = harness.callback()
    run(harness, net, replace(F, "relu", times_three), callback)
    assert "torch.nn.functional.relu" in callback.summary(), callback.summary()


def test_what_is_put_back_and_what_is_new_does_not_count(harness):
    """Mocks, interceptions of ours, values of modules, and new functions with defaults."""

    def change(module: Any) -> Callable[[], None]:
        put_back = replace(torch, "relu", times_three)(module)
        put_back()
        torch.made_for_test = 3  # type: ignore[attr-defined]

        class New(NamedTuple):
            first: int = 2

        assert New().first == 2
        return lambda: delattr(torch, "made_for_test")

    callback = harness.callback()
    eager = run(harness, net, change)
    assert_same(run(harness, net, change, callback), eager)
    assert callback.stats.steps["FULL"] >= 9, callback.summary()


def test_interceptions_do_not_count():
    module = nn.Linear(2, 2)
    code = LibraryCode([module])

    class Handler(ModuleHandler):
        def on_call(self, original, args, kwargs):
            return original(*args, **kwargs)

        def on_write(self, name, value): ...

    interception = Interception(module, Handler())
    assert code.holds()
    other = LibraryCode([module])
    interception.remove()
    assert code.holds()
    assert other.holds()
    put_back = replace(nn.Linear, "forward", other_forward)(None)
    try:
        assert not code.holds()
        assert str(code.explain()) == "Linear.forward"
    finally:
        put_back()
    assert code.holds()
