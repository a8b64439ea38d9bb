"""Attributes of modules that a step reads: a graph freezes their values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.contents import UnreadableError, look_into
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import is_read_by_user
from cg_lightning.diagnosis.hidden_modules import hidden_modules, opaque_in, sources_in
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.guards.sources import ALL_NAMES, Source
from cg_lightning.guards.value_kinds import holds_nothing, is_users_function
from cg_lightning.modules.attributes import (
    has_attributes_of_users,
    has_values_of_users,
    holding_class,
    is_set_by_users,
    is_user_attribute,
    names_in_users_methods,
    plain_values_of,
    set_by_users,
    slots_of,
    user_attributes,
    value_in_class,
)
from cg_lightning.modules.interception import (
    BESIDE_INTERCEPTIONS,
    Interception,
    ModuleHandler,
    can_intercept,
)
from cg_lightning.modules.kinds import (
    is_metric,
    is_user_class,
    is_user_module,
    is_value_of_class,
    once_for_each,
)


class AttributeReads(Detector):
    """Notes the attributes of the user's modules that are read.

    Reads in compiled code, and reads of constants on classes (``type(self).scale``), cannot be
    observed, so all of these count as read. An attribute that cannot be compared is a finding.
    """

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        watch = self.watch
        self._attributes = {
            id(module): _Attributes(watch, path, module)
            for path, module in [
                *watch.modules,
                *[pair for inside in watch.hidden.values() for pair in inside],
            ]
        }
        self._is_reading_all = False
        watch.read_all_attributes = self._read_all
        self._read_unseen([watch.root])
        in_class = once_for_each(has_values_of_users)  # most modules share a few classes
        with contextlib.ExitStack() as stack:
            for _, module in watch.modules:
                is_read = (
                    is_user_module(module)
                    or module is watch.root
                    or (
                        not is_metric(module)
                        and (in_class(type(module)) or has_attributes_of_users(module))
                    )
                )
                if is_read and id(module) not in watch.hidden and can_intercept(module):
                    handler = _ReadHandler(watch, self._attributes[id(module)], module)
                    stack.callback(Interception(module, handler).remove)
            yield

    def around_call(self, call: ModuleCall) -> contextlib.AbstractContextManager[None]:
        for module in call.hidden:
            self._attributes[id(module)].read_all()
        assert call.module is not None
        self._read_unseen(list(call.hidden) or [call.module])
        return contextlib.nullcontext()

    def _read_all(self, module: nn.Module | None) -> None:
        if not self._is_reading_all:
            self._is_reading_all = True
            for key, attributes in self._attributes.items():
                if module is None or key == id(module):
                    attributes.read_names()
            self._is_reading_all = False

    def _read_unseen(self, modules: list[nn.Module]) -> None:
        """Note what of these modules is read in ways that no interception shows."""
        for cls, name in plain_values_of(map(type, modules)):
            self.watch.read(Source(cls, name, f"{cls.__name__}.{name}"))
        for module in modules:
            kind: type = type(module)
            if not BESIDE_INTERCEPTIONS.isdisjoint(names_in_users_methods(kind)):
                self._attributes[id(module)].read_all()


class _Attributes:
    """The attributes of one module, as sources; each is made once."""

    def __init__(self, watch: StepWatch, path: str, module: nn.Module) -> None:
        self._watch = watch
        self._prefix = f"self.{path}." if path else "self."
        self._module = module
        self._sources: dict[str, list[Source]] = {}
        self._problems: dict[str, list[tuple[Cause, str]]] = {}
        self._reads_unseen: set[str] = set()
        """The names of attributes that hold a function which reads without an interception."""

    def read(self, name: str) -> None:
        """Note that an attribute is read, if it is the user's and no method."""
        if (sources := self._sources.get(name)) is None:
            with self._watch.paused():
                sources = self._sources[name] = self._sources_of(name)
        for source in sources:
            self._watch.read(source)
        for cause, words in self._problems.get(name, ()):
            self._watch.report(cause, words)
        if name in self._reads_unseen:
            self._watch.read_all_attributes(None)

    def read_all(self) -> None:
        """Note that all attributes are read."""
        with self._watch.paused():
            names = user_attributes(self._module)
        for name in names:
            self.read(name)

    def read_names(self) -> None:
        """Note a read of the names of all attributes, and of all their values."""
        path = self._prefix.removesuffix(".")
        self._watch.read(Source(self._module, ALL_NAMES, f"the attributes of {path}"))
        self.read_all()

    def _sources_of(self, name: str) -> list[Source]:
        module = self._module
        own = vars(module)
        members = (own["_parameters"], own["_buffers"], own["_modules"])
        path, inside = f"{self._prefix}{name}", list[Source]()
        if stored := set_by_users(module, name):
            name, cls = stored, None
        elif not is_user_attribute(module, name) or any(name in table for table in members):
            return _attributes_of_method(module, name)
        else:
            cls = holding_class(module, name)
        in_class = None if cls is None else vars(cls)[name]
        if cls is not None and not (is_user_class(cls) or is_set_by_users(cls, name)):
            return []  # a property or a value of a framework's
        kind: type = type(module)
        is_in_slot = name in slots_of(kind)
        value = Source(module, name, path).value() if is_in_slot or cls is None else in_class
        is_value = is_in_slot or cls is None or isinstance(value, type) or is_value_of_class(value)
        if is_value and not holds_nothing(value):
            try:
                contents = look_into(value, path)
                inside = sources_in(hidden_modules(self._watch, contents.modules), path)
                opaque = [*self._watch.look_at(contents), *opaque_in(self._watch, inside)]
                self._problems[name] = [(Cause.OPAQUE, words) for words in opaque]
                if contents.reads_unseen:
                    self._reads_unseen.add(name)
            except UnreadableError as error:
                self._problems[name] = [(Cause.STATE_REBOUND, f"{path} {error}")]
        sources = [Source(module, name, path), *inside]
        if cls is not None:
            sources.append(Source(cls, name, f"{cls.__name__}.{name}"))
        # a configuration: ``self.config.scale``
        classes: list[Any] = [value] if issubclass(type(value), type) else []
        sources += [
            Source(base, inner, f"{path}.{inner}") for base, inner in plain_values_of(classes)
        ]
        return sources


class _ReadHandler(ModuleHandler):
    def __init__(self, watch: StepWatch, attributes: _Attributes, module: nn.Module) -> None:
        self._watch = watch
        self._attributes = attributes
        # what the user's own ``__getattribute__`` reads in its turn goes to ``object``
        self._reads_unseen = any(
            is_user_class(cls) and "__getattribute__" in vars(cls) for cls in type(module).__mro__
        )

    def on_read(self, name: str) -> None:
        if self._watch.is_in_framework or self._watch.is_paused:
            return
        if self._reads_unseen:
            self._attributes.read_all()
        elif name != "__dict__":
            self._attributes.read(name)
        elif is_read_by_user():  # ``vars(self)["name"]``
            self._attributes.read_names()


def _attributes_of_method(module: nn.Module, name: str) -> list[Source]:
    method = value_in_class(type(module), name)
    is_users = isinstance(method, FunctionType) and is_users_function(method)
    return [Source(method, "__dict__", f"attributes of {name}")] if is_users else []
