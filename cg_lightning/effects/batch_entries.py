"""Entries that a step adds to its batch, or replaces in it: ``batch["pred"] = y``.

A captured step runs on containers of its own, so it may do with its entries what it likes. After
it, what is new is a part of the output of the graph. A replay gives the batch the same entries, as
callbacks see them. Entries are followed in dictionaries, at any depth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import containers_in, tensors_in

Entry = tuple[dict[Any, Any], Any, Any]
"""A dictionary of the batch, a key, and the value."""


class BatchEntries:
    """The entries of a batch as they were before a step.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: Any) -> None:
        self._before = [
            (container, dict(container))
            for container in containers_in(batch)
            if type(container) is dict
        ]

    def new(self) -> list[Entry]:
        """Return the entries that were added or replaced, in their order."""
        return [
            (container, key, value)
            for container, before in self._before
            for key, value in container.items()
            if key not in before or before[key] is not value
        ]

    def are_only_set(self) -> bool:
        """Return whether no entry was removed or moved, and a replay can set all new ones."""
        return all(
            list(container)[: len(before)] == list(before) for container, before in self._before
        ) and all(
            is_plain_value(key) and all(tensor.grad_fn is None for tensor in tensors_in(value))
            for _, key, value in self.new()
        )

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """While this is entered, the batch has its entries of before."""
        now = [(container, dict(container)) for container, _ in self._before]
        _fill(self._before)
        try:
            yield
        finally:
            _fill(now)


def _fill(contents: list[tuple[dict[Any, Any], dict[Any, Any]]]) -> None:
    for container, items in contents:
        container.clear()
        container.update(items)


class SetBatchEntries:
    """Sets the entries of the batch after each replay.

    Args:
        entries: What the captured step has set.
        output: What it has returned, and what else it hands out.
        given: The containers of the batch before the step.

    Raises:
        CaptureError: The step sets other entries than the watched one, which set some; or two parts
            share a container, and each would get one of its own.
    """

    def __init__(self, entries: BatchEntries, output: Any, given: Sequence[Any]) -> None:
        if not (entries.new() and entries.are_only_set()):
            raise CaptureError("the batch is not changed as in the watched step")
        known = set(map(id, given))
        own: list[int] = []
        for part in (output, *[value for _, _, value in entries.new()]):
            own += {id(each) for each in containers_in(part)} - known
        if len(own) != len(set(own)):
            raise CaptureError("what the step sets in its batch and returns share a container")

    def take(self, built: tuple[Any, list[Entry]]) -> Any:
        """Set the entries; see :class:`~cg_lightning.effects.effect.Taker`."""
        output, entries = built
        for container, key, value in entries:
            container[key] = value
        return output
