"""Plain values that differ in every batch, such as file names.

A graph of the whole step would freeze such a value, so it would never be replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.reasons import Reason, Status
from cg_lightning.core.tree import leaf_paths

MOST_VALUES = 16
"""Number of batches of equal shapes, all with different values, before values count as changing."""


@dataclasses.dataclass
class KeyFamily:
    """The keys that differ only in plain values."""

    first: tuple[Hashable, ...]
    keys: int = 0
    has_repeats: bool = False
    changing: set[int] = dataclasses.field(default_factory=set)


class ChangingValues:
    """Removes values that differ in every batch from the key of a step.

    Such a step cannot be one graph, because the graph would freeze the values. Its submodules can
    be captured: each call has its own key, which is made from the arguments of the call.
    """

    def __init__(self) -> None:
        self._families: dict[tuple[Any, ...], KeyFamily] = {}
        self._reasons: dict[BatchDescriptor, Reason] = {}

    def without_changing_values(
        self, key: BatchDescriptor, batch: Any, was_seen: bool
    ) -> BatchDescriptor:
        """Return the key of a step, without the values that change.

        Args:
            key: The key of the batch. It is returned as it is if no value is known to change.
            batch: The batch.
            was_seen: True if a step with exactly this key has run before.
        """
        family = self._families.setdefault(key.family, KeyFamily(key.leaves))
        if not family.changing:
            family.has_repeats |= was_seen
            family.keys += 1
            if family.has_repeats or family.keys <= MOST_VALUES:
                return key
        pairs = enumerate(zip(family.first, key.leaves, strict=True))
        family.changing |= {index for index, (one, other) in pairs if one != other}
        leaves = tuple(
            [
                ("changes",) if index in family.changing else leaf
                for index, leaf in enumerate(key.leaves)
            ]
        )
        general = dataclasses.replace(key, leaves=leaves)
        if general not in self._reasons:
            paths = leaf_paths(batch)
            changing = ", ".join([paths[index] for index in sorted(family.changing)])
            self._reasons[general] = Reason(
                Status.UNPROFITABLE,
                f"another value in each batch: {changing}; leave it out of the batch, or make it a "
                "tensor",
            )
        return general

    def note_repeat(self, key: BatchDescriptor) -> None:
        """A step with this very key runs for the second time."""
        family = self._families.get(key.family)
        if family is not None:
            family.has_repeats = True

    def reason(self, key: BatchDescriptor) -> Reason | None:
        """Return why the steps of a key cannot be one graph. None if no value was removed."""
        return self._reasons.get(key)
