"""Kinds of values: the one table that classifies everything that a step reads.

A step may be one graph only if each value that it read is harmless, or is compared before each
replay. All other values are *opaque*: iterators, random generators, files, locks, and any other
object with state in C.

An object has state in C if it is larger than a header, a dictionary, a list of weak references and
its slots together. ``object.__reduce_ex__`` makes the same test before it refuses to pickle an
object. Types that are larger for a known reason come first.
"""

from __future__ import annotations

import array
import collections
import contextvars
import datetime
import decimal
import enum
import fractions
import functools
import io
import logging
import operator
import pathlib
import random
import re
import struct
import sys
import threading
import types
import uuid
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.guards.sources import CacheWrapper
from cg_lightning.modules.attributes import attributes_of, has_room_for_attributes, slots_of
from cg_lightning.modules.interception import BESIDE_ALL
from cg_lightning.modules.kinds import (
    class_has,
    is_user_class,
    is_user_file,
    is_users_namespace,
    is_value_of_class,
    lightning_class,
    once_for_each,
)


class ValueKind(enum.Enum):
    """Decides how a value that a step reads is guarded."""

    HARMLESS = "nothing in it can change what a step computes"
    TENSOR = "compared by its address"
    MODULE = "has a guard of its own"
    FUNCTION = "its closure, defaults and bound objects are guarded"
    NAMESPACE = "a class or module of the user's: its values are guarded"
    REFERENCE = "its referent is guarded"
    CONTENTS = "its contents can be copied and compared"
    CACHE = "a function with functools.cache: a step that misses it changes it"
    GENERATOR = "a graph can draw from it on its device"
    CONTAINER = "its items are guarded"
    OBJECT = "its attributes are guarded"
    OPAQUE = "its contents cannot be read"


_HARMLESS: tuple[type, ...] = (
    *(types.GenericAlias, types.UnionType),
    *(
        str,
        bytes,
        int,
        float,
        complex,
        range,
        frozenset,
        type(Ellipsis),
        type(NotImplemented),
    ),
    *(enum.Enum, re.Pattern, re.Match, pathlib.PurePath, uuid.UUID, struct.Struct),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo),
    *(decimal.Decimal, fractions.Fraction, BaseException),
    *(logging.Filterer, logging.Filter),
    *(types.CodeType, types.FrameType, types.TracebackType, types.MemberDescriptorType),
    *(types.GetSetDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType),
    *(types.ClassMethodDescriptorType, type(collections.namedtuple("_Pair", "first").first)),  # type: ignore[attr-defined]
)
"""Immutable, or without influence on a result. A detector watches what is logged.

Attributes that the user has set on them are guarded.
"""
_BOUND_TO: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (functools.partial, ("func", "args", "keywords")),
    (property, ("fget", "fset", "fdel")),
    (slice, ("start", "stop", "step")),
    ((classmethod, staticmethod), ("__func__",)),
    (types.MethodType, ("__self__", "__func__")),
    ((types.BuiltinFunctionType, types.MethodWrapperType), ("__self__",)),
    ((types.FunctionType, types.CellType), ()),
)
"""Attributes of functions, and of a few other values of C. Only those of partials can change."""
_FUNCTIONS_WITH_NAMES = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType),
)
_OPERATORS = (operator.itemgetter, operator.attrgetter, operator.methodcaller)
"""Functions of C whose arguments only pickling shows."""
_FUNCTIONS = (
    *_OPERATORS,
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType),
    *(functools.partial, property, classmethod, staticmethod, types.CellType, slice),
)
_PARTS_OF_TRAINER = ("Trainer", "Fabric", "Strategy", "_Loop")
"""A detector watches reads of their attributes."""
_OPAQUE = (io.IOBase, random.Random)


def _array_contents(value: Any) -> Any:
    return value.shape, value.strides, value.flags.num, value.dtype, value.tobytes()


def _context_contents(value: contextvars.ContextVar[Any]) -> Any:
    now = value.get(None)
    return now if is_plain_value(now) else id(now)


def _lock_contents(value: Any) -> bool:
    return bool(value.locked())


_CONTENTS: dict[type, Callable[[Any], Any]] = {
    set: frozenset,
    bytearray: bytes,
    memoryview: bytes,
    array.array: array.array.tobytes,
    contextvars.ContextVar: _context_contents,
    type(threading.Lock()): _lock_contents,
    type(threading.RLock()): repr,
}


def contents_of(value: Any) -> Callable[[Any], Any] | None:
    """Return a function that copies the contents of a value; None if they cannot be compared."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(type(value), numpy.ndarray):
        return _array_contents
    return _contents_of_class(type(value))


@once_for_each
def _contents_of_class(cls: type) -> Callable[[Any], Any] | None:
    return next((read for kind, read in _CONTENTS.items() if issubclass(cls, kind)), None)


def _numpy_state(value: Any) -> str:
    return repr(value.bit_generator.state)


def state_of_generator(value: Any) -> Callable[[Any], Any] | None:
    """Return what copies the state of a random generator for a comparison; None if nothing does.

    A step that reads a generator draws from it: that is opaque. One that reads an object which has
    a generator (a tokenizer, a data set) mostly does not, so there the states are compared.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return _numpy_state
    return random.Random.getstate if isinstance(value, random.Random) else None


