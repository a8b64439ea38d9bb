"""Where a step changes values in Python: attributes of modules, and places inside of them."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

from torch import nn

from cg_lightning.guards.changed_values import (
    LISTS,
    MAPPINGS,
    KindsToChange,
    is_plain_object,
    kind_to_change,
)
from cg_lightning.guards.sources import MISSING, Source
from cg_lightning.modules.kinds import namespace_of

_Steps = tuple[tuple[bool, Any], ...]
_FACTORIES = (list, dict, int, float, collections.deque)


class ChangedAttribute(NamedTuple):
    """An attribute of a module that the watched step changed and did not read."""

    module: nn.Module
    name: str
    path: str
    """As the user would write it: ``self.outputs``."""
    is_set: bool
    """True if the step sets it before it reads it. False if it changes the current value."""
    is_added_to: bool = False
    """Whether a line of the step adds to it. If it is a tensor, that changes it in place."""

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the module."""
        return namespace_of(self.module)

    def kind_source(self) -> Source:
        """Return a source for the kind of its value."""
        return Source(KindsToChange(self.attributes), self.name, self.path)


class Place(NamedTuple):
    """The place of a value that a step changes: ``self.store.items["val"]``."""

    namespace: dict[str, Any]
    """The attributes of a module."""
    steps: _Steps
    """The way from there: keys, or (False) names of attributes."""
    path: str
    method: str = ""
    """The method of the value that is called; empty if none is."""

    def inside(self, is_key: bool, key: Any) -> Place:
        """Return the place of a part of this value."""
        path = f"{self.path}[{key!r}]" if is_key else f"{self.path}.{key}"
        return Place(self.namespace, (*self.steps, (is_key, key)), path)

    def outer(self) -> Place:
        """Return the place of the container, object or module that has the value."""
        return Place(self.namespace, self.steps[:-1], self.path)

    def is_same(self, other: Place) -> bool:
        """Return whether both are the same place, and not only the same value."""
        return self.namespace is other.namespace and self.steps == other.steps

    def holder(self) -> Any:
        """Return the container, object or module that has the value."""
        value: Any = self.namespace
        for is_key, key in self.steps[:-1]:
            value = value[key] if is_key else vars(value)[key]
        return value

    def value(self) -> Any:
        """Return the value."""
        is_key, key = self.steps[-1]
        return self.holder()[key] if is_key else vars(self.holder())[key]

    def set(self, value: Any) -> None:
        """Set the value."""
        is_key, key = self.steps[-1]
        holder = self.holder()
        (holder if is_key else vars(holder))[key] = value

    def found(self) -> Any:
        """Return the value; MISSING if it is not there. No code of the user is called."""
        value: Any = self.namespace
        for is_key, key in self.steps:
            value = _look_up(value, is_key, key)
        return value

    def kind(self) -> Any:
        """Return the kind of the value; None if it is not there."""
        value = self.found()
        return None if value is MISSING else kind_to_change(value)

    def can_be_set(self) -> bool:
        """Return whether a value can be set here in the usual way."""
        value: Any = self.namespace
        for is_key, key in self.steps[:-1]:
            value = _look_up(value, is_key, key)
        is_key, key = self.steps[-1]
        if type(value) in MAPPINGS:
            return is_key
        if is_key:
            return _look_up(value, is_key, key) is not MISSING
        return is_plain_object(value) and not hasattr(getattr(type(value), key, None), "__set__")


def _look_up(value: Any, is_key: bool, key: Any) -> Any:
    """Return an item or attribute, if it is looked up in the usual way; else MISSING."""
    cls: type = type(value)
    if not is_key:
        is_set_by_class = hasattr(getattr(cls, key, None), "__set__")
        if is_set_by_class or not is_plain_object(value):
            return MISSING
        return vars(value).get(key, MISSING)
    if cls in MAPPINGS:
        if (
            key not in value
            and cls is collections.defaultdict
            and value.default_factory in _FACTORIES
        ):
            return value.default_factory()
        return value.get(key, MISSING)
    if cls in LISTS and type(key) is int and -len(value) <= key < len(value):
        return value[key]
    return MISSING
