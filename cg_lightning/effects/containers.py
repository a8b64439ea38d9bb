"""Snapshots of containers and objects, which are compared and restored later.

Tensors in them are compared by identity, and by the attributes that users set on them. Writes
*into* a tensor, and attributes of modules, belong to
:class:`~cg_lightning.effects.step_state.StepState`.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.descriptor import is_inside_transform, is_plain_value
from cg_lightning.guards.frozen_parts import ChangedPlace
from cg_lightning.guards.value_kinds import ValueKind, bound_to, contents_of, kind_of
from cg_lightning.guards.values import MOST_VALUES
from cg_lightning.modules.attributes import attributes_of, is_same_value, same_attributes

_SEQUENCES = (list, collections.deque, MutableSequence)
_MUTABLE = (*_SEQUENCES, MutableMapping, MutableSet)
_Items = list[tuple[Any, Any]]
_MISSING: Any = object()


def _items_of(value: Any, kind: ValueKind) -> _Items:
    if kind is ValueKind.OBJECT:
        return list(attributes_of(value).items())
    if isinstance(value, MutableMapping):
        return [(key, value[key]) for key in list(value)]
    return list(enumerate(value)) if isinstance(value, (tuple, *_SEQUENCES)) else []


def _is_same_key(key: Any, before: Any) -> bool:
    return key is before or (type(key) is int and type(before) is int and key == before)


def _name(path: str, key: Any, kind: ValueKind) -> str:
    return f"{path}.{key}" if kind is ValueKind.OBJECT else f"{path}[{key!r}]"


def _changed_key(now: _Items, before: _Items) -> Any:
    """Return the key of the first item that was added, replaced or removed; None: none was."""
    old = dict(before)
    for key, value in now:
        if not is_same_value(old.pop(key, _MISSING), value):
            return key
    return next(iter(old), None)


def _memory_of(tensor: Tensor) -> Any:
    """Return address and layout of a tensor; None if it has none."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    if tensor.is_nested or is_inside_transform():
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class ContainersSnapshot:
    """The contents of some values, at any depth.

    Args:
        roots: Names and values. The contents of modules and tensors are left out.
        most: Maximum number of values that are stored.
    """

    def __init__(self, roots: Iterable[tuple[str, Any]], most: float = MOST_VALUES) -> None:
        self._nodes: list[tuple[Any, ValueKind, _Items, str]] = []
        self._copies: list[tuple[Any, Any, str]] = []
        self._tensors: list[tuple[Tensor, dict[str, Any], str]] = []
        self._memory: list[tuple[Tensor, Any, str]] = []
        self._ids: set[int] = set()
        pending = list(roots)
        seen: set[int] = set()
        while pending and len(seen) < most:
            path, value = pending.pop()
            if is_plain_value(value) or id(value) in seen:
                continue
            seen.add(id(value))
            with contextlib.suppress(Exception):  # whatever reading it raises: it is left out
                pending += self._store(path, value)

    def _store(self, path: str, value: Any) -> list[tuple[str, Any]]:
        """Store one value, and return names and values of what it holds."""
        if issubclass(type(value), Tensor):
            self._tensors.append((value, dict(vars(value)), path))
            self._memory.append((value, _memory_of(value), path))
            return []
        kind = kind_of(value)
        if kind in (ValueKind.CONTAINER, ValueKind.OBJECT):
            items = _items_of(value, kind)
            self._nodes.append((value, kind, items, path))
            if not issubclass(type(value), tuple):
                self._ids.add(id(value))
            return [
                (_name(path, key, kind), item) for key, item in items if not is_plain_value(item)
            ]
        if kind is ValueKind.CONTENTS:
            contents = contents_of(value)
            assert contents is not None
            self._copies.append((value, contents(value), path))
        elif kind is ValueKind.FUNCTION:
            return [(f"{path}.{name}", held) for name, held in bound_to(value).items()]
        return []

    def changed(self) -> str:
        """Return the path of the first entry that was added, replaced or removed; empty: none."""
        for kind, key, path in self._changed_nodes():
            return path if key is None else _name(path, key, kind)
        for value, copy, path in self._copies:
            contents = contents_of(value)
            assert contents is not None
            if contents(value) != copy:
                return path
        for tensor, attributes, path in self._tensors:
            if not same_attributes(vars(tensor), attributes):
                return f"an attribute of {path}"
        for tensor, memory, path in self._memory:
            if _memory_of(tensor) != memory:
                return f"the memory of {path}"
        return ""

    def changed_places(self) -> list[ChangedPlace]:
        """Return the entries that were added, replaced or removed.

        An entry without a name of its own has that of its container.
        """
        return [
            ChangedPlace(
                key if isinstance(key, str) else path.rpartition(".")[2].split("[")[0],
                is_set=kind is ValueKind.OBJECT,
            )
            for kind, key, path in self._changed_nodes()
        ]

    def _changed_nodes(self) -> Iterator[tuple[ValueKind, Any, str]]:
        """Yield kind, key of the first changed item, and path of each node that has changed."""
        for value, kind, before, path in self._nodes:
            now = _items_of(value, kind)
            if len(now) != len(before) or not all(
                _is_same_key(key, old_key) and is_same_value(old, item)
                for (key, item), (old_key, old) in zip(now, before, strict=True)
            ):
                yield kind, _changed_key(now, before), path

    def new_items(self) -> list[tuple[str, Any]]:
        """Return names and values of the items that were added or replaced."""
        found = []
        for value, kind, items, path in self._nodes:
            before = dict(items)
            found += [
                (_name(path, key, kind), item)
                for key, item in _items_of(value, kind)
                if not is_same_value(before.get(key, _MISSING), item)
            ]
        return found

    def holds(self, output: Any) -> bool:
        """Return whether a nested value contains one of these containers."""
        pending, seen = [output], set[int]()
        while pending:
            value = pending.pop()
            if isinstance(value, (Tensor, nn.Module)) or is_plain_value(value):
                continue
            if id(value) in self._ids:
                return True
            if id(value) not in seen:
                seen.add(id(value))
                kind = kind_of(value)
                if kind in (ValueKind.CONTAINER, ValueKind.OBJECT):
                    pending += [item for _, item in _items_of(value, kind)]
        return False

    def restore(self) -> None:
        """Restore what has changed."""
        for value, kind, before, _ in self._nodes:
            if kind is ValueKind.OBJECT:
                _restore_attributes(value, dict(before))
            elif isinstance(value, _MUTABLE):
                _restore_items(value, before)
        for value, copy, _ in self._copies:
            _restore_contents(value, copy)
        for tensor, attributes, _ in self._tensors:
            if not same_attributes(vars(tensor), attributes):
                vars(tensor).clear()
                vars(tensor).update(attributes)


def _restore_attributes(value: Any, before: dict[str, Any]) -> None:
    now = attributes_of(value)
    for name in now.keys() - before.keys():
        object.__delattr__(value, name)
    for name, held in before.items():
        if now.get(name, _MISSING) is not held:
            object.__setattr__(value, name, held)  # frozen dataclasses as well


def _restore_items(value: Any, before: _Items) -> None:
    now = _items_of(value, ValueKind.CONTAINER)
    if len(now) == len(before) and all(
        _is_same_key(key, old_key) and item is old
        for (key, item), (old_key, old) in zip(now, before, strict=True)
    ):
        return
    if isinstance(value, MutableMapping):
        for key in list(value):
            del value[key]
        for key, item in before:
            value[key] = item
    else:
        value.clear()
        value.extend(item for _, item in before)


def _restore_contents(value: Any, copy: Any) -> None:
    contents = contents_of(value)
    assert contents is not None
    if contents(value) == copy:
        return
    if isinstance(value, MutableSet):
        value.clear()
        value.update(copy)  # type: ignore[attr-defined]
    elif isinstance(value, bytearray):
        value[:] = copy
