"""Small steps: the ways that Python code can hold, change or emit something. test_hunt.py runs them.

A row is a name and a function that makes a new LightningModule with everything that it holds. What a
step writes to files goes to the working directory, which is empty at the start of each run.

Most rows are two: the thing is done ``in the step``, and ``in a part``, a submodule that the step calls.
"""

from __future__ import annotations

import array
import bisect
import collections
import contextvars
import csv
import ctypes
import dataclasses
import decimal
import enum
import fractions
import functools
import heapq
import io
import itertools
import json
import logging
import mmap
import os
import pathlib
import pickle
import queue
import random
import socket
import sqlite3
import subprocess
import sys
import threading
import types
import typing
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchmetrics
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from tests import hunt_public

BATCHES = 8
logger = logging.getLogger("user")


# ------------------------------------------------------------------------------------------ rows


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    side: str
    make: Callable[[], LightningModule]
    loader: Callable[[], DataLoader]
    stage: str = "validate"


class Runs(LightningModule):
    """Calls ``self.run`` on each batch, and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def run(self, batch: Any) -> Any:
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.run(batch)
        self.log("n", torch.ones((), device=self.device), reduce_fx="sum", batch_size=1)
        if isinstance(y, Tensor):
            self.log("m", y.mean(), batch_size=1)
        return y

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.run(batch)


class InStep(Runs):
    """The step does the thing."""

    def run(self, batch: Any) -> Any:
        return self.work(self.linear(batch["x"]))


class InPart(nn.Module):
    """A submodule does it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.work(self.linear(x))


class Whole(Runs):
    """The step that calls the submodule."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def run(self, batch: Any) -> Any:
        return self.part(batch["x"])


class BatchInStep(Runs):
    """As InStep; the thing is done to the batch."""

    def run(self, batch: Any) -> Any:
        return self.work(batch)


class BatchInPart(InPart):
    def forward(self, batch: Any) -> Any:
        return self.work(batch)


class WholeOfBatch(Whole):
    def run(self, batch: Any) -> Any:
        return self.part(batch)


BOTH_SIDES = ("in the step", "in a part")
IN_TURN = ("in a part", "in the step")
OWNERS = {
    "in the step": (InStep, lambda held: held),
    "in a part": (InPart, Whole),
}
OWNERS_OF_BATCH = {
    "in the step": (BatchInStep, lambda held: held),
    "in a part": (BatchInPart, WholeOfBatch),
}


def items() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {"x": torch.randn(4, generator=generator), "label": torch.tensor(index)}
        for index in range(BATCHES)
    ]


def dicts() -> DataLoader:
    return DataLoader(items(), batch_size=1)


def name_of(function: Callable[..., Any]) -> str:
    return function.__name__.strip("_").replace("_", " ")


def of_functions(
    kind: str,
    works: list[Any],
    owners: dict[str, Any] = OWNERS,
    loader: Callable[[], DataLoader] = dicts,
    sides: Sequence[str] = BOTH_SIDES,
    stages: Sequence[str] = ("validate", "predict"),
) -> list[Row]:
    """Rows of functions ``work(self, x)``. ``(start, work)``: what ``start(self)`` sets up before.

    ``sides``: where it is done; of IN_TURN one each. ``stages``: in turn.
    """
    rows = []
    pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in works]
    times = collections.Counter(work for _, work in pairs)
    for index, (start, work) in enumerate(pairs):
        name = name_of(work) if times[work] == 1 else f"{name_of(work)} ({name_of(start)})"
        for side in (sides[index % 2],) if sides is IN_TURN else sides:
            owner, wrap = owners[side]

            def make(owner: Any = owner, wrap: Any = wrap, start: Any = start, work: Any = work):
                class Does(owner):
                    def __init__(self) -> None:
                        super().__init__()
                        if start is not None:
                            start(self)

                Does.work = work
                return wrap(Does())

            stage = stages[len(rows) // 2 % len(stages)]
            rows.append(Row(f"{kind}: {name}, {side}", side, make, loader, stage))
    return rows


# ------------------------------------------------------------------ what is held, what is done with it


@dataclasses.dataclass(frozen=True)
class Use:
    """``use(held, x)`` gives the step's output; ``change(held, x)`` gives what is held from then on."""

    name: str
    make: Callable[[], Any]
    use: Callable[[Any, Tensor], Any]
    change: Callable[[Any, Tensor], Any] | None = None


@dataclasses.dataclass
class Fields:
    count: int = 0
    values: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    count: int = 1


class Point(typing.NamedTuple):
    count: int = 1


class Slotted:
    __slots__ = ("count", "values")

    def __init__(self) -> None:
        self.count, self.values = 0, []


