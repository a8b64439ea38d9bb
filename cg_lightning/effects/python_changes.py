"""Changes that a step makes in Python, done again after each replay: appended, added, set, called.

What is hard here:

- A step may change only values that it does not read, so its graph is right for any value. The
  watched step has shown that (``diagnosis/uses_of_attribute.py``). A capture proves it again: a
  :class:`_StandIn` replaces each such value. It records changes and supports no other operation.
- So a capture does not change the user's own containers, and nothing has to be restored in them.
- A value that is appended or set becomes a part of the output of the graph, so it is copied out of
  graph memory. If eager appends a tensor of the batch, a replay appends that very tensor.
- A change is made as the user's line makes it: ``+=`` of Python, on the current value.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import inspect
import math
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, NoneType
from typing import Any, NamedTuple

from torch import Tensor

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.equality import copy_of
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import containers_in, flatten
from cg_lightning.effects.containers import ContainersSnapshot
from cg_lightning.effects.effect import Effect
from cg_lightning.effects.late_reads import LateRead
from cg_lightning.effects.places import ChangedAttribute, Place
from cg_lightning.guards.changed_values import (
    LISTS,
    MAPPINGS,
    NUMBER,
    is_plain_object,
    kind_to_change,
)
from cg_lightning.guards.sources import MISSING

_ACCUMULATED = (bool, int, float, complex, str, NoneType, Tensor, list, dict, tuple)
"""Types that an object may hold if its method is called. None of them runs code of the user's."""


class Verb(enum.Enum):
    """Kinds of changes."""

    APPEND = "append"
    APPEND_LEFT = "appendleft"
    ADD = "+="
    SET = "="
    CALL = "()"


class Change(NamedTuple):
    """One change of the captured step, without its value."""

    verb: Verb
    place: Place
    kind: Any
    """The kind of the value that is changed; None if it is set."""
    method: CodeType | None = None
    """The code of the method that is called."""

    def is_possible(self) -> bool:
        """Return whether the change has the same effect as in the watched step."""
        if self.verb is Verb.SET:
            return self.place.can_be_set()
        if self.verb is Verb.CALL and not (self._updates_mapping() or self._has_method()):
            return False
        return self.kind is not None and self.place.kind() == self.kind

    def _updates_mapping(self) -> bool:
        return self.kind in MAPPINGS and self.place.method == "update"

    def _has_method(self) -> bool:
        """Return whether the method is the one that was seen, and its object has plain values."""
        value = self.place.found()
        if value is MISSING or not is_plain_object(value) or self.place.method in vars(value):
            return False
        function = inspect.getattr_static(type(value), self.place.method, None)
        if not isinstance(function, FunctionType) or function.__code__ is not self.method:
            return False
        return all(type(each) in _ACCUMULATED for each in vars(value).values())

    def takes(self, value: Any) -> bool:
        """Return whether a replay can make the change with this value."""
        if self.verb is Verb.SET:
            return True
        if self.verb is Verb.CALL and self._updates_mapping():
            return all(type(each) is dict and all(map(is_plain_value, each)) for each in value[0])
        if self.verb is Verb.CALL:
            return all(
                isinstance(x, (Tensor, LateRead)) or is_plain_value(x)
                for x in (*value[0], *value[1].values())
            )
        if self.verb is Verb.APPEND:
            return self.kind in LISTS
        if self.verb is Verb.APPEND_LEFT:
            return self.kind is collections.deque
        if isinstance(value, LateRead):
            return self.kind is list if value.method == "tolist" else bool(self.kind == NUMBER)
        if self.kind is list:
            return type(value) in (list, tuple)
        return self.kind in (NUMBER, str) and kind_to_change(value) == self.kind

    def make(self, value: Any) -> None:
        """Make the change."""
        if self.verb is Verb.APPEND:
            self.place.value().append(value)
        elif self.verb is Verb.APPEND_LEFT:
            self.place.value().appendleft(value)
        elif self.verb is Verb.CALL:
            args, kwargs = value
            getattr(self.place.value(), self.place.method)(*args, **kwargs)
        elif self.verb is Verb.ADD:
            total = self.place.value()
            total += value
            self.place.set(total)
        else:
            self.place.set(value)


