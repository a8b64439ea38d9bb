"""Attributes of modules that a graph may freeze, and their comparison."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import dis
import enum
import functools
import logging
import pathlib
import struct
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.modules.compiled import (
    COMPILED_IN_PLACE,
    is_compiled_by_callback,
    is_compiled_in_place,
)
from cg_lightning.modules.kinds import (
    class_has,
    is_metric,
    is_user_class,
    is_user_module,
    is_value_of_class,
    lightning_class,
    namespace_of,
    once_for_each,
)

_PLAIN = (bool, int, float, str, bytes, type(None), torch.device, torch.dtype, types.MethodType)


def is_same_value(before: Any, after: Any) -> bool:
    """Return True if both are the same object, or equal plain values of the same type.

    Of a float every bit counts: 0.0 and -0.0 differ, and NaN equals itself.
    """
    if before is after:
        return True
    cls: type = type(before)
    if cls is not type(after) or not isinstance(before, _PLAIN) or has_room_for_attributes(cls):
        return False
    if isinstance(before, float):
        return struct.pack("d", before) == struct.pack("d", after)
    return bool(before == after)


def same_attributes(attributes: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return True if all attributes are the same objects, or equal plain values."""
    return attributes.keys() == before.keys() and all(
        map(is_same_value, before.values(), attributes.values())
    )


@once_for_each
def slots_of(cls: type) -> tuple[str, ...]:
    """Return the names of the slots of instances of ``cls``, as ``getattr`` takes them."""
    found: dict[str, None] = {}
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")
            mangled = f"_{base.__name__.lstrip('_')}{name}" if is_private else name
            if isinstance(vars(base).get(mangled), types.MemberDescriptorType):
                found[mangled] = None
    return tuple(found)


def has_room_for_attributes(cls: type) -> bool:
    """Return True if instances of a class can be given attributes."""
    return cls.__dictoffset__ != 0 or bool(slots_of(cls))


_KEPT_IN_C: tuple[tuple[type, tuple[str, ...]], ...] = (
    (collections.defaultdict, ("default_factory",)),
    (types.CellType, ("cell_contents",)),
    (types.FunctionType, ("__defaults__", "__kwdefaults__")),
)
"""What instances of some classes hold although no dictionary and no slot of theirs has it."""


def _parts_of_error(cls: type) -> list[str]:
    """Return what Python keeps of an error: ``args``, ``__cause__``, ``errno``, ..."""
    found = [
        name
        for base in cls.__mro__
        if base.__module__ == "builtins" and issubclass(base, BaseException)
        for name, value in vars(base).items()
        if isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType))
    ]
    return [each for each in dict.fromkeys(found) if each not in ("__dict__", "__traceback__")]


@once_for_each
def members_of(cls: type) -> tuple[str, ...]:
    """Return the names of attributes that instances of ``cls`` store outside a dictionary."""
    in_c = [name for base, names in _KEPT_IN_C if issubclass(cls, base) for name in names]
    if issubclass(cls, BaseException):
        in_c += _parts_of_error(cls)
    own = slots_of(cls)
    if issubclass(cls, pathlib.PurePath):  # fills its slots when it is asked
        own = tuple([name for name in own if not hasattr(pathlib.PurePath, name)])
    return (*own, *in_c)


@once_for_each
def names_of_library(cls: type) -> frozenset[str]:
    """Return the attributes of instances that only the class of a library writes and reads.

    Examples are caches that it fills on a read, and settings of loggers.
    """
    if issubclass(cls, logging.Handler):
        return frozenset({*vars(logging.StreamHandler()), *vars(logging.NullHandler())})
    if issubclass(cls, logging.Logger):
        return frozenset(vars(logging.Logger("any"))) - {"level", "disabled"}
    if issubclass(cls, enum.Enum):
        return frozenset(("_name_", "__objclass__", "_sort_order_", "_inverted_", "_hash_"))
    enter = None if is_user_class(cls) else getattr(cls, "__enter__", None)
    if isinstance(enter, types.FunctionType):  # it stores what the exit restores
        return frozenset(s.argval for s in dis.get_instructions(enter) if s.opname == "STORE_ATTR")
    return frozenset()


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object: in its dictionary, in slots, and a few in C."""
    cls: type = type(value)
    found = dict(getattr(value, "__dict__", ()))
    for name in names_of_library(cls):
        found.pop(name, None)
    for name in members_of(cls):
        try:
            found[name] = getattr(value, name)
        except (AttributeError, ValueError):  # an empty slot, an empty cell
            continue
    return found


def attributes_beside_items(container: Any) -> dict[str, Any]:
    """Return the attributes of a container that are not items."""
    found = attributes_of(container)
    if dataclasses.is_dataclass(container):
        for field in dataclasses.fields(container):
            found.pop(field.name, None)
    return found


def has_slots(module: nn.Module) -> bool:
    """Return True if the class of a module has slots as well as a dictionary."""
    cls: type = type(module)
    return bool(slots_of(cls))


def slots_in(module: nn.Module) -> dict[str, Any]:
    """Return the slots of a module, without a call of the user's ``__getattribute__``."""
    found = {}
    cls: type = type(module)
    for name in slots_of(cls):
        with contextlib.suppress(AttributeError):
            found[name] = object.__getattribute__(module, name)
    return found