class Meter:
    """An AverageMeter."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: Any) -> None:
        self.sum = self.sum + value
        self.count += 1


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Calls:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


class CountsReads:
    """Changes where it is only read."""

    def __init__(self) -> None:
        self.__dict__["reads"] = 0

    @property
    def scale(self) -> float:
        self.__dict__["reads"] += 1
        return 1.0 + self.__dict__["reads"]

    def __getitem__(self, index: int) -> float:
        self.__dict__["reads"] += 1
        return float(self.__dict__["reads"])

    def __len__(self) -> int:
        self.__dict__["reads"] += 1
        return self.__dict__["reads"]


class OwnList(list):
    def append(self, value: Any) -> None:
        super().append(value)
        self.last = value


class OwnDict(collections.UserDict):
    pass


class CountingModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        return x * self.calls


def does(action: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """A use that does something and returns x."""

    def use(held: Any, x: Tensor) -> Tensor:
        action(held, x)
        return x

    return use


def times(held: Any, x: Tensor) -> Tensor:
    return x * held


def times_first(held: Any, x: Tensor) -> Tensor:
    return x * held[0]


def times_length(held: Any, x: Tensor) -> Tensor:
    return x * len(held)


def times_next(held: Any, x: Tensor) -> Tensor:
    return x * next(held)


def times_count(held: Any, x: Tensor) -> Tensor:
    held.count += 1
    return x * held.count


def unless_none(held: Any, x: Tensor) -> Tensor:
    return x if held is None else x * 2


def if_true(held: Any, x: Tensor) -> Tensor:
    return x if held else -x


def add_first(held: Any, x: Tensor) -> Tensor:
    held[0] += 1
    return x * int(held[0])


def add_at_key(held: Any, x: Tensor) -> Tensor:
    held["k"] = held.get("k", 0) + 1
    return x * held["k"]


def append_and_count(held: Any, x: Tensor) -> Tensor:
    held.append(1)
    return x * len(held)


def keep_outputs(held: Any, x: Tensor) -> Tensor:
    held.append(x)
    return x * 2


def put_and_get(held: Any, x: Tensor) -> Tensor:
    value = held.get()
    held.put(value + 1)
    return x * value


def rotate_and_read(held: Any, x: Tensor) -> Tensor:
    held.rotate(1)
    return x * held[0]


def numbers() -> Any:
    """A generator."""
    value = 1.0
    while True:
        yield value
        value += 0.5


def cached_square() -> Any:
    @functools.lru_cache
    def square(value: int) -> int:
        return value * value

    return square


def memory_file() -> Any:
    file = io.StringIO()
    file.write("start")
    return file


def database() -> Any:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.execute("create table steps (value integer)")
    return connection


def filled_queue() -> Any:
    filled: Any = queue.SimpleQueue()
    filled.put(1)
    return filled


def set_divided(held: Any, x: Tensor) -> Tensor:
    """Sets the flags Inexact and Rounded."""
    return x * float(held.divide(decimal.Decimal(1), decimal.Decimal(3)))


def more_precise(held: Any, x: Tensor) -> Tensor:
    held.prec += 1
    return x * held.prec


def doubled_once_set(held: Any, x: Tensor) -> Tensor:
    y = x * 2 if held.is_set() else x
    held.set()
    return y


def merge(held: Any, x: Tensor) -> Any:
    return {**held, len(held): 1.0}


REBOUND = [
    Use("int, rebind", lambda: 1, times, lambda held, x: held + 1),
    Use("float, rebind", lambda: 1.0, times, lambda held, x: held * 0.5),
    Use("bool, rebind", lambda: True, if_true, lambda held, x: not held),
    Use("str, rebind", lambda: "a", times_length, lambda held, x: held + "a"),
    Use("bytes, rebind", lambda: b"a", times_length, lambda held, x: held + b"a"),
    Use("None, rebind once", lambda: None, unless_none, lambda held, x: "seen"),
    Use("tuple, rebind", lambda: (1,), times_first, lambda held, x: (held[0] + 1,)),
    Use("frozenset, rebind", lambda: frozenset({0}), times_length, lambda held, x: held | {len(held)}),
    Use("Fraction, rebind", lambda: fractions.Fraction(1), lambda held, x: x * float(held),
        lambda held, x: held / 2),
    Use("enum member, rebind", lambda: Colour.RED, lambda held, x: x * held.value,
        lambda held, x: Colour.BLUE if held is Colour.RED else Colour.RED),
    Use("named tuple, rebind", Point, lambda held, x: x * held.count,
        lambda held, x: held._replace(count=held.count + 1)),
    Use("frozen dataclass, rebind", Frozen, lambda held, x: x * held.count,
        lambda held, x: dataclasses.replace(held, count=held.count + 1)),
    Use("numpy number, rebind", lambda: np.float32(1.0), lambda held, x: x * float(held),
        lambda held, x: held + np.float32(1.0)),
    Use("list, rebind", lambda: [1], times_length, lambda held, x: [*held, 1]),
    Use("dict, rebind", dict, times_length, merge),
    Use("numpy array, rebind", lambda: np.ones(2), lambda held, x: x * float(held[0]),
        lambda held, x: held + 1),
    Use("tensor, rebind to a sum", lambda: torch.zeros(()), lambda held, x: x + held,
        lambda held, x: held + x.mean()),
    Use("tensor, rebind to an average", lambda: torch.zeros(()), lambda held, x: x + held,
        lambda held, x: held * 0.9 + x.mean() * 0.1),
    Use("tensor, rebind to the input", lambda: torch.zeros(1, 4), lambda held, x: x + held,
        lambda held, x: x),
    Use("tensor, rebind to a view", lambda: torch.zeros(1, 2), lambda held, x: x * 2,
        lambda held, x: x[:, :2]),
    Use("list of tensors, rebind", list, lambda held, x: x * len(held),
        lambda held, x: [*held, x]),
    Use("dict of tensors, rebind", lambda: {"ema": torch.zeros(())}, lambda held, x: x + held["ema"],
        lambda held, x: {"ema": held["ema"] * 0.5 + x.mean()}),
]  # fmt: skip

CHANGED = [
    Use("list, append", lambda: [0], append_and_count),
    Use("list, append only", list, does(lambda held, x: held.append(5))),
    Use("list, item assignment", lambda: [1.0], add_first),
    Use("list, pop", lambda: list(range(1, 30)), lambda held, x: x * held.pop()),
    Use("list, clear and extend", lambda: [1], lambda held, x: (held.extend([2]), x * len(held))[1]),
    Use("list, delete an item", lambda: list(range(1, 30)), does(lambda held, x: held.__delitem__(0))),
    Use("list, insert", list, does(lambda held, x: held.insert(0, len(held)))),
    Use("list, reverse", lambda: [1.0, 2.0], lambda held, x: (held.reverse(), x * held[0])[1]),
    Use("list, heap", lambda: list(range(1, 30)), lambda held, x: x * heapq.heappop(held)),
    Use("list, bisect", list, does(lambda held, x: bisect.insort(held, -len(held)))),
    Use("list of tensors, append", list, keep_outputs),
    Use("list of tensors, append a detached copy", list,
        does(lambda held, x: held.append(x.detach().clone()))),
    Use("list of tensors, pop the oldest", lambda: [torch.zeros(())] * 2,
        lambda held, x: (held.append(x.mean()), x + held.pop(0))[1]),
    Use("list of tensors, item in place", lambda: [torch.zeros(())],
        lambda held, x: x + held[0].add_(1)),
    Use("list of tensors, item assignment", lambda: [torch.zeros(())],
        does(lambda held, x: held.__setitem__(0, x.mean()))),
    Use("list of dicts, append", list, does(lambda held, x: held.append({"y": x, "n": 1}))),
    Use("list in a tuple, append", lambda: ([0], 1), lambda held, x: append_and_count(held[0], x)),
    Use("list in a list in a dict, append", lambda: {"a": [[0]]},
        lambda held, x: append_and_count(held["a"][0], x)),
    Use("own list, append", OwnList, append_and_count),
    Use("UserList, append", lambda: collections.UserList([0]), append_and_count),
    Use("dict, item assignment", dict, add_at_key),
    Use("dict, new key in each step", dict,
        lambda held, x: (held.__setitem__(len(held), 1.0), x * len(held))[1]),
    Use("dict, setdefault", dict, lambda held, x: (held.setdefault("k", []).append(1),
                                                   x * len(held["k"]))[1]),
    Use("dict, pop", lambda: {index: float(index) for index in range(1, 30)},
        lambda held, x: x * held.popitem()[1]),
    Use("dict, update", dict, does(lambda held, x: held.update({len(held): 1}))),
    Use("dict, a key once", dict, lambda held, x: x * held.setdefault("once", 2.0)),
    Use("dict of tensors, item assignment", lambda: {"ema": torch.zeros(())},
        does(lambda held, x: held.update(ema=held["ema"] * 0.5 + x.mean()))),
    Use("dict of tensors, item in place", lambda: {"sum": torch.zeros(())},
        lambda held, x: x + held["sum"].add_(x.mean())),
    Use("nested dict of tensors, in place", lambda: {"a": {"b": [torch.zeros(())]}},
        lambda held, x: x + held["a"]["b"][0].mul_(0.5).add_(x.mean())),
    Use("UserDict, item assignment", OwnDict, add_at_key),
    Use("ChainMap, item assignment", lambda: collections.ChainMap({}, {"k": 3}), add_at_key),
    Use("defaultdict of lists, append", lambda: collections.defaultdict(list),
        lambda held, x: (held["k"].append(1), x * len(held["k"]))[1]),
    Use("defaultdict of numbers, add", lambda: collections.defaultdict(int), add_at_key),
    Use("defaultdict of meters, update", lambda: collections.defaultdict(Meter),
        does(lambda held, x: held["loss"].update(1.0))),
    Use("Counter, update", collections.Counter,
        lambda held, x: (held.update("a"), x * held["a"])[1]),
    Use("OrderedDict, move to the end", lambda: collections.OrderedDict(a=1.0, b=2.0, c=3.0),
        lambda held, x: (held.move_to_end(next(iter(held))), x * next(iter(held.values())))[1]),
    Use("deque, append", lambda: collections.deque(maxlen=3), append_and_count),
    Use("deque, append only", lambda: collections.deque(maxlen=3),
        does(lambda held, x: held.append(1))),
    Use("deque, rotate", lambda: collections.deque([1.0, 2.0, 3.0]), rotate_and_read),
    Use("deque of tensors, append", lambda: collections.deque(maxlen=4), keep_outputs),
    Use("set, add", set, lambda held, x: (held.add(len(held)), x * len(held))[1]),
    Use("set in a dict, add", lambda: {"s": set()}, does(lambda held, x: held["s"].add(len(held["s"])))),
    Use("set, pop", lambda: set(range(1, 30)), lambda held, x: x * held.pop()),
    Use("bytearray, item assignment", lambda: bytearray(b"\1\2"), add_first),
    Use("bytearray, extend", bytearray, does(lambda held, x: held.extend(b"a"))),
    Use("array, item assignment", lambda: array.array("d", [1.0]), add_first),
    Use("array, append", lambda: array.array("i"), append_and_count),
    Use("memoryview, item assignment", lambda: memoryview(bytearray(b"\1\2")), add_first),
    Use("numpy array, in place", lambda: np.ones(3), add_first),
    Use("numpy array, in place, not read", lambda: np.zeros(3), does(lambda held, x: np.add(held, 1, out=held))),
    Use("numpy array in a dict, in place", lambda: {"a": np.ones(3)},
        lambda held, x: add_first(held["a"], x)),
    Use("ctypes number, assign", lambda: ctypes.c_int(1),
        lambda held, x: (setattr(held, "value", held.value + 1), x * held.value)[1]),
    Use("tensor, in place", lambda: torch.zeros(()), lambda held, x: x + held.add_(1)),
    Use("tensor, in place from the input", lambda: torch.zeros(()), lambda held, x: x + held.add_(x.mean())),
    Use("tensor, item assignment", lambda: torch.zeros(4),
        does(lambda held, x: held.__setitem__(0, x.mean()))),
    Use("tensor, copy of the input", lambda: torch.zeros(1, 4), does(lambda held, x: held.copy_(x))),
    Use("tensor, an attribute on it", lambda: torch.zeros(()),
        does(lambda held, x: setattr(held, "count", getattr(held, "count", 0) + 1))),
    Use("SimpleNamespace, field", lambda: types.SimpleNamespace(count=0), times_count),
    Use("SimpleNamespace, list in it", lambda: types.SimpleNamespace(values=[0]),
        lambda held, x: append_and_count(held.values, x)),
    Use("dataclass, field", Fields, times_count),
    Use("dataclass, list in it", Fields, lambda held, x: append_and_count(held.values, x)),
    Use("slotted object, field", Slotted, times_count),
    Use("slotted object, list in it", Slotted, lambda held, x: append_and_count(held.values, x)),
    Use("objects in objects, field", lambda: types.SimpleNamespace(a=types.SimpleNamespace(b=Fields())),
        lambda held, x: times_count(held.a.b, x)),
    Use("meter, update with a number", Meter, does(lambda held, x: held.update(2.0))),
    Use("meter, update with a tensor", Meter, does(lambda held, x: held.update(x.mean()))),
    Use("meter, average read", Meter, lambda held, x: (held.update(2.0), x * held.count)[1]),
    Use("object that is called", Calls, lambda held, x: held(x)),
    Use("object that counts reads, property", CountsReads, lambda held, x: x * held.scale),
    Use("object that counts reads, item", CountsReads, times_first),
    Use("object that counts reads, length", CountsReads, times_length),
    Use("weak dictionary", weakref.WeakKeyDictionary,
        does(lambda held, x: held.setdefault(Fields, []).append(1))),
    Use("torchmetrics in a dict, update", lambda: {"mean": torchmetrics.MeanMetric()},
        does(lambda held, x: held["mean"].update(x.mean().cpu()))),
    Use("torchmetrics in a list, called", lambda: [torchmetrics.MeanMetric()],
        lambda held, x: x + held[0](x.mean().cpu())),
    Use("module in a list, called", lambda: [CountingModule()], lambda held, x: held[0](x)),
    Use("module in a dict in an object", lambda: types.SimpleNamespace(parts={"a": CountingModule()}),
        lambda held, x: held.parts["a"](x)),
]  # fmt: skip

OPAQUE = [
    Use("cycle, next", lambda: itertools.cycle([1.0, 2.0, 3.0, 4.0, 5.0]), times_next),
    Use("count, next", lambda: itertools.count(1), times_next),
    Use("count, next, not used", lambda: itertools.count(1), does(lambda held, x: next(held))),
    Use("generator, next", numbers, times_next),
    Use("iterator of a list, next", lambda: iter(list(range(1, 30))), times_next),
    Use("iterator of a dict, next", lambda: iter(dict.fromkeys(range(1, 30))), times_next),
    Use("zip, next", lambda: zip(itertools.count(1), itertools.count(5), strict=False),
        lambda held, x: x * next(held)[1]),
    Use("map, next", lambda: map(float, itertools.count(1)), times_next),
    Use("enumerate, next", lambda: enumerate(itertools.count(1)), lambda held, x: x * next(held)[1]),
    Use("reversed, next", lambda: reversed(range(1, 30)), times_next),
    Use("numpy Generator, draw", lambda: np.random.default_rng(5), lambda held, x: x * float(held.random())),
    Use("numpy Generator, draw, not used", lambda: np.random.default_rng(5),
        does(lambda held, x: held.random())),
    Use("numpy RandomState, draw", lambda: np.random.RandomState(5),
        lambda held, x: x * float(held.uniform())),
    Use("Random, draw", lambda: random.Random(5), lambda held, x: x * held.random()),
    Use("Random, shuffle a list", lambda: (random.Random(5), [1, 2, 3, 4, 5]),
        lambda held, x: (held[0].shuffle(held[1]), x * held[1][0])[1]),
    Use("torch Generator on the CPU, draw", lambda: torch.Generator("cpu").manual_seed(5),
        lambda held, x: x * torch.rand((), generator=held, device="cpu").to(x.device)),
    Use("torch Generator on the CPU, seed", lambda: torch.Generator("cpu").manual_seed(5),
        does(lambda held, x: held.manual_seed(held.initial_seed() + 1))),
    Use("queue, put", queue.SimpleQueue, does(lambda held, x: held.put(1))),
    Use("queue, put and get", filled_queue, put_and_get),
    Use("queue of tensors, put", queue.SimpleQueue, does(lambda held, x: held.put(x))),
    Use("Queue, put and get", lambda: (lambda q: (q.put(1), q)[1])(queue.Queue()), put_and_get),
    Use("open file, write", lambda: open("held.txt", "w"), does(lambda held, x: held.write("x"))),  # noqa: SIM115
    Use("open file, print", lambda: open("held.txt", "w"), does(lambda held, x: print("x", file=held))),  # noqa: SIM115
    Use("StringIO, write", memory_file, does(lambda held, x: held.write("x"))),
    Use("StringIO, position read", memory_file,
        lambda held, x: (held.write("x"), x * held.tell())[1]),
    Use("BytesIO, write", io.BytesIO, does(lambda held, x: held.write(b"x"))),
    Use("csv writer, row", lambda: (lambda f: (f, csv.writer(f)))(io.StringIO()),
        does(lambda held, x: held[1].writerow([1, 2]))),
    Use("mmap, write", lambda: mmap.mmap(-1, 64), does(lambda held, x: held.write(b"x"))),
    Use("mmap, item assignment", lambda: mmap.mmap(-1, 64), add_first),
    Use("socket, send", socket.socketpair, does(lambda held, x: held[0].send(b"x"))),
    Use("database, insert", database, does(lambda held, x: held.execute("insert into steps values (1)"))),
    Use("database, count", database,
        lambda held, x: (held.execute("insert into steps values (1)"),
                         x * held.execute("select count(*) from steps").fetchone()[0])[1]),
    Use("lru_cache, one miss", cached_square, lambda held, x: x * held(3)),
    Use("lru_cache, a miss in each step", cached_square, lambda held, x: x * held(held.cache_info().currsize + 2)),
    Use("decimal context, flags", lambda: decimal.Context(prec=5), set_divided),
    Use("decimal context, precision", lambda: decimal.Context(prec=5), more_precise),
    Use("threading.local, field", lambda: (lambda t: (setattr(t, "count", 0), t)[1])(threading.local()),
        times_count),
    Use("Event, set", threading.Event, doubled_once_set),
    Use("semaphore, acquire", lambda: threading.Semaphore(20), lambda held, x: (held.acquire(), x * held._value)[1]),
]  # fmt: skip


# ------------------------------------------------------------------------------ where it is held

HELD: Any = None
VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("held")


def as_attribute(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.held = make()

        def work(self, x: Tensor) -> Any:
            y = use(self.held, x)
            if change is not None:
                self.held = change(self.held, x)
            return y

    return Holds()


def as_buffer(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", make())

        def work(self, x: Tensor) -> Any:
            y = use(self.held, x)
            if change is not None:
                self.held = change(self.held, x)
            return y

    return Holds()


def in_a_submodule(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.ReLU())
            self.inner[0].held = make()

        def work(self, x: Tensor) -> Any:
            y = use(self.inner[0].held, x)
            if change is not None:
                self.inner[0].held = change(self.inner[0].held, x)
            return y

    return Holds()


def in_a_nested_dict(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.state = {"a": {"held": make()}}

        def work(self, x: Tensor) -> Any:
            y = use(self.state["a"]["held"], x)
            if change is not None:
                self.state["a"]["held"] = change(self.state["a"]["held"], x)
            return y

    return Holds()


def in_a_list(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.state = [[make()]]

        def work(self, x: Tensor) -> Any:
            y = use(self.state[0][0], x)
            if change is not None:
                self.state[0][0] = change(self.state[0][0], x)
            return y

    return Holds()


def in_an_object(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.state = types.SimpleNamespace(inner=Slotted())
            self.state.inner.values = make()

        def work(self, x: Tensor) -> Any:
            inner = self.state.inner
            y = use(inner.values, x)
            if change is not None:
                inner.values = change(inner.values, x)
            return y

    return Holds()


def on_the_class(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        held = make()

        def work(self, x: Tensor) -> Any:
            y = use(self.held, x)
            if change is not None:
                type(self).held = change(self.held, x)
            return y

    return Holds()


def on_another_class(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Registry:
        held = make()

    class Holds(owner):
        def work(self, x: Tensor) -> Any:
            y = use(Registry.held, x)
            if change is not None:
                Registry.held = change(Registry.held, x)
            return y

    return Holds()


def in_a_global(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def work(self, x: Tensor) -> Any:
            global HELD
            y = use(HELD, x)
            if change is not None:
                HELD = change(HELD, x)
            return y

    global HELD
    HELD = make()
    return Holds()


def in_a_closure(owner: Any, make: Any, use: Any, change: Any) -> Any:
    held = make()

    def uses(x: Tensor) -> Any:
        nonlocal held
        y = use(held, x)
        if change is not None:
            held = change(held, x)
        return y

    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.uses = uses

        def work(self, x: Tensor) -> Any:
            return self.uses(x)

    return Holds()


def in_a_closure_of_the_method(owner: Any, make: Any, use: Any, change: Any) -> Any:
    held = make()

    class Holds(owner):
        def work(self, x: Tensor) -> Any:
            nonlocal held
            y = use(held, x)
            if change is not None:
                held = change(held, x)
            return y

    return Holds()


def as_a_default_argument(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def work(self, x: Tensor, held: Any = [make()]) -> Any:  # noqa: B006, B008
            y = use(held[0], x)
            if change is not None:
                held[0] = change(held[0], x)
            return y

    return Holds()


def on_a_function(owner: Any, make: Any, use: Any, change: Any) -> Any:
    def uses(x: Tensor) -> Any:
        y = use(uses.held, x)
        if change is not None:
            uses.held = change(uses.held, x)
        return y

    class Holds(owner):
        def work(self, x: Tensor) -> Any:
            return uses(x)

    uses.held = make()
    return Holds()


def in_a_partial(owner: Any, make: Any, use: Any, change: Any) -> Any:
    def uses(held: Any, x: Tensor) -> Any:
        y = use(held[0], x)
        if change is not None:
            held[0] = change(held[0], x)
        return y

    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.uses = functools.partial(uses, [make()])

        def work(self, x: Tensor) -> Any:
            return self.uses(x)

    return Holds()


def behind_a_bound_method(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Keeper:
        def __init__(self) -> None:
            self.held = make()

        def uses(self, x: Tensor) -> Any:
            y = use(self.held, x)
            if change is not None:
                self.held = change(self.held, x)
            return y

    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.uses = Keeper().uses

        def work(self, x: Tensor) -> Any:
            return self.uses(x)

    return Holds()


def in_a_context_variable(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def work(self, x: Tensor) -> Any:
            held = VARIABLE.get()
            y = use(held, x)
            if change is not None:
                VARIABLE.set(change(held, x))
            return y

    VARIABLE.set(make())
    return Holds()


def in_the_environment(owner: Any, make: Any, use: Any, change: Any) -> Any:
    """Holds text only: ``use`` and ``change`` see a number."""

    class Holds(owner):
        def work(self, x: Tensor) -> Any:
            held = float(os.environ["HUNT_HELD"])
            y = use(held, x)
            if change is not None:
                os.environ["HUNT_HELD"] = str(change(held, x))
            return y

    os.environ["HUNT_HELD"] = str(make())
    return Holds()


def on_an_object_that_holds_the_module(owner: Any, make: Any, use: Any, change: Any) -> Any:

    class Helper:
        def __init__(self, module: Any) -> None:
            self.module, self.held = module, make()

    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.helpers = [Helper(self)]

        def work(self, x: Tensor) -> Any:
            helper = self.helpers[0].module.helpers[0]
            y = use(helper.held, x)
            if change is not None:
                helper.held = change(helper.held, x)
            return y

    return Holds()


def behind_getattr(owner: Any, make: Any, use: Any, change: Any) -> Any:
    """``__getattr__`` and ``__setattr__`` of an object lead to another one."""

    class Wraps:
        def __init__(self) -> None:
            self.__dict__["inner"] = {"held": make()}

        def __getattr__(self, name: str) -> Any:
            if name not in self.__dict__["inner"]:
                raise AttributeError(name)
            return self.__dict__["inner"][name]

        def __setattr__(self, name: str, value: Any) -> None:
            self.__dict__["inner"][name] = value

    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.wraps = Wraps()

        def work(self, x: Tensor) -> Any:
            y = use(self.wraps.held, x)
            if change is not None:
                self.wraps.held = change(self.wraps.held, x)
            return y

    return Holds()


def behind_a_property(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self._held = [make()]

        @property
        def current(self) -> Any:
            return self._held[-1]

        def work(self, x: Tensor) -> Any:
            y = use(self.current, x)
            if change is not None:
                self._held[-1] = change(self.current, x)
            return y

    return Holds()


def in_the_instances_dict(owner: Any, make: Any, use: Any, change: Any) -> Any:
    class Holds(owner):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["held"] = make()

        def work(self, x: Tensor) -> Any:
            y = use(vars(self)["held"], x)
            if change is not None:
                vars(self)["held"] = change(vars(self)["held"], x)
            return y

    return Holds()


PLACES = [
    in_a_submodule,
    in_a_nested_dict,
    in_a_list,
    in_an_object,
    on_the_class,
    on_another_class,
    in_a_global,
    in_a_closure,
    in_a_closure_of_the_method,
    as_a_default_argument,
    on_a_function,
    in_a_partial,
    behind_a_bound_method,
    on_an_object_that_holds_the_module,
    in_a_context_variable,
    behind_getattr,
    behind_a_property,
    in_the_instances_dict,
]
IN_EVERY_PLACE = (
    "float, rebind",
    "tensor, rebind to a sum",
    "list, append",
    "dict, item assignment",
    "tensor, in place",
    "count, next",
)
ALL_USES = [*REBOUND, *CHANGED, *OPAQUE]


def held_rows() -> list[Row]:
    rows = []

    def add(place: Any, use: Use, side: str, stage: str) -> None:
        owner, wrap = OWNERS[side]
        make = lambda: wrap(place(owner, use.make, use.use, use.change))
        rows.append(Row(f"{use.name}, {name_of(place)}, {side}", side, make, dicts, stage))

    for index, use in enumerate(ALL_USES):
        add(as_attribute, use, "in the step", "validate" if index % 3 else "predict")
        add(as_attribute, use, "in a part", "predict" if index % 3 else "validate")
    for place in PLACES:
        for index, use in enumerate(use for use in ALL_USES if use.name in IN_EVERY_PLACE):
            # one side each, in turn: the places are what is new here
            side = list(OWNERS)[(index + PLACES.index(place)) % 2]
            add(place, use, side, "validate" if index % 2 else "predict")
    for use in ALL_USES:
        if use.name.startswith("tensor"):
            add(as_buffer, use, "in the step", "validate")
            add(as_buffer, use, "in a part", "predict")
        if use.name == "float, rebind":
            add(in_the_environment, use, "in the step", "validate")
            add(in_the_environment, use, "in a part", "predict")
    return rows


# ----------------------------------------------------------------------- what a step does to the world


def prints(self, x):
    print("one")
    return x


def prints_at_once(self, x):
    print("one", "two", sep="-", end="", flush=True)
    return x


def prints_its_shape(self, x):
    print(f"{tuple(x.shape)} {x.dtype}")
    return x


def prints_to_standard_error(self, x):
    print("one", file=sys.stderr)
    return x


def keep_print(self):
    self.say = print


def prints_by_another_name(self, x):
    self.say("one")
    return x


def writes_standard_output(self, x):
    sys.stdout.write("one ")
    return x


def writes_standard_error(self, x):
    sys.stderr.write("one ")
    return x


def keep_standard_output(self):
    self.out = sys.stdout


def writes_kept_standard_output(self, x):
    self.out.write("one ")
    return x


def writes_a_descriptor(self, x):
    os.write(1, b"one ")
    return x


def writes_by_tqdm(self, x):
    tqdm.write("one")
    return x


def logs(self, x):
    logger.info("one")
    return x


def logs_with_arguments(self, x):
    logger.warning("shape %s", tuple(x.shape))
    return x


def warns(self, x):
    warnings.warn("user: odd", stacklevel=1)
    return x


def appends_to_a_file(self, x):
    with open("lines.txt", "a") as file:
        file.write("x")
    return x


def appends_by_a_path(self, x):
    with pathlib.Path("lines.txt").open("a") as file:
        file.write("x")
    return x


def writes_a_file_of_its_own(self, x):
    pathlib.Path(f"step{len(os.listdir('.'))}.txt").write_text("x")
    return x


def counts_in_a_file(self, x):
    path = pathlib.Path("count.txt")
    count = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(count))
    return x * count


def writes_by_os_open(self, x):
    handle = os.open("lines.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, b"x")
    os.close(handle)
    return x


def saves_by_torch(self, x):
    torch.save(x, f"step{len(os.listdir('.'))}.pt")
    return x


def saves_by_numpy(self, x):
    np.save(f"step{len(os.listdir('.'))}.npy", np.ones(2))
    return x


def pickles(self, x):
    with open("objects.pkl", "ab") as file:
        pickle.dump({"a": 1}, file)
    return x


def writes_json_lines(self, x):
    with open("lines.jsonl", "a") as file:
        json.dump({"shape": list(x.shape)}, file)
    return x


def writes_a_row(self, x):
    with open("rows.csv", "a", newline="") as file:
        csv.writer(file).writerow([1, 2])
    return x


def makes_a_folder(self, x):
    os.mkdir(f"folder{len(os.listdir('.'))}")
    return x


def touches_a_file(self, x):
    pathlib.Path(f"touched{len(os.listdir('.'))}").touch()
    return x


def make_a_file(self):
    pathlib.Path("0.name").write_text("")


def renames_a_file(self, x):
    name = next(iter(os.listdir(".")))
    os.rename(name, f"{int(name.split('.')[0]) + 1}.name")
    return x


def make_many_files(self):
    for index in range(20):
        pathlib.Path(f"{index:02}.txt").write_text("")


def removes_a_file(self, x):
    os.remove(sorted(os.listdir("."))[0])
    return x


def runs_a_process(self, x):
    subprocess.run(["/bin/sh", "-c", "echo one >> lines.txt"], check=True)
    return x


def runs_a_shell(self, x):
    os.system("echo one >> lines.txt")
    return x


def inserts_into_a_database(self, x):
    connection = sqlite3.connect("steps.db")
    with connection:
        connection.execute("create table if not exists steps (value integer)")
        connection.execute("insert into steps values (1)")
    connection.close()
    return x


def starts_a_thread(self, x):
    thread = threading.Thread(target=lambda: logger.info("from a thread"))
    thread.start()
    thread.join()
    return x


def sets_an_environment_variable(self, x):
    os.environ["HUNT_COUNT"] = str(int(os.environ.get("HUNT_COUNT", "0")) + 1)
    return x * int(os.environ["HUNT_COUNT"])


def puts_an_environment_variable(self, x):
    os.environ.setdefault("HUNT_TEXT", "")
    os.environ["HUNT_TEXT"] += "x"
    return x


WORLD = [
    prints,
    prints_at_once,
    prints_its_shape,
    prints_to_standard_error,
    (keep_print, prints_by_another_name),
    writes_standard_output,
    writes_standard_error,
    (keep_standard_output, writes_kept_standard_output),
    writes_a_descriptor,
    writes_by_tqdm,
    logs,
    logs_with_arguments,
    warns,
    appends_to_a_file,
    appends_by_a_path,
    writes_a_file_of_its_own,
    counts_in_a_file,
    writes_by_os_open,
    saves_by_torch,
    saves_by_numpy,
    pickles,
    writes_json_lines,
    writes_a_row,
    makes_a_folder,
    touches_a_file,
    (make_a_file, renames_a_file),
    (make_many_files, removes_a_file),
    runs_a_process,
    runs_a_shell,
    inserts_into_a_database,
    starts_a_thread,
    sets_an_environment_variable,
    puts_an_environment_variable,
]


# ------------------------------------------------------------------------ random numbers and settings


def draws_by_random(self, x):
    return x * random.random()


def draws_by_numpy(self, x):
    return x * float(np.random.rand())


def draws_by_numpy_unused(self, x):
    np.random.rand()
    return x


def draws_by_torch(self, x):
    return x + torch.rand_like(x)


def draws_by_torch_on_the_cpu(self, x):
    return x + torch.rand(4).to(x.device)


def drops_out(self, x):
    return F.dropout(x, 0.5, training=True)


def draws_a_permutation(self, x):
    return x[:, torch.randperm(4, device=x.device)]


def seeds_torch(self, x):
    torch.manual_seed(5)
    return x + torch.rand_like(x)


def seeds_random(self, x):
    random.seed(5)
    return x * random.random()


def seeds_numpy(self, x):
    np.random.seed(5)
    return x * float(np.random.rand())


def forks_the_generator(self, x):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        noise = torch.rand_like(x)
    return x + noise + torch.rand_like(x)


def shuffles(self, x):
    order = [1.0, 2.0, 3.0]
    random.shuffle(order)
    return x * order[0]


def chooses_a_branch(self, x):
    return x if random.random() < 0.5 else -x


def takes_its_time_from_a_counter(self, x):
    return x * next(COUNTER)


def sets_numpys_errors(self, x):
    np.seterr(all="ignore")
    return x


def sets_the_decimal_context(self, x):
    decimal.getcontext().prec += 1
    return x * decimal.getcontext().prec


def asks_for_gradients(self, x):
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad((leaf * leaf).sum(), leaf)
    return gradient


RANDOM = [
    draws_by_random,
    draws_by_numpy,
    draws_by_numpy_unused,
    draws_by_torch,
    draws_by_torch_on_the_cpu,
    drops_out,
    draws_a_permutation,
    seeds_torch,
    seeds_random,
    seeds_numpy,
    forks_the_generator,
    shuffles,
    chooses_a_branch,
    takes_its_time_from_a_counter,
    sets_numpys_errors,
    sets_the_decimal_context,
    asks_for_gradients,
]


# -------------------------------------------------------------------------- the module that changes itself


def new_attribute_in_each_step(self, x):
    setattr(self, f"seen{len(vars(self))}", 1)
    return x


def start_once(self):
    self.cache = None


def builds_a_cache_once(self, x):
    if self.cache is None:
        self.cache = torch.ones(4, device=x.device) * 2
    return x * self.cache


def builds_a_cache_by_hasattr(self, x):
    if not hasattr(self, "mask"):
        self.mask = torch.ones(4, device=x.device) * 2
    return x * self.mask


def has_seen_it(self):
    self.seen = False


def does_something_once(self, x):
    if not self.seen:
        self.seen = True
        return x * 100
    return x


def start_at_zero(self):
    self.step = 0


def does_something_at_the_seventh_step(self, x):
    self.step += 1
    return x * 100 if self.step == 7 else x


def deletes_an_attribute(self, x):
    if hasattr(self, "note"):
        del self.note
    else:
        self.note = 1
    return x


def changes_a_weight(self, x):
    self.linear.weight.data.mul_(0.5)
    return x


def replaces_a_weight(self, x):
    self.linear.weight = nn.Parameter(self.linear.weight.detach() * 0.5)
    return x


def have_a_buffer(self):
    self.register_buffer("seen", torch.zeros(()))


def counts_in_a_buffer(self, x):
    self.seen += 1
    return x * self.seen


def registers_a_buffer(self, x):
    self.register_buffer(f"seen{len(self._buffers)}", torch.zeros(()))
    return x


def adds_a_module(self, x):
    self.add_module(f"added{len(self._modules)}", nn.ReLU())
    return x


def replaces_a_module(self, x):
    self.linear = nn.Linear(4, 4, device=x.device)
    return x


def registers_a_hook(self, x):
    self.linear.register_forward_hook(lambda module, args, output: output * 2)
    return x


def changes_the_mode(self, x):
    self.linear.train(not self.linear.training)
    return x


def changes_requires_grad(self, x):
    self.linear.requires_grad_(not self.linear.weight.requires_grad)
    return x


def assigns_its_class(self, x):
    self.__class__ = type(self.__class__.__name__, (self.__class__,), {})
    return x


def patches_a_method(self, x):
    self.extra_repr = lambda: "patched"
    return x


def have_a_metric(self):
    self.mean = torchmetrics.MeanMetric()


def updates_a_metric(self, x):
    self.mean.update(x.mean())
    return x


def updates_a_metric_and_computes(self, x):
    self.mean.update(x.mean())
    return x + self.mean.compute()


def have_a_listed_metric(self):
    self.kept = torchmetrics.CatMetric()


def updates_a_listed_metric(self, x):
    self.kept.update(x)
    return x


def resets_a_metric(self, x):
    self.mean.reset()
    self.mean.update(x.mean())
    return x


def sets_an_attribute_of_its_output(self, x):
    y = x * 2
    y.note = "seen"
    return y


def counts_in_attributes_of_its_output(self, x):
    self.step += 1
    y = x * 2
    y.step = self.step
    return y


def have_a_buffer_that_is_returned(self):
    self.register_buffer("kept", torch.zeros(1, 4))


def returns_a_buffer(self, x):
    self.kept.copy_(x)
    return self.kept


def returns_a_list_that_it_keeps(self, x):
    self.cache = [*self.cache, x] if self.cache else [x]
    return self.cache


def have_a_list(self):
    self.outputs = []


def returns_the_same_list(self, x):
    self.outputs.append(x)
    return self.outputs


def returns_none(self, x):
    self.last = x
    return


def keeps_a_view(self, x):
    self.last = x[:, :2]
    return x


OF_ITSELF = [
    new_attribute_in_each_step,
    (start_once, builds_a_cache_once),
    builds_a_cache_by_hasattr,
    (has_seen_it, does_something_once),
    (start_at_zero, does_something_at_the_seventh_step),
    deletes_an_attribute,
    changes_a_weight,
    replaces_a_weight,
    (have_a_buffer, counts_in_a_buffer),
    registers_a_buffer,
    adds_a_module,
    replaces_a_module,
    registers_a_hook,
    changes_the_mode,
    changes_requires_grad,
    assigns_its_class,
    patches_a_method,
    (have_a_metric, updates_a_metric),
    (have_a_metric, updates_a_metric_and_computes),
    (have_a_listed_metric, updates_a_listed_metric),
    (have_a_metric, resets_a_metric),
    sets_an_attribute_of_its_output,
    (start_at_zero, counts_in_attributes_of_its_output),
    (have_a_buffer_that_is_returned, returns_a_buffer),
    (start_once, returns_a_list_that_it_keeps),
    (have_a_list, returns_the_same_list),
    returns_none,
    keeps_a_view,
]


# ---------------------------------------------------------------------------------------- exceptions


def raises_at_the_sixth_step(self, x):
    self.step += 1
    if self.step == 6:
        raise RuntimeError("sixth step")
    return x


def have_a_closure(self):
    count = 0

    def check(x):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyError("sixth call")
        return x

    self.check = check


def raises_in_a_closure(self, x):
    return self.check(x)


def have_six(self):
    self.values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def runs_out_of_a_list(self, x):
    return x * self.values.pop()


def have_an_iterator(self):
    self.values = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def runs_out_of_an_iterator(self, x):
    return x * next(self.values)


def raises_at_once(self, x):
    raise ValueError("at once")


def raises_by_an_operation(self, x):
    return x @ torch.ones(5, 5, device=x.device)


def reads_what_is_not_there(self, x):
    return x * self.not_there


def catches_an_exception(self, x):
    try:
        self.values.append(1.0)
        return x * self.missing["key"]
    except AttributeError:
        return x * len(self.values)


def catches_a_missing_key(self, x):
    try:
        return x * {}["key"]
    except KeyError:
        return x * 2


EXCEPTIONS = [
    (start_at_zero, raises_at_the_sixth_step),
    (have_a_closure, raises_in_a_closure),
    (have_six, runs_out_of_a_list),
    (have_an_iterator, runs_out_of_an_iterator),
    raises_at_once,
    raises_by_an_operation,
    reads_what_is_not_there,
    (have_six, catches_an_exception),
    catches_a_missing_key,
]


# ------------------------------------------------------------------------------------------ the batch


def adds_a_key(self, batch):
    batch["y"] = self.linear(batch["x"])


def adds_a_key_and_returns_it(self, batch):
    batch["y"] = self.linear(batch["x"])
    return batch["y"]


def adds_a_number(self, batch):
    batch["n"] = len(batch)
    return self.linear(batch["x"])


def replaces_a_key(self, batch):
    batch["x"] = self.linear(batch["x"])
    return batch["x"].mean()


def replaces_a_key_by_the_same(self, batch):
    batch["x"] = batch["x"].to(self.linear.weight.device)
    return self.linear(batch["x"])


def pops_a_key(self, batch):
    label = batch.pop("label")
    return self.linear(batch["x"]) + label


def pops_a_key_if_it_is_there(self, batch):
    batch.pop("label", None)
    return self.linear(batch["x"])


def deletes_a_key(self, batch):
    del batch["label"]
    return self.linear(batch["x"])


def clears_it(self, batch):
    x = batch["x"]
    batch.clear()
    return self.linear(x)


def updates_it(self, batch):
    batch.update(y=self.linear(batch["x"]), n=1)
    return len(batch)


def sets_a_default(self, batch):
    return self.linear(batch["x"]) * batch.setdefault("scale", 2.0)


def reorders_it(self, batch):
    batch["x"] = batch.pop("x")
    return self.linear(batch["x"])


def returns_it(self, batch):
    self.linear(batch["x"])
    return batch


def returns_it_with_a_key(self, batch):
    batch["y"] = self.linear(batch["x"])
    return batch


def returns_a_copy_with_a_key(self, batch):
    return {**batch, "y": self.linear(batch["x"])}


def returns_its_tensor(self, batch):
    self.linear(batch["x"])
    return batch["x"]


def returns_a_view_of_its_tensor(self, batch):
    self.linear(batch["x"])
    return batch["x"][:, :2]


def changes_its_tensor_in_place(self, batch):
    batch["x"].mul_(2)
    return self.linear(batch["x"])


def changes_a_part_of_its_tensor(self, batch):
    batch["x"][:, 0] = 0
    return self.linear(batch["x"])


def changes_its_tensor_and_returns_it(self, batch):
    return batch["x"].add_(self.linear(batch["x"]))


def changes_its_data(self, batch):
    batch["x"].data = self.linear(batch["x"])
    return batch["x"].mean()


def resizes_its_tensor(self, batch):
    y = self.linear(batch["x"])
    batch["x"].unsqueeze_(0)
    return y


def sets_an_attribute_of_its_tensor(self, batch):
    batch["x"].note = "seen"
    return self.linear(batch["x"])


def reads_an_attribute_of_its_tensor(self, batch):
    return self.linear(batch["x"]) * getattr(batch["x"], "note", 2.0)


def keeps_it(self, batch):
    self.last = batch
    return self.linear(batch["x"])


def keeps_its_tensor(self, batch):
    self.last = batch["x"]
    return self.linear(batch["x"])


def keeps_all(self, batch):
    self.outputs.append(batch)
    return self.linear(batch["x"])


def copies_it_first(self, batch):
    batch = dict(batch)
    batch["y"] = self.linear(batch.pop("x"))
    return batch


def puts_itself_into_it(self, batch):
    y = self.linear(batch["x"])
    batch["batch"] = {"y": y, "x": batch["x"]}
    return y


def adds_a_key_to_the_inner_dict(self, batch):
    batch["inner"]["y"] = self.linear(batch["x"])
    return batch["inner"]["y"]


def appends_to_the_inner_list(self, batch):
    batch["list"].append(self.linear(batch["x"]))
    return len(batch["list"])


def replaces_an_item_of_the_inner_list(self, batch):
    batch["list"][0] = self.linear(batch["x"])
    return batch["list"][0]


def pops_an_item_of_the_inner_list(self, batch):
    return self.linear(batch["list"].pop())


def clears_the_inner_dict(self, batch):
    batch["inner"].clear()
    return self.linear(batch["x"])


@dataclasses.dataclass
class Batch:
    x: Tensor
    label: Tensor
    y: Any = None


def sets_a_field(self, batch):
    batch.y = self.linear(batch.x)
    return batch.y


def replaces_a_field(self, batch):
    batch.x = self.linear(batch.x)
    return batch.x.mean()


def sets_a_field_to_none(self, batch):
    batch.label = None
    return self.linear(batch.x)


def sets_a_field_to_a_number(self, batch):
    batch.y = 3
    return self.linear(batch.x)


def sets_a_new_attribute(self, batch):
    batch.note = "seen"
    return self.linear(batch.x)


def returns_the_object(self, batch):
    batch.y = self.linear(batch.x)
    return batch


def makes_another_object(self, batch):
    return dataclasses.replace(batch, y=self.linear(batch.x))


class Sample:
    """An object that is not known as a container."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.y = None


