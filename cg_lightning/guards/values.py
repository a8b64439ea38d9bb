"""What is inside the values that a graph has frozen: containers, objects, arrays and tensors, however deep.

Values stay the same objects when something in them changes, so identity is not enough.
"""

from __future__ import annotations

import array
import collections
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.tree import flatten, structure_paths
from cg_lightning.guards.module_guard import Addresses
from cg_lightning.guards.sources import describe_change, shorten
from cg_lightning.modules.attributes import (
    attributes_of,
    is_configuration,
    is_plain_object,
    is_same_value,
    same_attributes,
    slots_of,
)
from cg_lightning.modules.kinds import is_user_class

LARGE = 256
"""Containers and arrays with more items, such as a vocabulary, are compared once an epoch."""
_CONTENTS: dict[type, Callable[[Any], Any]] = {
    set: frozenset,
    bytearray: bytes,
    array.array: array.array.tobytes,
    random.Random: random.Random.getstate,
}
_Path = tuple[Any, ...]
"""A value's parent and how to get from there: formatted only if something has changed."""


def addresses_of(tensors: Iterable[Tensor]) -> set[int]:
    """Return the addresses of the tensors' storages."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if _has_memory(tensor)}


def _has_memory(tensor: Tensor) -> bool:
    # derivatives of forward mode may have none
    return tensor.layout is torch.strided and not tensor._is_zerotensor()


def _array_contents(value: Any) -> Any:
    return value.shape, value.dtype, value.tobytes()


def _generator_contents(value: Any) -> str:
    return repr(value.bit_generator.state)


def _contents_of(value: Any) -> Callable[[Any], Any] | None:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return _array_contents
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return _generator_contents
    return _CONTENTS.get(type(value))


def _flatten(value: Any) -> tuple[list[Any], Any]:
    return flatten(list(value) if isinstance(value, collections.deque) else value)


def _format(path: _Path) -> str:
    parent, step, detail = path
    if parent is None:
        return str(step)
    root = _format(parent)
    if isinstance(step, str):
        return f"{root}.{step}"
    return structure_paths(detail, root)[step]


def _leads_anywhere(value: Any) -> bool:
    cls = type(value)
    if not is_plain_object(value):
        return False
    is_standard = cls.__module__.split(".")[0] in sys.stdlib_module_names  # a logger, for example
    return (is_standard or not is_user_class(cls)) and not is_configuration(value)


class FrozenValues:
    """Stores what is inside some values, and compares it later.

    Containers are compared by their leaves, plain objects by their attributes and by the containers, arrays, modules
    and objects among them (those of other libraries: if they hold nothing else than values, containers and objects like
    themselves), and tensors by their addresses and their layout. A value that has nothing inside is for the caller to compare.

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
        self.tensors: list[Tensor] = []
        self._tensor_paths: list[_Path] = []
        self._containers: list[tuple[Any, list[Any], Any, _Path]] = []
        self._large_containers: list[tuple[Any, list[Any], Any, _Path]] = []
        self._inside_large: list[FrozenValues] = []
        self._objects: list[tuple[dict[str, Any], dict[str, Any], _Path]] = []
        self._slotted: list[tuple[Any, dict[str, Any], _Path]] = []
        self._copies: list[tuple[Any, Callable[[Any], Any], Any, _Path]] = []
        self._large_copies: list[tuple[Any, Callable[[Any], Any], Any, _Path]] = []
        roots = list(values)
        names = [""] * len(roots) if paths is None else list(paths)
        # whether to look into objects of other libraries too; one that is no configuration may lead anywhere
        pending: list[tuple[Any, _Path, bool]] = [
            (value, (None, name, None), True) for value, name in zip(roots, names, strict=True)
        ]
        self._seen = set() if seen is None else seen
        while pending:
            value, path, any_object = pending.pop()
            if is_plain_value(value) or id(value) in self._seen:
                continue
            if not any_object and _leads_anywhere(value):
                continue
            self._seen.add(id(value))
            found = self._store(value, path)
            pending += [(item, place, any_object and into_any) for item, place, into_any in found]
        for _, leaves, structure, path in self._large_containers:
            self._look_into_large(leaves, structure, path)
        self._addresses = Addresses(self.tensors)
        self._layouts = self._current_layouts()
        self.is_empty = not any(
            (self.tensors, self._containers, self._objects, self._slotted, self._copies)
        )
        """Whether :meth:`hold` has nothing to compare."""

    def _store(self, value: Any, path: _Path) -> Iterable[tuple[Any, _Path, bool]]:
        """Store one value; return what is to be looked into next."""
        if type(value) in (Tensor, nn.Parameter):
            if value.layout is torch.strided:
                self.tensors.append(value)
                self._tensor_paths.append(path)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        elif (contents := _contents_of(value)) is not None:
            items = 1
            if contents is _array_contents:
                items = value.size
            elif hasattr(value, "__len__"):
                items = len(value)
            copies = self._large_copies if items > LARGE else self._copies
            copies.append((value, contents, contents(value), path))
        elif (flat := _flatten(value))[1] is not None:
            leaves, structure = flat
            if len(leaves) > LARGE:
                self._large_containers.append((value, leaves, structure, path))
                return []
            self._containers.append((value, leaves, structure, path))
            return [(leaf, (path, index, structure), True) for index, leaf in enumerate(leaves)]
        elif is_plain_object(value):
            held = attributes_of(value)
            if slots_of(type(value)):
                self._slotted.append((value, held, path))
            else:
                self._objects.append((vars(value), held, path))
            inside = is_configuration(value)
            return [(item, (path, name, None), inside) for name, item in held.items()]
        return []

    def _look_into_large(self, leaves: list[Any], structure: Any, path: _Path) -> None:
        inside = {index: leaf for index, leaf in enumerate(leaves) if not is_plain_value(leaf)}
        if inside:
            paths = structure_paths(structure, _format(path))
            values = FrozenValues(inside.values(), [paths[index] for index in inside], self._seen)
            self._inside_large.append(values)
            self.modules += values.modules

    def _current_layouts(self) -> list[Any]:
        return [(tensor.shape, tensor.stride()) for tensor in self.tensors]

    def hold(self) -> bool:
        """Return whether nothing has changed. Large containers are not compared."""
        return (
            self._addresses.check()
            and self._current_layouts() == self._layouts
            and all(_leaves_hold(value, leaves, s) for value, leaves, s, _ in self._containers)
            and all(same_attributes(attributes, before) for attributes, before, _ in self._objects)
            and all(same_attributes(attributes_of(v), before) for v, before, _ in self._slotted)
            and all(contents(value) == before for value, contents, before, _ in self._copies)
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
        for value, before, path in self._slotted:
            if not same_attributes(attributes_of(value), before):
                return _explain_attributes(attributes_of(value), before, _format(path))
        for value, contents, before, path in [*self._copies, *self._large_copies]:
            if contents(value) != before:
                return f"{_format(path)}: the contents of the {type(value).__name__} have changed"
        for index in self._addresses.moved():
            return f"{_format(self._tensor_paths[index])}: the tensor has another address"
        for layout, before, path in zip(
            self._current_layouts(), self._layouts, self._tensor_paths, strict=True
        ):
            if layout != before:
                return f"{_format(path)}: the tensor has another shape or other strides"
        return next(filter(None, [values.explain() for values in self._inside_large]), "")


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
