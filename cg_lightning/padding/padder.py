"""Decides how a batch is padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.pad_rules import PadRule
from cg_lightning.core.tree import flatten
from cg_lightning.padding.leaves import PaddedLeaf, PaddedLeaves
from cg_lightning.padding.rules import PadRules


class Padder:
    """Pads batches as ``capture_sizes`` and ``pad_dims`` say.

    Args:
        capture_sizes: The sizes of dimension 0; empty: it is not padded.
        rules: Says how other dimensions are padded.
    """

    def __init__(self, capture_sizes: Sequence[int], rules: PadRules) -> None:
        self._rows = PadRule(tuple(capture_sizes)) if capture_sizes else None
        self._rules = rules

    def note(self, batch: Any) -> None:
        """Record a batch whose shape has no graph."""
        self._rules.note(batch)

    def rules_of(self, batch: Any, leaves: Sequence[Any]) -> dict[int, dict[int, PadRule]]:
        """Return the rules for other dimensions than 0, by the place of the leaf.

        Raises:
            ValueError: A rule does not fit the batch.
        """
        return self._rules.of(batch, leaves)

    def pad(
        self, leaves: Sequence[Any], rules: dict[int, dict[int, PadRule]]
    ) -> PaddedLeaves | None:
        """Return how a batch is padded; None if it has a captured size, or none is large enough."""
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        rows = next((tensor.shape[0] for tensor in tensors.values() if tensor.dim()), 0)
        padded_rows = rows if self._rows is None or not rows else self._rows.size_for(rows)
        padded = {}
        for index, tensor in tensors.items():
            shape = list(tensor.shape)
            if shape and shape[0] == rows:
                shape[0] = padded_rows
            values = {}
            for dim, rule in rules.get(index, {}).items():
                shape[dim] = rule.size_for(shape[dim]) if shape[dim] else 0
                if shape[dim] != tensor.shape[dim]:
                    values[dim] = rule.value
            if tuple(shape) != tuple(tensor.shape) and tensor.numel():
                padded[index] = PaddedLeaf(
                    tuple(tensor.shape), tuple(shape), values, tensor.is_floating_point()
                )
        elements = sum(tensor.numel() for tensor in tensors.values())
        return PaddedLeaves(padded, elements) if padded else None


class PadderOfCalls(Padder):
    """Pads arguments of a submodule: those that are leaves of the batch of the current step."""

    def note(self, batch: Any) -> None:
        """See :meth:`Padder.note`: the padder of the step has seen the batch."""

    def rules_of(self, batch: Any, leaves: Sequence[Any]) -> dict[int, dict[int, PadRule]]:
        """See :meth:`Padder.rules_of`; ``batch`` and ``leaves`` are those of the arguments."""
        context = current_forward_context()
        assert context is not None and context.step is not None  # noqa: PT018
        given = flatten(context.step.batch)[0]
        rules = super().rules_of(context.step.batch, given)
        known = {id(given[index]): rule for index, rule in rules.items()}
        return {index: known[id(leaf)] for index, leaf in enumerate(leaves) if id(leaf) in known}