def sets_an_attribute_of_an_object(self, batch):
    batch.y = self.linear(batch.x)
    return batch.y


def reads_an_object(self, batch):
    return self.linear(batch.x)


def appends_to_a_list(self, batch):
    batch.append(self.linear(batch[0]))
    return batch[-1]


def replaces_an_item(self, batch):
    batch[0] = self.linear(batch[0])
    return batch[0]


def pops_an_item(self, batch):
    label = batch.pop()
    return self.linear(batch[0]) + label


def nested() -> DataLoader:
    return DataLoader(
        [{"x": item["x"], "inner": {"label": item["label"]}, "list": [item["x"] + 1]} for item in items()],
        batch_size=1,
    )  # fmt: skip


def objects() -> DataLoader:
    return DataLoader(
        [Batch(item["x"][None], item["label"][None]) for item in items()],
        batch_size=1,
        collate_fn=lambda each: each[0],
    )


def samples() -> DataLoader:
    return DataLoader(
        [Sample(item["x"][None]) for item in items()], batch_size=1, collate_fn=lambda each: each[0]
    )


def lists() -> DataLoader:
    return DataLoader([[item["x"], item["label"]] for item in items()], batch_size=1)


OF_DICTS = [
    adds_a_key,
    adds_a_key_and_returns_it,
    adds_a_number,
    replaces_a_key,
    replaces_a_key_by_the_same,
    pops_a_key,
    pops_a_key_if_it_is_there,
    deletes_a_key,
    clears_it,
    updates_it,
    sets_a_default,
    reorders_it,
    returns_it,
    returns_it_with_a_key,
    returns_a_copy_with_a_key,
    returns_its_tensor,
    returns_a_view_of_its_tensor,
    changes_its_tensor_in_place,
    changes_a_part_of_its_tensor,
    changes_its_tensor_and_returns_it,
    changes_its_data,
    resizes_its_tensor,
    sets_an_attribute_of_its_tensor,
    reads_an_attribute_of_its_tensor,
    keeps_it,
    keeps_its_tensor,
    (have_a_list, keeps_all),
    copies_it_first,
    puts_itself_into_it,
]
OF_NESTED = [
    adds_a_key_to_the_inner_dict,
    appends_to_the_inner_list,
    replaces_an_item_of_the_inner_list,
    pops_an_item_of_the_inner_list,
    clears_the_inner_dict,
]
OF_OBJECTS = [
    sets_a_field,
    replaces_a_field,
    sets_a_field_to_none,
    sets_a_field_to_a_number,
    sets_a_new_attribute,
    returns_the_object,
    makes_another_object,
]
OF_LISTS = [appends_to_a_list, replaces_an_item, pops_an_item]
OF_SAMPLES = [sets_an_attribute_of_an_object, reads_an_object]


