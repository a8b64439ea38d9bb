"""The way of a step through the code: every instruction of Python that ran, in order.

Two steps that went the same way have read the same names, called the same functions and done the
same in Python. Only values may differ: numbers, and what tensors hold. So what a watched step has
shown is true of each step that goes its way, whatever the shape of its batch. To trace a step takes
some eager steps; to watch it takes dozens.

What is hard here:

- From Python 3.12 on, ``sys.monitoring`` reports calls, branches and exceptions. All instructions
  follow from these, and to receive them takes a third of the time.
- Before, a thread has one place for a tracer. If a debugger or a tool for coverage traces, there is
  no way, in any version: their code may run anywhere.
- Two modules of one class run the same code, so the way has the module of each call as well.
- It cannot be observed which branch compiled code takes, nor which attribute ``getattr`` reads if
  its name is computed. A step with such code has no way.
- Our own code is around that of the user. It is no part of the way.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import sys
import threading
from array import array
from collections.abc import Callable
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

from cg_lightning.diagnosis.monitoring import free_tool
from cg_lightning.modules.kinds import is_our_file, is_user_file

Way = bytes
"""A digest of everything that ran."""
_CALL_OF_MODULE = nn.Module.__call__.__code__
_COMPUTES_NAMES = frozenset({"getattr", "attrgetter", "vars", "__dict__", "eval", "exec"})
_COMPILER = "/torch/_dynamo/"
_OURS, _TRACED, _MODULE, _UNSEEN = range(4)
"""Kinds of code."""


class WayRecorder:
    """Traces steps of one module.

    It keeps the code that it has seen alive, because code is known by its address.
    """

    def __init__(self) -> None:
        self._codes: dict[int, tuple[CodeType, int]] = {}

    def run(
        self, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Way | None]:
        """Call a function. Return its output, and its way; None if it is not known."""
        if sys.gettrace() is not None:
            return function(*args, **kwargs), None
        known = len(self._codes)
        collects = gc.isenabled()
        gc.disable()  # it would call finalizers anywhere
        try:
            if sys.version_info >= (3, 12) and free_tool() is not None:
                monitored = _MonitoredTrace(self._codes)
                return monitored.run(function, *args, **kwargs), monitored.way()
            trace = _Trace(self._codes)
            output = trace.run(function, *args, **kwargs)
        finally:
            if collects:
                gc.enable()
        is_whole = len(self._codes) == known or _tells_first_calls()
        return output, trace.way() if is_whole else None


@functools.cache
def _tells_first_calls() -> bool:
    """Return False in Python 3.13: it reports no instructions of the first call of a function."""
    function = FunctionType(compile("None", "<new>", "eval"), {})  # code of ours is not traced
    trace = _Trace({})
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace.on_call)
    function()
    sys.settrace(None)
    return len(trace.ran) > 1


def _kind_of(code: CodeType) -> int:
    file = code.co_filename
    if is_our_file(file):
        return _OURS
    if code is _CALL_OF_MODULE:
        return _MODULE
    computes_names = is_user_file(file) and not _COMPUTES_NAMES.isdisjoint(code.co_names)
    return _UNSEEN if computes_names or _COMPILER in file else _TRACED


def _known_kind(codes: dict[int, tuple[CodeType, int]], code: CodeType) -> int:
    known = codes.get(id(code))
    if known is None:
        known = codes[id(code)] = (code, _kind_of(code))
    return known[1]


class _Trace:
    """One run under ``sys.settrace``.

    Args:
        codes: The code that was seen so far, and its kind, by id.
    """

    def __init__(self, codes: dict[int, tuple[CodeType, int]]) -> None:
        self.ran = array("q")
        self._codes = codes
        self._is_seen = True
        append = self.ran.append

        # it is called for each instruction, so it looks nothing up
        def on_instruction(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
            append(frame.f_lasti)
            return on_instruction

        self._on_instruction = on_instruction

    def way(self) -> Way | None:
        """Return the way that was traced; None if it is not known."""
        return hashlib.sha256(self.ran.tobytes()).digest() if self._is_seen else None

    def on_call(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        """Is called for each call of a function."""
        code = frame.f_code
        kind = _known_kind(self._codes, code)
        if kind == _OURS:
            return None
        self.ran.append(id(code))
        if kind == _MODULE:
            self.ran.append(id(frame.f_locals["self"]))
        elif kind == _UNSEEN:
            self._is_seen = False
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._on_instruction

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function. Return its output."""
        sys._getframe().f_trace_opcodes = True  # or else Python 3.12 reports no instructions
        sys.settrace(self.on_call)
        try:
            return function(*args, **kwargs)
        finally:
            self._is_seen &= sys.gettrace() == self.on_call
            if sys.gettrace() == self.on_call:
                sys.settrace(None)


if sys.version_info >= (3, 12):
    from cg_lightning.diagnosis.monitoring import Monitor

    _EVENTS = sys.monitoring.events
    _BITS = 31
    """Of a place in code."""

    class _MonitoredTrace:
        """One run under ``sys.monitoring``.

        What it calls is monitored itself, which makes all that it does slow. So it only stores
        events: those of other threads and of our own code are left out at the end.

        Args:
            codes: The code that was seen so far, and its kind, by id.
        """

        def __init__(self, codes: dict[int, tuple[CodeType, int]]) -> None:
            self._codes = codes
            self._events: list[tuple[int, CodeType, int]] = []
            """The thread, the code, and what happened there."""

        def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            """Call a function. Return its output."""
            with Monitor(self._callbacks()):
                return function(*args, **kwargs)

        def way(self) -> Way | None:
            """Return the way of the run; None if it is not known."""
            thread, kinds, ran = threading.get_ident(), dict[int, int](), array("q")
            append = ran.append
            for its_thread, code, place in self._events:
                key = id(code)
                if its_thread != thread:
                    continue
                if key not in kinds:
                    kinds[key] = _known_kind(self._codes, code)
                if kinds[key] != _OURS:
                    append(key)
                    append(place)
            return None if _UNSEEN in kinds.values() else hashlib.sha256(ran.tobytes()).digest()

        def _callbacks(self) -> dict[int, Callable[..., Any]]:
            """Return the functions that ``sys.monitoring`` calls, by event."""
            note, thread = self._events.append, threading.get_ident

            def on_start(code: CodeType, offset: int) -> None:
                note((thread(), code, offset << _BITS))
                if code is _CALL_OF_MODULE:
                    note((thread(), code, id(sys._getframe(1).f_locals["self"])))

            def on_branch(code: CodeType, offset: int, destination: int) -> None:
                note((thread(), code, offset << _BITS | destination))

            def on_throw(code: CodeType, offset: int, error: BaseException) -> None:
                note((thread(), code, ~(offset << _BITS)))

            def on_exception(event: int, code: CodeType, offset: int, error: BaseException) -> None:
                note((thread(), code, ~(offset << _BITS | event)))

            exceptions = (_EVENTS.RAISE, _EVENTS.EXCEPTION_HANDLED, _EVENTS.PY_UNWIND)
            return {
                _EVENTS.PY_START: on_start,
                _EVENTS.PY_RESUME: on_start,
                _EVENTS.PY_THROW: on_throw,
                _EVENTS.BRANCH: on_branch,
                **{event: functools.partial(on_exception, event) for event in exceptions},
            }