def has_hidden_state(cls: type) -> bool:
    """Return whether instances of a class keep something where Python cannot see it."""
    size = object.__basicsize__ + _WORD * len(slots_of(cls))
    # negative or 0: kept before the object, or not at all
    size += _WORD if cls.__dictoffset__ > 0 else 0
    size += _WORD if cls.__weakrefoffset__ > 0 else 0
    return cls.__basicsize__ > size or cls.__itemsize__ != 0


_WORD = object.__basicsize__ // 2


def _root(cls: type) -> str:
    return cls.__module__.split(".")[0]


def _is_of_python(cls: type) -> bool:
    # a file of the user's may be called ``queue.py``
    return _root(cls) in sys.stdlib_module_names and not is_users_namespace(cls)


def _is_of_library(cls: type) -> bool:
    return not is_user_class(cls) or _is_of_python(cls)


def _can_be_given_attributes(cls: type) -> bool:
    """Whether users set attributes on instances of a harmless class."""
    if issubclass(cls, (BaseException, logging.Filterer)):
        return True
    return has_room_for_attributes(cls) and not _is_of_library(cls)


def _is_harmless_class(cls: type) -> bool:
    if lightning_class(cls, *_PARTS_OF_TRAINER) or _root(cls) == "cg_lightning":
        return True
    if class_has(cls, "__members__"):
        return True
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(cls, (numpy.generic, numpy.dtype, numpy.ufunc)):
        return True
    is_called = "__call__" in dir(cls)
    if is_called and not is_user_class(cls):
        # an operator of PyTorch, with caches of its own
        return has_hidden_state(cls) or cls.__module__.startswith("torch._")
    if not has_hidden_state(cls):
        return False
    if class_has(cls, "__next__"):
        return False
    return _root(cls) == "torch"  # streams, dtypes, scripted objects


_WEAK_MAPPINGS = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary)
"""What they refer to is not kept alive: their attributes are guarded, which hold references."""
WEAK = (weakref.ref, weakref.WeakSet, *_WEAK_MAPPINGS)
"""A step that reads one of them may ask if something is alive, and what is guarded stays alive.

One that reads an object which has one (of its parent, say) mostly does not.
"""
_CONTAINERS = (tuple, list, collections.deque, MutableMapping, types.MappingProxyType)


def _is_subclass(cls: type, kinds: type | tuple[type, ...]) -> bool:
    try:
        return issubclass(cls, kinds)
    except TypeError:  # an abstract class asks for the hash of a class, and it has none
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        return any(base is kind for base in cls.__mro__ for kind in kinds)


@once_for_each
def _kind_of_class(cls: type) -> ValueKind:
    if _is_subclass(cls, Tensor):
        return ValueKind.TENSOR
    if _is_subclass(cls, nn.Module):
        return ValueKind.MODULE
    if _is_subclass(cls, _FUNCTIONS):
        return ValueKind.FUNCTION
    if _is_subclass(cls, (type, types.ModuleType)):
        return ValueKind.NAMESPACE
    if _is_subclass(cls, weakref.ref):
        return ValueKind.REFERENCE
    if _is_subclass(cls, _HARMLESS):
        return ValueKind.OBJECT if _can_be_given_attributes(cls) else ValueKind.HARMLESS
    if cls is CacheWrapper:
        return ValueKind.CACHE
    if _is_subclass(cls, torch.Generator):
        return ValueKind.GENERATOR
    if _is_subclass(cls, _OPAQUE):
        return ValueKind.OPAQUE
    if _is_subclass(cls, _CONTAINERS) and not _is_subclass(cls, _WEAK_MAPPINGS):
        return ValueKind.CONTAINER
    if _is_harmless_class(cls):
        return ValueKind.HARMLESS
    if cls.__name__ == "_local" and _root(cls) == "_thread":  # threading.local: this thread's
        return ValueKind.OBJECT
    return ValueKind.OPAQUE if has_hidden_state(cls) else ValueKind.OBJECT


def holds_nothing(value: Any) -> bool:
    """Return whether a value is plain, so nothing in it can change."""
    return is_plain_value(value) and not isinstance(value, enum.Enum)


def kind_of(value: Any) -> ValueKind:
    """Return the kind of a value."""
    if holds_nothing(value):
        return ValueKind.HARMLESS
    if contents_of(value) is not None:
        return ValueKind.CONTENTS
    cls: type = type(value)
    kind = _kind_of_class(cls)
    if kind is ValueKind.OPAQUE and callable(value) and hasattr(value, "__qualname__"):
        return ValueKind.HARMLESS  # a function that another language made
    if kind is ValueKind.NAMESPACE and not is_users_namespace(value):
        return ValueKind.HARMLESS
    if _is_subclass(cls, _HARMLESS):
        return kind
    if kind is not ValueKind.OBJECT or not _is_of_python(cls):
        return kind
    return ValueKind.OPAQUE if _is_around_opaque(value, 2) else kind


