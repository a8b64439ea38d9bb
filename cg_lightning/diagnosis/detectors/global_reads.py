"""Which globals a step reads: they are in no module, and a graph freezes them all the same."""

from __future__ import annotations

import contextlib
import dis
import sys
import types
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from cg_lightning.guards.values import FrozenValues
from cg_lightning.modules.attributes import is_same_value
from cg_lightning.modules.kinds import is_user_file

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, classmethod, staticmethod, property)
Read = tuple[Any, str]
"""What holds a global, and its name: the globals of a module (a dict), or a module or class of which it is an attribute."""


def _is_users_namespace(value: Any) -> bool:
    """Whether ``value`` is a module or class of the user's: ``import config``, ``class Config``."""
    if isinstance(value, type):
        value = sys.modules.get(value.__module__)
    file = getattr(value, "__file__", None)
    return isinstance(value, types.ModuleType) and (
        value.__name__ == "__main__" if file is None else is_user_file(file)
    )


def _attributes_of(namespace: Any, names: tuple[str, ...], seen: set[int]) -> list[Read]:
    """What of a module or class may be read by attributes with these names, in modules and classes inside it too."""
    found: list[Read] = []
    seen.add(id(namespace))
    for name in names:
        holders = namespace.__mro__ if isinstance(namespace, type) else (namespace,)
        holder = next((each for each in holders if name in vars(each)), None)
        value = None if holder is None else vars(holder)[name]
        if isinstance(value, (types.ModuleType, type)):
            if id(value) not in seen and _is_users_namespace(value):
                found += _attributes_of(value, names, seen)
        elif holder is not None and not isinstance(value, _FUNCTIONS):
            found.append((holder, name))
    return found


def _reads_of(frame: FrameType) -> list[Read]:
    """What a function of the user's may read: the globals that it names, and attributes of modules and classes."""
    found: list[Read] = []
    code, namespace = frame.f_code, frame.f_globals
    if not is_user_file(code.co_filename):
        return []
    for name in {
        step.argval for step in dis.get_instructions(code) if step.opname.endswith("_GLOBAL")
    }:
        value = namespace.get(name)
        if isinstance(value, (types.ModuleType, type)):
            if _is_users_namespace(value):
                found += _attributes_of(value, code.co_names, set())
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
        self._unreadable: dict[tuple[int, str], str] = {}

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
            if sys.getprofile() == self._on_event:
                sys.setprofile(None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While many functions run that are none of the user's: those of the compiler."""
        if sys.getprofile() != self._on_event:
            yield
            return
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(self._on_event)

    def problems(self) -> Iterator[tuple[tuple[int, str], str]]:
        """Gives the globals that the step itself has changed, or that nobody can look into: the key of a read, and words."""
        for key, (owner, value, contents) in self._before.items():
            if not (is_same_value(value, value_in(owner, key[1])) and contents.all_hold()):
                yield key, f"global {key[1]}"
        yield from self._unreadable.items()

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        reads = self._reads.get(frame.f_code)
        if reads is None:
            reads = self._reads[frame.f_code] = _reads_of(frame)
            for owner, name in reads:
                if (id(owner), name) not in self._before:
                    self._remember(owner, name)
        for read in reads:
            self._on_read(read)

    def _remember(self, owner: Any, name: str) -> None:
        value = value_in(owner, name)
        try:
            self._before[id(owner), name] = (owner, value, FrozenValues([value]))
        except (
            Exception
        ) as error:  # a closed file, say: whatever it raises, what reads it is no graph and says so
            self._unreadable[id(owner), name] = (
                f"global {name} cannot be looked into: {type(error).__name__}: {error}"
            )


def value_in(owner: Any, name: str) -> Any:
    """What ``owner``, a dict or an object, holds by a name; None where it does not."""
    return (owner if isinstance(owner, dict) else vars(owner)).get(name)
