"""Whether two runs gave the same numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cg_lightning.app.run import Results
from cg_lightning.core.tree import flatten, leaf_paths


def same_bits(one: Any, other: Any) -> bool:
    """Whether two leaves are equal, NaN being equal to NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
            and torch.equal(one.isnan(), other.isnan())
        )
    return type(one) is type(other) and (one == other or one != one)


def _differing_leaf(one: Any, other: Any, root: str) -> str:
    leaves, structure = flatten(one)
    others, other_structure = flatten(other)
    if structure != other_structure:
        return f"{root} is built differently"
    for path, leaf, other_leaf in zip(leaf_paths(one, root), leaves, others, strict=True):
        if not same_bits(leaf, other_leaf):
            return f"{path} is {leaf} with graphs, {other_leaf} without"
    return ""


def describe_difference(with_graphs: Results, without: Results) -> str:
    """Names the first metric or prediction that differs in any bit, with both values; empty where none does."""
    return _differing_leaf(with_graphs.metrics, without.metrics, "metrics") or _differing_leaf(
        with_graphs.predictions, without.predictions, "predictions"
    )