class _StandIn:
    """Replaces a value while its step is captured, and records the changes of it."""

    __slots__ = ("_place", "_record")
    _place: Place
    _record: ChangeRecording

    def __init__(self, place: Place, record: ChangeRecording) -> None:
        object.__setattr__(self, "_place", place)
        object.__setattr__(self, "_record", record)

    def append(self, value: Any) -> None:
        self._record.add(Verb.APPEND, self._place, value)

    def appendleft(self, value: Any) -> None:
        self._record.add(Verb.APPEND_LEFT, self._place, value)

    def extend(self, values: Any) -> None:
        if isinstance(values, LateRead):
            self._record.add(Verb.ADD, self._place, values)
            return
        for each in values:  # a generator may append to the same list meanwhile
            self.append(each)

    def __iadd__(self, value: Any) -> Any:
        self._record.add(Verb.ADD, self._place, value)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            self._refuse()
        return self._record.at(self._place.inside(False, name))

    def __getitem__(self, key: Any) -> Any:
        return self._record.at(self._place.inside(True, _known(key)))

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        *steps, (is_key, name) = self._place.steps
        if is_key or not steps:
            self._refuse()
        path = self._place.path.removesuffix(f".{name}")
        place = Place(self._place.namespace, tuple(steps), path, name)
        self._record.add(Verb.CALL, place, (args, kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, _StandIn):  # what += has returned
            self._record.add(Verb.SET, self._place.inside(False, name), value)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(value, _StandIn):
            self._record.add(Verb.SET, self._place.inside(True, _known(key)), value)

    def _refuse(self, *_: Any) -> Any:
        raise CaptureError(f"{self._place.path} is read, which the watched step did not do")

    __bool__ = __len__ = __iter__ = __contains__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __int__ = __float__ = __index__ = _refuse


def _known(key: Any) -> Any:
    if is_plain_value(key):
        return key
    raise CaptureError(f"an entry is set under a {type(key).__qualname__}, which no guard compares")


class _NotSet:
    """Replaces an attribute until the captured step sets it."""


class ChangeRecording:
    """The changes of one captured step.

    Args:
        attributes: The attributes that the step changes.
    """

    def __init__(self, attributes: Sequence[ChangedAttribute]) -> None:
        self._attributes = attributes
        self._changes: list[tuple[Verb, Place]] = []
        self._values: list[Any] = []
        self._set: dict[tuple[int, Any], Any] = {}
        self._read: list[Place] = []
        """The places where the step reads what it has set."""
        self._before: list[Any] = []
        self._put: list[Any] = []

    def add(self, verb: Verb, place: Place, value: Any) -> None:
        """Add one change."""
        self._changes.append((verb, place))
        self._values.append(_as_it_is_now(value) if verb is Verb.ADD else value)
        namespace = id(place.namespace)
        for other, steps in list(self._set):
            if other == namespace and steps[: len(place.steps)] == place.steps:
                del self._set[other, steps]
        if verb is Verb.SET:
            self._set[namespace, place.steps] = value

    def at(self, place: Place) -> Any:
        """Return what the step has set in a place, or else a stand-in for it."""
        key = (id(place.namespace), place.steps)
        if key not in self._set:
            return _StandIn(place, self)
        self._read.append(place)
        return self._set[key]

    def begin(self) -> None:
        """Replace each value by a stand-in."""
        for attribute in self._attributes:
            attributes = attribute.attributes
            self._before.append(attributes.get(attribute.name, MISSING))
            put = _NotSet() if attribute.is_set else _StandIn(_place_of(attribute), self)
            self._put.append(put)
            if not (attribute.is_set and self._before[-1] is MISSING):
                attributes[attribute.name] = put

    def restore(self) -> None:
        """Restore the values; idempotent."""
        for attribute, before in zip(self._attributes, self._before, strict=False):
            if before is MISSING:
                attribute.attributes.pop(attribute.name, None)
            else:
                attribute.attributes[attribute.name] = before
        self._before.clear()

    def finish(self, output: Any) -> tuple[Any, RepeatChanges]:
        """Return the output together with the values of the changes, and the changes.

        Call it after the step. All values are restored.

        Raises:
            CaptureError: A replay could not make the changes.
        """
        for attribute, put in zip(self._attributes, self._put, strict=True):
            now = attribute.attributes.get(attribute.name, MISSING)
            is_as_put = now is put or now is MISSING
            if attribute.is_set is is_as_put:
                raise CaptureError(f"{attribute.path} is not set as in the watched step")
            if attribute.is_set:
                self.add(Verb.SET, _place_of(attribute), now)
        self.restore()
        self._refuse_reads_of_shared()
        changes = []
        for (verb, place), value in zip(self._changes, self._values, strict=True):
            kind = None if verb is Verb.SET else place.kind()
            function = inspect.getattr_static(place.found(), place.method, None)
            change = Change(verb, place, kind, getattr(function, "__code__", None))
            if not (change.is_possible() and change.takes(value)):
                raise CaptureError(f"{place.path} is changed in a way that a replay cannot repeat")
            changes.append(change)
        parts, first = _without_repeats([output, *self._values])
        return (parts[0], parts[1:]), RepeatChanges(changes, first)

    def _refuse_reads_of_shared(self) -> None:
        """Raise if the step reads what it has set in a container that it changes elsewhere too."""
        read = {id(place.outer().found()): place for place in self._read}
        for verb, place in self._changes:
            changed = place.outer() if verb in (Verb.SET, Verb.ADD) else place
            value = changed.found()
            same = None if value is MISSING else read.get(id(value))
            if same is not None and not same.outer().is_same(changed):
                raise CaptureError(f"{same.path} is read, and {place.path} is in the same object")


def _place_of(attribute: ChangedAttribute) -> Place:
    return Place(attribute.attributes, ((True, attribute.name),), attribute.path)


def _as_it_is_now(value: Any) -> Any:
    """Return a copy of a value that a step adds, because it may change it in place later."""
    if type(value) is list:
        return list(value)
    return copy_of(value) if isinstance(value, Tensor) else value


def _without_repeats(parts: list[Any]) -> tuple[list[Any], list[int]]:
    """Return parts of an output, with None for a container that is there already, and its place.

    Raises:
        CaptureError: Two parts share a container inside. Each would get one of its own.
    """
    kept: list[Any] = []
    first: list[int] = []
    owners: dict[int, int] = {}
    for index, part in enumerate(parts):
        own = list(containers_in(part))
        before = owners.get(id(part), index) if own and own[0] is part else index
        if before != index and parts[before] is part:
            kept.append(None)
            first.append(before)
            continue
        if any(owners.setdefault(id(container), index) != index for container in own):
            raise CaptureError("values that the step keeps and returns share a container")
        kept.append(part)
        first.append(index)
    return kept, first


class RepeatChanges(Effect):
    """Makes the changes of the captured step again.

    Args:
        changes: The changes, in order.
        first: For the output and each value, the first of them that is the same container.
    """

    def __init__(self, changes: Sequence[Change], first: Sequence[int]) -> None:
        self._changes = list(changes)
        self._first = list(first)
        # guards compare attributes of modules, and not their contents
        self._inside = [
            change for change in changes if len(change.place.steps) > 1 or change.verb is Verb.CALL
        ]
        self._has_repeats = list(first) != list(range(len(first)))

    def is_valid(self) -> bool:
        """Return False if a value that is to be changed is gone, or of another kind."""
        for change in self._inside:  # noqa: SIM110  # a generator takes longer
            if not change.is_possible():
                return False
        return True

    def take(self, built: tuple[Any, list[Any]]) -> Any:
        """Make the changes; see :class:`~cg_lightning.effects.effect.Taker`."""
        output, values = built
        if self._has_repeats:
            parts = [output, *values]
            values = [parts[index] for index in self._first[1:]]
        for change, value in zip(self._changes, values, strict=True):
            change.make(value)
        return output


class ChangedAttributesSnapshot:
    """Snapshot of the values that a step changes in Python, which is compared and restored.

    Args:
        attributes: The attributes that the step changes.
    """

    def __init__(self, attributes: Sequence[ChangedAttribute]) -> None:
        self._before = [
            (each, each.attributes.get(each.name, MISSING), each.path) for each in attributes
        ]
        filled = [(path, value) for each, value, path in self._before if not each.is_set]
        self._containers = ContainersSnapshot(filled, most=math.inf)

    def restore(self) -> None:
        """Restore the contents of containers and objects. The caller restores attributes."""
        self._containers.restore()

    def values(self) -> list[tuple[str, Any]]:
        """Return names and copies of new values."""
        new = [*self._containers.new_items()]
        for attribute, before, path in self._before:
            now = attribute.attributes.get(attribute.name, MISSING)
            if now is not before or isinstance(now, Tensor):
                new.append((path, now))
        return [
            (path, copy_of(leaf) if isinstance(leaf, Tensor) else leaf)
            for path, value in new
            for leaf in flatten(value)[0]
        ]


@contextlib.contextmanager
def recording_changes(attributes: Sequence[ChangedAttribute]) -> Iterator[ChangeRecording]:
    """While this is entered, the changes of a step are recorded, and not made.

    Args:
        attributes: The attributes that the step changes.
    """
    recording = ChangeRecording(attributes)
    try:
        recording.begin()
        yield recording
    finally:
        recording.restore()
