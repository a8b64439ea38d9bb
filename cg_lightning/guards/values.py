"""What is inside frozen values: containers, objects, arrays and tensors, however deep.

Values stay the same objects when something in them changes, so identity is not enough.
"""

from __future__ import annotations

import collections
import contextvars
import gc
import operator
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.tree import containers_in, flatten, structure_paths
from cg_lightning.guards.identity import SameItems
from cg_lightning.guards.module_guard import Placement, layout_and_gradient_of
from cg_lightning.guards.sources import MISSING, describe_change, shorten
from cg_lightning.guards.value_kinds import (
    ValueKind,
    bound_to,
    contents_of,
    holds_nothing,
    holds_something,
    inside,
    is_users_function,
    keeps_more_than_items,
    kind_of,
    name_of_class,
    named_values_of,
    spaces_of,
    state_of_generator,
    values_of,
)
from cg_lightning.modules.attributes import (
    attributes_beside_items,
    attributes_of,
    has_room_for_attributes,
    is_same_value,
    members_of,
    names_of_library,
    same_attributes,
)

LARGE = 256
"""Containers and arrays with more items, such as a vocabulary, are compared once an epoch.

Of what a function with a cache has stored, only the counts are compared then.
"""
MOST_VALUES = 50_000
"""What holds more values than that is no longer looked into: it is opaque."""
_Path = tuple[Any, ...]
"""A value's parent and how to get from there: formatted only if something has changed."""


