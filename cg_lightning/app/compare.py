"""Compares the numbers of two runs."""

from __future__ import annotations

from typing import Any

from cg_lightning.app.run import Results
from cg_lightning.core.equality import same_leaf
from cg_lightning.core.tree import flatten, leaf_paths


def _differing_leaf(one: Any, other: Any, root: str) -> str:
    leaves, structure = flatten(one)
    others, other_structure = flatten(other)
    if structure != other_structure:
        return f"{root} is built differently"
    for path, leaf, other_leaf in zip(leaf_paths(one, root), leaves, others, strict=True):
        if not same_leaf(leaf, other_leaf):
            return f"{path} is {leaf} with graphs, {other_leaf} without"
    return ""


def describe_difference(with_graphs: Results, without: Results) -> str:
    """Return the first metric or prediction that differs in any bit, with both values.

    The string is empty if all of them are equal.
    """
    return _differing_leaf(with_graphs.metrics, without.metrics, "metrics") or _differing_leaf(
        with_graphs.predictions, without.predictions, "predictions"
    )
