"""Decides from the settings how a batch is padded, and refuses what does not fit the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.pad_rules import PadDims, PadRule
from cg_lightning.core.tree import dotted_paths, flatten
from cg_lightning.padding.leaves import PaddedLeaf, PaddedLeaves


class Padder:
    """Pads batches as ``capture_sizes`` and ``pad_dims`` say.

    Args:
        capture_sizes: The sizes of dimension 0; empty: it is not padded.
        pad_dims: The rules of other dimensions, by path of the leaf.
    """

    def __init__(self, capture_sizes: Sequence[int], pad_dims: PadDims) -> None:
        self._rows = PadRule(tuple(capture_sizes)) if capture_sizes else None
        self._dims = pad_dims

    def rules_of(self, batch: Any, leaves: Sequence[Any]) -> dict[int, dict[int, PadRule]]:
        """Return the rules for other dimensions than 0, by the place of the leaf.

        Raises:
            ValueError: A rule names a leaf or a dimension that is not there, or its value does not
                fit the leaf.
        """
        if not self._dims:
            return {}
        places = {path: index for index, path in enumerate(dotted_paths(batch))}
        found = {}
        for path, rules in self._dims.items():
            if path not in places:
                raise ValueError(
                    f"pad_dims names the leaf {path!r}, and the batch has none of that name; its "
                    f"leaves are {', '.join(map(repr, places))}."
                )
            for dim, rule in rules.items():
                _check_rule(path, dim, rule, leaves[places[path]])
            found[places[path]] = rules
        return found

    def pad(
        self, leaves: Sequence[Any], rules: dict[int, dict[int, PadRule]]
    ) -> PaddedLeaves | None:
        """Return how a batch is padded; None if it has a captured size, or none is large enough.

        Args:
            leaves: The leaves of the batch.
            rules: The rules for other dimensions than 0, by the place of the leaf.
        """
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
                padded[index] = PaddedLeaf(tuple(tensor.shape), tuple(shape), values)
        elements = sum(tensor.numel() for tensor in tensors.values())
        return PaddedLeaves(padded, elements) if padded else None


class PadderOfCalls(Padder):
    """Pads arguments of a submodule: those that are leaves of the batch of the current step."""

    def rules_of(self, batch: Any, leaves: Sequence[Any]) -> dict[int, dict[int, PadRule]]:
        """See :meth:`Padder.rules_of`; ``batch`` and ``leaves`` are those of the arguments."""
        context = current_forward_context()
        assert context is not None and context.step is not None  # noqa: PT018
        given = flatten(context.step.batch)[0]
        rules = super().rules_of(context.step.batch, given)
        known = {id(given[index]): rule for index, rule in rules.items()}
        return {index: known[id(leaf)] for index, leaf in enumerate(leaves) if id(leaf) in known}


def _check_rule(path: str, dim: int, rule: PadRule, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"pad_dims[{path!r}]: the leaf is a {type(leaf).__name__}; only tensors are padded."
        )
    if dim >= leaf.dim():
        raise ValueError(
            f"pad_dims[{path!r}] names dimension {dim}, and the tensor has shape "
            f"{tuple(leaf.shape)}; its dimensions are 0 to {leaf.dim() - 1}."
        )
    value, where = rule.value, f"pad_dims[{path!r}][{dim}]['value']={rule.value!r}"
    if leaf.dtype is torch.bool and value not in (0, 1):
        raise ValueError(f"{where} does not fit torch.bool; set True or False.")
    if leaf.dtype.is_floating_point or leaf.dtype.is_complex or leaf.dtype is torch.bool:
        return
    bounds = torch.iinfo(leaf.dtype)
    if value != value or value in (float("inf"), -float("inf")) or value != int(value):
        raise ValueError(f"{where} does not fit {leaf.dtype}; set a whole number.")
    if not bounds.min <= value <= bounds.max:
        raise ValueError(
            f"{where} does not fit {leaf.dtype}; set a number from {bounds.min} to {bounds.max}."
        )
