"""Padded steps of other shapes that go the same way: not each shape has to be watched.

To watch a step costs dozens of steps, and a loader of texts has a hundred shapes. What is padded is
compared with eager for each shape all the same, and its eager run is traced then. If it went the
way of a watched step, it takes over what that step has shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from cg_lightning.core.descriptor import BatchDescriptor, is_tensor_key
from cg_lightning.diagnosis.way import Way
from cg_lightning.host_values.path import ReadPath
from cg_lightning.runtime.dispatcher import CUDAGraphDispatcher
from cg_lightning.runtime.keys import Variant


@dataclasses.dataclass
class _Known:
    """A watched step whose way is known."""

    key: BatchDescriptor
    variant: Variant
    path: ReadPath | None
    """What it reads on the host."""
    way: Way
    has_path_of_all_shapes: bool = False
    """Whether a second shape that went this way was seen to read the same on the host."""


class AlikeSteps:
    """Knows the watched steps of one stage, and their ways.

    Args:
        dispatcher: Has the watched steps. Steps that it has dropped do not count.
    """

    def __init__(self, dispatcher: CUDAGraphDispatcher) -> None:
        self._dispatcher = dispatcher
        self._known: dict[Hashable, list[_Known]] = {}
        self._unlike: dict[BatchDescriptor, Way | None] = {}
        """The ways of keys that no watched step had gone. None: the key itself must be watched."""

    def note(
        self, key: BatchDescriptor, variant: Variant, path: ReadPath | None, way: Way | None
    ) -> None:
        """Note the way of a step that was watched.

        Args:
            key: Its key.
            variant: What it has shown.
            path: What it reads on the host.
            way: Its way; None if it is not known.
        """
        known = self._known_like(key)
        if way is not None and not any(each.variant is variant for each in known):
            self._known[_without_shapes(key)] = [*known, _Known(key, variant, path, way)]

    def note_unlike(self, key: BatchDescriptor, way: Way | None) -> None:
        """Note that a key could not take over what a watched step has shown.

        Args:
            key: The key.
            way: Its way. If a watched step has gone it, its host values are what is unlike.
        """
        is_known = any(each.way == way for each in self._known_like(key))
        self._unlike[key] = None if is_known else way

    def knows(self, key: BatchDescriptor) -> bool:
        """Return True if the way of a step is known that differs in its shapes only.

        It must do nothing but compute its output: else nothing of it can be done ahead.
        """
        return key not in self._unlike and any(
            each.variant.only_computes for each in self._known_like(key)
        )

    def has_gone(self, key: BatchDescriptor, way: Way) -> bool:
        """Return True if such a step went this way."""
        return any(each.way == way and each.variant.only_computes for each in self._known_like(key))

    def expect(self, key: BatchDescriptor, leaves: Sequence[Any]) -> Variant | None:
        """Return the variant that a new key may take over; None if it must be watched.

        Args:
            key: The key.
            leaves: The leaves of its batch.
        """
        likely = self._known_like(key)
        if key in self._unlike:
            likely = [each for each in likely if each.way == self._unlike[key]]
        found = next((each for each in likely if _holds(each, leaves)), None)
        if found is None:
            return None
        variant = Variant(found.variant.guards, list(found.variant.modes), is_taken_over=True)
        take_over(variant, found.variant, found.path)
        return variant

    def find(
        self,
        key: BatchDescriptor,
        leaves: Sequence[Any],
        way: Way | None,
        padded: ReadPath | None,
    ) -> tuple[Variant, ReadPath | None] | None:
        """Return a watched step that went the same way, and what it reads; None if none did.

        Args:
            key: The key of a step that has just run.
            leaves: The leaves of its batch.
            way: Its way.
            padded: What the step reads on the host for the padded batch.
        """
        for each in self._known_like(key):
            is_of_all_shapes = each.path is None or each.path.is_of_all_shapes(padded)
            if each.way == way and is_of_all_shapes and _holds(each, leaves):
                each.has_path_of_all_shapes |= (each.path is None) == (padded is None)
                return each.variant, each.path
        return None

    def find_of_all_shapes(
        self, key: BatchDescriptor, leaves: Sequence[Any], way: Way
    ) -> tuple[Variant, ReadPath | None] | None:
        """Return a watched step that went the same way, and what all shapes of this way read.

        None if no two shapes of this way are known to read the same.

        Args:
            key: The key of a step that has just run.
            leaves: The leaves of its batch.
            way: Its way.
        """
        for each in self._known_like(key):
            if each.has_path_of_all_shapes and each.way == way and _holds(each, leaves):
                return each.variant, each.path
        return None

    def _known_like(self, key: BatchDescriptor) -> list[_Known]:
        return [each for each in self._known.get(_without_shapes(key), ()) if self._is_kept(each)]

    def _is_kept(self, known: _Known) -> bool:
        state = self._dispatcher.known(known.key.fields)
        return state is not None and known.variant in state.variants


def take_over(variant: Variant, other: Variant, path: ReadPath | None) -> None:
    """Let a variant have what the watched step of another one has shown."""
    variant.guards, variant.watched, variant.path = other.guards, other.watched, path
    variant.modes, variant.reason = list(other.modes), other.reason


def _holds(known: _Known, leaves: Sequence[Any]) -> bool:
    return known.variant.guards.check() and (known.path is None or known.path.holds(leaves))


def _without_shapes(key: BatchDescriptor) -> Hashable:
    """Return the fields of a key without the shapes and strides of its tensors."""
    leaves = tuple(
        [(*leaf[2:3], *leaf[4:]) if is_tensor_key(leaf) else leaf for leaf in key.leaves]
    )
    return (key.structure, leaves, key.stage, key.dataloader_idx, key.training, key.flags)
