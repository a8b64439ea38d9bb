"""Nested batches and outputs: flatten, name and rebuild them.

``torch.utils._pytree`` handles dataclasses and mapping-like objects only if they are registered,
and batches often contain both. A container here is a container for Lightning's
``apply_to_collection``, which moves batches to a device.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

_Node = tuple[tuple[Any, ...], Iterable[Any]]  # the keys and the values of one container


def _tuple_children(node: Any) -> _Node:
    return tuple(range(len(node))), node


def _mapping_children(node: Any) -> _Node:
    keys = tuple(node)
    return keys, [node[key] for key in keys]


def _dataclass_children(node: Any) -> _Node:
    names = tuple(field.name for field in dataclasses.fields(node) if hasattr(node, field.name))
    return names, [getattr(node, name) for name in names]


def _build_sequence(node: Any, _: tuple[Any, ...], values: list[Any]) -> Any:
    kind = type(node)
    if hasattr(kind, "_make"):  # the constructor of a namedtuple takes one argument for each field
        return kind._make(values)
    return kind(values)


def _build_mapping(node: Any, keys: tuple[Any, ...], values: list[Any]) -> Any:
    if type(node) is dict:
        return dict(zip(keys, values, strict=True))
    new = copy.copy(node)  # keeps attributes other than the items (default_factory, encodings)
    for key, value in zip(keys, values, strict=True):
        new[key] = value
    if isinstance(new, OrderedDict) and tuple(new) != keys:  # outputs of transformers copy
        for key in keys:
            OrderedDict.move_to_end(new, key)
    return new


def _build_dataclass(node: Any, keys: tuple[Any, ...], values: list[Any]) -> Any:
    new = copy.copy(node)
    for key, value in zip(keys, values, strict=True):
        object.__setattr__(new, key, value)  # works for frozen dataclasses as well
    return new


@dataclasses.dataclass(frozen=True)
class _Container:
    children: Callable[[Any], _Node]
    build: Callable[[Any, tuple[Any, ...], list[Any]], Any]


_SEQUENCE = _Container(_tuple_children, _build_sequence)
_MAPPING = _Container(_mapping_children, _build_mapping)
_DATACLASS = _Container(_dataclass_children, _build_dataclass)
_containers: dict[type, _Container | None] = {}


def _find_container(kind: type) -> _Container | None:
    if issubclass(kind, (tuple, list)):
        return _SEQUENCE
    if issubclass(kind, Mapping):  # a read-only mapping cannot be rebuilt, so it is a leaf
        return _MAPPING if issubclass(kind, MutableMapping) else None
    return _DATACLASS if dataclasses.is_dataclass(kind) else None


def _container(node: Any) -> _Container | None:
    kind = type(node)
    try:
        return _containers[kind]
    except KeyError:
        return _containers.setdefault(kind, _find_container(kind))
    except TypeError:  # a class without a hash
        return None


def is_container(node: Any) -> bool:
    """Return True if :func:`flatten` flattens ``node``."""
    return _container(node) is not None


class _Keys(tuple[Any, ...]):
    """The keys of a mapping that are not all texts. ``True``, ``1`` and ``1.0`` are different."""

    __slots__ = ()

    def __eq__(self, other: Any) -> bool:
        return type(other) is _Keys and len(self) == len(other) and all(map(_is_same, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


def _is_same(before: Any, now: Any) -> bool:
    if before is now:
        return True
    cls: type = type(before)
    if cls is not type(now):
        return False
    if cls.__dictoffset__:  # equal objects may have other attributes
        return False
    if isinstance(before, tuple) and isinstance(now, tuple):
        return len(before) == len(now) and all(map(_is_same, before, now))
    is_equal = before == now or (before != before and now != now)
    return bool(is_equal) and repr(before) == repr(now)  # 0.0 and -0.0 are equal


_TEXTS = {str}


def _collect(node: Any, container: _Container, leaves: list[Any]) -> Hashable:
    keys, values = container.children(node)
    if container is _MAPPING and not _TEXTS.issuperset(map(type, keys)):
        keys = _Keys(keys)
    children: list[Hashable] = []
    for value in values:
        inner = _container(value)
        if inner is None:
            leaves.append(value)
            children.append(None)
        else:
            children.append(_collect(value, inner, leaves))
    return (type(node), keys, tuple(children))


def flatten(tree: Any) -> tuple[list[Any], Hashable]:
    """Return the leaves of ``tree`` in order, and its structure.

    Two structures are equal if all containers have the same types and keys, and the keys have the
    same types. Containers are tuples, lists, named tuples, writable mappings and dataclasses.
    Everything else is a leaf.
    """
    container = _container(tree)
    if container is None:
        return [tree], None
    leaves: list[Any] = []
    structure = _collect(tree, container, leaves)
    return leaves, structure


def leaf_paths(tree: Any, root: str = "batch") -> list[str]:
    """Return a path for each leaf, in the order of :func:`flatten`: ``batch[0]['ids'].values``."""
    return structure_paths(flatten(tree)[1], root)


def structure_paths(structure: Any, root: str) -> list[str]:
    """Return the paths of :func:`leaf_paths` from a stored structure."""
    if structure is None:
        return [root]
    kind, keys, children = structure
    dotted = _find_container(kind) is _DATACLASS
    return [
        path
        for key, child in zip(keys, children, strict=True)
        for path in structure_paths(child, f"{root}.{key}" if dotted else f"{root}[{key!r}]")
    ]


def dotted_paths(tree: Any) -> list[str]:
    """Return a short path for each leaf, in the order of :func:`flatten`: ``0.ids.values``."""
    return dotted_structure_paths(flatten(tree)[1])


def dotted_structure_paths(structure: Any) -> list[str]:
    """Return the paths of :func:`dotted_paths` from a stored structure."""
    if structure is None:
        return [""]
    _, keys, children = structure
    return [
        f"{key}.{path}" if path else str(key)
        for key, child in zip(keys, children, strict=True)
        for path in dotted_structure_paths(child)
    ]


def rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """Return a copy of the containers of ``tree`` with the leaves from ``leaves``, in order.

    ``tree`` itself is not changed.
    """
    container = _container(tree)
    if container is None:
        return next(leaves)
    keys, values = container.children(tree)
    parts = [
        next(leaves) if _container(value) is None else rebuild(value, leaves) for value in values
    ]
    return container.build(tree, keys, parts)


def rebuild_with_repeats(
    tree: Any, leaves: Iterator[Any], built: dict[int, Any] | None = None
) -> Any:
    """Return the same as :func:`rebuild`; a container that is there twice is one in the copy, too.

    Args:
        tree: The tree.
        leaves: The leaves, also those of each repeated container.
        built: The copies so far, by the ids of the containers.
    """
    container = _container(tree)
    if container is None:
        return next(leaves)
    built = {} if built is None else built
    keys, values = container.children(tree)
    parts = [rebuild_with_repeats(value, leaves, built) for value in values]
    if id(tree) not in built:
        built[id(tree)] = container.build(tree, keys, parts)
    return built[id(tree)]


def has_repeats(tree: Any) -> bool:
    """Return whether a container that can change is there twice."""
    found = list(map(id, containers_in(tree)))
    return len(set(found)) < len(found)


def containers_in(tree: Any, has_tuples: bool = False) -> Iterator[Any]:
    """Yield the containers of ``tree``, the outermost first; tuples never change: only if asked."""
    container = _container(tree)
    if container is not None:
        if has_tuples or not isinstance(tree, tuple):
            yield tree
        for value in container.children(tree)[1]:
            yield from containers_in(value, has_tuples)


def with_leaves_for(tree: Any, leaves: dict[int, Any]) -> Any:
    """Return a copy of the containers of ``tree``, in which leaves replace some, by their id.

    ``leaves`` then has the copies as well.
    """
    if id(tree) in leaves:
        return leaves[id(tree)]
    container = _container(tree)
    if container is None:
        return tree
    keys, values = container.children(tree)
    new = container.build(tree, keys, [with_leaves_for(value, leaves) for value in values])
    return leaves.setdefault(id(tree), new)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of ``tree``, in order."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]
