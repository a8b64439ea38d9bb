"""Plain values that differ in every batch, such as file names.

A graph of the whole step would freeze such a value. So the step may only pass it on, into its
output for example: then any value may be given to the graph. The capture shows whether it does. A
value that is read belongs to the key again, because it may have few values: ``batch["task"]``
besides file names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from cg_lightning.core.descriptor import BatchDescriptor, is_passed_on, is_text, passed_on
from cg_lightning.core.reasons import Reason, Status
from cg_lightning.core.tree import leaf_paths

MOST_VALUES = 16
"""Number of batches of equal shapes, all with different values, before values count as changing."""
MOST_TEXTS = 3
"""The same number, if only texts differ. Steps rarely read texts."""


@dataclasses.dataclass
class KeyFamily:
    """The keys that differ only in plain values."""

    first: tuple[Hashable, ...]
    keys: int = 0
    has_repeats: bool = False
    changing: set[int] = dataclasses.field(default_factory=set)
    differing: set[int] = dataclasses.field(default_factory=set)
    """The leaves in which keys differ from the first one."""
    is_read: bool = False
    """True if steps read values that always differ, or it is not known which values they read."""
    read: dict[int, set[Hashable]] = dataclasses.field(default_factory=dict)
    """Leaves that steps read, and the values that they have had since then."""
    seen: list[BatchDescriptor] = dataclasses.field(default_factory=list)
    """The keys so far."""

    @property
    def most_keys(self) -> int:
        """Number of keys before values count as changing."""
        only_texts = all(is_text(self.first[index]) for index in self.differing)
        return MOST_TEXTS if only_texts and not self.is_read else MOST_VALUES


class ChangingValues:
    """Removes values that differ in every batch from the key of a step.

    If the step only passes them on, it can be one graph. If it reads them it cannot, because the
    graph would freeze them. Its submodules can be captured: each call has its own key, which is
    made from the arguments of the call.
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
        family = self._family(key)
        pairs = enumerate(zip(family.first, key.leaves, strict=True))
        family.differing |= {index for index, (one, other) in pairs if one != other}
        if not family.changing:
            family.has_repeats |= was_seen
            family.keys += 1
            if family.has_repeats or family.keys <= family.most_keys:
                family.seen.append(key)
                return key
        for index, seen in family.read.items():
            seen.add(key.leaves[index])
        if any(len(seen) > MOST_VALUES for seen in family.read.values()):
            family.is_read = True
            family.read.clear()
        family.changing |= family.differing - family.read.keys()
        leaves = tuple(
            [
                (("changes",) if family.is_read else passed_on(leaf))
                if index in family.changing
                else leaf
                for index, leaf in enumerate(key.leaves)
            ]
        )
        general = dataclasses.replace(key, leaves=leaves)
        if family.is_read and general not in self._reasons:
            paths = leaf_paths(batch)
            changing = ", ".join([paths[index] for index in sorted(family.changing)])
            self._reasons[general] = Reason(
                Status.UNPROFITABLE,
                f"another value in each batch: {changing}; leave it out of the batch, or make it a "
                "tensor",
            )
        return general

    def note_repeat(self, key: BatchDescriptor) -> None:
        """Record that a step with exactly this key runs for the second time."""
        family = self._families.get(key.family)
        if family is not None:
            family.has_repeats = True

    def _family(self, key: BatchDescriptor) -> KeyFamily:
        return self._families.setdefault(key.family, KeyFamily(key.leaves))

    def kinds_passed_on(self, key: BatchDescriptor) -> list[Any]:
        """Return the classes of the values that ``key`` leaves out, which are only passed on."""
        return [leaf[1] for leaf in key.leaves if isinstance(leaf, tuple) and is_passed_on(leaf)]

    def are_read(self, key: BatchDescriptor) -> bool:
        """Return True if a step is known to read values that its key leaves out."""
        return self._family(key).is_read

    def note_read(self, key: BatchDescriptor, leaf: int | None = None) -> None:
        """Record that a step reads values that its key leaves out. From now on they belong to it.

        Args:
            key: The key of the step.
            leaf: The one that is read; None if that is not known.
        """
        family = self._family(key)
        if leaf is not None:
            family.read.setdefault(leaf, set())
            family.changing.discard(leaf)
            if family.changing:
                return
            family.read.clear()
        family.is_read = True
        family.changing.clear()

    def take_keys_before(self, key: BatchDescriptor) -> list[BatchDescriptor]:
        """Return the keys, each once, that were made before their values were left out of ``key``.

        They are of no use any more.
        """
        family = self._families[key.family]
        seen, family.seen = (family.seen, []) if family.changing else ([], family.seen)
        return seen

    def reason(self, key: BatchDescriptor) -> Reason | None:
        """Return why the steps of a key cannot be one graph; None if values do not stop it."""
        return self._reasons.get(key)
