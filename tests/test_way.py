"""The way of a step through the code: equal if the same instructions ran, and nothing else."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import nn

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
