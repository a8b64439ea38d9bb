"""A tool of ``sys.monitoring``, to which Python 3.12 and later reports what runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

_TOOLS = (3, 4)  # numbers without a purpose in Python


def free_tool() -> int | None:
    """Return a number that a tool of ``sys.monitoring`` may have; None if there is none."""
    if sys.version_info >= (3, 12):
        return next((tool for tool in _TOOLS if sys.monitoring.get_tool(tool) is None), None)
    return None


if sys.version_info >= (3, 12):
    _MONITORING = sys.monitoring

    class Monitor:
        """While it is entered, Python calls some functions, by event. A tool must be free.

        It is no generator: Python would report the library's functions around it.

        Args:
            callbacks: What is called for all code that runs.
            of_some_code: What is called for code that :meth:`report_events_of` was given.
        """

        def __init__(
            self,
            callbacks: Mapping[int, Callable[..., Any]],
            of_some_code: Mapping[int, Callable[..., Any]] | None = None,
        ) -> None:
            self._tool = -1
            self._local = of_some_code or {}
            self._callbacks = {**callbacks, **self._local}
            self._events = functools.reduce(int.__or__, callbacks)
            self._codes: list[CodeType] = []

        def __enter__(self) -> None:
            tool = free_tool()
            assert tool is not None, "callers check that a tool is free"
            self._tool = tool
            _MONITORING.use_tool_id(self._tool, "cg_lightning")
            try:
                for event, callback in self._callbacks.items():
                    _MONITORING.register_callback(self._tool, event, callback)
                _MONITORING.restart_events()  # an earlier step may have turned events off
                _MONITORING.set_events(self._tool, self._events)
            except BaseException:
                self.__exit__()
                raise

        def report_events_of(self, code: CodeType) -> None:
            """Report the further events of some code."""
            self._codes.append(code)
            events = functools.reduce(int.__or__, self._local)
            _MONITORING.set_local_events(self._tool, code, events)

        def __exit__(self, *_: object) -> None:
            _MONITORING.set_events(self._tool, 0)
            for code in self._codes:
                _MONITORING.set_local_events(self._tool, code, 0)
            for event in self._callbacks:
                _MONITORING.register_callback(self._tool, event, None)
            _MONITORING.free_tool_id(self._tool)
