"""What attributes hold that a graph has frozen, however deep, and whether they still hold it."""

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
from cg_lightning.core.tree import flatten
from cg_lightning.modules.attributes import (
    attributes_of,
    is_configuration,
    is_plain_object,
    is_same_value,
    slots_of,
)

_MANY = 256
"""Containers and arrays of more items, a vocabulary say, are compared by close looks only."""
_CONTENTS: dict[type, Callable[[Any], Any]] = {
    set: frozenset,
    bytearray: bytes,
    array.array: array.array.tobytes,
    random.Random: random.Random.getstate,
}
# private, and in CUDA builds only: compares 300 addresses in about 20 us
_native_compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


def addresses_of(tensors: Iterable[Tensor]) -> set[int]:
    """Where the storages of tensors begin."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if _has_memory(tensor)}


def _has_memory(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided and not tensor._is_zerotensor()
    )  # derivatives of forward mode may have none


class Addresses:
    """Where tensors lay."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._indices = list(range(len(tensors)))

    def hold(self) -> bool:
        """Whether they still lie there."""
        if _native_compare is not None and self._tensors:
            return bool(_native_compare(self._tensors, self._addresses, self._indices))
        return list(map(Tensor.data_ptr, self._tensors)) == self._addresses


def same_attributes(attributes: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether all attributes are still the same objects, or equal plain values."""
    return attributes.keys() == before.keys() and all(
        map(is_same_value, before.values(), attributes.values())
    )


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


class FrozenValues:
    """Remembers what is in some values: they stay the same objects when something in them changes.

    Containers are compared by their leaves, plain objects by their attributes, those of configurations in turn likewise, and
    tensors by where they lie. What has nothing in it is for the caller to compare.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self.modules: list[nn.Module] = []
        """Modules among them: those in a list, say, are no submodules."""
        self.tensors: list[Tensor] = []
        self._containers: list[tuple[Any, list[Any], Any]] = []
        self._large_containers: list[tuple[Any, list[Any], Any]] = []
        self._objects: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._slotted: list[tuple[Any, dict[str, Any]]] = []
        self._copies: list[tuple[Any, Callable[[Any], Any], Any]] = []
        self._large_copies: list[tuple[Any, Callable[[Any], Any], Any]] = []
        pending, seen = list(values), set()
        while pending:
            value = pending.pop()
            if is_plain_value(value) or id(value) in seen:
                continue
            seen.add(id(value))
            pending += self._look_into(value)
        self._addresses = Addresses(self.tensors)

    def _look_into(self, value: Any) -> Iterable[Any]:
        """Remembers one value; gives what is to be looked into next."""
        if type(value) in (Tensor, nn.Parameter):
            self.tensors += [value] if value.layout is torch.strided else []
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        elif (contents := _contents_of(value)) is not None:
            items = (
                value.size
                if contents is _array_contents
                else len(value)
                if hasattr(value, "__len__")
                else 1
            )
            large = items > _MANY
            (self._large_copies if large else self._copies).append(
                (value, contents, contents(value))
            )
        elif (flat := _flatten(value))[1] is not None:
            large = len(flat[0]) > _MANY
            (self._large_containers if large else self._containers).append((value, *flat))
            return [] if large else flat[0]
        elif is_plain_object(value):
            held = attributes_of(value)
            if slots_of(type(value)):
                self._slotted.append((value, held))
            else:
                self._objects.append((vars(value), held))
            return (
                held.values()
                if is_configuration(value)
                else [item for item in held.values() if isinstance(item, Tensor)]
            )
        return []

    def hold(self) -> bool:
        """Whether nothing has changed, but for large containers."""
        return (
            self._addresses.hold()
            and all(_leaves_hold(*container) for container in self._containers)
            and all(same_attributes(attributes, before) for attributes, before in self._objects)
            and all(
                same_attributes(attributes_of(value), before) for value, before in self._slotted
            )
            and all(contents(value) == before for value, contents, before in self._copies)
        )

    def large_ones_hold(self) -> bool:
        """Whether large containers have not changed."""
        return all(_leaves_hold(*container) for container in self._large_containers) and all(
            contents(value) == before for value, contents, before in self._large_copies
        )

    def all_hold(self) -> bool:
        """Whether nothing has changed at all."""
        return self.hold() and self.large_ones_hold()


def _flatten(value: Any) -> tuple[list[Any], Any]:
    return flatten(list(value) if isinstance(value, collections.deque) else value)


def _leaves_hold(container: Any, leaves: list[Any], structure: Any) -> bool:
    now, structure_now = _flatten(container)
    return structure_now == structure and all(map(is_same_value, leaves, now))
