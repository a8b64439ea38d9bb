"""Globals that a step reads: no module has them, and a graph freezes them all the same."""

from __future__ import annotations

import contextlib
import dis
import sys
import types
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import AT_THE_END
from cg_lightning.diagnosis.step_watch import StepWatch, UnreadableError, look_into
from cg_lightning.guards.sources import Source
from cg_lightning.guards.values import FrozenValues
from cg_lightning.modules.attributes import is_same_value
from cg_lightning.modules.kinds import is_user_file

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, classmethod, staticmethod, property)


class GlobalReads(Detector):
    """Notes the globals that the user's functions name; reports those that the step changes.

    It does *not* see what a function has closed over. If something else profiles the thread, it
    sees nothing.
    """

    causes = (Cause.STATE_REBOUND,)

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        # by id, with the code to keep it alive: to hash code takes longer than to call it
        self._sources: dict[int, tuple[CodeType, list[Source]]] = {}
        self._before: dict[tuple[int, str], tuple[Source, Any, FrozenValues]] = {}
        self._unreadable: dict[tuple[int, str], str] = {}

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        if sys.getprofile() is None:
            sys.setprofile(self._on_event)
        try:
            yield
        finally:
            if sys.getprofile() == self._on_event:
                sys.setprofile(None)
        for key, (source, value, contents) in self._before.items():
            if not (is_same_value(value, source.value()) and contents.all_hold()):
                self._report(key, f"global {source.name}")
        for key, problem in self._unreadable.items():
            self._report(key, problem)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """While many functions of the compiler run, and none of the user's."""
        if sys.getprofile() != self._on_event:
            yield
            return
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(self._on_event)

    def _report(self, key: tuple[int, str], words: str) -> None:
        readers = [call for call in self.watch.calls() if key in call.sources]
        self.watch.report(Cause.STATE_REBOUND, words, location=AT_THE_END, module="", calls=readers)

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        known = self._sources.get(id(code))
        if known is None:
            known = self._sources[id(code)] = (code, _sources_of(frame))
            for source in known[1]:
                if source.key not in self._before:
                    self._remember(source)
        for source in known[1]:
            self.watch.read(source)

    def _remember(self, source: Source) -> None:
        value = source.value()
        try:
            self._before[source.key] = (source, value, look_into(value))
        except UnreadableError as error:
            self._unreadable[source.key] = f"global {source.name} {error}"


def _is_users_namespace(value: Any) -> bool:
    """Whether ``value`` is a module or class of the user's: ``import config``, ``class Config``."""
    if isinstance(value, type):
        value = sys.modules.get(value.__module__)
    file = getattr(value, "__file__", None)
    return isinstance(value, types.ModuleType) and (
        value.__name__ == "__main__" if file is None else is_user_file(file)
    )


def _sources_in(namespace: Any, path: str, names: tuple[str, ...], seen: set[int]) -> list[Source]:
    """What may be read of a module or class by these names, and of modules and classes in it."""
    found: list[Source] = []
    seen.add(id(namespace))
    for name in names:
        holders = namespace.__mro__ if isinstance(namespace, type) else (namespace,)
        holder = next((each for each in holders if name in vars(each)), None)
        value = None if holder is None else vars(holder)[name]
        if isinstance(value, (types.ModuleType, type)):
            if id(value) not in seen and _is_users_namespace(value):
                found += _sources_in(value, f"{path}.{name}", names, seen)
        elif holder is not None and not isinstance(value, _FUNCTIONS):
            owner = holder.__name__ if isinstance(holder, type) else path
            found.append(Source(holder, name, f"{owner}.{name}"))
    return found


def _sources_of(frame: FrameType) -> list[Source]:
    """What a function of the user's may read: globals that it names, and attributes of them."""
    code, namespace = frame.f_code, frame.f_globals
    if not is_user_file(code.co_filename):
        return []
    found: list[Source] = []
    for name in {
        step.argval for step in dis.get_instructions(code) if step.opname.endswith("_GLOBAL")
    }:
        value = namespace.get(name)
        if isinstance(value, (types.ModuleType, type)):
            if _is_users_namespace(value):
                path = value.__name__ if isinstance(value, type) else name
                found += _sources_in(value, path, code.co_names, set())
        elif name in namespace and not isinstance(value, _FUNCTIONS):
            found.append(Source(namespace, name, name))
    return found
