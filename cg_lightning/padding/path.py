"""What a step reads on the host, for the batch and for the padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cg_lightning.core.reasons import NO_CHANGE, Changed, Reason
from cg_lightning.host_values.path import ReadPath
from cg_lightning.padding.leaves import PaddedLeaves


class PaddedPath:
    """Holds for a batch that takes one path through the step, and whose padding takes another one.

    Args:
        real: What the step reads for the batch; None if nothing.
        padded: What it reads for the padded batch.
        padding: How the batch is padded.
    """

    def __init__(self, real: ReadPath | None, padded: ReadPath, padding: PaddedLeaves) -> None:
        self.real = real
        self._padded = padded
        self._padding = padding

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Return True if both give the values that were read."""
        if self.real is not None and not self.real.holds(leaves):
            return False
        copied = self._padded.copies_of(leaves)
        if copied is not None:
            return self._padded.holds_on_host(self._padding.pad_some(copied))
        return self._padded.holds_for(self._padding.pad_some(self._padded.reads_of(leaves)))

    def is_ruled_out_by(self, failed: object) -> bool:
        """Return False: only the batch tells."""
        return False

    def explain(self) -> Changed:
        """Return the read that gave another value; empty if none did."""
        real = NO_CHANGE if self.real is None else self.real.explain()
        return real or self._padded.explain()

    def varying(self) -> Reason:
        """Return the reason of a key that has too many values."""
        return (self._padded if self.real is None else self.real).varying()
