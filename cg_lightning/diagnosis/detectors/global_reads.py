"""Globals that a step reads, and what its functions hold: a graph freezes them all the same."""

from __future__ import annotations

import contextlib
import dis
import sys
import types
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.call_events import call_events
from cg_lightning.diagnosis.clocks import (
    NAMES_OF_CLOCKS,
    arithmetic_of_thread,
    caller_of,
    clock_in_c,
    clock_in_python,
    environment_variable,
    has_clocks,
    method_of_generator,
    reads_environment,
)
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import AT_THE_END, NOT_YOURS, is_step_calling
from cg_lightning.diagnosis.functions import (
    FoundFunctions,
    codes_inside,
    find_functions,
    is_running,
    source_of_attributes,
    source_of_cache,
    sources_of_function,
)
from cg_lightning.diagnosis.hidden_modules import hidden_modules, opaque_in, sources_in
from cg_lightning.diagnosis.library_settings import has_settings, settings_read_by
from cg_lightning.diagnosis.module_state import ModuleState
from cg_lightning.diagnosis.step_watch import StepWatch, UnreadableError, look_into
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.guards.sources import ENVIRONMENT, DerivedNamespace, Source
from cg_lightning.guards.values import FrozenValues
from cg_lightning.modules.attributes import is_same_value
from cg_lightning.modules.kinds import is_user_file

_FUNCTIONS = (types.FunctionType, classmethod, staticmethod, property)


_CLASS_OF = frozenset({"type", "__class__"})
"""How a function asks for the class of an object."""
_LOOK_AT_ANYTHING = frozenset({"type", "id", "callable", "suppress", "eval", "exec"})
_GENERATED = "<string>"
"""The file of methods that dataclasses and named tuples make."""


