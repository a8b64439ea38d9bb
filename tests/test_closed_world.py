"""A step is one graph only if all it does in Python is known: harmless, compared or replayed."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import cProfile
import ctypes
import dataclasses
import enum
import functools
import importlib
import io
import itertools
import logging
import os
import pathlib
import queue
import random
import re
import sqlite3
import struct
import sys
import textwrap
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from os import write as write_kept
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cg_lightning import CUDAGraphCallback
from cg_lightning.guards import audit_events
from cg_lightning.guards.value_kinds import ValueKind, kind_of
from cg_lightning.guards.values import FrozenValues
from tests import models
from tests.harness import Harness, KeepOutputs, assert_same, features
from tests.models import Body, Predictor

SETTINGS = [
    {"verify_replays": 0},
    {"verify_replays": 2},
    {"mode": "PIECEWISE"},
]
Use = Callable[[Any, Any], Any]


class Uses(Predictor):
    """Scales what its network gives by what ``use`` makes of an attribute."""

    def __init__(self, held: Any, use: Use) -> None:
        super().__init__(Body())
        self.held = held
        self.use = use

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * self.use(self, self.held)


def run(
    harness: Harness,
    make: Callable[[], Any],
    callback: CUDAGraphCallback | None,
    loader: Any = None,
    others: Callable[[], list[Callback]] = list,
) -> Any:
    """Predict with a module made anew; return all that its user sees."""
    torch.manual_seed(2)
    module = make()
    kept = KeepOutputs()
    trainer = harness.trainer(*([] if callback is None else [callback]), kept, *others())
    torch.manual_seed(3)
    loader = features(32) if loader is None else loader
    return trainer.predict(module, loader), kept.kept


def compare(
    harness: Harness,
    make: Callable[[], Any],
    look: Callable[[], Any] = lambda: None,
    loader: Callable[[], Any] = lambda: None,
    others: Callable[[], list[Callback]] = list,
    **settings: Any,
) -> CUDAGraphCallback:
    """Compare a job with the callback to the same one without; ``look`` returns what is left."""
    callback = harness.callback(warmup_steps=1, **settings)
    seen = [(run(harness, make, each, loader(), others), look()) for each in (callback, None)]
    assert_same(*seen)
    return callback


def reasons(callback: CUDAGraphCallback) -> str:
    return "\n".join(str(record.reason) for record in callback.stats.reasons)


def generator() -> Any:
    yield from itertools.count(1.0)


class IteratesInPython:
    def __init__(self) -> None:
        self.number = 0

    def __next__(self) -> int:
        self.number += 1
        return self.number


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


def filled() -> queue.SimpleQueue[int]:
    found: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(99):
        found.put(number)
    return found


OPAQUE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "itertools.count": (lambda: itertools.count(1), next, "self.held: itertools.count"),
    "itertools.cycle": (lambda: itertools.cycle([1, 2, 3]), next, "self.held: itertools.cycle"),
    "iterator": (lambda: iter(range(1, 99)), next, "self.held: range_iterator"),
    "generator": (generator, next, "self.held: generator"),
    "enumerate": (lambda: enumerate(range(99)), lambda held: next(held)[0], "enumerate"),
    "random.Random": (lambda: random.Random(3), lambda held: held.random(), "random.Random"),
    "numpy Generator": (
        lambda: np.random.default_rng(3),
        lambda held: float(held.random()),
        "self.held: numpy.random.Generator",
    ),
    "numpy RandomState": (
        lambda: np.random.RandomState(3),
        lambda held: float(held.rand()),
        "RandomState",
    ),
    "cursor": (
        lambda: sqlite3.connect(":memory:").execute(
            "values (1), (2), (3), (4), (5), (6), (7), (8)"
        ),
        lambda held: held.fetchone()[0],
        "self.held: sqlite3.Cursor",
    ),
    "SimpleQueue": (filled, lambda held: held.get(), "self.held: SimpleQueue"),
    "StringIO": (
        lambda: io.StringIO("x" * 99),
        lambda held: len(held.read(2)) + held.tell(),
        "StringIO",
    ),
    "in a dictionary": (
        lambda: {"a": [itertools.count(1)]},
        lambda held: next(held["a"][0]),
        "self.held['a'][0]: itertools.count",
    ),
    "in an object": (
        lambda: Holder(itertools.count(1)),
        lambda held: next(held.held),
        "self.held.held: itertools.count",
    ),
    "in a partial": (
        lambda: functools.partial(next, itertools.count(1)),
        lambda held: held(),
        "self.held.args[0]: itertools.count",
    ),
    "bound": (lambda: itertools.count(1).__next__, lambda held: held(), "itertools.count"),
    "closed over": (
        lambda: (lambda numbers: lambda: next(numbers))(itertools.count(1)),
        lambda held: held(),
        "closure numbers of <lambda>: itertools.count",
    ),
}


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_objects(harness: Harness, name: str, settings: Any) -> None:
    """Hazard 37: their state moves where nobody sees it, so the step is no graph."""
    make, use, words = OPAQUE[name]
    callback = compare(harness, lambda: Uses(make(), lambda _, held: use(held)), **settings)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()
    if "mode" not in settings:
        assert "opaque object used" in reasons(callback)
        assert words in reasons(callback)


@contextlib.contextmanager
def profiled_by_a_function() -> Iterator[None]:
    profile = lambda frame, event, argument: None
    sys.setprofile(profile)
    try:
        yield
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)


PROFILERS = {
    "cProfile": cProfile.Profile,
    "a function": profiled_by_a_function,
    "torch.profiler": lambda: torch.profiler.profile(with_stack=True, acc_events=True),
}


NEXT_NUMBER: Any = None


class UsesAGlobalFunction(Predictor):
    def __init__(self, function: Any) -> None:
        super().__init__(Body())
        globals()["NEXT_NUMBER"] = function

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * NEXT_NUMBER()


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("profiler", PROFILERS)
def test_what_is_seen_under_a_profiler(harness: Harness, profiler: str, settings: Any) -> None:
    """Hazard 37: before Python 3.12, a thread has one profiler; what a function holds is seen."""
    make, _, words = OPAQUE["closed over"]
    with PROFILERS[profiler]():
        callback = compare(harness, lambda: UsesAGlobalFunction(make()), **settings)
    assert callback.stats.steps["FULL"] == 0
    if "mode" not in settings:
        is_hidden = profiler == "torch.profiler" and sys.version_info < (3, 12)
        assert ("cannot be paused (TraceContext)" if is_hidden else words) in reasons(callback)


def test_a_python_profiler_goes_on_after_a_watched_step(harness: Harness) -> None:
    with cProfile.Profile() as profile:
        compare(harness, lambda: Predictor(Body()))
    calls = {
        entry.code.co_name: entry.callcount
        for entry in profile.getstats()
        if isinstance(entry.code, types.CodeType)
    }
    assert calls["predict_step"] >= 8


NUMBERS: Any = None


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_opaque_globals(harness: Harness, settings: Any) -> None:
    """Hazard 37."""

    def make() -> Any:
        global NUMBERS
        NUMBERS = itertools.count(1)
        return Uses(None, lambda *_: next(NUMBERS))

    callback = compare(harness, make, **settings)
    if "mode" not in settings:
        assert "opaque object used: NUMBERS: itertools.count" in reasons(callback)


class OpaqueInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.numbers = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * next(self.numbers)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_opaque_in_a_submodule(harness: Harness, settings: Any) -> None:
    """Hazard 37: such a submodule is no graph, and its own submodules are."""
    callback = compare(harness, lambda: Predictor(OpaqueInside()), **settings)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()
    assert {entry.target for entry in callback.stats.entries} == {"net.linear"}


class Color(enum.Enum):
    RED = 1.0


@dataclasses.dataclass
class Point:
    x: float = 2.0


logger = logging.getLogger("user")
HARMLESS: dict[str, Any] = {
    "logger": (lambda: logger, lambda held: float(held.isEnabledFor(100))),
    "type": (lambda: Point, lambda held: held().x),
    "module": (lambda: torch.nn.functional, lambda held: float(hasattr(held, "relu"))),
    "function of torch": (lambda: torch.relu, lambda held: held(torch.ones(8)).numel() / 4),
    "function of NumPy": (lambda: np.prod, lambda held: float(held is np.prod)),
    "enum": (lambda: Color.RED, lambda held: held.value),
    "dtype": (lambda: torch.float32, lambda held: 2.0 * held.is_floating_point),
    "NumPy dtype": (lambda: np.dtype("f4"), lambda held: held.itemsize),
    "NumPy scalar": (lambda: np.float32(2), float),
    "Path": (lambda: pathlib.Path("a/b"), lambda held: len(held.parts)),
    "pattern": (lambda: re.compile("a+"), lambda held: len(held.match("aa")[0])),
    "partial": (lambda: functools.partial(max, 2.0), lambda held: held(1.0)),
    "frozenset": (lambda: frozenset({1.0, 2.0}), sum),
    "range": (lambda: range(1, 4), sum),
    "complex": (lambda: 1 + 2j, abs),
    "dataclass": (Point, lambda held: held.x),
    "object with a logger": (lambda: Holder(logger), lambda held: len(held.held.name)),
    "object with a generator": (
        lambda: Holder([random.Random(3), np.random.default_rng(3)]),
        lambda held: len(held.held),
    ),
    "counts in Python": (lambda: collections.Counter(a=2), lambda held: held["a"]),
    "context variable": (lambda: contextvars.ContextVar("v", default=2.0), lambda held: held.get()),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_objects(harness: Harness, name: str) -> None:
    make, use = HARMLESS[name]
    callback = compare(harness, lambda: Uses(make(), lambda _, held: use(held)))
    assert callback.stats.steps["FULL"] == 7, callback.summary()


def test_an_iterator_in_python_is_compared() -> None:
    assert kind_of(IteratesInPython()) is ValueKind.OBJECT
    assert kind_of(threading.local()) is ValueKind.OBJECT
    for value in (queue.SimpleQueue(), io.BytesIO(), itertools.count()):
        assert kind_of(value) is ValueKind.OPAQUE, value


def test_a_lock_is_compared() -> None:
    """It is free or held, and a replay may run only while that is as in the watched step."""
    for lock in (threading.Lock(), threading.RLock()):
        assert kind_of(lock) is ValueKind.CONTENTS
        values = FrozenValues([lock])
        with lock:
            assert not values.hold()
        assert values.hold()
    for value in (threading.Event(), queue.Queue()):
        assert kind_of(value) is ValueKind.OBJECT


# what functions hold


def counts() -> Any:
    count = 0

    def function() -> int:
        nonlocal count
        count += 1
        return count

    return function


def counts_in_a_list(kept: list[int] | None = None) -> Any:
    def function(kept: list[int] = [0]) -> int:  # noqa: B006
        kept[0] += 1
        return kept[0]

    function.__defaults__ = ([0],)
    return function


def counts_in_an_attribute() -> Any:
    def function() -> int:
        function.count = getattr(function, "count", 0) + 1  # type: ignore[attr-defined]
        return function.count  # type: ignore[attr-defined]

    return function


def counts_behind_a_decorator() -> Any:
    inner = counts()

    @functools.wraps(inner)
    def function() -> int:
        return inner()

    return function


class Meter:
    total: ClassVar[int] = 0

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count

    def in_class(self) -> int:
        type(self).total += 1
        return type(self).total


def keeps_a_meter(name: str) -> Callable[[], Any]:
    def make() -> Any:
        Meter.total = 0
        return getattr(Meter(), name)

    return make


def caches() -> Any:
    ran = []

    @functools.lru_cache(maxsize=1)
    def function(x: int) -> int:
        return len(ran) + x

    numbers = IteratesInPython()
    return lambda: function(next(numbers))


class CountsAsModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self) -> int:
        self.count += 1
        return self.count


def counts_by(holder: Holder) -> Any:
    return HoldsAModule(holder)


class HoldsAModule:
    def __init__(self, holder: Holder) -> None:
        self.holder = holder

    def __call__(self) -> int:
        return self.holder.held["a"]()


def counts_in_context(variable: contextvars.ContextVar[Any]) -> Any:
    variable.set(IteratesInPython())
    return lambda: next(variable.get())


def draws_from(holder: Holder) -> Any:
    return lambda: float(holder.held.random())


COUNTERS: dict[str, Callable[[], Any]] = {
    "closure": counts,
    "default": counts_in_a_list,
    "attribute": counts_in_an_attribute,
    "behind a decorator": counts_behind_a_decorator,
    "in a partial": lambda: functools.partial(counts()),
    "callable object": Meter,
    "module in an object": lambda: counts_by(Holder({"a": CountsAsModule()})),
    "in a context variable": lambda: counts_in_context(contextvars.ContextVar("numbers")),
    "bound method": keeps_a_meter("__call__"),
    "class": keeps_a_meter("in_class"),
    "iterator in Python": lambda: IteratesInPython().__next__,
    "thread local": lambda: (
        lambda local: lambda: local.__dict__.setdefault("n", []).append(1) or len(local.n)
    )(threading.local()),
    "generator in an object": lambda: draws_from(Holder(random.Random(3))),
    "generator of NumPy in an object": lambda: draws_from(Holder(np.random.default_rng(3))),
    "list behind append": lambda: (lambda kept: lambda: kept.append(1) or len(kept))([]),
}


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("where", ["attribute", "global", "closure", "container", "object"])
@pytest.mark.parametrize("name", COUNTERS)
def test_functions_that_count(harness: Harness, name: str, where: str, settings: Any) -> None:
    """Hazards 36 and 47: closures, defaults, attributes and bound objects of functions."""

    def make() -> Any:
        global NUMBERS
        function = COUNTERS[name]()
        if where == "attribute":
            return Uses(function, lambda _, held: held())
        if where == "global":
            NUMBERS = function
            return Uses(None, lambda *_: NUMBERS())
        if where == "closure":
            return Uses(None, lambda *_: function())
        if where == "container":
            return Uses({"a": [function]}, lambda _, held: held["a"][0]())
        return Uses(Holder(function), lambda _, held: held.held())

    callback = compare(harness, make, **settings)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()


def test_a_closure_is_named(harness: Harness) -> None:
    callback = compare(harness, lambda: Uses(counts(), lambda _, held: held()))
    assert "module state rebound: closure count of function" in reasons(callback)


SCALE: Any = None


class Changes(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 4:
            SCALE(3.0)


def scales() -> Any:
    global SCALE
    value = 1.0

    def put(new: float) -> None:
        nonlocal value
        value = new

    SCALE = put
    return lambda: value


def scales_by_default() -> Any:
    global SCALE
    kept = [1.0]
    SCALE = lambda new: kept.__setitem__(0, new)
    return lambda kept=kept: kept[0]


def scales_by_attribute() -> Any:
    global SCALE

    def function() -> float:
        return function.scale  # type: ignore[attr-defined]

    function.scale = 1.0  # type: ignore[attr-defined]
    SCALE = lambda new: setattr(function, "scale", new)
    return function


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("make", [scales, scales_by_default, scales_by_attribute])
def test_what_functions_hold_is_guarded(harness: Harness, make: Any, mode: str) -> None:
    """Hazards 8 and 47: changed between two batches, seen before the next replay."""

    class Inside(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.linear, self.function = nn.Linear(8, 8), function

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.function()

    callback = compare(
        harness,
        lambda: Predictor(Inside(make())),
        others=lambda: [Changes()],
        mode=mode,
        verify_replays=0,
    )
    assert callback.stats.captures == 2, callback.summary()


def test_functions_made_in_the_step_are_no_state(harness: Harness) -> None:
    class Makes(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            count = 0

            def function(x: Tensor) -> Tensor:
                nonlocal count
                count += 1
                return x * count

            return function(self.net(batch[0])) + function(batch[0])

    callback = compare(harness, lambda: Makes(Body()))
    assert callback.stats.steps["FULL"] == 7, callback.summary()


# names that a step reaches in other ways than by a global


USERS = types.ModuleType("users_own_names")
USERS.__file__ = __file__
SECOND = USERS.__name__ + "_later"


class Registry:
    count = 0
    kept: ClassVar[list[int]] = []
    by_name: ClassVar[dict[str, Any]] = {}

    @classmethod
    def tick(cls) -> int:
        cls.count += 1
        return cls.count

    @classmethod
    def put(cls) -> int:
        cls.kept.append(1)
        return len(cls.kept)

    @classmethod
    def get(cls) -> Any:
        return cls.by_name.setdefault("a", Meter())


class Derived(Registry):
    pass


class Single:
    one: ClassVar[Any] = None
    count = 0

    def __new__(cls) -> Any:
        if cls.one is None:
            cls.one = super().__new__(cls)
        return cls.one


class SingleByHasattr:
    count = 0

    def __new__(cls) -> Any:
        if not hasattr(cls, "one"):
            cls.one = super().__new__(cls)  # type: ignore[attr-defined]
        return cls.one  # type: ignore[attr-defined]


def count_of(single: Any) -> int:
    single.count += 1
    return single.count


def imports_a_name() -> int:
    from users_own_names import STATE

    STATE["n"] += 1
    return STATE["n"]


def imports_a_module() -> int:
    import users_own_names as own

    own.COUNT += 1
    return own.COUNT


def imports_by_name() -> int:
    own = __import__("users_own_names")
    own.COUNT += 1
    return own.COUNT


def sets_a_module() -> int:
    import users_own_names as own

    if hasattr(own, "LATER"):
        own.LATER += 1
    else:
        own.LATER = 1
    return own.LATER


def imports_first() -> int:
    import users_own_names_later as later

    later.STATE["n"] += 1
    return later.STATE["n"]


def count_in(given: Any) -> int:
    given.COUNT += 1
    return given.COUNT


def sets_a_global() -> int:
    global MADE_BY_THE_STEP
    try:
        MADE_BY_THE_STEP += 1
    except NameError:
        MADE_BY_THE_STEP = 1
    return MADE_BY_THE_STEP


def looks_up(name: str) -> int:
    state = getattr(USERS, name)
    state["n"] += 1
    return state["n"]


def makes_it(start: int = 0) -> Any:
    kept = [start]

    def made() -> int:
        kept[0] += 1
        return kept[0]

    return made


made: Any = None


def twin() -> Any:
    """Return a function; another one of its kind is the global with its name."""
    global made
    made = makes_it()
    return makes_it()


def twin_that_counts() -> Any:
    global function
    function = counts()
    return counts()


def twin_by_default() -> Any:
    def make() -> Any:
        def named_twin(kept: list[int]) -> int:
            kept[0] += 1
            return kept[0]

        named_twin.__defaults__ = ([0],)
        return named_twin

    global named_twin
    named_twin = make()
    return make()


def made_in_the_step_too() -> Any:
    older = makes_it()
    return lambda: makes_it(5)() * older()


def from_a_text() -> Any:
    names: dict[str, Any] = {"__name__": "__main__", "COUNT": 0}
    text = "def count():\n    global COUNT\n    COUNT += 1\n    return COUNT\n"
    exec(compile(text, "<string>", "exec"), names)
    return names["count"]


def by_name(name: str) -> Callable[[], Any]:
    return lambda: lambda: looks_up(name)


REACHES: dict[str, Callable[[], Any]] = {
    "classmethod": lambda: lambda: Registry.tick(),
    "classmethod that appends": lambda: lambda: Registry.put(),
    "classmethod of a base": lambda: lambda: Derived.tick(),
    "kept classmethod": lambda: Registry.tick,
    "singleton by classmethod": lambda: lambda: Registry.get()(),
    "singleton by new": lambda: lambda: count_of(Single()),
    "singleton by hasattr": lambda: lambda: count_of(SingleByHasattr()),
    "import of a name": lambda: imports_a_name,
    "import of a module": lambda: imports_a_module,
    "import by a function": lambda: imports_by_name,
    "first set in the step": lambda: sets_a_module,
    "import that is the first": lambda: imports_first,
    "module as argument": lambda: lambda: count_in([USERS][0]),
    "class as argument": lambda: lambda: count_in([USERS.Inside][0]),  # type: ignore[attr-defined]
    "global set in the step": lambda: sets_a_global,
    "computed name": by_name("STATE"),
    "twin": twin,
    "twin that counts": twin_that_counts,
    "twin by default": twin_by_default,
    "made in the step too": made_in_the_step_too,
    "code of no file": from_a_text,
}


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Callable[[], None]:
    """Return what puts all names back, and what is not imported yet."""
    monkeypatch.setitem(sys.modules, USERS.__name__, USERS)
    (tmp_path / f"{SECOND}.py").write_text("STATE = {'n': 0}\n")
    monkeypatch.syspath_prepend(tmp_path)

    def reset() -> None:
        vars(USERS).update(STATE={"n": 0}, COUNT=0, SCALE=1.0, Inside=type("Inside", (), {}))
        USERS.Inside.COUNT = 0  # type: ignore[attr-defined]
        USERS.Inside.__module__ = USERS.__name__  # type: ignore[attr-defined]
        vars(USERS).pop("LATER", None)
        globals().pop("MADE_BY_THE_STEP", None)
        sys.modules.pop(SECOND, None)
        Registry.count, Registry.kept, Registry.by_name = 0, [], {}
        for cls, name in ((Derived, "count"), (SingleByHasattr, "one")):
            if name in vars(cls):
                delattr(cls, name)
        Single.one = None

    reset()
    return reset


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", REACHES)
def test_names_that_count(harness: Harness, own_names: Any, name: str, settings: Any) -> None:
    """Hazards 6 and 47: through a class or module that is given, imported, or named by a text."""

    def make() -> Any:
        own_names()
        return Uses(REACHES[name](), lambda _, held: held())

    callback = compare(harness, make, **settings)
    # what an import in the step brings is there from the second step on
    is_first = name == "import that is the first"
    assert callback.stats.steps["PIECEWISE"] == 7 - is_first, callback.summary()
    assert "opaque" not in reasons(callback)


def runs(text: str, **names: Any) -> Callable[[], int]:
    names |= {"importlib": importlib, "sys": sys, "USERS": USERS, "__name__": "__main__"}
    exec(f"def read():\n{textwrap.indent(text, '    ')}\n", names)
    return names["read"]


BY_TEXT = {
    "globals": "return globals()['USERS'].COUNT",
    "eval": "return eval('USERS.COUNT')",
    "exec": "exec('USERS.COUNT += 1'); return USERS.COUNT",
    "sys.modules": "return sys.modules['users_own_names'].COUNT",
    "importlib.import_module": "return importlib.import_module('.test_tree', 'tests') and 1",
    "__import__": "return __import__('_'.join(['users', 'own', 'names'])).COUNT",
    "__dict__": "return USERS.__dict__['COUNT']",
    "vars": "return vars(USERS)['COUNT']",
    "setattr": "setattr(USERS, ''.join('COUNT'), USERS.COUNT + 1); return USERS.COUNT",
    "f_globals": "return sys._getframe().f_globals['USERS'].COUNT",
}


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", BY_TEXT)
def test_names_that_nobody_can_follow(
    harness: Harness, own_names: Any, name: str, settings: Any
) -> None:
    """Hazard 37."""

    def make() -> Any:
        own_names()
        return Uses(runs(BY_TEXT[name]), lambda _, held: held())

    changes = lambda: [ChangesInTheMiddle(lambda _: vars(USERS).update(COUNT=7))]
    callback = compare(harness, make, others=changes, **settings)
    assert callback.stats.steps["FULL"] == 0, callback.summary()
    if "mode" not in settings:
        assert f"opaque object used: {name} (<string>:" in reasons(callback)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_a_module_holds_that_the_step_imports_is_guarded(
    harness: Harness, own_names: Any, settings: Any
) -> None:
    """Hazards 6 and 47."""

    def make() -> Any:
        own_names()
        read = runs("return importlib.import_module('_'.join(['users', 'own', 'names'])).COUNT")
        return Uses(read, lambda _, held: held())

    changes = lambda: [ChangesInTheMiddle(lambda _: vars(USERS).update(COUNT=7))]
    callback = compare(harness, make, others=changes, **settings)
    assert "opaque" not in reasons(callback)
    if "mode" not in settings:
        assert callback.stats.steps["FULL"] > 0, callback.summary()


@dataclasses.dataclass
class Pair:
    first: Any
    second: float = 1.0


class Named(NamedTuple):
    first: Any


def test_methods_that_dataclasses_make_hold_nothing(harness: Harness) -> None:
    callback = compare(harness, lambda: Uses(None, lambda *_: Pair(2.0).first * Named(3.0).first))
    assert callback.stats.steps["FULL"] == 7, callback.summary()


class Misses(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function, self.count = nn.Linear(8, 8), function, IteratesInPython()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.function(next(self.count))


class MissesInside(Predictor):
    def __init__(self, function: Any) -> None:
        super().__init__(Misses(function))


def test_a_cache_that_the_first_steps_fill(harness: Harness) -> None:
    """A function with a cache is harmless once it gives what it has."""

    @functools.lru_cache
    def table(size: int) -> float:
        return 1.0 / size

    callback = compare(harness, lambda: Uses(None, lambda *_: table(8)))
    assert callback.stats.steps["PIECEWISE"] + callback.stats.steps["FULL"] == 7
    missing = lambda: functools.lru_cache(lambda x: x)
    for mode in ("FULL_AND_PIECEWISE", "PIECEWISE"):
        callback = compare(harness, lambda: MissesInside(missing()), mode=mode, verify_replays=0)
        assert {entry.target for entry in callback.stats.entries} == {"net.linear"}
    table.cache_clear()
    callback = compare(harness, lambda: Uses(caches(), lambda _, held: held()))
    assert callback.stats.steps["FULL"] == 0, callback.summary()


# the world


class Writes(Predictor):
    def __init__(self, write: Callable[[Any], Any]) -> None:
        super().__init__(Body())
        self.write = write

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.write(batch)
        return self.net(batch[0])


def write_line(path: pathlib.Path) -> None:
    with path.open("a") as file:
        file.write("x")


WORLD: dict[str, Callable[[pathlib.Path], Any]] = {
    "open": write_line,
    "torch.save": lambda path: torch.save([1], path / f"{len(list(path.iterdir()))}"),
    "numpy": lambda path: np.save(path / f"{len(list(path.iterdir()))}", np.ones(1)),
    "mkdir": lambda path: (path / f"{len(list(path.iterdir()))}").mkdir(),
    "process": lambda path: os.system(f"echo x >> {path}"),
    "environment": lambda path: os.environ.update(SEEN=os.environ.get("SEEN", "") + "x"),
}


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", WORLD)
def test_effects_on_the_world(harness: Harness, tmp_path, monkeypatch, name, settings) -> None:
    """Hazard 38: a replay would not have them."""
    monkeypatch.setenv("SEEN", "")
    numbers = itertools.count()
    paths: list[pathlib.Path] = []

    def make() -> Any:
        path = tmp_path / f"run {next(numbers)}"
        if name in ("torch.save", "numpy", "mkdir"):
            path.mkdir()
        os.environ["SEEN"] = ""
        paths.append(path)
        return Writes(functools.partial(lambda path, _: WORLD[name](path), path))

    def look() -> Any:
        path = paths[-1]
        if path.is_dir():
            return len(list(path.iterdir()))
        return path.read_text() if path.exists() else os.environ["SEEN"]

    callback = compare(harness, make, look, **settings)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()
    if "mode" not in settings:
        assert "files, processes or sockets used: o" in reasons(callback)
    assert not audit_events.listeners


MEMORY = (ctypes.c_float * 1)()


class WritesToMemory(Callback):
    def on_predict_batch_start(self, trainer, module, batch, batch_idx, *_: Any) -> None:
        MEMORY[0] = 1.0 + batch_idx


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "read",
    [
        lambda address: ctypes.c_float.from_address(address).value,
        lambda address: struct.unpack("f", ctypes.string_at(address, 4))[0],
        lambda address: (ctypes.c_float * 1).from_address(address)[0],
    ],
)
def test_memory_that_is_read_by_its_address(harness: Harness, read, settings) -> None:
    """Hazard 37: as ``tensor.data_ptr()`` and ``ctypes`` do."""
    address = ctypes.addressof(MEMORY)
    callback = compare(
        harness,
        lambda: Uses(None, lambda *_: read(address)),
        others=lambda: [WritesToMemory()],
        **settings,
    )
    assert callback.stats.steps["FULL"] == 0, callback.summary()
    if "mode" not in settings:
        assert "opaque object used: ctypes." in reasons(callback)


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "write",
    [
        lambda _: sys.stdout.write("x\n"),
        lambda _: sys.stderr.writelines(["x\n"]),
        lambda _: print("x"),
        lambda _: __import__("tqdm").tqdm.write("x"),
        lambda _: os.write(1, b"x\n"),
        lambda _: write_kept(1, b"x\n"),
        lambda _: os.writev(1, [b"x\n"]),
        lambda _: sys.stdout.buffer.write(b"x\n"),
        lambda _: sys.__stderr__.write("x\n"),  # type: ignore[union-attr]
        lambda _: warnings.showwarning("x\n", UserWarning, "x", 1),
    ],
)
def test_writes_to_standard_output(harness: Harness, capfd, write, settings) -> None:
    """Hazard 38."""
    callback = compare(
        harness,
        lambda: Writes(write),
        lambda: [text.count("x\n") for text in capfd.readouterr()],
        **settings,
    )
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()
    if "mode" not in settings:
        assert "logger or print used" in reasons(callback)
    assert "write" not in vars(sys.stdout)


LOGGER = logging.getLogger("user.of.closed.world")
RECORD = logging.makeLogRecord({"name": LOGGER.name, "levelno": logging.INFO, "msg": "x"})
AUDITED: list[str] = []


@functools.cache
def hear_own_events() -> None:
    """Hooks cannot be removed, so there is one."""
    sys.addaudithook(lambda event, _: event == "users.own.event" and AUDITED.append(event))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "write",
    [
        lambda _: LOGGER.info("x", stacklevel=7),
        lambda _: LOGGER.handlers[0].emit(RECORD),
        lambda _: LOGGER.handlers[0].handle(RECORD),
        lambda _: LOGGER.callHandlers(RECORD),
        lambda _: sys.audit("users.own.event"),
    ],
)
def test_records_that_name_no_line_of_the_step(harness: Harness, write, settings) -> None:
    """Hazard 38."""
    hear_own_events()
    streams: list[io.StringIO] = []

    def make() -> Any:
        AUDITED.clear()
        streams.append(io.StringIO())
        LOGGER.setLevel(logging.INFO)
        LOGGER.handlers[:] = [logging.StreamHandler(streams[-1])]
        return Writes(write)

    look = lambda: (streams[-1].getvalue(), len(AUDITED))
    callback = compare(harness, make, look, **settings)
    LOGGER.handlers.clear()
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()
    if "mode" not in settings:
        assert "logger or print used" in reasons(callback)


# the batch


@dataclasses.dataclass
class Sample:
    x: Tensor
    label: Any = None


class Dictionaries(torch.utils.data.Dataset):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.make(torch.full((4, 8), float(index)))


class LastBatches(Callback):
    """What a later callback sees of each batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        inner = batch if isinstance(batch, dict) else vars(batch)
        mark = getattr(inner["x"], "mark", None)
        self.seen.append(
            (list(inner), [inner.get("y"), inner.get("label")], outputs is batch, mark)
        )


