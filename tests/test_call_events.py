"""What Python tells of the calls of a watched step, without a step."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.diagnosis.call_events import _Profiler, call_events
from cg_lightning.diagnosis.watcher import StepWatcher


class Listener:
    names_in_c = frozenset({"monotonic", "index"})

    def __init__(self) -> None:
        self.quiet_files: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.c_calls: list[Any] = []

    def on_call(self, frame: FrameType) -> bool:
        self.calls[frame.f_code.co_name] += 1
        return frame.f_code.co_name in ("step", "again", "numbers")

    def on_c_call(self, function: Any, frame: FrameType) -> None:
        self.c_calls.append((function.__name__, function.__self__, frame.f_code.co_name))


def again() -> None:
    pass


def once() -> None:
    pass


def numbers() -> Any:
    yield 1
    yield time.monotonic()


def step() -> None:
    for _ in range(3):
        again()
        once()
    [5].index(5)
    list(numbers())


def counts(listener: Listener) -> list[int]:
    return [listener.calls[name] for name in ("step", "again", "once", "numbers")]


@pytest.mark.parametrize("repetition", range(2))
def test_what_tells_nothing_is_told_once(repetition):
    """What one step turned off is told to the next."""
    listener = Listener()
    with call_events(listener).reporting() as hindrance:
        step()
        assert hindrance == ""
    step()
    assert counts(listener) == [1, 3, 1, 3]
    assert listener.c_calls == [("index", [5], "step"), ("monotonic", time, "numbers")]


def test_files_of_which_nothing_is_told():
    listener = Listener()
    listener.quiet_files.add(__file__)
    with call_events(listener).reporting():
        step()
    assert counts(listener) == [0, 0, 0, 0]


def test_other_threads_and_suspended_code_are_not_told():
    listener = Listener()
    events = call_events(listener)
    with events.reporting():
        with events.suspended():
            step()
        other = threading.Thread(target=step)
        other.start()
        other.join()
        before = counts(listener)
        step()
    assert before == [0, 0, 0, 0]
    assert counts(listener) == [1, 3, 1, 3]
    assert len(listener.c_calls) == 2


def test_an_error_of_the_listener_ends_the_step_and_leaves_nothing():
    class Stops(Listener):
        def on_call(self, frame: FrameType) -> bool:
            if frame.f_code is once.__code__:
                raise KeyboardInterrupt
            return super().on_call(frame)

    listener = Stops()
    with pytest.raises(KeyboardInterrupt), call_events(listener).reporting():
        step()
    step()
    assert counts(listener) == [1, 1, 0, 0]
    assert sys.getprofile() is None


def test_two_steps_at_once():
    """As two Trainers in two threads: each is told of its own."""
    outer, inner = Listener(), Listener()

    def other() -> None:
        with call_events(inner).reporting():
            step()
            step()

    with call_events(outer).reporting():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        step()
    assert (counts(outer), counts(inner)) == ([1, 3, 1, 3], [2, 6, 1, 6])


def test_an_exception_that_is_thrown_into_a_generator():
    """Python cannot stop telling of these."""
    listener = Listener()

    @contextlib.contextmanager
    def opened() -> Any:
        try:
            yield
        finally:
            once()

    with call_events(listener).reporting():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="mine"), opened():
                raise RuntimeError("mine")
    assert listener.calls["opened"]
    assert listener.calls["once"] == 1


def test_code_without_a_file():
    namespace: dict[str, Any] = {}
    exec(textwrap.dedent("def step():\n    return 1\n"), namespace)
    listener = Listener()
    with call_events(listener).reporting():
        namespace["step"]()
    assert listener.calls["step"] == 1


@pytest.mark.parametrize("sets_profiler", [False, True])
def test_a_profiler_is_not_told_of_what_detectors_do_around_calls(monkeypatch, sets_profiler):
    """It was, and took a third of a watched step. A profiler that the step has set stays."""
    module = "cg_lightning.diagnosis.detectors.global_reads"
    monkeypatch.setattr(f"{module}.call_events", _Profiler)  # also from Python 3.12 on

    class Body(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if sets_profiler:
                sys.setprofile(mine)
            return once_in_net(x)

    def once_in_net(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def mine(*_: Any) -> None:
        pass

    told: list[str] = []
    on_event = _Profiler._on_event

    def event(self: _Profiler, frame: FrameType, *rest: Any) -> None:
        told.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
        on_event(self, frame, *rest)

    monkeypatch.setattr(_Profiler, "_on_event", event)
    net = nn.Sequential(Body(), nn.Linear(4, 4))
    watcher = StepWatcher(net, RecorderBackend(torch.device("cpu")), effects=None)
    inside: list[Any] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        y = net(x)
        inside.append(sys.getprofile())
        sys.setprofile(None)
        return y

    watcher.watch(lambda: step(torch.ones(2, 4)), None)
    of_call = [each for each in told if "around_call" in each or "_numpy_state" in each]
    assert not of_call
    assert any("once_in_net" in each for each in told) is not sets_profiler
    assert (inside[0] is mine) is sets_profiler
