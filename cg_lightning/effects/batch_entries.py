"""Entries that a step adds to its batch, replaces in it or removes: ``batch["pred"] = y``.

A captured step runs on copies of the containers, so it may change any entry. New entries become a
part of the output of the graph. A replay sets and removes the same entries in the batch, so
callbacks find them. Entries are compared in dictionaries and lists, at any depth. Lists keep their
length.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import containers_in, tensors_in

_Container = dict[Any, Any] | list[Any]
Entry = tuple[_Container, Any, Any]
"""A dictionary or list of the batch, a key, and the value."""
Removed = tuple[dict[Any, Any], Any]
"""A dictionary of the batch, and a key."""


class BatchEntries:
    """The entries of a batch as they were before a step.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: Any) -> None:
        self._before = [
            (container, container.copy())
            for container in containers_in(batch)
            if type(container) in (dict, list)
        ]

    def new(self) -> list[Entry]:
        """Return the entries that were added or replaced, in their order."""
        return [
            (container, key, value)
            for container, before in self._before
            for key, value in _items(container).items()
            if key not in (items := _items(before)) or items[key] is not value
        ]

    def removed(self) -> list[Removed]:
        """Return the entries that were removed from dictionaries."""
        return [
            (container, key)
            for container, before in self._before
            if isinstance(container, dict)
            for key in before
            if key not in container
        ]

    def can_be_made_again(self) -> bool:
        """Return whether a replay can set all new entries and remove those that are gone."""
        keys = [key for _, key, _ in self.new()] + [key for _, key in self.removed()]
        return (
            all(itertools.starmap(_is_in_order, self._before))
            and all(map(is_plain_value, keys))
            and all(tensor.grad_fn is None for _, _, v in self.new() for tensor in tensors_in(v))
        )

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """While this is entered, the batch has its earlier entries."""
        now = [(container, container.copy()) for container, _ in self._before]
        _fill(self._before)
        try:
            yield
        finally:
            _fill(now)


def _items(container: _Container) -> dict[Any, Any]:
    return container if isinstance(container, dict) else dict(enumerate(container))


def _is_in_order(container: _Container, before: _Container) -> bool:
    """Return whether the entries that are left have not moved."""
    if isinstance(container, list):
        return len(container) == len(before)
    kept = [key for key in before if key in container]
    return list(container)[: len(kept)] == kept


def _fill(contents: list[tuple[Any, Any]]) -> None:
    for container, items in contents:
        container.clear()
        container.extend(items) if isinstance(container, list) else container.update(items)


class SetBatchEntries:
    """Sets and removes entries of the batch after each replay.

    Args:
        entries: The entries that the captured step has set.
        output: All values that it has returned, or keeps.
        given: The containers of the batch before the step.

    Raises:
        CaptureError: The step changes other entries than the watched one, which changed some; or
            two parts share a container, and each would get one of its own.
    """

    def __init__(self, entries: BatchEntries, output: Any, given: Sequence[Any]) -> None:
        is_changed = bool(entries.new() or entries.removed())
        if not (is_changed and entries.can_be_made_again()):
            raise CaptureError("the batch is not changed as in the watched step")
        known = set(map(id, given))
        own: list[int] = []
        for part in (output, *[value for _, _, value in entries.new()]):
            own += {id(each) for each in containers_in(part)} - known
        if len(own) != len(set(own)):
            raise CaptureError(
                "values that the step sets in its batch and returns share a container"
            )

    def take(self, built: tuple[Any, tuple[list[Entry], list[Removed]]]) -> Any:
        """Change the entries; see :class:`~cg_lightning.effects.effect.Taker`."""
        output, (entries, removed) = built
        for without, key in removed:
            del without[key]
        for container, key, value in entries:
            container[key] = value
        return output
