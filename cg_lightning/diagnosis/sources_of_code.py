"""What some code may read of the user's: globals that it names, and what is inside of them."""

from __future__ import annotations

import abc
import sys
import types
from collections.abc import Sequence
from types import FrameType, FunctionType
from typing import Any

from torch import Tensor
from torch.backends import PropModule

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.tree import is_container
from cg_lightning.diagnosis.functions import source_of_attributes, sources_of_function
from cg_lightning.diagnosis.names_in_code import NamesInCode, names_of
from cg_lightning.guards.library_code import dictionary_of, version_of
from cg_lightning.guards.sources import MISSING, DerivedNamespace, LibrarySource, Source
from cg_lightning.modules.kinds import (
    is_user_class,
    is_user_file,
    is_users_namespace,
    is_value_of_class,
    once_for_each,
)

_ASKS_FOR_CLASSES = frozenset({"isinstance", "issubclass"})
_FUNCTIONS = (types.FunctionType, classmethod, staticmethod, property)


class _Unset(Source):
    """A name that does not exist before the step: the step itself may set it."""


def needs_guard(source: Source) -> bool:
    """Return False for a name that does not exist, and that only the step itself sets."""
    return not isinstance(source, _Unset) or source.value() is not MISSING


def sources_of(frame: FrameType, names: NamesInCode) -> list[Source]:
    """Return what a function of the user's may read: globals that it names, and inside of them."""
    found: list[Source] = []
    namespace = frame.f_globals
    is_set = names.sets_globals()
    for name in names.globals:
        found += _sources_of_name(namespace, name, name, names)
        if name not in namespace and name in is_set:
            found.append(_Unset(namespace, name, name))
        elif name not in namespace and not _is_pythons_own(frame.f_builtins.get(name)):
            found.append(Source(frame.f_builtins, name, name))
    for module, name in names.imported:
        if sys.modules.get(module.__name__) is module:
            path = f"sys.modules[{module.__name__!r}]"
            found.append(LibrarySource(sys.modules, module.__name__, path))
        if name:
            found += _sources_of_name(vars(module), name, f"{module.__name__}.{name}", names)
        elif is_users_namespace(module):
            found += sources_in_namespace(module, module.__name__, names)
        else:
            found += _sources_by_names(module, module.__name__, names.names)
    for space, name in names.looked_up():
        if name not in dir(space):
            found.append(Source(space, name, f"{space.__name__}.{name}"))
    return [*found, *_sources_on_tensors(names)]


def _sources_of_name(
    namespace: dict[str, Any], name: str, path: str, names: NamesInCode
) -> list[Source]:
    value = namespace.get(name)
    if isinstance(value, (types.ModuleType, type)):
        if not is_users_namespace(value):
            return _sources_by_names(value, path, names.names)
        where = value.__name__ if isinstance(value, type) else path
        return sources_in_namespace(value, where, names)
    if isinstance(value, types.FunctionType):
        return [Source(namespace, name, path), *_attributes_of_function(value)]
    if name in namespace and not isinstance(value, _FUNCTIONS):
        return [Source(namespace, name, path)]
    return []


def _sources_on_tensors(names: NamesInCode) -> list[Source]:
    """Return what may be read of the class of tensors, if the user has set it there."""
    found = {name: vars(Tensor)[name] for name in names.names if name in vars(Tensor)}
    return [
        Source(Tensor, name, f"torch.Tensor.{name}")
        for name, value in found.items()
        if is_value_of_class(value)
    ]


def _is_pythons_own(value: Any) -> bool:
    """Return whether something among the builtins is a function or class of Python itself."""
    return callable(value) and getattr(value, "__module__", "") == "builtins"


