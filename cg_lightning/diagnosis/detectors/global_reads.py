"""Globals that a step reads, and what its functions hold: a graph freezes them all the same."""

from __future__ import annotations

import builtins
import contextlib
import copy
import dataclasses
import importlib
import pickle
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.lines import Elsewhere, file_and_line
from cg_lightning.diagnosis.call_events import call_events
from cg_lightning.diagnosis.contents import UnreadableError, look_into
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import is_step_calling
from cg_lightning.diagnosis.frames import (
    classes_given,
    is_generated,
    is_users_code,
    may_read_modules_unseen,
    may_use_unseen,
    namespaces_given,
)
from cg_lightning.diagnosis.functions import (
    FoundFunctions,
    codes_inside,
    find_functions,
    is_only_called_here,
    is_running,
    source_of_cache,
    users_functions,
)
from cg_lightning.diagnosis.garbage import NAMES_OF_COLLECTOR
from cg_lightning.diagnosis.hidden_modules import hidden_modules, opaque_in, sources_in
from cg_lightning.diagnosis.library_settings import (
    CONTEXT_OF_DECIMAL,
    FILTERS,
    FLAGS_OF_DECIMAL,
    LOCALE_AND_ZONE,
    WARN,
    has_decimal,
    has_settings,
    setting_returned_by,
    settings_of_numpy,
    settings_read_by,
)
from cg_lightning.diagnosis.log_levels import asks_for_level, level_asked_for
from cg_lightning.diagnosis.module_state import ModuleState
from cg_lightning.diagnosis.names_in_code import NamesInCode
from cg_lightning.diagnosis.sources_of_code import (
    all_sources_in,
    asks_for_registrations,
    modules_named,
    namespaces_named,
    needs_guard,
    sources_held_by,
    sources_in_held,
    sources_in_namespace,
    sources_of,
    values_by_names,
)
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.volatile_functions import (
    NAMES_OF_VOLATILE,
    caller_of,
    environment_variable,
    has_volatile,
    method_of_generator,
    reads_environment,
    returns_library_state,
    seeds_itself,
    tensor_of_address,
    volatile_in_c,
    volatile_in_python,
)
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.diagnosis.writes import (
    NAMES_OF_WRITES,
    has_writes,
    is_called_by_user,
    write_in_c,
    write_in_python,
)
from cg_lightning.guards.frozen_parts import ChangedPlace
from cg_lightning.guards.sources import (
    ENVIRONMENT,
    REGISTRATIONS,
    DerivedNamespace,
    LibrarySource,
    Source,
)
from cg_lightning.guards.value_kinds import can_be_set_in
from cg_lightning.guards.values import FrozenValues
from cg_lightning.modules.attributes import is_same_value
from cg_lightning.modules.kinds import is_users_namespace

_BY_TEXT = frozenset({"globals", "eval", "exec"})
"""Functions of C by which code reads globals that it does not name."""
_PICKLES = frozenset({"dump", "dumps"})
"""Functions of C that read all attributes of what they are given."""
_COPIES = (copy.copy.__code__, copy.deepcopy.__code__)
"""The same in Python."""
_IMPORT = importlib.import_module.__code__


_NAMES_IN_C = _BY_TEXT | WARN | _PICKLES


