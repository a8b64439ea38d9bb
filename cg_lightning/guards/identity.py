"""Comparisons by identity, in a few native calls: mostly, all values are the same objects.

A value that is another object may still be an equal plain value. To find that out takes longer, and
is for the caller.
"""

from __future__ import annotations

import collections
import operator
import types
from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

from cg_lightning.core.tree import is_container

_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, types.MappingProxyType)
_SEQUENCES = (list, collections.deque)


class SameItems:
    """Tells whether containers have the same objects as items.

    Args:
        containers: Containers that are compared as deep as they go.
        mappings: Dictionaries of which only the items are compared, not what is inside them.
        names: Namespaces, names in them, and the objects that they refer to.
        attributes: Objects, names of attributes that no dictionary has, and what they refer to.
        sized: Namespaces of which only the number of names is compared.
        missing: What an attribute refers to that is not there.
    """

    def __init__(
        self,
        containers: Iterable[Any],
        mappings: Iterable[dict[str, Any]],
        names: list[tuple[Any, str, Any]],
        attributes: list[tuple[Any, str, Any]],
        sized: Iterable[Any],
        missing: Any,
    ) -> None:
        self._views: list[Any] = []
        for mapping in mappings:
            self._add_mapping(mapping)
        self.others = [each for each in containers if not self._add(each)]
        """Containers that it cannot compare: their classes decide what their items are."""
        self._items = list(chain.from_iterable(self._views))
        self._sized = [*self._views, *sized]
        self._lengths = list(map(len, self._sized))
        self._spaces = [space for space, _, _ in names]
        self._names = [name for _, name, _ in names]
        self._named = [value for _, _, value in names]
        self._holders = [holder for holder, _, _ in attributes]
        self._attributes = [name for _, name, _ in attributes]
        self._held = [value for _, _, value in attributes]
        self._missing = repeat(missing)

    def _add_mapping(self, mapping: Any) -> Iterable[Any]:
        items: Iterable[Any] = mapping.values()
        self._views += (mapping, items)  # a view of a mapping follows its changes
        return items

    def _add(self, container: Any) -> bool:
        kind = type(container)
        items: Iterable[Any] = container
        if kind in _MAPPINGS:
            items = self._add_mapping(container)
        elif kind in _SEQUENCES:
            self._views.append(container)
        elif kind is not tuple:
            return False
        return all(self._add(item) for item in items if is_container(item))

    def hold(self) -> bool:
        """Return True if containers have the same items in the same order, and so have names."""
        # lengths tell when an item has moved to the next container
        if list(map(len, self._sized)) != self._lengths:
            return False
        if not all(map(operator.is_, chain.from_iterable(self._views), self._items)):
            return False
        try:
            found = map(operator.getitem, self._spaces, self._names)
            if not all(map(operator.is_, found, self._named)):
                return False
            found = map(getattr, self._holders, self._attributes, self._missing)
            return all(map(operator.is_, found, self._held))
        except (KeyError, ValueError):  # a name that is gone, an empty cell
            return False
