"""Comparisons by identity, in a few native calls: mostly, all values are the same objects.

A value that is another object may still be an equal plain value. To find that out takes longer, and
is for the caller.
"""

from __future__ import annotations

import collections
import operator
import types
from collections.abc import Iterable
from itertools import chain
from typing import Any

from cg_lightning.core.tree import is_container
from cg_lightning.guards.sources import MISSING

_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, types.MappingProxyType)
_SEQUENCES = (list, collections.deque)
_NAMESPACES = (dict, types.MappingProxyType)


class SameNames:
    """Tells whether names refer to the same objects as before.

    Args:
        names: Namespaces, names in them, and the objects; ``MISSING`` for a name that is not there.
    """

    def __init__(self, names: Iterable[tuple[Any, str, Any]]) -> None:
        names = list(names)
        plain = [each for each in names if type(each[0]) in _NAMESPACES]
        there = [each for each in plain if each[2] is not MISSING]
        absent = [each for each in plain if each[2] is MISSING]
        self._spaces, self._names, self._expected = _columns(there)
        self._other_spaces, self._absent_names, _ = _columns(absent)
        self._derived = [each for each in names if type(each[0]) not in _NAMESPACES]

    def hold(self) -> bool:
        """Return True if each name refers to the same object."""
        try:
            found = map(operator.getitem, self._spaces, self._names)
            if not all(map(operator.is_, found, self._expected)):
                return False
        except KeyError:
            return False
        return not any(map(operator.contains, self._other_spaces, self._absent_names)) and all(
            space.get(name, MISSING) is value for space, name, value in self._derived
        )


class SameItems:
    """Tells whether containers have the same objects as items.

    Args:
        containers: Containers that are compared as deep as they go.
        mappings: Dictionaries of which only the items are compared, not what is inside them.
    """

    def __init__(self, containers: Iterable[Any], mappings: Iterable[dict[str, Any]] = ()) -> None:
        self._views: list[Any] = []
        for mapping in mappings:
            self._add_mapping(mapping)
        self.others = [each for each in containers if not self._add(each)]
        """Containers that it cannot compare: their classes decide what their items are."""
        self._lengths = list(map(len, self._views))
        self._items = list(chain.from_iterable(self._views))

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
        """Return True if all containers have the same items in the same order."""
        # lengths tell when an item has moved to the next container
        return list(map(len, self._views)) == self._lengths and all(
            map(operator.is_, chain.from_iterable(self._views), self._items)
        )


def _columns(rows: list[tuple[Any, str, Any]]) -> tuple[list[Any], list[str], list[Any]]:
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