def adds(batch: Any, y: Tensor) -> None:
    batch["y"] = y


def adds_deep(batch: Any, y: Tensor) -> None:
    batch["more"].append(y)


def pops(batch: Any, y: Tensor) -> None:
    batch.pop("label")


def replaces(batch: Any, y: Tensor) -> None:
    batch["label"] = y


def sets_a_field(batch: Any, y: Tensor) -> None:
    batch.label = y


def returns_it(batch: Any, y: Tensor) -> Any:
    return batch


def returns_it_inside(batch: Any, y: Tensor) -> Any:
    return {"batch": batch, "y": y}


def dictionary(x: Tensor) -> Any:
    return {"x": x, "label": x.sum(), "more": [x + 1]}


def marks(batch: Any, y: Tensor) -> None:
    batch["x"].mark = getattr(batch["x"], "mark", 0) + 1


BATCHES: list[tuple[Any, Any]] = [
    *[
        (dictionary, do)
        for do in (adds, adds_deep, marks, pops, replaces, returns_it, returns_it_inside)
    ],
    (Sample, sets_a_field),
    (Sample, returns_it),
]


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", [*SETTINGS, {"verify_every": 1}], ids=str)
@pytest.mark.parametrize(("make", "do"), BATCHES)
@pytest.mark.parametrize("inside", [False, True])
def test_what_happens_to_the_batch(harness: Harness, make, do, settings, inside) -> None:
    """Hazard 35: everybody who sees the batch afterwards sees what eager leaves."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, batch: Any) -> Any:
            x = batch["x"] if isinstance(batch, dict) else batch.x
            y = self.linear(x)
            returned = do(batch, y)
            return y if returned is None else returned

    class Step(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if inside:
                return self.net(batch)
            return Inner.forward(self.net, batch)

    last: list[LastBatches] = []

    def others() -> list[Callback]:
        last.append(LastBatches())
        return [last[-1]]

    callback = compare(
        harness,
        lambda: Step(Inner()),
        lambda: last[-1].seen,
        lambda: DataLoader(Dictionaries(make), batch_size=None),
        others,
        **settings,
    )
    is_one = do in (adds, pops, replaces, returns_it, returns_it_inside) and "mode" not in settings
    assert callback.stats.steps["FULL" if is_one else "PIECEWISE"] == 7, callback.summary()
    if "mode" not in settings and not is_one:
        cause = "opaque object used: mark" if do is marks else "input mutated in place"
        assert cause in reasons(callback)


def test_containers_that_the_step_makes_itself(harness: Harness) -> None:
    class Copies(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            batch = {"x": batch["x"]}
            batch["y"] = self.net(batch["x"])
            return batch

    callback = compare(
        harness,
        lambda: Copies(Body()),
        loader=lambda: DataLoader(Dictionaries(dictionary), batch_size=None),
    )
    assert callback.stats.steps["FULL"] == 7, callback.summary()


class Data:
    """A batch of its own kind, as those of graph networks."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device, non_blocking: bool = False) -> Data:
        return Data(self.x.to(device, non_blocking=non_blocking))