class GlobalReads(Detector):
    """Notes the globals that the user's functions name, and what these functions hold.

    A function holds what it has closed over, its defaults and its attributes. What the step changes
    of all that is reported, and so is what nobody can look into, clocks included.
    """

    causes = (Cause.STATE_REBOUND, Cause.OPAQUE)
    names_in_c = NAMES_OF_CLOCKS

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        # by id, with the code to keep it alive: to hash code takes longer than to call it
        self._known: dict[int, _Code] = {}
        self.quiet_files: set[str] = set()
        """Files of others in which no function is a clock."""
        self._events = call_events(self)
        self._made_here: set[int] = set()
        """The code of functions that functions of the step make, by id."""
        self._before: dict[tuple[int, str], tuple[Source, Any, FrozenValues]] = {}
        self._modules: dict[tuple[int, str], list[ModuleState]] = {}
        """The modules that a source holds."""
        self._inside: dict[tuple[int, str], list[Source]] = {}
        """What these hold."""
        self._problems: dict[tuple[int, str], list[tuple[Cause, str, str]]] = {}
        self._of_classes: dict[tuple[int, type], list[Source]] = {}
        """What the functions with some code read of the class of their first argument."""
        self._unguarded: dict[tuple[int, str], list[ModuleCall]] = {}
        """Which calls read what only the step itself is expected to change."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        with self._events.telling() as hindrance:
            yield
        if hindrance:
            self.watch.report(
                Cause.OPAQUE,
                f"a profiler that cannot be paused ({hindrance}) hides what functions hold",
                location=NOT_YOURS,
                module="",
                calls=self.watch.calls(),
            )
        for key, problems in self._problems.items():
            for cause, words, location in problems:
                self._report(key, cause, words, location)
        for key, (source, value, contents) in self._before.items():
            with self.watch.paused():
                now = source.value()
            if not (is_same_value(value, now) and contents.all_hold()):
                self._report(key, Cause.STATE_REBOUND, _words(source), AT_THE_END)
            for state in self._modules.get(key, ()):
                with self.watch.paused():
                    changed = state.changed()
                if changed:
                    words = f"{_words(source)}: {type(state.module).__name__}.{changed[0]}"
                    self._report(key, Cause.STATE_REBOUND, words, AT_THE_END)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """While many functions of the compiler run, and none of the user's."""
        with self._events.suspended():
            yield

    def _report(self, key: tuple[int, str], cause: Cause, words: str, location: str) -> None:
        readers = [call for call in self.watch.calls() if key in call.sources]
        readers += self._unguarded.get(key, [])
        self.watch.report(cause, words, location=location, module="", calls=readers)

    def on_call(self, frame: FrameType) -> bool:
        """See :class:`~cg_lightning.diagnosis.call_events.CallListener`."""
        code = frame.f_code
        known = self._known.get(id(code))
        if known is None:
            if self.watch.is_paused:  # we call it: what the step does with it comes later
                return True
            known = self._known[id(code)] = self._look_at(frame)
        if known.matters:
            self._on_call(known, frame)
        return known.matters

    def on_c_call(self, function: Any, frame: FrameType) -> None:
        """See :class:`~cg_lightning.diagnosis.call_events.CallListener`."""
        if name := clock_in_c(function) or method_of_generator(function, frame):
            self._report_clock(name, frame)

    def _on_call(self, known: _Code, frame: FrameType) -> None:
        if known.clock:
            self._report_clock(known.clock, caller_of(frame))
        if known.is_of_environment:
            self._read_environment(frame)
        for source in known.sources:
            self._read(source)
        if known.asks_for_class:
            for source in self._sources_of_own_class(frame, known):
                self._read(source)
        for function, sources in known.functions:
            if len(known.functions) == 1 or is_running(function, frame):
                for source in sources:
                    self._note(source, known.location)

    def _report_clock(self, name: str, caller: FrameType) -> None:
        if is_step_calling(caller):
            self.watch.report(Cause.OPAQUE, name)

    def _read_environment(self, frame: FrameType) -> None:
        """Guard an environment variable that the step reads."""
        if self.watch.is_paused or not is_step_calling(frame.f_back):
            return
        if name := environment_variable(frame):
            self._note(Source(ENVIRONMENT, name, f"os.environ[{name!r}]"), "")
        else:
            self.watch.report(Cause.OPAQUE, "os.environ")

    def _look_at(self, frame: FrameType) -> _Code:
        code = frame.f_code
        settings = settings_read_by(code)
        for source in settings:
            self._remember(source, AT_THE_END)
        if not is_user_file(code.co_filename):
            file = code.co_filename
            is_of_module = frame.f_globals.get("__file__") == file
            if is_of_module and not (has_clocks(file) or has_settings(file)):
                self.quiet_files.add(file)
            clock, is_of_environment = clock_in_python(code), reads_environment(code)
            matters = bool(clock or settings) or is_of_environment
            return _Code(code, matters, clock, is_of_environment, sources=settings)
        found = FoundFunctions([], [], [])
        if code.co_filename != _GENERATED:
            found = find_functions(frame, id(code) in self._made_here)
        if found.is_hidden:
            words = f"gc.freeze hides what a function holds: {code.co_name}"
            self.watch.report(Cause.OPAQUE, words)
        self._made_here.update(map(id, codes_inside(code)))
        if _may_use_unseen(code):
            self.watch.note_unseen_use(f"{code.co_filename}:{code.co_firstlineno}")
        location = f"{code.co_filename}:{code.co_firstlineno}"
        sources = [
            *_sources_of(frame),
            *map(source_of_cache, found.caches),
            *found.places,
            *settings,
        ]
        for source in sources:
            self._remember(source, location)
        held = [(function, _sources_held_by(function)) for function in found.functions]
        asks = not _CLASS_OF.isdisjoint(code.co_names)
        clock = arithmetic_of_thread(code)
        matters = bool(sources or held or asks or clock)
        return _Code(code, matters, clock, False, location, sources, held, asks)

    def _sources_of_own_class(self, frame: FrameType, known: _Code) -> list[Source]:
        """What a function reads of the class of its first argument: ``type(self).scale``."""
        code = known.code
        if not code.co_argcount:
            return []
        cls = type(frame.f_locals.get(code.co_varnames[0]))
        key = (id(code), cls)
        if key not in self._of_classes:
            found = []
            if _is_users_namespace(cls):
                found = _sources_in(cls, cls.__name__, _names_in(code), set())
            self._of_classes[key] = found
            for source in found:
                self._remember(source, known.location)
        return self._of_classes[key]

    def _note(self, source: Source, location: str) -> None:
        self._remember(source, location)
        self._read(source)

    def _read(self, source: Source) -> None:
        if source.name != "__dict__" or source.value():
            self.watch.read(source)
            for inside in self._inside.get(source.key, ()):
                self.watch.read(inside)
            return
        # hardly any function has attributes: a guard of each would cost more than the rest
        readers = self._unguarded.setdefault(source.key, [])
        readers += [call for call in self.watch.stack if call not in readers]

    def _remember(self, source: Source, location: str) -> None:
        key = source.key
        if key in self._before or key in self._problems:
            return
        with self.watch.paused():  # to look at a module is no read of the step's
            value = source.value()
        try:
            contents = look_into(value, source.path)
            modules = hidden_modules(self.watch, contents.modules) if contents.modules else []
            inside = sources_in(modules, source.path)
            opaque = [*self.watch.look_at(contents), *opaque_in(self.watch, inside)]
        except UnreadableError as error:
            words = f"{_words(source)} {error}"
            self._problems[key] = [(Cause.STATE_REBOUND, words, AT_THE_END)]
            return
        if modules:
            self._inside[key] = inside
            with self.watch.paused():
                self._modules[key] = [ModuleState(module) for module in modules]
        if opaque:
            self._problems[key] = [(Cause.OPAQUE, words, location) for words in opaque]
        self._before[key] = (source, value, contents)


