"""Notices values that are another one in each batch, such as names of files: no graph of the whole step would be replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from cg_lightning.core.descriptor import BatchDescriptor, is_tensor_key
from cg_lightning.core.tree import leaf_paths

_MOST_VALUES = 16
"""So many batches of the same shapes, no two of them with the same values, show that values change."""


@dataclasses.dataclass
class _Kind:
    """Keys that differ in nothing but plain values."""

    first: tuple[Hashable, ...]
    keys: int = 0
    has_repeats: bool = False
    changing: set[int] = dataclasses.field(default_factory=set)


class ChangingValues:
    """Leaves values that change with each batch out of the key of a step.

    Such a step is no graph as a whole, which would freeze them. Its submodules may be: their calls have keys of their own,
    made of what they are given.
    """

    def __init__(self) -> None:
        self._kinds: dict[BatchDescriptor, _Kind] = {}
        self.reasons: dict[BatchDescriptor, str] = {}
        """Why the step of a general key is no graph."""

    def generalize(self, key: BatchDescriptor, batch: Any, was_seen: bool) -> BatchDescriptor:
        """Gives the key of a step that is not decided yet: the same one, or one without the values that change.

        Args:
            key: Of the batch.
            batch: The batch.
            was_seen: Whether a step with this very key has run before.
        """
        kind = self._kind(key)
        if not kind.changing:
            kind.has_repeats |= was_seen
            kind.keys += 1
            if kind.has_repeats or kind.keys <= _MOST_VALUES:
                return key
        kind.changing |= {
            index
            for index, (one, other) in enumerate(zip(kind.first, key.leaves, strict=True))
            if one != other
        }
        leaves = tuple(
            [
                ("changes",) if index in kind.changing else leaf
                for index, leaf in enumerate(key.leaves)
            ]
        )
        general = dataclasses.replace(key, leaves=leaves)
        if general not in self.reasons:
            paths = leaf_paths(batch)
            changing = ", ".join([paths[index] for index in sorted(kind.changing)])
            self.reasons[general] = (
                f"another value in each batch: {changing}; leave it out of the batch, or make it a tensor"
            )
        return general

    def _kind(self, key: BatchDescriptor) -> _Kind:
        tensors = tuple([leaf if is_tensor_key(leaf) else None for leaf in key.leaves])
        return self._kinds.setdefault(dataclasses.replace(key, leaves=tensors), _Kind(key.leaves))
