"""The way of a step through the code: equal if the same instructions ran, and nothing else."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

from cg_lightning.diagnosis import way as way_module
from cg_lightning.diagnosis.way import WayRecorder


class Holder:
    scale = 1.0


def one_line(x: int) -> Any:
    return Holder.scale if x > 3 else 2.0


def loops(x: int) -> list[int]:
    return [each + 1 for each in range(x)]


def catches(x: int) -> int:
    try:
        if x > 3:
            raise ValueError
    except ValueError:
        return 0
    return x


def short_circuit(x: int) -> bool:
    return x > 3 and Holder.scale > 0


def by_name(x: int) -> float:
    return getattr(Holder, "scale")  # noqa: B009


@pytest.fixture
def ways():
    recorder = WayRecorder()

    def way(function, *args):
        recorder.run(function, *args)  # Python 3.13 tells nothing of the first call
        return recorder.run(function, *args)[1]

    return way


@pytest.mark.parametrize("function", [one_line, catches, short_circuit])
def test_another_branch_is_another_way(ways, function):
    assert ways(function, 1) == ways(function, 2) is not None
    assert ways(function, 4) == ways(function, 5)
    assert ways(function, 1) != ways(function, 4)


def test_another_number_of_rounds_is_another_way(ways):
    assert ways(loops, 2) == ways(loops, 2)
    assert ways(loops, 2) != ways(loops, 3)


def test_another_module_is_another_way(ways):
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(3, 2)
    assert ways(lambda net: net(x), one) != ways(lambda net: net(x), other)
    call = lambda net, x: net(x)
    assert ways(call, one, x) == ways(call, one, torch.ones(5, 2))
    assert ways(call, one, x) != ways(call, other, x)


def test_names_that_may_be_computed_have_no_way(ways):
    assert ways(by_name, 1) is None


def test_a_debugger_keeps_its_place():
    def tracer(frame, event, arg):
        return None

    recorder = WayRecorder()
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        output, way = recorder.run(one_line, 1)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert (output, way) == (2.0, None)


def test_an_error_leaves_no_tracer():
    def fails():
        raise RuntimeError("own")

    with pytest.raises(RuntimeError, match="own"):
        WayRecorder().run(fails)
    assert sys.gettrace() is None
    assert gc.isenabled()


class Refuses:
    @property
    def value(self) -> float:
        raise AttributeError

    def __bool__(self) -> bool:
        return False


def counts_down(x: int) -> int:
    while x:
        x -= 1
    else:
        x = 7
    return x


def matches(x: int) -> Any:
    match (x, x % 2):
        case (0, _):
            return Holder.scale
        case (_, 1):
            return 2.0
    return None


def generates(x: int) -> int:
    return sum(each for each in range(x) if each % 3)


def hidden_error(x: int) -> bool:
    class Asked:
        @property
        def value(self) -> float:
            table = {1: Holder.scale, 3: 2.0}
            try:
                return table[x]
            except KeyError as error:
                raise AttributeError from error

    return hasattr(Asked(), "value")


def sorts(x: int) -> list[int]:
    return sorted([3, 1, x], key=lambda each: -each if each > 2 else each)


def suppresses(x: int) -> float:
    with contextlib.suppress(ZeroDivisionError):
        1 / x
        return Holder.scale
    return 3.0


def finally_runs(x: int) -> int:
    for _ in range(2):
        try:
            if x == 2:
                continue
            if x == 3:
                break
        finally:
            x += 10
    return x


def chained(x: int) -> bool:
    return 1 < x < 4 and not (x == 2 or x is None)


def delegates(x: int) -> list[int]:
    def inner():
        yield from range(x)
        try:
            yield 5
        except ValueError:
            yield 6

    running = inner()
    first = next(running)
    return [first, running.throw(ValueError) if x == 0 else next(running)]


def truth_of_an_object(x: int) -> bool:
    return bool(Refuses() if x > 2 else x) or x == 1


def default_of_none(x: int) -> int:
    found = {1: 2, 2: None}.get(x)
    return 5 if found is None else found


FUNCTIONS = [
    *(one_line, loops, catches, short_circuit, counts_down, matches, generates, hidden_error),
    *(sorts, suppresses, finally_runs, chained, delegates, truth_of_an_object, default_of_none),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_events_tell_ways_apart_as_instructions_do(function, monkeypatch):
    """From Python 3.12 on, branches are told and not instructions."""

    def alike() -> list[int]:
        recorder = WayRecorder()
        for x in range(6):
            recorder.run(function, x)
        ways = [recorder.run(function, x)[1] for x in range(6)]
        assert None not in ways
        again = [recorder.run(function, x)[1] for x in range(6)]
        assert again == ways
        return [ways.index(way) for way in ways]

    found = alike()
    monkeypatch.setattr(way_module, "free_tool", lambda: None)
    assert alike() == found
    assert len(set(found)) > 1


def test_other_threads_are_no_part_of_the_way(ways):
    ended = threading.Event()

    def busy() -> None:
        x = 0
        while not ended.is_set():
            x = x + 1 if x % 3 else x - 1

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        found = {ways(loops, 2000) for _ in range(5)}
    finally:
        ended.set()
        thread.join()
    assert len(found) == 1
