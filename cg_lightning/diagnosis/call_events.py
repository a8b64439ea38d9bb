"""Every call that a watched step makes, as Python itself reports it.

What is hard here: a step makes a million calls. Nearly all of them are inside torch and this
package, and are of no interest. From Python 3.12 on, ``sys.monitoring`` stops reporting such
functions (PEP 669). Before, a profiler is called for every call.
"""

from __future__ import annotations

import contextlib
import cProfile
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import CodeType, FrameType, FunctionType, MethodDescriptorType, MethodType
from typing import Any, Protocol
from unittest.mock import patch

from cg_lightning.diagnosis.findings import may_call_for_step
from cg_lightning.diagnosis.monitoring import free_tool


class CallListener(Protocol):
    """Receives the calls of one thread."""

    quiet_files: set[str]
    """Files of modules whose calls are of no interest. The listener may add to them."""
    names_in_c: frozenset[str]
    """The names of the functions of C that matter."""

    def on_call(self, frame: FrameType) -> bool:
        """Is called when a function of Python begins.

        Returns:
            True if later calls of the same code are to be reported as well.
        """

    def on_c_call(self, function: Any, frame: FrameType) -> None:
        """Is called when the code of ``frame`` calls a function of C with such a name."""


class CallEvents:
    """Reports the calls of this thread to a listener."""

    def reporting(self) -> AbstractContextManager[str]:
        """While this is entered, calls are reported. Yields what prevents it; empty: nothing."""
        raise NotImplementedError

    def suspended(self) -> AbstractContextManager[None]:
        """While this is entered, nothing is reported."""
        raise NotImplementedError

    def pause(self) -> bool:
        """Report nothing until :meth:`resume`, if reports take time; return whether they do."""
        return False

    def resume(self) -> None:
        """Report again."""


def call_events(listener: CallListener) -> CallEvents:
    """Return the events for ``listener``, as this version of Python has them."""
    if sys.version_info >= (3, 12) and free_tool() is not None:
        return _Monitoring(listener)
    return _Profiler(listener)


class _Profiler(CallEvents):
    """Calls, as ``sys.setprofile`` reports them."""

    def __init__(self, listener: CallListener) -> None:
        self._listener = listener
        # by id, with the code to keep it alive: to hash code takes longer than to call it
        self._quiet: dict[int, CodeType] = {}
        self._profiler = self._on_event

    @contextlib.contextmanager
    def reporting(self) -> Iterator[str]:
        with _paused_profiler() as left:
            if left is None:
                sys.setprofile(self._profiler)
            try:
                yield left or ""
            finally:
                self.pause()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        if not self.pause():
            yield
            return
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> bool:
        is_reporting = sys.getprofile() is self._profiler
        if is_reporting:
            sys.setprofile(None)
        return is_reporting

    def resume(self) -> None:
        if sys.getprofile() is None:  # or else the step has set one of its own
            sys.setprofile(self._profiler)

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


@contextlib.contextmanager
def _paused_profiler() -> Iterator[str | None]:
    """Pause the profiler of this thread, which can have only one, and let it go on afterwards.

    Yields:
        None, or the kind of a profiler that could not be paused. That of ``torch.profiler`` with
        stacks is one: nothing in Python can start it again.
    """
    profiler = sys.getprofile()
    if profiler is None:
        yield None
    elif isinstance(profiler, cProfile.Profile):  # before Python 3.12, which has a place for it
        profiler.disable()
        try:
            yield None
        finally:
            profiler.enable()
    elif isinstance(profiler, (FunctionType, MethodType)):
        sys.setprofile(None)
        try:
            yield None
        finally:
            sys.setprofile(profiler)
    else:
        yield type(profiler).__name__


def _frame_of(code: CodeType) -> FrameType:
    """Return the innermost frame that runs this code."""
    frame = sys._getframe(1)
    while frame.f_code is not code:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame


if sys.version_info >= (3, 12):
    from cg_lightning.diagnosis.monitoring import Monitor

    _EVENTS = sys.monitoring.events

    class _Monitoring(CallEvents):
        """Calls, as ``sys.monitoring`` reports them. Other profilers need not pause.

        Of calls of C, it asks only the code that may do them for the step.
        """

        def __init__(self, listener: CallListener) -> None:
            self._listener = listener
            self._thread = threading.get_ident()
            self._is_suspended = False
            self._seen: dict[int, CodeType] = {}
            starts: dict[int, Callable[..., Any]] = {
                _EVENTS.PY_START: self._on_start,
                _EVENTS.PY_RESUME: self._on_start,  # a generator goes on
                _EVENTS.PY_THROW: self._on_throw,
            }
            self._monitor = Monitor(starts, {_EVENTS.CALL: self._on_c_call})

        @contextlib.contextmanager
        def reporting(self) -> Iterator[str]:
            with self._monitor:
                yield ""

        @contextlib.contextmanager
        def suspended(self) -> Iterator[None]:
            with patch.object(self, "_is_suspended", True):
                yield

        def _on_throw(self, code: CodeType, offset: int, error: BaseException) -> None:
            self._on_start(code, offset)  # Python always reports it

        def _on_start(self, code: CodeType, offset: int) -> Any:
            if self._is_suspended or threading.get_ident() != self._thread:
                return None
            if id(code) not in self._seen:
                self._seen[id(code)] = code
                if may_call_for_step(code.co_filename):
                    self._monitor.report_events_of(code)
            frame = _frame_of(code)
            is_quiet = frame.f_globals.get("__file__") in self._listener.quiet_files
            if is_quiet or not self._listener.on_call(frame):
                return sys.monitoring.DISABLE
            return None

        def _on_c_call(self, code: CodeType, offset: int, function: Any, first: Any) -> None:
            if getattr(function, "__name__", "") not in self._listener.names_in_c:
                return
            if self._is_suspended or threading.get_ident() != self._thread:
                return
            if isinstance(function, MethodDescriptorType):
                function = function.__get__(first, type(first))  # without the type, some crash
            self._listener.on_c_call(function, _frame_of(code))
