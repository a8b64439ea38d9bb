"""The graph of a padded batch, as the batches of one smaller shape see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cg_lightning.capture.entry import GraphEntry
from cg_lightning.padding.leaves import Fill, PaddedLeaves
from cg_lightning.padding.output_cut import OutputCut
from cg_lightning.report.records import PaddingRecord


class Guards(Protocol):
    """The guards of the graph."""

    def check(self) -> bool:
        """Return True if all guarded values are unchanged."""


class PaddedEntry:
    """Runs the batches of one shape from the graph of the padded batch.

    It owns neither the graph nor its memory: the key of the padded batch does.

    Args:
        graph: The graph of the padded batch.
        guards: Its guards; None if they are those of the batches' own key.
        padding: How the batch is padded.
        outputs: What its output is cut to.
        record: The row in the statistics.
        replays: What it counts from.
    """

    __slots__ = (
        *("_copies", "_fill", "_given", "_graph", "_guards", "_outputs", "_padded", "_record"),
        *("padding", "record", "replays"),
    )

    def __init__(
        self,
        graph: GraphEntry,
        guards: Guards | None,
        padding: PaddedLeaves,
        outputs: OutputCut,
        record: PaddingRecord,
        replays: int,
    ) -> None:
        self._graph = graph
        self._guards = guards
        self.padding = padding
        self._outputs = outputs
        self._copies = outputs.copies if graph.gives_copies(outputs.structure) else None
        self._record = record
        self._given: Sequence[Any] | None = None
        self._padded: list[Any] = []
        self._fill = Fill.GIVEN
        self.record = graph.record
        self.replays = replays
        """Replays for this shape, and those of the graph that were compared before it."""

    def is_valid(self) -> bool:
        """Return True if the graph exists and its guards hold."""
        if self._graph.is_valid() and (self._guards is None or self._guards.check()):
            return True
        self.forget()
        return False

    @property
    def is_dropped(self) -> bool:
        """Whether the graph was dropped."""
        return self._graph.is_dropped

    def pad_ahead(self, leaves: Sequence[Any], fill: Fill = Fill.GIVEN) -> list[Any]:
        """Return the leaves of the padded batch, in the tensors that the graph reads.

        :meth:`replay` must be the next to use the graph; then it does not pad again.
        """
        self._given, self._fill, self._padded = leaves, fill, self._pad(leaves, fill)
        return self._padded

    def _pad(self, leaves: Sequence[Any], fill: Fill) -> list[Any]:
        static, parts = self._graph.static_leaves, self._graph.parts.get(self.padding)
        if parts is None:
            parts = self._graph.parts[self.padding] = self.padding.parts_of(static)
        return self.padding.pad_into(static, parts, leaves, fill)

    def forget(self) -> None:
        """Forget the padded batch: its step does not run from the graph."""
        self._given, self._padded = None, []

    def replay(
        self, leaves: list[Any], step: int, tree: Any = None, fill: Fill = Fill.GIVEN
    ) -> Any:
        """Run the step for a batch from the graph of the padded batch.

        Args:
            leaves: The leaves of the batch.
            step: The number of the current step.
            tree: The batch. The graph only computes, so it needs none.
            fill: What the padding is filled with.
        """
        is_padded = self._given is leaves and self._fill is fill
        padded = self._padded if is_padded else self._pad(leaves, fill)
        self.forget()
        output = self._graph.replay(padded, step, copies=self._copies)
        if self._copies is not None:
            return output
        return self._outputs.cut(output, padded, leaves)

    def count(self) -> None:
        """Count a replay whose result is returned to the user."""
        self.replays += 1
        self.record.replays += 1
        self._record.ran(self.padding.elements, self.padding.padded_elements)

    def count_timed(self, seconds: float) -> None:
        """Count a replay that was a step of its own, with its host time in seconds."""
        self.count()
        record = self.record
        record.timed += 1
        record.host_seconds += seconds