def sources_in_namespace(namespace: Any, path: str, names: NamesInCode) -> list[Source]:
    """Return what may be read of a module or class by these names, and inside of it."""
    is_module = isinstance(namespace, types.ModuleType)
    wanted = (*names.names, "__getattr__") if is_module else names.names
    found = _sources_by_names(namespace, path, wanted)
    is_set, is_asked_for = names.may_be_missing()
    for name in {*is_set, *is_asked_for}:
        if not any(name in vars(holder) for holder in _holders(namespace)):
            kind = Source if name in is_asked_for else _Unset
            found.append(kind(namespace, name, f"{path}.{name}"))
    return found


def _sources_by_names(namespace: Any, path: str, names: Sequence[str]) -> list[Source]:
    """Return what may be read of a module or class by these names, and of those inside it."""
    found: list[Source] = []
    seen = {id(namespace)}
    # without recursion: namespaces may lead far
    pending = [(namespace, path, iter(names))]
    while pending:
        namespace, path, left = pending[-1]
        name = next(left, None)
        if name is None:
            pending.pop()
            continue
        holder, value = _look_up(namespace, name)
        where = f"{path}.{name}"
        if isinstance(value, (types.ModuleType, type)):
            if id(value) not in seen:
                seen.add(id(value))
                pending.append((value, where, iter(names)))
        elif holder is not None and is_users_namespace(namespace):
            found += _sources_of_users(namespace, holder, name, path, value)
        elif holder is not None:
            found.append(_source_in_library(holder, name, where, value))
    return found


def _sources_of_users(
    namespace: Any, holder: Any, name: str, path: str, value: Any
) -> list[Source]:
    """Return what may be read by a name of a module or class of the user's, found in ``holder``."""
    where = f"{path}.{name}"
    if isinstance(value, types.FunctionType):
        place = holder if isinstance(holder, type) else vars(holder)
        return [Source(place, name, where), *_attributes_of_function(value)]
    if isinstance(value, _FUNCTIONS):
        return [Source(holder, name, where)]
    owner = holder.__name__ if isinstance(holder, type) else path
    found = [Source(holder, name, f"{owner}.{name}")]
    if holder is not namespace:  # a class may get a value of its own
        found.append(Source(namespace, name, where))
    return found


def _source_in_library(holder: Any, name: str, path: str, value: Any) -> Source:
    """Return the source of a name in a library, where users may set a value of their own."""
    if isinstance(value, types.FunctionType):
        is_users = is_user_file(value.__code__.co_filename)
    else:
        is_users = is_plain_value(value) or is_container(value) or is_user_class(type(value))
    return (Source if is_users else LibrarySource)(holder, name, path)


def _holders(namespace: Any) -> Sequence[Any]:
    """Return where a name of a module or class is looked up, also the user's metaclasses."""
    if not isinstance(namespace, type):
        # ``torch.backends.opt_einsum`` is an object, and the module that it stands for has the rest
        is_replaced = isinstance(namespace, PropModule)
        return (namespace, vars(namespace)["m"]) if is_replaced else (namespace,)
    kind: type = type(namespace)
    return (*namespace.__mro__, *[each for each in kind.__mro__ if is_users_namespace(each)])


def _look_up(namespace: Any, name: str) -> tuple[Any, Any]:
    """Return where a name of a module or class is found, and its value; None if it is nowhere."""
    holder = next((each for each in _holders(namespace) if name in vars(each)), None)
    return holder, None if holder is None else vars(holder)[name]


def all_sources_in(namespace: Any) -> list[Source]:
    """Return what may be read of a module or class by a name that is computed.

    Of a library, these are plain values.
    """
    if not is_users_namespace(namespace):
        name = getattr(namespace, "__name__", type(namespace).__name__)
        return [Source(_plain_values_in(namespace), "values", f"values in {name}")]
    found: list[Source] = []
    pending, seen = [namespace], set[int]()
    while pending:
        space = pending.pop()
        if id(space) in seen or not is_users_namespace(space):
            continue
        seen.add(id(space))
        # an abstract class keeps there what it was asked; registrations are a source of their own
        names = [each for each in vars(space) if each != "_abc_impl"]
        found += _sources_by_names(space, space.__name__, names)
        found.append(Source(_names_of(space), "names", f"names in {space.__name__}"))
        if isinstance(space, type):  # ``attrgetter("inner.scale")(Config)``
            pending += [each for each in vars(space).values() if isinstance(each, type)]
    return found