# ------------------------------------------------------- what only a LightningModule has, and other steps


def prints_by_lightning(self, x):
    self.print("one")
    return x


def reads_the_trainer(self, x):
    return x * (1 + self.trainer.current_epoch + self.current_epoch)


def reads_the_global_step(self, x):
    return x * (1 + self.global_step)


def logs_an_output(self, x):
    self.log("extra", x.mean(), batch_size=1)
    return x


def logs_a_number(self, x):
    self.log("extra", 2.0, batch_size=1)
    return x


def logs_a_changing_number(self, x):
    self.step += 1
    self.log("extra", float(self.step), batch_size=1, reduce_fx="sum")
    return x


def logs_under_changing_names(self, x):
    self.step += 1
    self.log(f"extra{self.step % 2}", x.mean(), batch_size=1)
    return x


def uses_its_logger_if_there_is_one(self, x):
    if self.logger is not None:
        self.logger.log_metrics({"a": 1.0})
    return x


def counts_batches_by_the_trainer(self, x):
    return x * (1 + self.trainer.num_val_batches[0])


ONLY_IN_STEP = [
    prints_by_lightning,
    reads_the_trainer,
    reads_the_global_step,
    logs_an_output,
    logs_a_number,
    (start_at_zero, logs_a_changing_number),
    (start_at_zero, logs_under_changing_names),
    uses_its_logger_if_there_is_one,
    counts_batches_by_the_trainer,
]


