"""Records of values that a graph has frozen. Each one compares its value, and explains a change."""

from __future__ import annotations

import collections
import gc
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from cg_lightning.core.reasons import Changed
from cg_lightning.core.tree import flatten, structure_paths
from cg_lightning.guards.identity import is_same_structure
from cg_lightning.guards.sources import MISSING, describe_change, shorten
from cg_lightning.modules.attributes import is_same_value, same_attributes

Path = tuple[Any, ...]
"""The path of the parent, the step from there, and a detail. It is formatted after a change."""
Reader = Callable[[Any], dict[str, Any]]


def as_tree(value: Any) -> Any:
    """Return a container in a form that ``core/tree.py`` can flatten."""
    if isinstance(value, collections.deque):
        return list(value)
    return dict(value) if isinstance(value, types.MappingProxyType) else value


def flatten_value(value: Any) -> tuple[list[Any], Any]:
    """Return the leaves and the structure of a container."""
    return flatten(as_tree(value))


def format_path(path: Path) -> str:
    """Return a path as the user would write it."""
    parent, step, detail = path
    if parent is None:
        return str(step)
    root = format_path(parent)
    if step is None:
        return root
    if isinstance(step, str):
        return f"{root}.{step}"
    return structure_paths(detail, root)[step]


def root_of(path: Path) -> str:
    """Return where a path begins."""
    while path[0] is not None:
        path = path[0]
    return str(path[1])


def itself(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes: they are the value that is read."""
    return attributes


class ChangedPlace(NamedTuple):
    """The name of something that has changed."""

    name: str
    is_set: bool
    """True if the name refers to another object. False if only the contents have changed."""


def _innermost_name(path: Path, root: str) -> str:
    parent, step, detail = path
    if parent is None:
        return root if detail is None else str(detail)  # the name of what a function closes over
    return step if isinstance(step, str) else _innermost_name(parent, root)


class FrozenContainer(NamedTuple):
    """A container and its leaves, which are compared as deep as containers go."""

    value: Any
    leaves: list[Any]
    structure: Any
    path: Path

    def holds(self) -> bool:
        """Return True if it has the same structure and leaves."""
        now, structure = flatten_value(self.value)
        return is_same_structure(self.structure, structure) and all(
            map(is_same_value, self.leaves, now)
        )

    def changed_places(self, name: str) -> list[ChangedPlace]:
        """Return the container if it has changed; see :meth:`FrozenValues.changed_places`."""
        return [] if self.holds() else [ChangedPlace(_innermost_name(self.path, name), False)]

    def explain(self) -> Changed:
        """Return the first change."""
        path = format_path(self.path)
        now, structure = flatten_value(self.value)
        if not is_same_structure(self.structure, structure):
            sizes = f"now {len(now)} items, before {len(self.leaves)}"
            return Changed(path, f"{path}: other keys or another length, {sizes}")
        paths = structure_paths(structure, path)
        changed = (
            describe_change(paths[index], item, before)
            for index, (item, before) in enumerate(zip(now, self.leaves, strict=True))
            if not is_same_value(before, item)
        )
        return next(changed)


class FrozenAttributes(NamedTuple):
    """A value and its attributes, which a function reads."""

    value: Any
    read: Reader
    before: dict[str, Any]
    path: Path

    def holds(self) -> bool:
        """Return True if it has the same attributes."""
        return same_attributes(self.read(self.value), self.before)

    def changed_places(self, name: str) -> list[ChangedPlace]:
        """Return the attributes that have changed."""
        now, before = self.read(self.value), self.before
        return [
            # the content of a cell has the name of the variable
            ChangedPlace(
                _innermost_name(self.path, name) if each == "cell_contents" else each, True
            )
            for each in {**before, **now}
            if not is_same_value(before.get(each, MISSING), now.get(each, MISSING))
        ]

    def explain(self) -> Changed:
        """Return the first change."""
        now, before, path = self.read(self.value), self.before, format_path(self.path)
        for name in [*before, *now]:
            where = f"{path}.{name}"
            if name not in now:
                return Changed(where, f"{where}: now not there, before {shorten(before[name])}")
            if name not in before:
                return Changed(where, f"{where}: now {shorten(now[name])}, before not there")
            if not is_same_value(before[name], now[name]):
                return describe_change(where, now[name], before[name])
        raise AssertionError("called only if an attribute has changed")


class FrozenContents(NamedTuple):
    """A value and a copy of its contents, which a function reads."""

    value: Any
    read: Callable[[Any], Any]
    before: Any
    path: Path

    def holds(self) -> bool:
        """Return True if the contents are equal to the copy."""
        return bool(self.read(self.value) == self.before)

    def changed_places(self, name: str) -> list[ChangedPlace]:
        """Return the value if its contents have changed."""
        return [] if self.holds() else [ChangedPlace(_innermost_name(self.path, name), False)]

    def explain(self) -> Changed:
        """Return the change."""
        kind = type(self.value).__name__
        return Changed(f"{format_path(self.path)}: the contents of the {kind} have changed")


class FrozenClass(NamedTuple):
    """An object and its class."""

    value: Any
    cls: type
    path: Path

    def holds(self) -> bool:
        """Return True if the object has the same class."""
        return type(self.value) is self.cls

    def explain(self) -> Changed:
        """Return the change."""
        where, now, before = format_path(self.path), type(self.value).__name__, self.cls.__name__
        return Changed(where, f"{where}: now a {now}, before a {before}")


class FrozenResults:
    """The results in the cache of a function. Counts alone may be equal for different results.

    Args:
        cache: The function.
    """

    def __init__(self, cache: Any) -> None:
        # nothing else gives them; the other dictionary has the attributes of the function
        held = [each for each in gc.get_referents(cache) if type(each) is dict]
        self._stored = next((each for each in held if each is not vars(cache)), {})
        self._kept = list(self._stored.values())
        """Kept alive, so that no later result can have one of their ids."""

    def kept(self, cache: Any) -> list[Any]:
        """Return the results and the arguments that they are for."""
        aside = (self._stored, vars(cache))
        held = [each for each in gc.get_referents(cache) if all(each is not one for one in aside)]
        is_bounded = cache.cache_parameters()["maxsize"] is not None  # then there are links around
        return held if is_bounded else [*held, *self._stored, *self._stored.values()]

    def now(self, cache: Any) -> tuple[int, ...]:
        """Return how often the function was computed, how much is stored, and the ids of it."""
        info = cache.cache_info()
        return (info.misses, info.currsize, *map(id, self._stored.values()))
