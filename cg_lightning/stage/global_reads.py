"""Which globals a step reads: they are in no module, and a graph freezes them all the same."""

from __future__ import annotations

import contextlib
import dis
import sys
import types
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from cg_lightning.stage.frozen_values import FrozenValues
from cg_lightning.stage.location import is_of_user
from cg_lightning.stage.module_attributes import is_same_value

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, classmethod, staticmethod, property)
Read = tuple[Any, str]
"""What holds a global, and its name: the globals of a module (a dict), or a module or class of which it is an attribute."""


def _is_users_namespace(value: Any) -> bool:
    """Whether ``value`` is a module or class of the user's: ``import config``, ``class Config``."""
    if isinstance(value, type):
        value = sys.modules.get(value.__module__)
    file = getattr(value, "__file__", None)
    return isinstance(value, types.ModuleType) and (value.__name__ == "__main__" if file is None else is_of_user(file))


def _reads_of(frame: FrameType) -> list[Read]:
    """What a function of the user's may read: the globals that it names, and attributes of modules and classes."""
    found: list[Read] = []
    code, namespace = frame.f_code, frame.f_globals
    if not is_of_user(code.co_filename):
        return []
    for name in {step.argval for step in dis.get_instructions(code) if step.opname.endswith("_GLOBAL")}:
        value = namespace.get(name)
        if isinstance(value, (types.ModuleType, type)):
            if _is_users_namespace(value):
                found += [(value, n) for n in code.co_names if not isinstance(vars(value).get(n), (*_FUNCTIONS, type(None)))]
        elif name in namespace and not isinstance(value, _FUNCTIONS):
            found.append((namespace, name))
    return found


class GlobalReads:
    """Notices the globals that the user's own functions name, while a step runs, and whether the step changes them.

    It does *not* see what a function has closed over. Where something else profiles the thread it sees nothing.

    Args:
        on_read: Called with what a function may read, each time that one is called.
    """

    def __init__(self, on_read: Callable[[Read], None]) -> None:
        self._on_read = on_read
        self._reads: dict[CodeType, list[Read]] = {}
        self._before: dict[tuple[int, str], tuple[Any, Any, FrozenValues]] = {}

    @contextlib.contextmanager
    def noticing(self) -> Iterator[None]:
        """While the step runs."""
        if sys.getprofile() is not None:
            yield
            return
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def changed(self) -> list[str]:
        """Names of what the step itself has changed: a list that it has appended to, say."""
        return [
            name
            for (_, name), (owner, value, contents) in self._before.items()
            if not (is_same_value(value, value_in(owner, name)) and contents.hold() and contents.large_ones_hold())
        ]

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        reads = self._reads.get(frame.f_code)
        if reads is None:
            reads = self._reads[frame.f_code] = _reads_of(frame)
            for owner, name in reads:
                if (id(owner), name) not in self._before:
                    value = value_in(owner, name)
                    self._before[id(owner), name] = (owner, value, FrozenValues([value]))
        for read in reads:
            self._on_read(read)


def value_in(owner: Any, name: str) -> Any:
    """What ``owner``, a dict or an object, holds by a name; None where it does not."""
    return (owner if isinstance(owner, dict) else vars(owner)).get(name)