def scripted_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module of ``torch.jit``, except parameters and buffers.

    They are stored outside Python, so a change cannot be intercepted.
    """
    kind = vars(module).get("_concrete_type")  # private: the only way to get their names
    names = set(kind.get_attributes()) - names_of_frameworks(module) if kind is not None else ()
    values = {name: getattr(module, name) for name in names}
    return {
        name: value if isinstance(value, Tensor) else repr(value) for name, value in values.items()
    }


def names_of_frameworks(module: nn.Module) -> frozenset[str]:
    """Return the names of the attributes that torch and Lightning store in ``module``.

    ``training`` is one of them. It is part of the key.
    """
    kind: type = type(module)
    return _names_for(kind)


@once_for_each
def _names_for(kind: type) -> frozenset[str]:
    return _names_in(lightning_class(kind, "LightningModule") or nn.Module)


@once_for_each
def _names_in(cls: type) -> frozenset[str]:
    return frozenset({*vars(cls()), "__dict__", "__class__"})


_SET_BY_USERS = frozenset(
    (
        "_example_input_array",
        "_automatic_optimization",
        "_strict_loading",
        "prepare_data_per_node",
        "allow_zero_length_dataloader_with_multiple_devices",
    )
)
"""Attributes that Lightning stores, and the user sets and reads, mostly as properties."""


def set_by_users(module: nn.Module, name: str) -> str:
    """Return the attribute in which Lightning stores a user's value ``name``; otherwise empty."""
    for each in (f"_{name}", name):
        if each in _SET_BY_USERS and each in namespace_of(module):
            return each
    return ""


def names_of_users(module: nn.Module) -> set[str]:
    """Return the names of the attributes that users set: in the module itself, and in slots."""
    attributes = namespace_of(module)
    cls: type = type(module)
    names = {*attributes, *slots_of(cls)}
    return {name for name in names if name in _SET_BY_USERS} | (names - names_of_frameworks(module))


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the forward hooks and forward pre-hooks of ``module``.

    The dictionaries are never replaced.
    """
    return module._forward_hooks, module._forward_pre_hooks


def backward_hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the backward hooks and backward pre-hooks of ``module``."""
    return module._backward_hooks, module._backward_pre_hooks


def global_hooks() -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the global forward hooks and forward pre-hooks, which run for all modules."""
    return _torch_module._global_forward_hooks, _torch_module._global_forward_pre_hooks


_PROFILERS = {
    "lightning.pytorch.profilers": "PyTorchProfiler",
    "pytorch_lightning.profilers": "PyTorchProfiler",
    "torch.profiler": "torch.profiler",
    "torch.autograd.profiler": "torch.autograd.profiler",
}


def profiler_of(hook: Callable[..., Any]) -> str:
    """Return the name of the profiler that added a hook. Empty if no known profiler did."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    module = f"{getattr(hook, '__module__', '')}."
    return next((name for path, name in _PROFILERS.items() if module.startswith(f"{path}.")), "")


def holding_class(module: nn.Module, name: str) -> type | None:
    """Return the class in which an attribute is found. None if the module itself stores it."""
    if name in vars(module):
        return None
    return next((cls for cls in type(module).__mro__ if name in vars(cls)), None)


def value_in_class(cls: type, name: str) -> Any:
    """Return the value of a name in a class or a base, without descriptors; otherwise None."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def class_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield names and values of user classes of ``module``, except methods and descriptors."""
    for cls in type(module).__mro__:
        if is_user_class(cls):
            for name, value in vars(cls).items():
                if not name.startswith("__") and is_value_of_class(value):
                    yield f"{cls.__name__}.{name}", value


def plain_values_of(classes: Iterable[type]) -> list[tuple[type, str]]:
    """Return class and name of each plain value of these classes and their bases.

    Only classes of the user's code are searched.
    """
    # by id: a class may have no hash
    bases = {id(base): base for cls in classes for base in cls.__mro__}
    named = [
        (cls, name, value)
        for cls in filter(is_user_class, bases.values())
        for name, value in vars(cls).items()
        if not name.startswith("__")
    ]
    return [(cls, name) for cls, name, value in named if is_plain_value(value)]


def _names_mentioned_by(values: Iterable[Any]) -> frozenset[str]:
    """Return the names that the functions among some values mention."""
    functions = [each for each in values if isinstance(each, types.FunctionType)]
    return frozenset(name for function in functions for name in function.__code__.co_names)