class Marked(Tensor):
    """A subclass of tensors."""


class ReadsData(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch.x if isinstance(batch, Data) else batch["x"]
        return self.net(x.as_subclass(Tensor))


def views(x: Tensor) -> Any:
    return {"x": x[:, :8], "same": x}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [Data, lambda x: {"x": x.as_subclass(Marked)}, views])
def test_batches_without_a_key_run_in_pieces(harness: Harness, make, settings) -> None:
    callback = compare(
        harness,
        lambda: ReadsData(Body()),
        loader=lambda: DataLoader(Dictionaries(make), batch_size=None),
        **settings,
    )
    # tensors that were moved to a GPU share no memory
    is_one = harness.backend == "cuda" and make is views and settings != {"mode": "PIECEWISE"}
    assert callback.stats.steps["FULL" if is_one else "PIECEWISE"] == 7, callback.summary()
    assert callback.stats.captures == 1


# what code asks about itself


class Asks(nn.Module):
    """Computes something else while it is captured, as attention of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        answers = (
            torch.cuda.is_current_stream_capturing(),
            torch.cuda.graphs.is_current_stream_capturing(),
            imported_before(),
        )
        return self.linear(x) + any(answers)


imported_before = torch.cuda.is_current_stream_capturing


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_code_that_asks_whether_it_is_captured(
    harness: Harness, monkeypatch, settings: Any
) -> None:
    """Hazard 40: it hears in a capture what it hears in eager."""
    if harness.backend == "recorder":  # no stream captures: the truth is that of the recorder
        from cg_lightning.backends import recorder

        truth = lambda: getattr(recorder._recording, "recorder", None) is not None
        monkeypatch.setattr(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", truth)
    callback = compare(harness, lambda: Predictor(Asks()), **settings)
    assert callback.stats.replays == 7, callback.summary()


@pytest.mark.parametrize("has_private_name", [True, False])
def test_pytorch_hears_the_truth(monkeypatch, has_private_name: bool) -> None:
    from cg_lightning.backends import capture_scope

    if has_private_name:
        monkeypatch.setattr(torch.cuda.graphs, capture_scope._ASKED, lambda: True)
    else:
        monkeypatch.delattr(torch.cuda.graphs, capture_scope._ASKED)
        truth = lambda: True
        for module in (torch.cuda, capture_scope):
            monkeypatch.setattr(module, "is_current_stream_capturing", truth)
    before = torch.cuda.is_current_stream_capturing
    with capture_scope.capture_looks_eager():
        ask = torch.cuda.is_current_stream_capturing
        heard = {
            name: eval("ask()", {"ask": ask, "__name__": name})
            for name in (
                "torch.nn.modules._functions",
                "triton.runtime",
                "transformers.utils",
                "mine",
            )
        }
    assert heard == {
        "torch.nn.modules._functions": True,
        "triton.runtime": True,
        "transformers.utils": False,
        "mine": False,
    }
    assert torch.cuda.is_current_stream_capturing is before
    assert before()


# without verification


class Caches(nn.Module):
    """Keeps a table until the mode changes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.kind = kind
        self.cache: Any = None
        self.tables: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Caches:
        self.cache = None
        getattr(self, "tables", {}).clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attribute":
            if self.cache is None:
                self.cache = self.linear.weight.sum(0) * 2
            return self.linear(x) + self.cache
        if "a" not in self.tables:
            self.tables["a"] = self.linear.weight.sum(0) * 2
        return self.linear(x) + self.tables["a"]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["attribute", "container"])