# ------------------------------------------------------------------------ harmless: these must be FULL

TABLE = {"scale": 2.0, "names": ["a", "b"]}
SCALE = 2.0
SCALES = (1.0, 2.0)
halved = functools.partial(torch.mul, other=0.5)


class Config:
    scale = 2.0
    activation = "relu"


@dataclasses.dataclass(frozen=True)
class Options:
    scale: float = 2.0
    layers: tuple[int, ...] = (1, 2)
    colour: Colour = Colour.RED


class Tokenizer:
    """Not read by any step; its state cannot be compared."""

    def __init__(self) -> None:
        self.lock, self.rng = threading.Lock(), random.Random(5)
        self.vocabulary = {"a": 1}


class Activation:
    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)

    @property
    def doubled(self) -> float:
        return self.slope * 2


def scaled(x: Tensor, by: float = 2.0) -> Tensor:
    return x * by


def have_plain_values(self):
    self.scale, self.flag, self.name, self.nothing = 2.0, True, "relu", None
    self.sizes, self.table = (1, 2), {"scale": 2.0, "deep": {"list": [1.0, 2.0]}}


def reads_a_number(self, x):
    return x * self.scale


def reads_a_flag(self, x):
    return x * 2 if self.flag else x


def reads_a_name(self, x):
    return F.relu(x) if self.name == "relu" else x