class GlobalReads(Detector):
    """Notes the globals that the user's functions name, and the state of these functions.

    The state of a function is its closure, its defaults and its attributes. It reports values of
    these that the step changes, or that cannot be compared, and calls of volatile functions such as
    clocks. As it receives all calls, it also reports those that write or show text.
    """

    sees_compiled_code = True
    names_in_c = NAMES_OF_VOLATILE | NAMES_OF_WRITES | NAMES_OF_COLLECTOR | _NAMES_IN_C

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        # by id, with the code to keep it alive: to hash code takes longer than to call it
        self._known: dict[int, _Code] = {}
        self.quiet_files: set[str] = set()
        """Files of others in which no function is volatile."""
        self._events = call_events(self)
        watch.note_call_events(self._events)
        watch.sources_held = self._sources_held
        self._made_here: set[int] = set()
        """The code of functions that functions of the step make, by id."""
        self._from_before: dict[int, list[FunctionType]] | None = None
        """The functions that existed before the step made any, by the ids of their code."""
        self._before: dict[tuple[int, str], tuple[Source, Any, FrozenValues]] = {}
        self._modules: dict[tuple[int, str], list[ModuleState]] = {}
        """The modules that a source holds."""
        self._inside: dict[tuple[int, str], list[Source]] = {}
        """What these hold."""
        self._problems: dict[tuple[int, str], list[tuple[Cause, str, str]]] = {}
        self._named: dict[int, Any] = {}
        """The user's classes that code of the step names."""
        self._held: dict[int, tuple[Any, str]] = {}
        """Modules, classes and loggers of libraries that values hold, and their names."""
        self._modules_named: dict[int, Any] = {}
        """The user's modules that code names, and all modules that it passes on."""
        self._reads_by_name = False
        """Whether the step may read attributes of these by names that its code does not mention."""
        self._reads_unseen = False
        """Whether a global holds a function by which code reads modules without an interception."""
        self._of_namespaces: dict[tuple[int, int, str], list[Source]] = {}
        """What some code may read of such a class, or of a class or module that it is given."""
        self._to_remember: deque[Source] = deque()
        """What values hold that were found, and that are looked at next."""
        self._is_remembering = False
        self._weights = {id(each) for each in chain(watch.root.parameters(), watch.root.buffers())}
        """The ids of parameters and buffers, whose places in memory are guarded."""
        self._unguarded: dict[tuple[int, str], list[ModuleCall]] = {}
        """Which calls read what only the step itself is expected to change."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        with self._events.reporting() as hindrance:
            yield
        if hindrance:
            self.watch.report(
                Cause.OPAQUE,
                f"a profiler that cannot be paused ({hindrance}) hides what functions hold",
                location=Elsewhere.NOT_YOURS,
                module="",
                calls=self.watch.calls(),
            )
        for key, problems in self._problems.items():
            for cause, words, location in problems:
                self._report(key, cause, words, location)
        for key, (source, value, contents) in self._before.items():
            with self.watch.paused():
                now = source.value()
            if source is FLAGS_OF_DECIMAL:  # once they are set, they stay
                self.watch.notes.did_one_time_work |= value != now
            elif not (is_same_value(value, now) and contents.hold()):
                line = self._line(source, value, contents)
                self._report(key, Cause.STATE_REBOUND, _words(source), line or Elsewhere.AT_THE_END)
            for state in self._modules.get(key, ()):
                with self.watch.paused():
                    changed = state.changed()
                if changed:
                    words = f"{_words(source)}: {type(state.module).__name__}.{changed[0]}"
                    with self.watch.paused():
                        line = self.watch.line_that_changes(state.changed_places(changed[0]))
                    self._report(key, Cause.STATE_REBOUND, words, line or Elsewhere.AT_THE_END)

    def _line(self, source: Source, before: Any, contents: FrozenValues) -> str:
        """Return the line that has changed a source; empty if none is known."""
        with self.watch.paused():
            if is_same_value(before, source.value()):
                return self.watch.line_that_changes(contents.changed_places(source.name))
            return self.watch.line_that_changes([ChangedPlace(source.name, is_set=True)])

    def suspended(self) -> contextlib.AbstractContextManager[None]:
        return self._events.suspended()  # many functions of the compiler run, none of the user's

    def _report(self, key: tuple[int, str], cause: Cause, words: str, location: str) -> None:
        readers = [call for call in self.watch.calls() if key in call.sources]
        readers += self._unguarded.get(key, [])
        self.watch.report(cause, words, location=location, module="", calls=readers)

    def on_call(self, frame: FrameType) -> bool:
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
        if function.__name__ in NAMES_OF_COLLECTOR and function.__module__ == "gc":
            self.watch.garbage.end()
        name = volatile_in_c(function) or method_of_generator(function, frame)
        if name := name or seeds_itself(function, frame):
            if id(tensor_of_address(function)) not in self._weights:
                self._report_volatile(name, frame)
        elif name := write_in_c(function, frame):
            self.watch.report_once_a_line(Cause.PRINTED, name)
        elif function.__name__ in WARN and function.__module__ == "_warnings":
            if not self.watch.is_paused:  # now they may be others: ``with catch_warnings():``
                self.watch.read(FILTERS)
        elif function.__name__ in _PICKLES and _pickles(function):
            self.watch.read_all_attributes(None)
        elif _reads_by_text(function) and is_users_code(frame):
            self.watch.report_once_a_line(Cause.OPAQUE, function.__name__)

    def _on_call(self, known: _Code, frame: FrameType) -> None:
        if known.volatile:
            self._report_volatile(known.volatile, caller_of(frame))
        if known.write and is_called_by_user(frame.f_back):
            self.watch.report_once_a_line(Cause.PRINTED, known.write)
        if known.code is _IMPORT and frame.f_back and is_users_code(frame.f_back):
            self._import(frame.f_locals["name"], frame.f_back)
        if known.is_of_environment:
            self._read_environment(frame)
        for words, line in known.opaque:
            self.watch.report_once_a_line(Cause.OPAQUE, words, location=line)
        if known.reads_modules or (self._reads_unseen and known.names is not None):
            self.watch.read_all_attributes(None)
        if known.copies and isinstance(copied := frame.f_locals["x"], nn.Module):
            self.watch.read_all_attributes(copied)
        for source in known.sources:
            self._read(source)
        for source in level_asked_for(frame):
            self._note(source, "")
        if known.names is not None:
            self.watch.note_classes(classes_given(frame))  # a later call may be given others
            for namespace in namespaces_given(frame):
                self._read_namespace(namespace, known, "given")
            for namespace in list(self._named.values()):
                self._read_namespace(namespace, known, "named")
            for namespace, _ in list(self._held.values()):
                self._read_namespace(namespace, known, "held")
            if self._reads_by_name:
                for source in self._all_sources():
                    self._note(source, known.location)
        for function, sources in known.functions:
            if is_running(function, frame):
                for source in sources:
                    self._note(source, known.location)

    def _report_volatile(self, name: str, caller: FrameType) -> None:
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
            self._remember(source, Elsewhere.AT_THE_END)
        if not is_users_code(frame):
            return self._look_at_library(frame, settings)
        location = file_and_line(code.co_filename, code.co_firstlineno)
        self.watch.note_code(code)
        names = NamesInCode(frame)
        found = self._find_functions(frame)
        if found.is_hidden:
            words = f"gc.freeze hides what a function holds: {code.co_name}"
            self.watch.report(Cause.OPAQUE, words)
        self._note_makes(code)
        if may_use_unseen(names):
            self.watch.notes.unseen_use = self.watch.notes.unseen_use or location
        for kind in names.kinds_compared() or ():
            self.watch.notes.kinds_compared.setdefault(id(kind), (kind, location))
        if names.imports_unknown:  # the next step finds it, and what it holds
            self.watch.notes.did_one_time_work = True
        computed = list(names.computed(frame.f_locals, is_users_namespace))
        loaded = list(names.loaded(frame.f_locals))
        values = [value for _, value in loaded]
        sources = [
            *sources_of(frame, names),
            *map(source_of_cache, found.caches),
            *found.places,
            *settings,
            *filter(None, map(setting_returned_by, values)),
            *settings_of_numpy(values, names.writes_text()),
            *(LOCALE_AND_ZONE if names.writes_as_told() else ()),
        ]
        for each in computed:
            if each.only_reads_one:
                sources += all_sources_in(each.namespace)
        opaque = [
            (each.words, file_and_line(code.co_filename, each.line))
            for each in computed
            if not each.only_reads_one
        ]
        opaque += [(name, location) for name, value in loaded if returns_library_state(value)]
        opaque += [(f"sys.modules[{name!r}]", location) for name in names.imports_objects]
        if asks_for_registrations(frame, names):
            sources.append(REGISTRATIONS)
        for source in sources:
            self._remember(source, location)
        lines = names.lines()
        sources = _with_lines(sources, lines)
        held = [(each, _with_lines(sources_held_by(each), lines)) for each in found.functions]
        named = namespaces_named(frame, names)
        modules = [*modules_named(frame, names), *names.passed_on(frame.f_locals)]
        self._modules_named |= {id(each): each for each in modules}
        self._reads_by_name = self._reads_by_name or names.reads_by_name()
        self._note_named(named)
        self.watch.note_classes(named)
        return _Code(
            code,
            location=location,
            sources=sources,
            functions=held,
            names=names,
            opaque=opaque,
            reads_modules=may_read_modules_unseen(names, frame),
        )

    def _note_named(self, namespaces: list[Any]) -> None:
        """Note classes that code names: other code may get them, and read them by its names."""
        for namespace in namespaces:
            if id(namespace) not in self._named:
                self._named[id(namespace)] = namespace
                for known in list(self._known.values()):
                    self._read_namespace(namespace, known, "named")

    def _sources_held(self, contents: FrozenValues) -> list[Source]:
        """Return what the step may read of what some values hold, other than their attributes.

        These are modules and classes of libraries, by the names in its code so far. Code that runs
        later reads them when it begins.
        """
        found = list(CONTEXT_OF_DECIMAL) if contents.is_decimal else []
        self._reads_by_name |= contents.reads_by_name
        for namespace, path in contents.namespaces:
            self._held.setdefault(id(namespace), (namespace, path))
            for known in list(self._known.values()):
                found += self._sources_in(namespace, known, "held")
        if self._reads_by_name and (contents.reads_by_name or contents.namespaces):
            found += self._all_sources()
        self._to_remember.extend(found)
        if not self._is_remembering:  # without recursion: what they hold may lead far, or back
            self._is_remembering = True
            while self._to_remember:
                self._remember(self._to_remember.popleft(), Elsewhere.AT_THE_END)
            self._is_remembering = False
        return found

    def _read_namespace(self, namespace: Any, known: _Code, how: str) -> None:
        """Note what some code reads of a class or module; see :meth:`_sources_in`."""
        for source in self._sources_in(namespace, known, how):
            self._remember(source, known.location)
            self._read(source)

    def _sources_in(self, namespace: Any, known: _Code, how: str) -> list[Source]:
        """Return what some code may read of a class or module by its names.

        Args:
            namespace: The class or module.
            known: The code.
            how: ``named``: any code names it. ``given``: the code gets it as an argument, such as
                ``cls``. ``held``: a library's, and a value that the step reads refers to it.
        """
        key = (id(known.code), id(namespace), how)
        if key not in self._of_namespaces:
            found: list[Source] = []
            if known.names is None:
                pass
            elif how == "named":
                found = values_by_names(namespace, known.names)
            elif how == "given" and is_users_namespace(namespace):
                found = sources_in_namespace(namespace, namespace.__name__, known.names)
            elif can_be_set_in(namespace):
                held = self._held.get(id(namespace))
                path = held[1] if held else namespace.__name__
                found = sources_in_held(namespace, path, known.names)
            self._of_namespaces[key] = found
        return self._of_namespaces[key]

    def _all_sources(self) -> list[Source]:
        """Return all values in the namespaces that code may read by names that it computes."""
        spaces = {id(each): each for each, _ in self._held.values()}
        spaces |= self._named | self._modules_named
        return [source for each in spaces.values() for source in all_sources_in(each)]

    def _import(self, name: str, caller: FrameType) -> None:
        """Note that a function of the user's imports a module by a name that it computes."""
        module = sys.modules.get(name)
        if name.startswith("."):
            self.watch.report_once_a_line(Cause.OPAQUE, "importlib.import_module")
        elif module is None:  # the next step finds it, and what it holds
            self.watch.notes.did_one_time_work = True
        elif is_users_namespace(module):
            for source in all_sources_in(module):
                self._note(source, file_and_line(caller.f_code.co_filename, caller.f_lineno))

    def _look_at_library(self, frame: FrameType, settings: Sequence[Source]) -> _Code:
        code = frame.f_code
        file = code.co_filename
        is_of_module = frame.f_globals.get("__file__") == file
        is_looked_at = has_volatile(file) or has_settings(file) or has_writes(file)
        is_looked_at = is_looked_at or has_decimal(frame.f_globals)
        if is_of_module and not (is_looked_at or file in (importlib.__file__, copy.__file__)):
            self.quiet_files.add(file)
        volatile, is_of_environment = volatile_in_python(code), reads_environment(code)
        write = write_in_python(code)
        matters = bool(volatile or settings or write) or is_of_environment or code is _IMPORT
        matters = matters or asks_for_level(code) or code in _COPIES
        return _Code(
            code,
            matters=matters,
            volatile=volatile,
            is_of_environment=is_of_environment,
            write=write,
            sources=settings,
            copies=code in _COPIES,
        )

    def _find_functions(self, frame: FrameType) -> FoundFunctions:
        code = frame.f_code
        if is_generated(frame):
            return FoundFunctions([], [], [])
        if id(code) not in self._made_here:
            return find_functions(frame)
        if is_only_called_here(code):
            return FoundFunctions([], [], [])
        assert self._from_before is not None
        return find_functions(frame, self._from_before.get(id(code), []))

    def _note_makes(self, code: CodeType) -> None:
        """Note the functions that a function of the step is about to make."""
        inside = codes_inside(code)
        self._made_here.update(map(id, inside))
        if self._from_before is None and not all(map(is_only_called_here, inside)):
            self._from_before = users_functions()

    def _note(self, source: Source, location: str) -> None:
        self._remember(source, location)
        self._read(source)

    def _read(self, source: Source) -> None:
        if needs_guard(source):
            self.watch.read(source)
            for inside in self._inside.get(source.key, ()):
                self.watch.read(inside)
            return
        # hardly any of these are there: a guard of each would cost more than the rest
        readers = self._unguarded.setdefault(source.key, [])
        readers += [call for call in self.watch.stack if call not in readers]

    def _remember(self, source: Source, location: str) -> None:
        key = source.key
        if key in self._before or key in self._problems or isinstance(source, LibrarySource):
            return
        with self.watch.paused():  # these reads are not the step's
            value = source.value()
        try:
            contents = look_into(value, source.path)
            modules = hidden_modules(self.watch, contents.modules) if contents.modules else []
            inside = sources_in(modules, source.path)
            opaque = [*self.watch.look_at(contents), *opaque_in(self.watch, inside)]
        except UnreadableError as error:
            words = f"{_words(source)} {error}"
            self._problems[key] = [(Cause.STATE_REBOUND, words, Elsewhere.AT_THE_END)]
            return
        if modules:
            self._inside[key] = inside
            with self.watch.paused():
                self._modules[key] = [ModuleState(module) for module in modules]
        self._reads_unseen |= contents.reads_unseen
        if opaque:
            self._problems[key] = [(Cause.OPAQUE, words, location) for words in opaque]
        self._before[key] = (source, value, contents)


