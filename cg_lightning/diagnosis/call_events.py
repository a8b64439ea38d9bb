"""Every call that a watched step makes, as Python itself tells of it.

What is hard here: a step makes a million calls, nearly all of them within torch and this package,
and tells nothing by them. From Python 3.12 on, ``sys.monitoring`` stops telling of a function that
tells nothing (PEP 669). Before, a profiler is called each time.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import CodeType, FrameType, MethodDescriptorType
from typing import Any, Protocol

from cg_lightning.diagnosis.findings import may_call_for_step
from cg_lightning.diagnosis.profilers import paused_profiler


class CallListener(Protocol):
    """Hears of the calls of one thread."""

    quiet_files: set[str]
    """Files of modules whose functions tell nothing. The listener may add to them."""
    names_in_c: frozenset[str]
    """The names of the functions of C that matter."""

    def on_call(self, frame: FrameType) -> bool:
        """A function of Python begins.

        Returns:
            Whether to tell of later calls of the same code, too.
        """

    def on_c_call(self, function: Any, frame: FrameType) -> None:
        """The code of ``frame`` calls a function of C with such a name."""


class CallEvents(Protocol):
    """Tells a listener of the calls of this thread."""

    def telling(self) -> AbstractContextManager[str]:
        """While it tells. Yields the kind of what keeps it from telling; empty if nothing does."""

    def suspended(self) -> AbstractContextManager[None]:
        """While nothing is told."""


def call_events(listener: CallListener) -> CallEvents:
    """Return what tells ``listener`` of calls in this version of Python."""
    if sys.version_info >= (3, 12) and free_tool() is not None:
        return _Monitoring(listener)
    return _Profiler(listener)


def free_tool() -> int | None:
    """Return a number that a tool of ``sys.monitoring`` may have; None if there is none."""
    if sys.version_info >= (3, 12):
        return next((tool for tool in _TOOLS if sys.monitoring.get_tool(tool) is None), None)
    return None


class _Profiler:
    """Tells by ``sys.setprofile``."""

    def __init__(self, listener: CallListener) -> None:
        self._listener = listener
        # by id, with the code to keep it alive: to hash code takes longer than to call it
        self._quiet: dict[int, CodeType] = {}

    @contextlib.contextmanager
    def telling(self) -> Iterator[str]:
        """See :class:`CallEvents`."""
        with paused_profiler() as left:
            if left is None:
                sys.setprofile(self._on_event)
            try:
                yield left or ""
            finally:
                if sys.getprofile() == self._on_event:
                    sys.setprofile(None)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """See :class:`CallEvents`."""
        if sys.getprofile() != self._on_event:
            yield
            return
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(self._on_event)

    def _on_event(self, frame: FrameType, event: str, function: Any) -> None:
        listener = self._listener
        if event == "call":
            # to read ``f_code`` is an audit event: with a hook, it takes as long as all of the rest
            if frame.f_globals.get("__file__") in listener.quiet_files:
                return
            code = frame.f_code
            if id(code) not in self._quiet and not listener.on_call(frame):
                self._quiet[id(code)] = code
        elif event == "c_call" and getattr(function, "__name__", "") in listener.names_in_c:
            listener.on_c_call(function, frame)


def _frame_of(code: CodeType) -> FrameType:
    """Return the innermost frame that runs this code."""
    frame = sys._getframe(1)
    while frame.f_code is not code:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame


if sys.version_info >= (3, 12):
    _MONITORING = sys.monitoring
    _EVENTS = _MONITORING.events
    _TOOLS = (3, 4)  # those that Python names for no purpose
    _STARTS = (_EVENTS.PY_START, _EVENTS.PY_RESUME, _EVENTS.PY_THROW)
    """A function begins, a generator goes on, a generator goes on with an exception."""

    class _Monitoring:
        """Tells by ``sys.monitoring``: other profilers need not pause.

        Of calls of C, it asks only the code that may do them for the step.
        """

        def __init__(self, listener: CallListener) -> None:
            self._listener = listener
            self._thread = threading.get_ident()
            self._is_suspended = False
            self._seen: dict[int, CodeType] = {}
            self._asked: list[CodeType] = []
            """Code whose calls of functions of C are told."""

        @contextlib.contextmanager
        def telling(self) -> Iterator[str]:
            """See :class:`CallEvents`."""
            tool = free_tool()
            assert tool is not None, "it was asked for when this was made"
            _MONITORING.use_tool_id(tool, "cg_lightning")
            try:
                on_start = functools.partial(self._on_start, tool)
                _MONITORING.register_callback(tool, _EVENTS.PY_START, on_start)
                _MONITORING.register_callback(tool, _EVENTS.PY_RESUME, on_start)
                on_throw = functools.partial(self._on_throw, tool)
                _MONITORING.register_callback(tool, _EVENTS.PY_THROW, on_throw)
                _MONITORING.register_callback(tool, _EVENTS.CALL, self._on_c_call)
                _MONITORING.set_events(tool, functools.reduce(int.__or__, _STARTS))
                _MONITORING.restart_events()  # what an earlier step has turned off
                yield ""
            finally:
                _MONITORING.set_events(tool, 0)
                for code in self._asked:
                    _MONITORING.set_local_events(tool, code, 0)
                for event in (*_STARTS, _EVENTS.CALL):
                    _MONITORING.register_callback(tool, event, None)
                _MONITORING.free_tool_id(tool)

        @contextlib.contextmanager
        def suspended(self) -> Iterator[None]:
            """See :class:`CallEvents`."""
            before, self._is_suspended = self._is_suspended, True
            try:
                yield
            finally:
                self._is_suspended = before

        def _on_throw(self, tool: int, code: CodeType, offset: int, error: BaseException) -> None:
            self._on_start(tool, code, offset)  # Python always tells of it

        def _on_start(self, tool: int, code: CodeType, offset: int) -> Any:
            if self._is_suspended or threading.get_ident() != self._thread:
                return None
            if id(code) not in self._seen:
                self._seen[id(code)] = code
                if may_call_for_step(code.co_filename):
                    self._asked.append(code)
                    _MONITORING.set_local_events(tool, code, _EVENTS.CALL)
            frame = _frame_of(code)
            is_quiet = frame.f_globals.get("__file__") in self._listener.quiet_files
            if is_quiet or not self._listener.on_call(frame):
                return _MONITORING.DISABLE
            return None

        def _on_c_call(self, code: CodeType, offset: int, function: Any, first: Any) -> None:
            if getattr(function, "__name__", "") not in self._listener.names_in_c:
                return
            if self._is_suspended or threading.get_ident() != self._thread:
                return
            if isinstance(function, MethodDescriptorType):
                function = function.__get__(first, type(first))  # without the type, some crash
            self._listener.on_c_call(function, _frame_of(code))