def reads_none(self, x):
    return x if self.nothing is None else x * 2


def reads_a_tuple(self, x):
    return x * self.sizes[1]


def reads_a_dict(self, x):
    return x * self.table["scale"] * self.table["deep"]["list"][1]


def reads_a_dict_by_get(self, x):
    return x * self.table.get("missing", 3.0)


def goes_through_a_dict(self, x):
    for name, value in self.table["deep"].items():
        x = x * len(name) * value[0]
    return x


def have_objects(self):
    self.config, self.options = types.SimpleNamespace(scale=2.0, deep=Fields(3, [1.0])), Options()
    self.activation, self.path = Activation(0.1), pathlib.Path("/tmp/a.txt")
    self.colour, self.tokenizer, self.partial = (
        Colour.RED,
        Tokenizer(),
        functools.partial(torch.mul, other=2.0),
    )
    self.array, self.slotted, self.point = np.ones(2), Slotted(), Point(2)
    self.function, self.method, self.kept = torch.relu, Tokenizer().vocabulary.get, [torch.ones(4)]
    self.mean = torchmetrics.MeanMetric()
    self.by_lambda = lambda x: x * 2.0


def reads_a_namespace(self, x):
    return x * self.config.scale * self.config.deep.count


def reads_a_frozen_dataclass(self, x):
    return x * self.options.scale * self.options.layers[1]