@once_for_each
def _names_in_methods(cls: type) -> frozenset[str]:
    """Return the names that the methods of a class mention."""
    return _names_mentioned_by(value for base in cls.__mro__ for value in vars(base).values())


@once_for_each
def names_in_users_methods(cls: type) -> frozenset[str]:
    """Return the names that methods and properties of the user's classes mention."""
    values = [v for base in cls.__mro__ if is_user_class(base) for v in vars(base).values()]
    return _names_mentioned_by(
        getattr(each, "fget", None) or getattr(each, "__func__", each) for each in values
    )


_VALUES_OF_TORCH = frozenset({"dump_patches", "T_destination", "call_super_init"})
"""What ``nn.Module`` has, and no method of it reads: Dynamo replaces ``__init__`` for good."""


def is_set_by_users(cls: type, name: str) -> bool:
    """Return whether a class of a framework has a value that none of its own methods mentions."""
    is_known = name in _names_in_methods(cls) or name in _VALUES_OF_TORCH
    return not is_known and is_value_of_class(vars(cls)[name])


@once_for_each
def _known_names(cls: type) -> frozenset[str]:
    """Return the names that torch and Lightning store, and those that methods mention."""
    return _names_for(cls) | _names_in_methods(cls)


def has_attributes_of_users(module: nn.Module) -> bool:
    """Return True if a module of torch holds something that its code does not know.

    Marks of other libraries (``_is_hf_initialized``) are among :func:`layer_settings` only.
    """
    attributes, cls = namespace_of(module), type(module)
    unknown = attributes.keys() - _known_names(cls)
    return any(not _is_mark(name, attributes[name]) for name in unknown)


def has_values_of_users(cls: type) -> bool:
    """Return True if a class of torch has a value that its code does not know."""
    known = _known_names(cls) | _VALUES_OF_TORCH
    return any(
        name not in known and is_value_of_class(value) and not _is_mark(name, value)
        for base in cls.__mro__
        for name, value in vars(base).items()
        if not name.startswith("__")
    )


def _is_mark(name: str, value: Any) -> bool:
    return name.startswith("_") and is_plain_value(value)


def is_user_attribute(module: nn.Module, name: str) -> bool:
    """Return True if ``name`` is a user's attribute and not a method.

    ``self.half = 2`` hides a method, and is an attribute.
    """
    if name in names_of_frameworks(module):
        return False
    attributes = namespace_of(module)
    if name in attributes and is_plain_value(attributes[name]):
        return True
    found = value_in_class(type(module), name)
    is_method = callable(found) or isinstance(found, classmethod)
    return isinstance(found, type) or is_value_of_class(found) or not is_method


def user_attributes(module: nn.Module) -> list[str]:
    """Return all attributes that a call may read, for modules whose reads cannot be observed."""
    if not is_user_module(module):
        return []
    cls: type = type(module)
    names = {
        *namespace_of(module),
        *slots_of(cls),
        *[name.split(".")[-1] for name, _ in class_values(module)],
    }
    # what ABCMeta keeps is no value of the user's
    names = {name for name in names if not name.startswith("_abc_")}
    return [name for name in names if is_user_attribute(module, name)]


def _methods_of_classes(cls: type) -> dict[str, Any]:
    # special methods are left out: functions of this package may replace them
    return {
        f"{base.__name__}.{name}": value
        for base in cls.__mro__
        if is_user_class(base)
        for name, value in vars(base).items()
        if not name.startswith("__") and (callable(value) or class_has(type(value), "__get__"))
    }


def stored_settings(module: nn.Module) -> dict[str, Any]:
    """Return those of :func:`layer_settings` that the module itself stores."""
    attributes, known = vars(module), names_of_frameworks(module)
    if is_metric(module):
        return {
            name: value
            for name, value in attributes.items()
            if is_plain_value(value) and not name.startswith("_")
        }
    if not is_user_module(module):
        if is_compiled_by_callback(module):  # which compiles again after a change of its own
            known |= {COMPILED_IN_PLACE}
        return {name: value for name, value in attributes.items() if name not in known}
    cls: type = type(module)
    return {name: v for name, v in attributes.items() if callable(value_in_class(cls, name))}


def layer_settings(module: nn.Module) -> dict[str, Any]:
    """Return settings that influence a graph although no attribute read was observed.

    For a module of torch these are all its attributes (``eps``, ``p``). For a metric they are its
    plain attributes (``threshold``). For any other module they are its class, its class values,
    replaced methods (``module.forward = ...``) and the methods of its classes.
    """
    cls: type = type(module)
    found = stored_settings(module)
    if not (is_metric(module) or is_user_module(module)):
        found["forward of its class"] = value_in_class(cls, "forward")
    found.update(class_values(module))
    found.update(_methods_of_classes(cls))
    found.pop(COMPILED_IN_PLACE, None)  # compared as "is compiled"
    return {
        **found,
        "training": None,  # part of the key
        "__class__": cls,
        "is compiled": is_compiled_in_place(module),
    }