def addresses_of(tensors: Iterable[Tensor]) -> set[int]:
    """Return the addresses of the tensors' storages."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if has_memory(tensor)}


def has_memory(tensor: Tensor) -> bool:
    """Return False for a tensor without memory of its own.

    Such is a derivative of forward mode, or a subclass that only wraps other tensors.
    """
    if tensor.layout is not torch.strided or tensor._is_zerotensor():
        return False
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # nothing else tells
        return False
    return True


_Reader = Callable[[Any], dict[str, Any]]
_OF_OBJECT = "an attribute of an object"


def _is_in_object(path: _Path) -> bool:
    while path[0] is not None:
        if path[2] == _OF_OBJECT:
            return True
        path = path[0]
    return False


def _as_tree(value: Any) -> Any:
    if isinstance(value, collections.deque):
        return list(value)
    return dict(value) if isinstance(value, types.MappingProxyType) else value


def _flatten(value: Any) -> tuple[list[Any], Any]:
    return flatten(_as_tree(value))


def _path_in_function(path: _Path, function: Any, name: str) -> _Path:
    if isinstance(function, types.CellType):
        return (path, None, None)
    if name.startswith("closure "):
        return (None, f"{name} of {function.__name__}", None)
    return (path, name, None)


def _is_alive(reference: Any) -> bool:
    return reference() is not None


def _keys_in(container: Any) -> list[Any]:
    """Return the keys of all mappings in a container that are no plain values."""
    return [
        key
        for each in containers_in(_as_tree(container))
        if isinstance(each, Mapping)
        for key in each
        if not holds_nothing(key)
    ]


def _format(path: _Path) -> str:
    parent, step, detail = path
    if parent is None:
        return str(step)
    root = _format(parent)
    if step is None:
        return root
    if isinstance(step, str):
        return f"{root}.{step}"
    return structure_paths(detail, root)[step]


class FrozenValues:
    """Stores what is inside some values, and compares it later.

    Containers are compared by their leaves, objects by their attributes, both as deep as they go,
    and tensors by their addresses. A value that has nothing inside is for the caller to compare,
    and what nobody can look into is in ``opaque``.

    Args:
        values: The values.
        paths: Their names as the user would write them, for :meth:`explain`.
        seen: The ids of values that are compared already.
    """

    def __init__(
        self,
        values: Iterable[Any],
        paths: Iterable[str] | None = None,
        seen: set[int] | None = None,
    ) -> None:
        self.modules: list[nn.Module] = []
        """Modules among them: those in a list, for example, are no submodules."""
        self.generators: dict[str, torch.Generator] = {}
        """Random generators of PyTorch, by their names: operations show what is drawn from them."""
        self.tensors: list[Tensor] = []
        self._tensor_paths: list[_Path] = []
        self._containers: list[tuple[Any, list[Any], Any, _Path]] = []
        self._large_containers: list[tuple[Any, list[Any], Any, _Path]] = []
        self._large_members: list[tuple[list[Any], _Path]] = []
        self._inside_large: list[FrozenValues] = []
        self._looked_beside: set[int] = set()
        self._objects: list[tuple[dict[str, Any], dict[str, Any], _Path]] = []
        self._read: list[tuple[Any, _Reader, dict[str, Any], _Path]] = []
        """Values, how they are asked for what they hold, and what that is."""
        self._names: list[tuple[Any, str, Any]] = []
        self._members: list[tuple[Any, str, Any]] = []
        self._sized: list[Any] = []
        """Natively comparable, these say the same as what was read."""
        self._types: list[tuple[Any, type, _Path]] = []
        self._opaque: list[tuple[_Path, str]] = []
        self._copies: list[tuple[Any, Callable[[Any], Any], Any, _Path]] = []
        self._large_copies: list[tuple[Any, Callable[[Any], Any], Any, _Path]] = []
        roots = list(values)
        names = [""] * len(roots) if paths is None else list(paths)
        pending: list[tuple[Any, _Path]] = [
            (value, (None, name, None)) for value, name in zip(roots, names, strict=True)
        ]
        seen = set() if seen is None else seen
        while pending:
            value, path = pending.pop()
            if holds_nothing(value) or id(value) in seen:
                continue
            seen.add(id(value))
            if len(seen) > MOST_VALUES:
                self._opaque.append((path, "more values than anybody compares"))
                break
            pending += self._store(value, path, seen)
        for _, leaves, structure, path in self._large_containers:
            self._look_into_large(leaves, structure_paths(structure, _format(path)), seen)
        for members, path in self._large_members:
            self._look_into_large(members, [_format(path)] * len(members), seen)
        self._placement = Placement(self.tensors, layout_and_gradient_of)
        self._same_items = SameItems(
            [container for container, *_ in self._containers],
            [attributes for attributes, *_ in self._objects],
            self._names,
            self._members,
            self._sized,
            MISSING,
        )
        others = set(map(id, self._same_items.others))
        self._other_containers = [each for each in self._containers if id(each[0]) in others]
        self._typed = [value for value, _, _ in self._types]
        self._expected_types = [cls for _, cls, _ in self._types]
        self.is_empty = not any(
            (
                *(self.tensors, self._containers, self._objects),
                *(self._read, self._types, self._copies),
            )
        )
        """Whether :meth:`hold` has nothing to compare."""

    def opaque(self) -> list[str]:
        """Return what nobody can look into: ``self.rng: numpy.random.Generator``."""
        return [f"{_format(path)}: {name}" for path, name in self._opaque]

    def _store(self, value: Any, path: _Path, seen: set[int]) -> Iterable[tuple[Any, _Path]]:
        """Store one value; return what is to be looked into next."""
        kind = kind_of(value)
        if kind is ValueKind.TENSOR:
            if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
                self.tensors.append(value)
                self._tensor_paths.append(path)
            if held := vars(value):  # somebody gave it attributes
                self._objects.append((held, dict(held), path))
                return [(item, (path, name, None)) for name, item in held.items()]
        elif kind is ValueKind.GENERATOR:
            self.generators[_format(path)] = value
        elif kind is ValueKind.MODULE:
            self.modules.append(value)
        elif kind is ValueKind.CONTAINER:
            return self._store_container(value, path, seen)
        elif kind is ValueKind.CACHE:
            results = _Results(value)
            self._copies.append((value, results.now, results.now(value), path))
            return self._inside(results.kept(value), path, "results")
        elif kind is ValueKind.FUNCTION:
            return self._store_function(value, path)
        elif kind is ValueKind.NAMESPACE:
            return self._store_namespace(value, path)
        elif kind is ValueKind.REFERENCE:
            return self._store_reference(value, path, seen)
        elif kind is ValueKind.OBJECT:
            return [*self._store_object(value, path, seen), *self._members_of(value, path)]
        elif kind is ValueKind.CONTENTS:
            return self._store_contents(value, path, seen)
        elif _is_in_object(path) and (contents := state_of_generator(value)) is not None:
            self._copies.append((value, contents, contents(value), path))
        elif kind is ValueKind.OPAQUE:
            self._opaque.append((path, name_of_class(value)))
        return self._members_of(value, path)

    def _members_of(self, value: Any, path: _Path) -> list[tuple[Any, _Path]]:
        return self._inside(inside(value), path, "members")

    def _inside(self, values: Iterable[Any], path: _Path, name: str) -> list[tuple[Any, _Path]]:
        """Return values to look into next, or note them for a closer look if they are many."""
        found = [each for each in values if not holds_nothing(each)]
        if len(found) > LARGE:
            self._large_members.append((found, (path, name, None)))
            return []
        return [(each, (path, name, None)) for each in found]

    def _store_contents(self, value: Any, path: _Path, seen: set[int]) -> list[tuple[Any, _Path]]:
        contents = contents_of(value)
        assert contents is not None
        items = 1
        if hasattr(value, "nbytes"):
            items = value.nbytes // value.itemsize
        elif hasattr(value, "__len__"):
            items = len(value)
        copies = self._large_copies if items > LARGE else self._copies
        copies.append((value, contents, contents(value), path))
        found = self._members_of(value, path)
        if isinstance(value, contextvars.ContextVar):
            found.append((value.get(None), (path, "get()", None)))
        if has_room_for_attributes(type(value)):
            found += self._store_object(value, path, seen)
        return found

    def _store_container(
        self, value: Any, path: _Path, seen: set[int]
    ) -> Iterable[tuple[Any, _Path]]:
        leaves, structure = _flatten(value)
        found: list[tuple[Any, _Path]] = []
        for container in [value, *containers_in(_as_tree(value))]:
            if keeps_more_than_items(container) and id(container) not in self._looked_beside:
                self._looked_beside.add(id(container))
                held = self._store_attributes(container, attributes_beside_items, path)
                found += [(item, (path, name, None)) for name, item in held.items()]
                found += self._store_class(type(container), path, seen)
        found += self._inside(_keys_in(value), path, "keys")
        if len(leaves) > LARGE:
            self._large_containers.append((value, leaves, structure, path))
            return found
        self._containers.append((value, leaves, structure, path))
        return [*found, *[(leaf, (path, i, structure)) for i, leaf in enumerate(leaves)]]

    def _store_attributes(self, value: Any, read: _Reader, path: _Path) -> dict[str, Any]:
        """Store what a value holds, as ``read`` tells; return it."""
        cls: type = type(value)
        held = read(value)
        space = getattr(value, "__dict__", None)
        members = members_of(cls)
        if space is not None and len(held) == len(space) and not members:
            self._objects.append((space, held, path))
            return held
        if space is None and not members:
            return held
        self._read.append((value, read, held, path))
        if space is not None:
            self._sized.append(space)
            self._names += [(space, name, space[name]) for name in held if name in space]
        self._members += [(value, name, held.get(name, MISSING)) for name in members]
        return held

    def _store_function(self, value: Any, path: _Path) -> list[tuple[Any, _Path]]:
        # each function that is called is guarded: those that hold nothing must cost nothing
        if not is_users_function(value) or not holds_something(value):
            return []
        cls: type = type(value)
        held = bound_to(value)
        if has_room_for_attributes(cls) or members_of(cls):
            held |= self._store_attributes(value, attributes_of, path)
        return [(each, _path_in_function(path, value, name)) for name, each in held.items()]

    def _store_object(self, value: Any, path: _Path, seen: set[int]) -> list[tuple[Any, _Path]]:
        """Store an object with its class; return what is to be looked into next."""
        held = self._store_attributes(value, attributes_of, path)
        self._types.append((value, type(value), path))
        found = [(item, (path, name, _OF_OBJECT)) for name, item in held.items()]
        return [*found, *self._store_class(type(value), path, seen)]

    def _store_class(self, cls: type, path: _Path, seen: set[int]) -> list[tuple[Any, _Path]]:
        if id(cls) in seen or not spaces_of(cls):
            return []
        seen.add(id(cls))
        return self._store_namespace(cls, path)

    def _store_namespace(self, namespace: Any, path: _Path) -> list[tuple[Any, _Path]]:
        held = values_of(namespace)
        self._read.append((namespace, values_of, held, path))
        self._names += named_values_of(namespace)
        self._sized += map(vars, spaces_of(namespace))
        return [(item, (path, name, _OF_OBJECT)) for name, item in held.items()]

    def _store_reference(
        self, reference: Any, path: _Path, seen: set[int]
    ) -> list[tuple[Any, _Path]]:
        value = reference()
        self._copies.append((reference, _is_alive, _is_alive(reference), path))
        cls: type = type(value)
        is_plain = kind_of(value) is ValueKind.OBJECT and cls.__dictoffset__ != 0
        if not is_plain or members_of(cls) or names_of_library(cls):
            return [(value, (path, "()", None))]
        if id(value) in seen:
            return []
        seen.add(id(value))
        held = dict(vars(value))
        self._objects.append((vars(value), held, path))  # this does not keep the object alive
        found = [(item, (path, name, _OF_OBJECT)) for name, item in held.items()]
        return [*found, *self._store_class(cls, path, seen)]

    def _look_into_large(self, items: list[Any], paths: list[str], seen: set[int]) -> None:
        """Store what is inside the items of something large, to be compared with it."""
        inside = {index: item for index, item in enumerate(items) if not holds_nothing(item)}
        if inside:
            values = FrozenValues(inside.values(), [paths[index] for index in inside], seen)
            self._inside_large.append(values)
            self.modules += values.modules
            self.generators |= values.generators
            self._opaque += values._opaque

    def hold(self) -> bool:
        """Return whether nothing has changed. Large containers are not compared."""
        return (
            self._placement.check()
            and (self._same_items.hold() or self._items_are_equal())
            and all(
                _leaves_hold(value, leaves, s) for value, leaves, s, _ in self._other_containers
            )
            and all(map(operator.is_, map(type, self._typed), self._expected_types))
            and all(contents(value) == before for value, contents, before, _ in self._copies)
        )

    def _items_are_equal(self) -> bool:
        return (
            all(_leaves_hold(value, leaves, s) for value, leaves, s, _ in self._containers)
            and all(same_attributes(attributes, before) for attributes, before, _ in self._objects)
            and all(same_attributes(read(value), before) for value, read, before, _ in self._read)
        )

    def large_ones_hold(self) -> bool:
        """Return whether large containers have not changed."""
        return (
            all(_leaves_hold(value, leaves, s) for value, leaves, s, _ in self._large_containers)
            and all(contents(value) == before for value, contents, before, _ in self._large_copies)
            and all(values.all_hold() for values in self._inside_large)
        )

    def all_hold(self) -> bool:
        """Return whether nothing at all has changed."""
        return self.hold() and self.large_ones_hold()

    def explain(self) -> str:
        """Return what has changed, with both values; empty if nothing has. It takes its time."""
        for value, leaves, structure, path in [*self._containers, *self._large_containers]:
            if not _leaves_hold(value, leaves, structure):
                return _explain_container(value, leaves, structure, _format(path))
        for attributes, before, path in self._objects:
            if not same_attributes(attributes, before):
                return _explain_attributes(attributes, before, _format(path))
        for value, read, before, path in self._read:
            if not same_attributes(now := read(value), before):
                return _explain_attributes(now, before, _format(path))
        for value, cls, path in self._types:
            if type(value) is not cls:
                return f"{_format(path)}: now a {type(value).__name__}, before a {cls.__name__}"
        for value, contents, before, path in [*self._copies, *self._large_copies]:
            if contents(value) != before:
                return f"{_format(path)}: the contents of the {type(value).__name__} have changed"
        for index in self._placement.moved():
            return f"{_format(self._tensor_paths[index])}: the tensor has another address"
        for index in self._placement.laid_out_otherwise():
            where = _format(self._tensor_paths[index])
            what = "another shape, other strides, data type or requires_grad"
            return f"{where}: the tensor has {what}"
        return next(filter(None, [values.explain() for values in self._inside_large]), "")


class _Results:
    """What a function with a cache has stored. Counts alone are the same again after a while.

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
        if info.currsize > LARGE:
            return info.misses, info.currsize
        return (info.misses, info.currsize, *map(id, self._stored.values()))


def _leaves_hold(container: Any, leaves: list[Any], structure: Any) -> bool:
    now, structure_now = _flatten(container)
    return structure_now == structure and all(map(is_same_value, leaves, now))


def _explain_container(value: Any, leaves: list[Any], structure: Any, path: str) -> str:
    now, structure_now = _flatten(value)
    if structure_now != structure:
        return f"{path}: other keys or another length, now {len(now)} items, before {len(leaves)}"
    paths = structure_paths(structure, path)
    changed = (
        describe_change(paths[index], item, before)
        for index, (item, before) in enumerate(zip(now, leaves, strict=True))
        if not is_same_value(before, item)
    )
    return next(changed)


def _explain_attributes(attributes: dict[str, Any], before: dict[str, Any], path: str) -> str:
    for name in [*before, *attributes]:
        if name not in attributes:
            return f"{path}.{name}: now not there, before {shorten(before[name])}"
        if name not in before:
            return f"{path}.{name}: now {shorten(attributes[name])}, before not there"
        if not is_same_value(before[name], attributes[name]):
            return describe_change(f"{path}.{name}", attributes[name], before[name])
    raise AssertionError("called only if an attribute has changed")
