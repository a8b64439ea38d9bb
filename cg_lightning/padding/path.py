"""What a step reads on the host, for the batch and for the padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cg_lightning.core.reasons import NO_CHANGE, Changed, Reason
from cg_lightning.host_values.path import ReadPath, read_together
from cg_lightning.padding.entry import PaddedEntry


class PaddedPath:
    """Holds for a batch that takes one path through the step, and whose padding takes another one.

    Args:
        real: What the step reads for the batch; None if nothing.
        padded: What it reads for the padded batch.
        entry: Pads batches for the graph.
    """

    def __init__(self, real: ReadPath | None, padded: ReadPath, entry: PaddedEntry) -> None:
        self._real = real
        self._padded = padded
        self._entry = entry

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Return True if both give the values that were read.

        The padded batch is then where the graph reads it. The device computes what is read for the
        batch while the host pads it, and the host waits for all values at once.
        """
        copied = self._padded.copies_of(leaves)
        if copied is not None or self._entry.is_dropped:  # then it is looked up again
            if self._real is not None and not self._real.holds(leaves):
                return False
            if copied is None:
                return True
            return self._padded.holds_on_host(self._entry.padding.pad_some(copied))
        values = None if self._real is None else self._real.begin(leaves)
        if values is None and self._real is not None and not self._real.holds(leaves):
            return False
        padded = self._entry.pad_ahead(leaves)
        more = None if values is None else self._padded.begin(padded)
        if self._hold(padded, values, more):
            return True
        self._entry.forget()
        return False

    def _hold(
        self, padded: list[Any], values: list[Tensor] | None, more: list[Tensor] | None
    ) -> bool:
        if self._real is None or values is None:
            return self._padded.holds(padded)
        found = read_together([*values, *(more or ())])
        if not self._real.holds_with(found[: len(values)]):
            return False
        if more is None:
            return self._padded.holds(padded)
        return self._padded.holds_with(found[len(values) :])

    def of_batch(self) -> ReadPath | None:
        """Return what the step reads for the batch itself."""
        return self._real

    def is_ruled_out_by(self, failed: object) -> bool:
        """Return False: only the batch decides it."""
        return False

    def explain(self) -> Changed:
        """Return the read that gave another value; empty if none did."""
        real = NO_CHANGE if self._real is None else self._real.explain()
        return real or self._padded.explain()

    def varying(self) -> Reason:
        """Return the reason of a key that has too many values."""
        return (self._padded if self._real is None else self._real).varying()
