"""Which attributes of modules a graph may have frozen, and whether they are still the same."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.tree import flatten
from cg_lightning.modules.compiled import is_compiled_in_place
from cg_lightning.modules.kinds import is_metric, is_user_class, is_user_module, lightning_class

_PLAIN = (bool, int, float, str, bytes, type(None), torch.device, torch.dtype, types.MethodType)


def is_same_value(before: Any, after: Any) -> bool:
    """Whether an attribute still refers to the same object, or to an equal plain value."""
    if before is after:
        return True
    return type(before) is type(after) and isinstance(before, _PLAIN) and bool(before == after)


def same_attributes(attributes: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return whether all attributes are the same objects, or equal plain values."""
    return attributes.keys() == before.keys() and all(
        map(is_same_value, before.values(), attributes.values())
    )


def slots_of(cls: type) -> tuple[str, ...]:
    """Gives the attributes that instances of ``cls`` keep in slots."""
    declared = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    names = [name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(
        [name for name in names if isinstance(getattr(cls, name, None), types.MemberDescriptorType)]
    )


def is_plain_object(value: Any) -> bool:
    """Whether ``value`` is an object of the user's that holds attributes: a configuration, say."""
    cls = type(value)
    if isinstance(value, (nn.Module, Tensor, type, types.ModuleType)):
        return False
    if lightning_class(cls, "Trainer") or (callable(value) and not is_user_class(cls)):
        return False
    return hasattr(value, "__dict__") or bool(slots_of(type(value)))


def attributes_of(value: Any) -> dict[str, Any]:
    """Gives what a plain object holds, also in slots."""
    kept = {name: getattr(value, name) for name in slots_of(type(value)) if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **kept}


def scripted_attributes(module: nn.Module) -> dict[str, Any]:
    """Gives what a module of ``torch.jit`` holds beside parameters and buffers; it does so where Python sees no change."""
    kind = vars(module).get("_concrete_type")  # private: there is no other way to their names
    names = set(kind.get_attributes()) - names_of_frameworks(module) if kind is not None else ()
    values = {name: getattr(module, name) for name in names}
    return {
        name: value if isinstance(value, Tensor) else repr(value) for name, value in values.items()
    }


def is_configuration(value: Any, within: frozenset[int] = frozenset()) -> bool:
    """Whether an object of the user's holds nothing but plain values, tensors, containers of them, and objects like itself."""
    if id(value) in within:
        return True
    leaves = flatten(list(attributes_of(value).values()))[0]
    within |= {id(value)}
    return all(
        is_plain_value(leaf)
        or isinstance(leaf, Tensor)
        or (is_plain_object(leaf) and is_configuration(leaf, within))
        for leaf in leaves
    )


def names_of_frameworks(module: nn.Module) -> frozenset[str]:
    """Return the names that torch, and Lightning if it is a LightningModule, keep in ``module``.

    ``training``, one of them, is part of the key.
    """
    return _names_in(lightning_class(type(module), "LightningModule") or nn.Module)


@functools.cache
def _names_in(cls: type) -> frozenset[str]:
    return frozenset({*vars(cls()), "__dict__", "__class__"})


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Gives the forward hooks of ``module`` and those that come before it; each dictionary stays the same one."""
    return module._forward_hooks, module._forward_pre_hooks


def global_hooks() -> tuple[dict[int, Any], dict[int, Any]]:
    """Likewise for the forward hooks of all modules."""
    return _torch_module._global_forward_hooks, _torch_module._global_forward_pre_hooks


def holding_class(module: nn.Module, name: str) -> type | None:
    """Gives the class that an attribute is found in, if the module itself does not have it."""
    if name in vars(module):
        return None
    return next((cls for cls in type(module).__mro__ if name in vars(cls)), None)


def class_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Gives names and values of what user-written classes of ``module`` hold beside methods and descriptors."""
    for cls in type(module).__mro__:
        if is_user_class(cls):
            for name, value in vars(cls).items():
                if not (
                    name.startswith("__") or callable(value) or hasattr(type(value), "__get__")
                ):
                    yield f"{cls.__name__}.{name}", value


def values_of_classes(modules: list[nn.Module]) -> list[tuple[type, str]]:
    """Gives the plain values of user-written classes, which nobody sees being read (``type(self).name``), by class and name."""
    return plain_values_of(map(type, modules))


def plain_values_of(classes: Iterable[type]) -> list[tuple[type, str]]:
    """Gives the plain values of user-written classes among these and their bases, by class and name."""
    written = {base: None for cls in classes for base in cls.__mro__ if is_user_class(base)}
    named = [
        (cls, name, value)
        for cls in written
        for name, value in vars(cls).items()
        if not name.startswith("__")
    ]
    return [(cls, name) for cls, name, value in named if is_plain_value(value)]


def is_plain_attribute(module: nn.Module, name: str) -> bool:
    """Whether ``name`` is an attribute of the user's, and no method; ``self.half = 2`` hides one."""
    if name in names_of_frameworks(module):
        return False
    attributes: dict[str, Any] = object.__getattribute__(module, "__dict__")
    if name in attributes and is_plain_value(attributes[name]):
        return True
    found = getattr(type(module), name, None)
    return isinstance(found, type) or not callable(found)


def plain_attributes(module: nn.Module) -> list[str]:
    """Names of all attributes that a call may read, where nobody can see which ones it does."""
    if not is_user_module(module):
        return []
    attributes: dict[str, Any] = object.__getattribute__(
        module, "__dict__"
    )  # the module may be intercepted
    names = {*attributes, *[name.split(".")[-1] for name, _ in class_values(module)]}
    return [name for name in names if is_plain_attribute(module, name)]


def _methods_of_classes(cls: type) -> dict[str, Any]:
    """Gives the methods of user-written classes, but for special ones, where functions of ours may stand."""
    return {
        f"{base.__name__}.{name}": value
        for base in cls.__mro__
        if is_user_class(base)
        for name, value in vars(base).items()
        if not name.startswith("__") and (callable(value) or hasattr(type(value), "__get__"))
    }


def settings(module: nn.Module) -> dict[str, Any]:
    """Gives what is no attribute that a step was seen to read, and still decides what a graph holds.

    Of a module that torch wrote these are all its attributes (``eps``, ``p``), of a metric the plain ones (``threshold``), of
    any other module its class and what stands in the place of a method (``module.forward = ...``,
    ``type(module).forward = ...``).
    """
    cls, attributes = type(module), vars(module)
    if is_metric(module):
        found = {
            name: value
            for name, value in attributes.items()
            if is_plain_value(value) and not name.startswith("_")
        }
    elif is_user_module(module):
        found = {
            name: value for name, value in attributes.items() if callable(getattr(cls, name, None))
        }
    else:
        found = {
            name: value
            for name, value in attributes.items()
            if name not in names_of_frameworks(module)
        }
    found.update(class_values(module))
    found.update(_methods_of_classes(cls))
    found.pop("_compiled_call_impl", None)  # compared as "is compiled"
    return {
        **found,
        "training": None,
        "__class__": cls,
        "is compiled": is_compiled_in_place(module),
    }  # training: in the key