class _Names(DerivedNamespace):
    """Which names a module or class has."""

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def get(self, name: str, default: Any) -> Any:
        """Return all of them."""
        return " ".join(vars(self._namespace))


class _PlainValues(DerivedNamespace):
    """All plain values in a module or class of a library."""

    def __init__(self, namespace: Any) -> None:
        self._space = dictionary_of(namespace)
        self._version: object = None
        self._values = ""

    def get(self, name: str, default: Any) -> Any:
        """Return them as a text, which is only made if the namespace has changed."""
        version = version_of(self._space)
        if version != self._version:
            self._version = version
            self._values = repr({n: v for n, v in self._space.items() if is_plain_value(v)})
        return self._values


_plain_values_in = once_for_each(_PlainValues)
_names_of = once_for_each(_Names)  # two sources are the same by their holder


def sources_held_by(function: FunctionType) -> list[Source]:
    """Return what a function holds, and what it may read of modules and classes among it."""
    found = sources_of_function(function)
    names = names_of(function.__code__)
    for source in list(found):
        value = source.value()
        if isinstance(value, (types.ModuleType, type)) and is_users_namespace(value):
            found += _sources_by_names(value, value.__name__, names)
        elif isinstance(value, types.FunctionType):
            found += _attributes_of_function(value)
    return found


def _attributes_of_function(function: FunctionType) -> list[Source]:
    if not is_user_file(function.__code__.co_filename):
        return []
    return [source_of_attributes(function)]


def sources_in_held(namespace: Any, path: str, names: NamesInCode) -> list[Source]:
    """Return what code may read by its names of a library's module or class that a value holds.

    The functions of classes are left out: there, mostly methods have such names.
    """
    found = _sources_by_names(namespace, path, names.names)
    if isinstance(namespace, type):
        return [each for each in found if not isinstance(each, LibrarySource)]
    return found


def modules_named(frame: FrameType, names: NamesInCode) -> list[types.ModuleType]:
    """Return the user's modules among the globals that a function names and imports."""
    found = [frame.f_globals.get(name) for name in names.globals]
    found += [module for module, _ in names.imported]
    return [e for e in found if isinstance(e, types.ModuleType) and is_users_namespace(e)]


def namespaces_named(frame: FrameType, names: NamesInCode) -> list[type]:
    """Return the user's classes among the globals that a function names."""
    found = [frame.f_globals.get(name) for name in names.globals]
    found += [vars(module).get(name) for module, name in names.imported if name]
    found += [frame.f_locals.get(name) for name in frame.f_code.co_freevars if name != "__class__"]
    return [each for each in found if isinstance(each, type) and is_users_namespace(each)]


def values_by_names(cls: type, names: NamesInCode) -> list[Source]:
    """Return what code may read of a class by its names, except functions: these are seen."""
    return [
        source
        for name in set(names.names)
        for holder in cls.__mro__
        if name in vars(holder) and is_user_class(holder) and is_value_of_class(vars(holder)[name])
        if not isinstance(vars(holder)[name], type)
        for source in (
            Source(holder, name, f"{holder.__name__}.{name}"),
            *([Source(cls, name, f"{cls.__name__}.{name}")] if holder is not cls else []),
        )
    ]


def asks_for_registrations(frame: FrameType, names: NamesInCode) -> bool:
    """Return whether code may ask if a class is registered with an abstract one of the user's."""
    is_asked = not _ASKS_FOR_CLASSES.isdisjoint(frame.f_code.co_names)
    return is_asked and any(isinstance(e, abc.ABCMeta) for e in namespaces_named(frame, names))