class _Code(NamedTuple):
    """What is known of one code object whose functions the step calls."""

    code: CodeType
    matters: bool
    """Whether a call tells anything."""
    clock: str
    """What it asks that nobody can guard; empty if nothing."""
    is_of_environment: bool
    """Whether it reads environment variables for its caller."""
    location: str = ""
    sources: Sequence[Source] = ()
    """The globals that it names, and the settings of PyTorch."""
    functions: Sequence[tuple[FunctionType, list[Source]]] = ()
    """The functions that have it, and what each holds."""
    asks_for_class: bool = False
    """Whether it may ask for the class of an object."""


def _words(source: Source) -> str:
    is_attribute = source.belongs_to_function or isinstance(source.holder, (type, DerivedNamespace))
    return source.path if is_attribute else f"global {source.name}"


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
        elif holder is not None and isinstance(value, types.FunctionType):
            place = holder if isinstance(holder, type) else vars(holder)
            found += [Source(place, name, f"{path}.{name}"), *_attributes_of_function(value)]
        elif holder is not None and not isinstance(value, _FUNCTIONS):
            owner = holder.__name__ if isinstance(holder, type) else path
            found.append(Source(holder, name, f"{owner}.{name}"))
    return found


def _names_in(code: CodeType) -> tuple[str, ...]:
    """The names that a function mentions, also as a text: ``getattr(type(self), "scale")``."""
    return (*code.co_names, *[each for each in code.co_consts if isinstance(each, str)])


def _sources_held_by(function: FunctionType) -> list[Source]:
    """What a function holds, and what it may read of modules and classes that it holds."""
    found = sources_of_function(function)
    names = _names_in(function.__code__)
    for source in list(found):
        value = source.value()
        if isinstance(value, (types.ModuleType, type)) and _is_users_namespace(value):
            found += _sources_in(value, value.__name__, names, set())
        elif isinstance(value, types.FunctionType):
            found += _attributes_of_function(value)
    return found


def _attributes_of_function(function: FunctionType) -> list[Source]:
    if not is_user_file(function.__code__.co_filename):
        return []
    return [source_of_attributes(function)]


def _may_use_unseen(code: CodeType) -> bool:
    """Whether a function may handle an error, or looks at objects without asking them."""
    if not _LOOK_AT_ANYTHING.isdisjoint(code.co_names):
        return True
    names = [step.opname for step in dis.get_instructions(code)]
    return names.count("PUSH_EXC_INFO") > names.count("WITH_EXCEPT_START")


def _sources_of(frame: FrameType) -> list[Source]:
    """What a function of the user's may read: globals that it names, and attributes of them."""
    code, namespace = frame.f_code, frame.f_globals
    found: list[Source] = []
    for name in {
        step.argval for step in dis.get_instructions(code) if step.opname.endswith("_GLOBAL")
    }:
        value = namespace.get(name)
        if isinstance(value, (types.ModuleType, type)):
            if _is_users_namespace(value):
                path = value.__name__ if isinstance(value, type) else name
                found += _sources_in(value, path, _names_in(code), set())
        elif isinstance(value, types.FunctionType):
            found += [Source(namespace, name, name), *_attributes_of_function(value)]
        elif name in namespace and not isinstance(value, _FUNCTIONS):
            found.append(Source(namespace, name, name))
    return found
