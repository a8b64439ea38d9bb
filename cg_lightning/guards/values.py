"""The contents of guarded values: containers, objects, arrays and tensors, at any depth.

A value stays the same object when its contents change, so identity is not enough.
"""

from __future__ import annotations

import contextvars
import decimal
import functools
import itertools
import logging
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.core.tree import containers_in
from cg_lightning.guards.frozen_parts import (
    ChangedPlace,
    FrozenAttributes,
    FrozenClass,
    FrozenContainer,
    FrozenContents,
    FrozenResults,
    Path,
    Reader,
    as_tree,
    flatten_value,
    format_path,
    itself,
    root_of,
)
from cg_lightning.guards.identity import Members, SameItems
from cg_lightning.guards.module_guard import Placement, layout_and_gradient_of
from cg_lightning.guards.sources import MISSING
from cg_lightning.guards.value_kinds import (
    WEAK,
    ValueKind,
    bound_to,
    can_be_set_in,
    contents_of,
    holds_nothing,
    holds_something,
    inside,
    is_users_function,
    keeps_more_than_items,
    kind_of,
    name_of_class,
    named_values_of,
    reads_by_name,
    reads_unseen,
    registry_of,
    spaces_of,
    state_of_generator,
    values_of,
)
from cg_lightning.modules.attributes import (
    attributes_beside_items,
    attributes_of,
    has_room_for_attributes,
    members_of,
    names_of_library,
)

MOST_VALUES = 50_000
"""A value that contains more values is opaque."""