def test_caches_that_train_and_eval_clear(harness: Harness, kind: str, settings: Any) -> None:
    """Hazard 46: no attribute is left with graph memory."""
    callback = harness.callback(warmup_steps=2, **settings)

    def job(trainer: Any, module: Any) -> Any:
        kept = []
        for _ in range(3):
            kept.append(trainer.predict(module, features(32)))
            module.train()
            module.eval()
            kept.append((module.net.cache, dict(module.net.tables)))
            kept.append(trainer.predict(module, features(32)))
            kept.append([module.net.cache, *module.net.tables.values()])
            kept.append([each.clone() for each in kept[-1] if each is not None])
        return kept

    harness.compare(Predictor(Caches(kind)), job, callback)


class KeepsWhereNobodyLooks(nn.Module):
    """A cache whose state at the start of a step is no guard: the capture fills it.

    Calls are counted in the digits that NumPy prints: no guard sees them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        calls = np.get_printoptions()["precision"] + 1
        np.set_printoptions(precision=calls)
        if calls > 3:
            self.kept = y + 1
        return y


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("verify_replays", [0, 2])
def test_what_a_capture_leaves_in_attributes(
    harness: Harness, mode: str, verify_replays: int
) -> None:
    """Hazard 46: the graph is refused, and the attribute is eager's."""
    module: list[Any] = []

    def make() -> Any:
        np.set_printoptions(precision=0)
        module[:] = [Predictor(KeepsWhereNobodyLooks())]
        return module[0]

    callback = harness.callback(warmup_steps=3, mode=mode, verify_replays=verify_replays)
    with np.printoptions():  # puts them back
        seen = [(run(harness, make, each), module[0].net.kept.clone()) for each in (callback, None)]
    assert_same(*seen)
    if not verify_replays:
        assert "module state rebound: self" in reasons(callback), callback.summary()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "ask",
    [
        lambda: random.Random().random(),
        lambda: random.Random(None).random(),
        lambda: float(torch.initial_seed() % 7),
    ],
    ids=["Random()", "Random(None)", "initial_seed"],
)
def test_randomness_that_nobody_can_repeat(harness: Harness, ask, settings) -> None:
    """Hazard 37: a graph would freeze it."""
    module = lambda: Uses(None, lambda *_: ask())
    callback = harness.callback(warmup_steps=1, **settings)
    run(harness, module, callback)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()
    if "mode" not in settings:
        assert "opaque object used" in reasons(callback)


