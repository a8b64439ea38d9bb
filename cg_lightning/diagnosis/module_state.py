"""A snapshot of what a module holds, to be compared later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cg_lightning.diagnosis.contents import UnreadableError, look_into
from cg_lightning.guards.frozen_parts import ChangedPlace
from cg_lightning.guards.value_kinds import holds_nothing, values_of
from cg_lightning.guards.values import FrozenValues
from cg_lightning.modules.attributes import (
    is_same_value,
    names_of_frameworks,
    scripted_attributes,
    set_by_users,
    slots_in,
)
from cg_lightning.modules.kinds import once_for_each

_TABLES = ("_parameters", "_buffers", "_modules")
ValuesOf = Callable[[type], dict[str, Any]]


def values_of_classes() -> ValuesOf:
    """Return a function that gives the values of a class as they are when it is first asked."""
    return once_for_each(values_of)


class ModuleState:
    """The attributes of a module and of its classes, and what is inside those of the user's.

    Args:
        module: The module.
        of_class: Gives the values of its class. Many modules may share the result of one
            :func:`values_of_classes`, if they are looked at together.
    """

    def __init__(self, module: nn.Module, of_class: ValuesOf = values_of) -> None:
        self.module = module
        self._values = _values(module, of_class)
        known = names_of_frameworks(module)
        self._contents = {
            name: contents
            for name in self._values
            if name not in known or set_by_users(module, name)
            if (contents := readable_contents(self._values[name])) is not None
        }

    def modules_inside(self) -> list[nn.Module]:
        """Return the modules that attributes hold in containers or objects, with theirs."""
        held = [module for contents in self._contents.values() for module in contents.modules]
        return [child for module in held for child in module.modules()]

    def changed(self, of_class: ValuesOf = values_of) -> list[str]:
        """Return the names of attributes that changed, came or went, or whose contents changed.

        Args:
            of_class: As in the constructor, but with the values of now.
        """
        missing, now = object(), _values(self.module, of_class)
        changed = [
            name
            for name, value in now.items()
            if not is_same_value(self._values.get(name, missing), value)
        ]
        gone = [name for name in self._values if name not in now]
        inside = [
            name
            for name, contents in self._contents.items()
            if f"{name}.requires_grad" not in changed and not contents.hold()
        ]
        return list(dict.fromkeys([*changed, *gone, *inside]))

    def changed_places(self, name: str) -> list[ChangedPlace]:
        """Return the changes of an attribute, or in it, by the names that code uses for it.

        Args:
            name: One of the names that :meth:`changed` returns.
        """
        missing = object()
        now = _values(self.module, values_of)
        if not is_same_value(self._values.get(name, missing), now.get(name)):
            return [ChangedPlace(name.rpartition(".")[2], True)]
        contents = self._contents.get(name)
        return [] if contents is None else contents.changed_places(name)


def _values(module: nn.Module, of_class: ValuesOf) -> dict[str, Any]:
    attributes = {**vars(module), **slots_in(module), **scripted_attributes(module)}
    # Lightning's cache of the names of metrics, made by the first ``self.log``
    attributes.pop("_metric_attributes", None)
    # torch.jit's cache of its compiled methods, made when they are first read
    attributes = {
        name: value
        for name, value in attributes.items()
        if not issubclass(type(value), torch.ScriptMethod)
    }
    members = {
        f"{table}.{name}": member
        for table in _TABLES
        for name, member in attributes.pop(table, {}).items()
    }
    members |= {
        f"{name}.requires_grad": member.requires_grad
        for name, member in members.items()
        if isinstance(member, torch.Tensor)
    }
    cls: type = type(module)
    return {**of_class(cls), **attributes, **members, "__class__": cls}


def readable_contents(value: Any) -> FrozenValues | None:
    """Return the contents of a value; None if it has none, or if they cannot be read."""
    if holds_nothing(value):
        return None
    try:
        return look_into(value)
    except UnreadableError:  # AttributeReads reports whatever reads it
        return None