def _is_around_opaque(value: Any, depth: int) -> bool:
    """Return True for an object of Python that keeps an opaque one: a queue, an event, a pool."""
    for held in attributes_of(value).values():
        cls: type = type(held)
        kind = _kind_of_class(cls)
        if kind is ValueKind.OPAQUE and contents_of(held) is None:
            return True
        is_object = kind is ValueKind.OBJECT and _is_of_python(cls)
        if depth > 1 and is_object and _is_around_opaque(held, depth - 1):
            return True
    return False


def bound_to(function: Any) -> dict[str, Any]:
    """Return bound objects and arguments of a function by name, and the cells of its closure."""
    if isinstance(function, types.FunctionType):
        names = function.__code__.co_freevars
        cells = zip(names, function.__closure__ or (), strict=False)
        # ``super()`` closes over ``__class__``
        return {f"closure {name}": cell for name, cell in cells if name != "__class__"}
    if isinstance(function, _OPERATORS):
        return {"arguments": function.__reduce__()}
    names = next(names for kinds, names in _BOUND_TO if isinstance(function, kinds))
    return {name: getattr(function, name, None) for name in names}


_READ_BY_NAME = frozenset({"getattr", "hasattr", "vars", "dir", "format", "format_map"})
_IMMUTABLE = 1 << 8
"""The flag of classes in which nothing can be set: those of Python itself."""


def reads_by_name(function: Any) -> bool:
    """Return whether a function of C reads attributes by names that it is given, or has."""
    if isinstance(function, types.BuiltinFunctionType):
        return function.__name__ in _READ_BY_NAME
    return isinstance(function, _OPERATORS)


def reads_unseen(function: Any) -> bool:
    """Return whether a value is a function by which code reads modules without an interception."""
    kinds = (types.WrapperDescriptorType, types.MethodWrapperType, *_FUNCTIONS_WITH_NAMES)
    return isinstance(function, kinds) and function.__name__ in BESIDE_ALL


def can_be_set_in(namespace: Any) -> bool:
    """Return whether a value in a module or class can be replaced."""
    return not (isinstance(namespace, type) and namespace.__flags__ & _IMMUTABLE)


def is_users_function(function: Any) -> bool:
    """Return False for functions that a library has defined. All else counts as the user's."""
    if not isinstance(function, types.FunctionType):
        return True
    return is_user_file(function.__code__.co_filename)


def registry_of(function: Any) -> Any:
    """Return what a function with ``functools.singledispatch`` has registered; None for others."""
    registry = getattr(function, "registry", None)
    return registry if isinstance(registry, types.MappingProxyType) else None


def holds_something(function: Any) -> bool:
    """Return whether a function has closed over something, has attributes or defaults in it."""
    if not isinstance(function, types.FunctionType):
        return True
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return bool(bound_to(function) or vars(function)) or not all(map(holds_nothing, defaults))


def keeps_more_than_items(container: Any) -> bool:
    """Return whether a container or its class may have attributes."""
    cls: type = type(container)
    if cls in (list, tuple, dict, collections.deque):
        return False
    is_built_in = isinstance(container, (list, tuple, dict, collections.deque))
    return is_built_in or is_users_namespace(cls)


def inside(value: Any) -> list[Any]:
    """Return values inside a value that are neither items of a container nor attributes."""
    if isinstance(value, (set, frozenset)):
        return list(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.hasobject:
        return [value.item()] if value.ndim == 0 else list(value.ravel().tolist())
    return []


def spaces_of(namespace: Any) -> list[Any]:
    """Return the namespaces that the user has written among those of a class, or of a module."""
    if not isinstance(namespace, type):
        return [namespace]
    kind: type = type(namespace)
    kinds = [cls for cls in kind.__mro__ if is_users_namespace(cls)]
    return [*[cls for cls in namespace.__mro__ if is_user_class(cls)], *kinds]


def values_of(namespace: Any) -> dict[str, Any]:
    """Return all but the functions in a class of the user's with its bases, or in a module."""
    is_class = isinstance(namespace, type)
    return {
        f"{space.__name__}.{name}" if is_class else name: value
        for space in spaces_of(namespace)
        for name, value in vars(space).items()
        if _is_value_of_namespace(name, value)
    }


def named_values_of(namespace: Any) -> list[tuple[Any, str, Any]]:
    """Return the same as mappings, names in them, and values."""
    return [
        (vars(space), name, value)
        for space in spaces_of(namespace)
        for name, value in vars(space).items()
        if _is_value_of_namespace(name, value)
    ]


def _is_value_of_namespace(name: str, value: Any) -> bool:
    is_internal = name.startswith(("__", "_abc_")) or (name[0] == "_" == name[-1])
    if is_internal or isinstance(value, types.MemberDescriptorType):
        return False
    return is_value_of_class(value) or is_users_namespace(value)


def name_of_class(value: Any) -> str:
    """Return the name of a value's class as users write it: ``numpy.random.Generator``."""
    cls = type(value)
    parts = [part for part in cls.__module__.split(".") if not part.startswith("_")]
    return ".".join([*parts, cls.__qualname__]).removeprefix("builtins.")