def reads_an_enum(self, x):
    return x * 2 if self.colour is Colour.RED and self.options.colour == Colour.RED else x


def reads_a_path(self, x):
    return x * 2 if self.path.suffix == ".txt" else x


def reads_a_slotted_object(self, x):
    return x * (1 + self.slotted.count)


def reads_a_named_tuple(self, x):
    return x * self.point.count


def calls_an_object(self, x):
    return self.activation(x) * self.activation.doubled


def calls_a_partial(self, x):
    return self.partial(x)


def calls_a_function_of_torch(self, x):
    return self.function(x)


def calls_a_lambda(self, x):
    return self.by_lambda(x)


def holds_a_tokenizer_unread(self, x):
    return x * 2


def reads_a_table_of_a_tokenizer(self, x):
    return x * self.tokenizer.vocabulary["a"]


def reads_a_listed_tensor(self, x):
    return x * self.kept[0]


def updates_a_registered_metric(self, x):
    self.mean.update(x.mean())
    return x


def have_modules(self):
    self.many = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    self.named = nn.ModuleDict({"relu": nn.ReLU()})
    self.bias = nn.Parameter(torch.ones(4))
    self.register_buffer("constant", torch.ones(4))


def calls_a_list_of_modules(self, x):
    for module in self.many:
        x = module(x)
    return x


