"""Comparisons by identity, in a few native calls: mostly, all values are the same objects.

Another object may still be an equal plain value. The caller finds that out, because it takes
longer. Keys and members of sets are found by equality, which may leave a part of them out: ``True``
is the key 1, and a class of the user's may compare names only.

To compare an item takes 10 ns. Of large dictionaries, the versions are compared first. Very large
lists of texts are compared by equality, which takes less than 1 ns for a text that is the same
object, but a text equals one of another class (``StrEnum``). Many small ones are compared in these
ways as well.
"""

from __future__ import annotations

import collections
import operator
import types
from collections.abc import Iterable
from itertools import chain, compress, repeat
from typing import Any

from cg_lightning.core.tree import is_container
from cg_lightning.guards.library_code import version_of
from cg_lightning.guards.value_kinds import ValueKind, kind_of
from cg_lightning.modules.attributes import attributes_of, is_same_value

_DICTIONARIES = (dict, collections.defaultdict, collections.Counter)
"""Those whose versions show all changes: to move an item of an ``OrderedDict`` is none."""
_MAPPINGS = (*_DICTIONARIES, collections.OrderedDict, types.MappingProxyType)
_SEQUENCES = (list, collections.deque)
_MANY = 32
"""So many items are compared in about the time of a comparison of its own kind."""
_MANY_IN_ALL = 1000
_MANY_TEXTS = 4000
"""So many are compared by identity in 50 us."""


class SameItems:
    """Compares items of containers, names and attributes with the objects of when they were added.

    Args:
        missing: The value of an attribute that does not exist.
    """

    def __init__(self, missing: Any) -> None:
        self._views: list[Any] = []
        self._items: list[Any] = []
        self._sized: list[Any] = []
        self._lengths: list[int] = []
        self._spaces: list[Any] = []
        self._names: list[str] = []
        self._named: list[Any] = []
        self._large: list[dict[Any, Any]] = []
        self._versions: list[Any] = []
        self._keys: list[list[Any]] = []
        self._values: list[list[Any]] = []
        self._texts: list[list[str]] = []
        self._copies: list[list[str]] = []
        self._holders: list[Any] = []
        self._attributes: list[str] = []
        self._held: list[Any] = []
        self._missing = repeat(missing)

    def add(self, container: Any) -> bool:
        """Add a container with the containers inside it.

        Return False if it cannot be compared here, because a class decides what its items are.
        """
        kind = type(container)
        if kind in _MAPPINGS:
            self.add_mapping(container)
        elif kind in _SEQUENCES:
            self._add_view(container)
        elif kind is not tuple:
            return False
        items = container.values() if kind in _MAPPINGS else container
        return all(self.add(item) for item in items if is_container(item))

    def add_mapping(self, mapping: Any) -> None:
        """Add the keys and values of a mapping, but not the contents of its values."""
        is_large = len(mapping) > _MANY or self._number_of_items() > _MANY_IN_ALL
        if is_large and type(mapping) in _DICTIONARIES:
            self._large.append(mapping)
            self._versions.append(version_of(mapping))
            self._keys.append(list(mapping))
            self._values.append(list(mapping.values()))
            return
        self._add_view(mapping)
        self._add_view(mapping.values())  # a view of a mapping follows its changes

    def _add_view(self, view: Any) -> None:
        is_large = len(view) + self._number_of_items() > _MANY_TEXTS
        if is_large and type(view) is list and all(type(each) is str for each in view):
            self._texts.append(view)
            self._copies.append(list(view))
            return
        self._views.append(view)
        self._items += view
        self.add_size(view)

    def _number_of_items(self) -> int:
        return len(self._items) + len(self._large) + len(self._texts)

    def add_size(self, namespace: Any) -> None:
        """Add a namespace of which only the number of names is compared."""
        self._sized.append(namespace)
        self._lengths.append(len(namespace))

    def add_name(self, namespace: Any, name: str, value: Any) -> None:
        """Add a name in a namespace, and the object that it refers to."""
        self._spaces.append(namespace)
        self._names.append(name)
        self._named.append(value)

    def add_attribute(self, holder: Any, name: str, value: Any) -> None:
        """Add an attribute that no dictionary has, and the object that it refers to."""
        self._holders.append(holder)
        self._attributes.append(name)
        self._held.append(value)

    def hold(self) -> bool:
        """Return True if all containers and names have the same items in the same order."""
        # lengths show when an item has moved to the next container
        if list(map(len, self._sized)) != self._lengths:
            return False
        if not all(map(operator.is_, chain.from_iterable(self._views), self._items)):
            return False
        if self._texts and not self._texts_hold():
            return False
        if self._large and not self._large_ones_hold():
            return False
        try:
            found = map(operator.getitem, self._spaces, self._names)
            if not all(map(operator.is_, found, self._named)):
                return False
            found = map(getattr, self._holders, self._attributes, self._missing)
            return all(map(operator.is_, found, self._held))
        except (KeyError, ValueError):  # a name that is gone, an empty cell
            return False

    def _texts_hold(self) -> bool:
        try:
            return self._texts == self._copies
        except Exception:  # of an array, for example, that replaces a text: it has no truth value
            return False

    def _large_ones_hold(self) -> bool:
        versions = list(map(version_of, self._large))
        if versions == self._versions:
            return True
        stored = zip(self._large, self._keys, self._values, strict=True)
        changed = compress(stored, map(operator.ne, versions, self._versions))
        for mapping, keys, values in changed:
            if len(mapping) != len(keys) or not all(map(operator.is_, mapping, keys)):
                return False
            if not all(map(operator.is_, mapping.values(), values)):
                return False
        self._versions = versions
        return True


def is_same_item(before: Any, now: Any) -> bool:
    """Return whether two equal keys, or members of sets, are equal in all that they hold."""
    if is_same_value(before, now):
        return True
    if type(before) is not type(now) or before != now:
        return False
    if isinstance(before, tuple):
        return len(before) == len(now) and all(map(is_same_item, before, now))
    if isinstance(before, frozenset):
        return Members(before) == Members(now)
    kind = kind_of(before)
    if kind is ValueKind.OBJECT:
        held, held_now = attributes_of(before), attributes_of(now)
        return held.keys() == held_now.keys() and all(
            map(is_same_value, held.values(), held_now.values())
        )
    return kind is ValueKind.HARMLESS and repr(before) == repr(now)


class Members:
    """The members of a set, in the order in which it has them.

    Args:
        members: The set.
    """

    def __init__(self, members: Iterable[Any]) -> None:
        self._members = list(members)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Members) or len(self._members) != len(other._members):
            return False
        if all(map(operator.is_, self._members, other._members)):
            return True
        now = {member: member for member in other._members}
        return all(each in now and is_same_item(each, now[each]) for each in self._members)

    __hash__ = None  # type: ignore[assignment]


def is_same_structure(before: Any, now: Any) -> bool:
    """Return whether two structures (``core/tree.py``) are equal, and so are their keys."""
    return bool(before == now) and _have_same_keys(before, now)


def _have_same_keys(before: Any, now: Any) -> bool:
    if before is None:
        return True
    (_, keys, children), (_, keys_now, children_now) = before, now
    if not all(map(operator.is_, keys, keys_now)) and not all(map(is_same_item, keys, keys_now)):
        return False
    return all(map(_have_same_keys, children, children_now))