SEEDS: dict[str, Callable[[], Any]] = {
    "manual_seed": lambda: torch.manual_seed(5),
    "set_rng_state": lambda: torch.set_rng_state(torch.get_rng_state()),
    "fork_rng": lambda: torch.random.fork_rng(devices=[]).__enter__(),
    "seed_everything": lambda: __import__("lightning").seed_everything(5, verbose=False),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", SEEDS)
def test_seeds_in_a_step(harness: Harness, name: str, settings: Any) -> None:
    """Hazard 9: a replay draws on from where the generator is."""

    class Seeds(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            SEEDS[name]()
            return self.net(batch[0]) * torch.rand(8, device=self.device)

    callback = compare(harness, lambda: Seeds(Body()), **settings)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()
    if "mode" not in settings:
        assert "randomness drawn on the host" in reasons(callback)


def state_of_device(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()


def all_states(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cat(torch.cuda.get_rng_state_all())
    return torch.random.get_rng_state()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("read", [state_of_device, all_states])
def test_the_random_state_is_read_in_a_step(harness: Harness, read: Any, settings: Any) -> None:
    """Hazard 9: a graph would return the state of its capture."""

    class Reads(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            output = self.net(batch[0] + torch.rand_like(batch[0]))
            return output, read(self.device)

    callback = compare(harness, lambda: Reads(Body()), **settings)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()
    if "mode" not in settings:
        assert "randomness drawn on the host" in reasons(callback)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_unaligned_slices_as_arguments(harness: Harness, settings: Any) -> None:
    """Hazard 14: kernels take other loads at other addresses, so the last bit may differ."""
    addresses: list[int] = []

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 8)

        def forward(self, x: Tensor) -> Tensor:
            addresses.append(x.data_ptr() % 16)
            return self.linear(x)

    class Slices(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0][:, 1:]) + self.net(batch[0][:, :7])

    addresses.clear()
    callback = compare(harness, lambda: Slices(Notes()), **settings)
    assert set(addresses) == {0, 4}
    assert addresses.count(0) == addresses.count(4)  # in captures as well
    assert callback.stats.replays >= 7


# exceptions


class Sixth(Predictor):
    def __init__(self) -> None:
        super().__init__(Body())
        self.count = counts()

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if self.count() == 6:
            raise KeyError("sixth")
        return self.net(batch[0])


class PopsTwice(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        batch.pop("label")
        return self.net(batch["x"])


@pytest.mark.parametrize("settings", [*SETTINGS, {"verify_every": 1}], ids=str)
def test_exceptions_that_depend_on_how_often_a_step_ran(harness: Harness, settings: Any) -> None:
    """Hazard 29: raised at the same batch, as the user raised it, and never as our failure."""
    numbers = []
    for callback in (harness.callback(warmup_steps=1, **settings), None):
        extra = [] if callback is None else [callback]
        kept = KeepOutputs()
        with pytest.raises(KeyError, match="sixth") as caught:
            harness.trainer(*extra, kept).predict(Sixth(), features(32))
        numbers.append(len(kept.kept))
        assert caught.value.__cause__ is None
        if callback is not None:
            assert "capture failed" not in callback.summary()
    assert numbers == [5, 5]
    callback = compare(
        harness,
        lambda: PopsTwice(Body()),
        loader=lambda: DataLoader(Dictionaries(dictionary), batch_size=None),
        **settings,
    )
    assert "capture failed" not in callback.summary()


# what another callback changes between two batches


class ChangesInTheMiddle(Callback):
    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 4:
            self.change(pl_module)


class ReadsItsClass(Predictor):
    cfg: ClassVar[dict[str, float]] = {"scale": 1.0}

    def __init__(self) -> None:
        super().__init__(Body())
        type(self).cfg["scale"] = 1.0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * type(self).cfg["scale"]


class ReadsItsClassByName(ReadsItsClass):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * getattr(self.__class__, "cfg")["scale"]  # noqa: B009


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale, self.table = nn.Linear(4, 4), 1.0, {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * self.table["scale"]


def holds_in_a_list() -> Any:
    return Uses([Scales()], lambda self, held: held[0](torch.ones(8, device=self.device)))


def scales_of_a_list(module: Any) -> None:
    module.held[0].scale = 3.0


def table_of_a_list(module: Any) -> None:
    module.held[0].table["scale"] = 3.0


def holds_on_a_layer() -> Any:
    layer = nn.ReLU()
    layer.options = Holder({"scale": 1.0})
    return Uses(layer, lambda self, held: held.options.held["scale"])


def scale_on_a_layer(module: Any) -> None:
    module.held.options.held["scale"] = 3.0


def scale_of_the_class(module: Any) -> None:
    type(module).cfg["scale"] = 3.0


def scales_by_plain_defaults(scale: float = 1.0, *, other: float = 1.0) -> float:
    return scale * other


def other_defaults(_: Any) -> None:
    scales_by_plain_defaults.__defaults__ = (3.0,)


def other_keyword_default(_: Any) -> None:
    scales_by_plain_defaults.__kwdefaults__["other"] = 3.0


def uses_defaults() -> Any:
    scales_by_plain_defaults.__defaults__ = (1.0,)
    scales_by_plain_defaults.__kwdefaults__ = {"other": 1.0}
    return Uses(None, lambda *_: scales_by_plain_defaults())


class Settings:
    scale = 1.0

    @classmethod
    def get(cls) -> float:
        return cls.scale


class OwnSettings(Settings):
    pass


def uses_settings(read: Callable[[], float]) -> Callable[[], Any]:
    def make() -> Any:
        Settings.scale, models.SCALE = 1.0, 1.0  # type: ignore[attr-defined]
        if "scale" in vars(OwnSettings):
            del OwnSettings.scale
        return Uses(None, lambda *_: read())

    return make


def scale_of_settings(_: Any) -> None:
    Settings.scale = 3.0


def scale_of_own_settings(_: Any) -> None:
    OwnSettings.scale = 3.0


def scale_of_models(_: Any) -> None:
    models.SCALE = 3.0  # type: ignore[attr-defined]


def imports_scale() -> float:
    from tests.models import SCALE

    return SCALE


def looks_scale_up() -> float:
    return getattr(models, "".join(["SC", "ALE"]))


def class_of_an_object(module: Any) -> None:
    module.held.__class__ = Doubles


class Doubles(Holder):
    factor = 2.0


class Triples(Holder):
    factor = 3.0


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
@pytest.mark.parametrize(
    ("make", "change"),
    [
        (ReadsItsClass, scale_of_the_class),
        (ReadsItsClassByName, scale_of_the_class),
        (holds_in_a_list, scales_of_a_list),
        (holds_in_a_list, table_of_a_list),
        (holds_on_a_layer, scale_on_a_layer),
        (lambda: Uses(Triples(1), lambda self, held: held.factor), class_of_an_object),
        (uses_defaults, other_defaults),
        (uses_defaults, other_keyword_default),
        (uses_settings(Settings.get), scale_of_settings),
        (uses_settings(OwnSettings.get), scale_of_own_settings),
        (uses_settings(lambda: OwnSettings.scale), scale_of_own_settings),
        (uses_settings(imports_scale), scale_of_models),
        (uses_settings(looks_scale_up), scale_of_models),
    ],
    ids=[
        *("class", "class by name", "module in a list", "its table", "layer", "class of an object"),
        *("default", "keyword default", "classmethod", "classmethod of a base", "base"),
        *("import in the step", "computed name"),
    ],
)
def test_what_changes_in_the_middle(harness: Harness, make: Any, change: Any, mode: str) -> None:
    """Hazard 7: read through a class, of a module that is no submodule, of a module of torch."""
    callback = compare(
        harness, make, others=lambda: [ChangesInTheMiddle(change)], mode=mode, verify_replays=0
    )
    assert callback.stats.replays >= 4, callback.summary()