class _Code(NamedTuple):
    """What is known of one code object whose functions the step calls."""

    code: CodeType
    matters: bool = True
    """Whether its calls are of interest."""
    volatile: str = ""
    """The volatile function that it is or calls; empty if there is none."""
    is_of_environment: bool = False
    """Whether it reads environment variables for its caller."""
    write: str = ""
    """The function by which it writes or shows text for its caller; empty if there is none."""
    location: str = ""
    sources: Sequence[Source] = ()
    """The globals that it names, and the settings of PyTorch."""
    functions: Sequence[tuple[FunctionType, list[Source]]] = ()
    """The functions that have it, and what each holds."""
    names: NamesInCode | None = None
    """The names that it may read of a class or module that it is given; None: it is given none."""
    opaque: Sequence[tuple[str, str]] = ()
    """Its actions that cannot be followed, with their lines."""
    copies: bool = False
    """Whether it copies its argument ``x``, with all attributes."""
    reads_modules: bool = False
    """Whether it may read any module without an interception."""


def _with_lines(sources: Iterable[Source], lines: Mapping[str, str]) -> list[Source]:
    """Return the same sources with the lines that read their names."""
    return [
        dataclasses.replace(each, line=lines[each.name]) if each.name in lines else each
        for each in sources
    ]


def _reads_by_text(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return name in _BY_TEXT and function is getattr(builtins, name)


def _pickles(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    return function.__module__ == "_pickle" or isinstance(owner, pickle.Pickler)


def _words(source: Source) -> str:
    is_attribute = source.belongs_to_function or isinstance(source.holder, (type, DerivedNamespace))
    return source.path if is_attribute else f"global {source.name}"