def calls_a_dict_of_modules(self, x):
    return self.named["relu"](x)


def reads_parameters_and_buffers(self, x):
    return x * self.bias + self.constant


def asks_for_a_type(self, x):
    return x * 2 if type(self.many[0]) is nn.Linear and isinstance(self.linear, nn.Linear) else x


def reads_a_constant(self, x):
    return x * SCALE * SCALES[1] * torch.pi


def reads_a_table(self, x):
    return x * TABLE["scale"] * len(TABLE["names"])


def reads_a_class(self, x):
    return F.relu(x) * Config.scale if Config.activation == "relu" else x


def calls_a_helper(self, x):
    return scaled(scaled(x), by=0.5)


def calls_a_global_partial(self, x):
    return halved(x)


def makes_lists_of_its_own(self, x):
    parts = []
    for part in x.unbind(1):
        parts.append(part * 2)
    return torch.stack(parts, 1)


def makes_dicts_of_its_own(self, x):
    found = collections.defaultdict(list)
    for index, part in enumerate(x.unbind(1)):
        found[index % 2].append(part)
    return torch.stack(found[0] + found[1], 1)


def makes_iterators_of_its_own(self, x):
    scales = itertools.cycle([1.0, 2.0])
    return torch.stack([part * scale for part, scale in zip(x.unbind(1), scales, strict=False)], 1)


def makes_a_generator_of_its_own(self, x):
    return sum(part for part in x.unbind(1))


def makes_a_closure_of_its_own(self, x):
    count = 0

    def add(part):
        nonlocal count
        count += 1
        return part * count

    return torch.stack([add(part) for part in x.unbind(1)], 1)


def makes_a_random_generator_of_its_own(self, x):
    return x * random.Random(5).random()


def makes_an_object_of_its_own(self, x):
    fields = Fields()
    fields.count += 1
    fields.values.append(x)
    return fields.values[0] * fields.count


def asks_a_logger_that_is_quiet(self, x):
    logger.debug("one")
    return x


def asserts_a_shape(self, x):
    assert x.shape[-1] == 4, "four features"
    return x.view(x.size(0), -1)


def formats_a_text_that_nobody_sees(self, x):
    text = f"{x.shape} {type(self).__name__}"
    return x * 2 if text else x


def imports_in_the_step(self, x):
    import math

    return x * math.sqrt(2.0)


def works_without_gradients(self, x):
    with torch.no_grad():
        return x * 2


def works_under_autocast(self, x):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return self.linear(x)


def returns_a_dict(self, x):
    return {"y": x, "n": 1, "names": ["a"]}


def returns_an_object(self, x):
    return Fields(1, [x])


def sets_an_attribute_to_the_same_value(self, x):
    self.training = False
    return x


HARMLESS = [
    *((have_plain_values, work) for work in (reads_a_number, reads_a_flag, reads_a_name, reads_none, reads_a_tuple,
                                             reads_a_dict, reads_a_dict_by_get, goes_through_a_dict)),
    *((have_objects, work) for work in (reads_a_namespace, reads_a_frozen_dataclass, reads_an_enum, reads_a_path,
                                        reads_a_slotted_object, reads_a_named_tuple, calls_an_object, calls_a_partial,
                                        calls_a_function_of_torch, calls_a_lambda, holds_a_tokenizer_unread,
                                        reads_a_table_of_a_tokenizer, reads_a_listed_tensor,
                                        updates_a_registered_metric)),
    *((have_modules, work) for work in (calls_a_list_of_modules, calls_a_dict_of_modules,
                                        reads_parameters_and_buffers, asks_for_a_type)),
    reads_a_constant,
    reads_a_table,
    reads_a_class,
    calls_a_helper,
    calls_a_global_partial,
    makes_lists_of_its_own,
    makes_dicts_of_its_own,
    makes_iterators_of_its_own,
    makes_a_generator_of_its_own,
    makes_a_closure_of_its_own,
    makes_a_random_generator_of_its_own,
    makes_an_object_of_its_own,
    asks_a_logger_that_is_quiet,
    asserts_a_shape,
    formats_a_text_that_nobody_sees,
    imports_in_the_step,
    works_without_gradients,
    works_under_autocast,
    returns_a_dict,
    returns_an_object,
    sets_an_attribute_to_the_same_value,
]  # fmt: skip


# -------------------------------------------------------------------------------------- all of them

COUNTER = itertools.count(1)


STEP_ONLY: Any = {"sides": ["in the step"], "stages": ["validate"]}


def rows() -> list[Row]:
    return [
        *held_rows(),
        *of_functions("world", WORLD, sides=["in a part"]),
        *of_functions("random", RANDOM, sides=["in a part"]),
        *of_functions("itself", OF_ITSELF),
        *of_functions("exception", EXCEPTIONS),
        *of_functions("batch", OF_DICTS, OWNERS_OF_BATCH),
        *of_functions("nested batch", OF_NESTED, OWNERS_OF_BATCH, nested),
        *of_functions("dataclass batch", OF_OBJECTS, OWNERS_OF_BATCH, objects),
        *of_functions("object batch", OF_SAMPLES, OWNERS_OF_BATCH, samples),
        *of_functions("list batch", OF_LISTS, OWNERS_OF_BATCH, lists),
        *of_functions("module", ONLY_IN_STEP, sides=["in the step"], stages=["validate"]),
        *of_functions("harmless", HARMLESS, sides=IN_TURN),
        *of_functions("object", hunt_public.OBJECTS, sides=IN_TURN),
        *of_functions("control", hunt_public.CONTROL),
        *of_functions("weights", hunt_public.WEIGHTS),
        *of_functions("between", hunt_public.BETWEEN, **STEP_ONLY),
        *of_functions("lightning", hunt_public.OF_LIGHTNING, **STEP_ONLY),
    ]


def reset() -> None:
    """The state that this module and the process hold, as it is before any row."""
    global HELD, COUNTER
    HELD, COUNTER = None, itertools.count(1)
    hunt_public.reset()
    VARIABLE.set(None)
    np.seterr(divide="warn", over="warn", under="ignore", invalid="warn")
    decimal.getcontext().prec = 28


def world() -> list[Any]:
    """What a step may have changed there."""
    return [
        HELD,
        COUNTER,
        VARIABLE.get(),
        np.geterr(),
        decimal.getcontext().prec,
        TABLE,
        Config,
        *hunt_public.world(),
    ]