def addresses_of(tensors: Iterable[Tensor]) -> set[int]:
    """Return the addresses of the tensors' storages."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if has_memory(tensor)}


def has_memory(tensor: Tensor) -> bool:
    """Return False for a tensor without memory of its own.

    Examples are derivatives of forward mode, and subclasses that only wrap other tensors.
    """
    if tensor.layout is not torch.strided or tensor._is_zerotensor():
        return False
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # there is no other test
        return False
    return True


_OF_OBJECT = object()
"""The detail of a path to an attribute of an object."""


def _is_in_object(path: Path) -> bool:
    while path[0] is not None:
        if path[2] is _OF_OBJECT:
            return True
        path = path[0]
    return False


def _path_in_function(path: Path, function: Any, name: str, value: Any) -> Path:
    if isinstance(function, types.CellType):
        return (path, None, None)
    if isinstance(value, types.CellType) and isinstance(function, types.FunctionType):
        return (None, f"{name} of {function.__name__}", name.removeprefix("closure "))
    return (path, name, None)


_own = object.__getattribute__  # runs no code of the user's
_DICT = itertools.repeat("__dict__")


def _dictionary_of(value: Any) -> Any:
    try:
        return _own(value, "__dict__")
    except (AttributeError, TypeError):  # a proxy
        return None


def _is_alive(reference: Any) -> bool:
    return reference() is not None


def _keys_in(container: Any) -> list[Any]:
    """Return the keys of all mappings in a container that are no plain values."""
    return [
        key
        for each in containers_in(as_tree(container))
        if isinstance(each, Mapping)
        for key in each
        if not holds_nothing(key)
    ]


class FrozenValues:
    """Stores the contents of some values, and compares them later.

    Containers are compared by their leaves, objects by their attributes, both as deep as they go,
    and tensors by their addresses. The caller compares values that have nothing inside. Values
    whose contents cannot be read are in ``opaque``.

    Args:
        values: The values.
        paths: Their names as the user would write them, for :meth:`explain`.
        without_attributes: Functions that have no attributes, by their names.
    """

    def __init__(
        self,
        values: Iterable[Any],
        paths: Iterable[str] | None = None,
        without_attributes: Mapping[str, types.FunctionType] | None = None,
    ) -> None:
        self.modules: list[nn.Module] = []
        """Modules among them: those in a list, for example, are no submodules."""
        self.generators: dict[str, torch.Generator] = {}
        """Random generators of PyTorch, by their names. Operations show which ones a step uses."""
        self.namespaces: list[tuple[Any, str]] = []
        """Modules, classes, loggers and handlers of libraries among them, with their names."""
        self.is_decimal = False
        """Whether a value of ``decimal`` is among them."""
        self.reads_by_name = False
        """Whether a function is among them that reads attributes by names which it is given."""
        self.reads_unseen = False
        """Whether a function is among them by which code reads modules without an interception."""
        self.tensors: list[Tensor] = []
        self._tensor_paths: list[Path] = []
        self._items: list[FrozenContainer | FrozenAttributes] = []
        self._same_items = SameItems(MISSING)
        """Compares the same items natively, by identity."""
        self._other_containers: list[FrozenContainer] = []
        """Those among the items that it cannot compare."""
        self._classes: list[FrozenClass] = []
        self._contents: list[FrozenContents] = []
        self._owners: list[Any] = []
        """Objects that may be given another dictionary (``config.__dict__ = ...``)."""
        self._dictionaries: list[Any] = []
        self._owner_paths: list[Path] = []
        self._bare = [
            FrozenAttributes(vars(function), itself, {}, (None, name, None))
            for name, function in (without_attributes or {}).items()
        ]
        """Functions and tensors that have no attributes."""
        self._opaque: list[tuple[Path, str]] = []
        self._known_subclasses: set[int] = set()
        """The ids of containers whose attributes are stored."""
        roots = list(values)
        names = [""] * len(roots) if paths is None else list(paths)
        pending: list[tuple[Any, Path]] = [
            (value, (None, name, None)) for value, name in zip(roots, names, strict=True)
        ]
        seen = set[int]()
        while pending:
            value, path = pending.pop()
            if holds_nothing(value) or id(value) in seen:
                continue
            seen.add(id(value))
            if len(seen) > MOST_VALUES:
                self._opaque.append((path, f"more than {MOST_VALUES} values"))
                break
            pending += self._store(value, path, seen)
        self._placement = Placement(self.tensors, layout_and_gradient_of)
        self.without_attributes = list({id(each.value): each.value for each in self._bare}.values())
        """The dictionaries of functions and tensors without attributes. They must stay empty."""
        self._typed = [each.value for each in self._classes]
        self._expected_types = [each.cls for each in self._classes]
        self.has_more = any((self.tensors, self._items, self._classes, self._contents))
        """Whether :meth:`hold` compares anything except :attr:`without_attributes`."""

    def all_containers(self) -> list[Any]:
        """Return all containers."""
        found = [each.value for each in self._items if isinstance(each, FrozenContainer)]
        inside = [containers_in(as_tree(each)) for each in found]
        return [*found, *itertools.chain.from_iterable(inside)]

    def classes(self) -> list[type]:
        """Return the classes of all objects."""
        return self._expected_types

    @property
    def is_empty(self) -> bool:
        """Whether :meth:`hold` has nothing to compare."""
        return not (self.has_more or self.without_attributes)

    def opaque(self) -> list[str]:
        """Return the values that cannot be compared: ``self.rng: numpy.random.Generator``."""
        return [f"{format_path(path)}: {name}" for path, name in self._opaque]

    def _store(self, value: Any, path: Path, seen: set[int]) -> Iterable[tuple[Any, Path]]:
        """Store one value; return the values inside it, which are stored next."""
        kind = kind_of(value)
        self.reads_unseen |= reads_unseen(value)
        if isinstance(value, WEAK) and not _is_in_object(path):
            self._opaque.append((path, name_of_class(value)))
        if kind is ValueKind.TENSOR:
            if has_memory(value):
                self.tensors.append(value)
                self._tensor_paths.append(path)
            held = vars(value)  # attributes that the user has set
            if not held:
                self._bare.append(FrozenAttributes(held, itself, {}, path))
                return []
            self._store_space(held, dict(held), path)
            return [(item, (path, name, None)) for name, item in held.items()]
        if kind is ValueKind.GENERATOR:
            self.generators[format_path(path)] = value
        elif kind is ValueKind.MODULE:
            self.modules.append(value)
        elif kind is ValueKind.CONTAINER:
            return self._store_container(value, path, seen)
        elif kind is ValueKind.CACHE:
            results = FrozenResults(value)
            self._contents.append(FrozenContents(value, results.now, results.now(value), path))
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
            self._contents.append(FrozenContents(value, contents, contents(value), path))
        elif kind is ValueKind.OPAQUE:
            self._opaque.append((path, name_of_class(value)))
        elif isinstance(value, decimal.Decimal):
            self.is_decimal = True
        elif isinstance(value, (type, types.ModuleType)) and can_be_set_in(value):
            self.namespaces.append((value, format_path(path)))
        return self._members_of(value, path)

    def _members_of(self, value: Any, path: Path) -> list[tuple[Any, Path]]:
        return self._inside(inside(value), path, "members")

    def _inside(self, values: Iterable[Any], path: Path, name: str) -> list[tuple[Any, Path]]:
        """Return the values to store next."""
        return [(each, (path, name, None)) for each in values if not holds_nothing(each)]

    def _store_contents(self, value: Any, path: Path, seen: set[int]) -> list[tuple[Any, Path]]:
        contents = Members if isinstance(value, set) else contents_of(value)
        assert contents is not None
        self._contents.append(FrozenContents(value, contents, contents(value), path))
        found = self._members_of(value, path)
        if isinstance(value, contextvars.ContextVar):
            found.append((value.get(None), (path, "get()", None)))
        if has_room_for_attributes(type(value)):
            found += self._store_object(value, path, seen)
        return found

    def _store_container(
        self, value: Any, path: Path, seen: set[int]
    ) -> Iterable[tuple[Any, Path]]:
        leaves, structure = flatten_value(value)
        found: list[tuple[Any, Path]] = []
        for container in [value, *containers_in(as_tree(value), has_tuples=True)]:
            if keeps_more_than_items(container) and id(container) not in self._known_subclasses:
                self._known_subclasses.add(id(container))
                held = self._store_attributes(container, attributes_beside_items, path)
                found += [(item, (path, name, None)) for name, item in held.items()]
                found += self._store_class(type(container), path, seen)
        found += self._inside(_keys_in(value), path, "keys")
        container = FrozenContainer(value, leaves, structure, path)
        self._items.append(container)
        if not self._same_items.add(value):
            self._other_containers.append(container)
        return [*found, *[(leaf, (path, i, structure)) for i, leaf in enumerate(leaves)]]

    def _store_attributes(self, value: Any, read: Reader, path: Path) -> dict[str, Any]:
        """Store the attributes of a value, which ``read`` returns; return them."""
        cls: type = type(value)
        held = read(value)
        space = getattr(value, "__dict__", None)
        members = members_of(cls)
        has_all = not (members or names_of_library(cls))
        if space is not None and _dictionary_of(value) is space:
            self._owners.append(value)
            self._dictionaries.append(space)
            self._owner_paths.append(path)
        if space is not None and has_all and len(held) == len(space):
            self._store_space(space, held, path)
            return held
        if space is None and not members:
            return held
        self._items.append(FrozenAttributes(value, read, held, path))
        same = self._same_items
        if space is not None:
            same.add_size(space)
            for name in held:
                if name in space:
                    same.add_name(space, name, space[name])
        for name in members:
            same.add_attribute(value, name, held.get(name, MISSING))
        return held

    def _store_space(self, space: dict[str, Any], held: dict[str, Any], path: Path) -> None:
        """Store a namespace and a copy of it."""
        self._items.append(FrozenAttributes(space, itself, held, path))
        self._same_items.add_mapping(space)

    def _store_function(self, value: Any, path: Path) -> list[tuple[Any, Path]]:
        # each function that is called is guarded, so functions without state must cost no time
        if not is_users_function(value):
            registry = registry_of(value)
            return [] if registry is None else [(registry, (path, "registry", None))]
        if not holds_something(value):
            self._bare.append(FrozenAttributes(vars(value), itself, {}, path))
            return []
        cls: type = type(value)
        held = bound_to(value)
        self.reads_by_name |= reads_by_name(value)
        if isinstance(value, types.BuiltinFunctionType):  # of a module of C, or of an object
            held = {} if isinstance(value.__self__, types.ModuleType) else held
        if isinstance(value, functools.partial):  # ``__setstate__`` exchanges all of them
            self._items.append(FrozenAttributes(value, bound_to, dict(held), path))
            for name, each in held.items():
                self._same_items.add_attribute(value, name, each)
        if has_room_for_attributes(cls) or members_of(cls):
            held |= self._store_attributes(value, attributes_of, path)
        return [(each, _path_in_function(path, value, name, each)) for name, each in held.items()]

    def _store_object(self, value: Any, path: Path, seen: set[int]) -> list[tuple[Any, Path]]:
        """Store an object with its class; return the values inside it, which are stored next."""
        held = self._store_attributes(value, attributes_of, path)
        if isinstance(value, (logging.Logger, logging.Handler)):  # not all of it is compared
            self.namespaces.append((value, format_path(path)))
        self._classes.append(FrozenClass(value, type(value), path))
        found = [(item, (path, name, _OF_OBJECT)) for name, item in held.items()]
        return [*found, *self._store_class(type(value), path, seen)]

    def _store_class(self, cls: type, path: Path, seen: set[int]) -> list[tuple[Any, Path]]:
        if id(cls) in seen or not spaces_of(cls):
            return []
        seen.add(id(cls))
        return self._store_namespace(cls, path)

    def _store_namespace(self, namespace: Any, path: Path) -> list[tuple[Any, Path]]:
        held = values_of(namespace)
        self._items.append(FrozenAttributes(namespace, values_of, held, path))
        for space, name, value in named_values_of(namespace):
            self._same_items.add_name(space, name, value)
        for space in spaces_of(namespace):
            self._same_items.add_size(vars(space))
        return [(item, (path, name, _OF_OBJECT)) for name, item in held.items()]

    def _store_reference(
        self, reference: Any, path: Path, seen: set[int]
    ) -> list[tuple[Any, Path]]:
        value = reference()
        self._contents.append(FrozenContents(reference, _is_alive, _is_alive(reference), path))
        cls: type = type(value)
        is_plain = kind_of(value) is ValueKind.OBJECT and cls.__dictoffset__ != 0
        if not is_plain or members_of(cls) or names_of_library(cls):
            return [(value, (path, "()", None))]
        if id(value) in seen:
            return []
        seen.add(id(value))
        held = dict(vars(value))
        self._store_space(vars(value), held, path)  # this does not keep the object alive
        found = [(item, (path, name, _OF_OBJECT)) for name, item in held.items()]
        return [*found, *self._store_class(cls, path, seen)]

    def hold(self) -> bool:
        """Return whether nothing has changed."""
        return (
            not any(self.without_attributes)
            and self._placement.check()
            and (self._same_items.hold() or all(each.holds() for each in self._items))
            and all(each.holds() for each in self._other_containers)
            and all(map(operator.is_, map(type, self._typed), self._expected_types))
            and all(map(operator.is_, map(_own, self._owners, _DICT), self._dictionaries))
            and all(read(value) == before for value, read, before, _ in self._contents)
        )

    def changed_places(self, name: str) -> list[ChangedPlace]:
        """Return all that has changed, by the names that code has for it. It is slow.

        Args:
            name: The name of the value itself.
        """
        parts = [*self._items, *self._bare, *self._contents]
        places = itertools.chain.from_iterable(each.changed_places(name) for each in parts)
        return list(dict.fromkeys(places))

    def explain(self, lines: Mapping[str, str] | None = None) -> Changed:
        """Return what has changed, with both values; empty if nothing has. It is slow.

        Args:
            lines: The user's lines that read the values, by the names of these.
        """
        for each in [*self._items, *self._bare, *self._classes, *self._contents]:
            if not each.holds():
                return each.explain().at((lines or {}).get(root_of(each.path), ""))
        for owner, before, path in zip(
            self._owners, self._dictionaries, self._owner_paths, strict=True
        ):
            if _dictionary_of(owner) is not before:
                where = format_path(path)
                return Changed(where, f"{where}: another __dict__")
        for index in self._placement.moved():
            where = format_path(self._tensor_paths[index])
            return Changed(f"{where}: the tensor has another address")
        for index in self._placement.laid_out_otherwise():
            where = format_path(self._tensor_paths[index])
            what = "another shape, other strides, data type or requires_grad"
            return Changed(f"{where}: the tensor has {what}")
        return NO_CHANGE
