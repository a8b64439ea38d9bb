"""The rules by which leaves of batches are padded: those of the settings, or proposed ones."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cg_lightning.core.pad_rules import PadDims, PadRule, check_pad_dims
from cg_lightning.core.shape_proposal import FEW_SHAPES, SeenShape, ShapeProposal
from cg_lightning.core.tree import dotted_paths, flatten

LEARNED_BATCHES = 16
"""Number of batches without a graph after which sizes are proposed."""
LARGER_BATCHES = 8
"""Number of batches beyond the largest size that add a size."""
MOST_KINDS = 64
"""Maximum number of kinds of batches, because names of tensors may be new in each batch."""


class PadRules(Protocol):
    """Says how other dimensions than 0 are padded."""

    def note(self, batch: Any) -> None:
        """Record a batch whose shape has no graph."""

    def of(self, batch: Any, leaves: Sequence[Any]) -> dict[int, dict[int, PadRule]]:
        """Return the rules of a batch, by the place of the leaf and by dimension.

        Raises:
            ValueError: A rule does not fit the batch.
        """


class GivenRules:
    """The rules that ``pad_dims`` gives.

    They must fit the first batch. A later batch that they do not fit, one of another dataloader for
    example, keeps its shape, and a warning says why.

    Args:
        pad_dims: The rules by path of the leaf and by dimension.
    """

    def __init__(self, pad_dims: PadDims) -> None:
        self._dims = pad_dims
        self._have_fitted = False
        self._warned: set[str] = set()

    def note(self, batch: Any) -> None:
        """See :class:`PadRules`: nothing is learned."""

    def of(self, batch: Any, leaves: Sequence[Any]) -> dict[int, dict[int, PadRule]]:
        """See :class:`PadRules`.

        Raises:
            ValueError: This is the first batch, and a rule names a leaf or a dimension that is not
                there, or its value does not fit the leaf.
        """
        try:
            found = self._of(batch, leaves)
        except ValueError as error:
            if not self._have_fitted:
                raise
            if (why := str(error)) not in self._warned and len(self._warned) < MOST_KINDS:
                self._warned.add(why)
                warnings.warn(f"{why} Such batches run in their own shapes.", stacklevel=2)
            return {}
        self._have_fitted = True
        return found

    def _of(self, batch: Any, leaves: Sequence[Any]) -> dict[int, dict[int, PadRule]]:
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


class ProposedRules:
    """The rules of ``pad_dims="auto"``: proposed from the shapes of batches that have no graph.

    Batches with other tensors, or other numbers of dimensions, have rules of their own. The value
    of the padding is 0. Whether that gives what eager gives is checked as for any other rule.

    Args:
        proposed: Receives each proposal, as ``pad_dims`` would give it.
    """

    def __init__(self, proposed: dict[str, Any]) -> None:
        self._proposed = proposed
        self._kinds: dict[tuple[Any, ...], _BatchKind] = {}

    def note(self, batch: Any) -> None:
        """See :class:`PadRules`."""
        kind, shape, _ = self._look_at(batch, flatten(batch)[0])
        is_empty = any(0 in each for each in shape.shapes)
        if not is_empty and kind.note(shape):
            self._proposed.update(copy.deepcopy(kind.pad_dims))

    def of(self, batch: Any, leaves: Sequence[Any]) -> dict[int, dict[int, PadRule]]:
        """See :class:`PadRules`."""
        kind, _, places = self._look_at(batch, leaves)
        return {places[path]: rules for path, rules in kind.rules.items()}

    def _look_at(
        self, batch: Any, leaves: Sequence[Any]
    ) -> tuple[_BatchKind, SeenShape, dict[str, int]]:
        named = enumerate(zip(dotted_paths(batch), leaves, strict=True))
        places = {
            path: index
            for index, (path, leaf) in named
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided
        }
        shapes = tuple(tuple(leaves[index].shape) for index in places.values())
        key = (tuple(places), tuple(map(len, shapes)))
        kind = self._kinds.get(key) or _BatchKind()
        if len(self._kinds) < MOST_KINDS:
            self._kinds[key] = kind
        return kind, SeenShape(tuple(places), shapes), places


class _BatchKind:
    """What is known of batches with the same tensors, but for their sizes."""

    def __init__(self) -> None:
        self._seen: Counter[SeenShape] = Counter()
        self._larger: list[SeenShape] = []
        self.pad_dims: dict[str, dict[int, dict[str, Any]]] = {}
        self.rules: PadDims = {}

    def note(self, shape: SeenShape) -> bool:
        """Add a batch. Return True if that changes the rules."""
        if not self.rules:
            self._seen[shape] += 1
            if len(self._seen) <= FEW_SHAPES or self._seen.total() < LEARNED_BATCHES:
                return False
            seen = [SeenShape(each.paths, each.shapes, n) for each, n in self._seen.items()]
            self.pad_dims = ShapeProposal(seen).pad_dims
            self._seen.clear()  # if only dimension 0 varies, there is nothing to propose
        else:
            if not self._is_larger(shape):
                return False
            self._larger.append(shape)
            if len(self._larger) < LARGER_BATCHES:
                return False
            self._add_sizes()
        self.rules = check_pad_dims(self.pad_dims) if self.pad_dims else {}
        return bool(self.rules)

    def _sizes(self, shape: SeenShape) -> list[tuple[list[int], int]]:
        """The proposed sizes and the size, for each dimension that is padded."""
        shapes = dict(zip(shape.paths, shape.shapes, strict=True))
        return [
            (rule["sizes"], shapes[path][dim])
            for path, dims in self.pad_dims.items()
            for dim, rule in dims.items()
        ]

    def _is_larger(self, shape: SeenShape) -> bool:
        return any(size > sizes[-1] for sizes, size in self._sizes(shape))

    def _add_sizes(self) -> None:
        for shape in sorted(self._larger, key=lambda each: each.shapes, reverse=True):
            for sizes, size in self._sizes(shape):
                if size > sizes[-1]:
                    sizes.append(size)
        self._larger = []


def _check_rule(path: str, dim: int, rule: PadRule, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise ValueError(
            f"pad_dims[{path!r}]: the leaf is a {type(leaf).__name__}; only tensors are padded."
        )
    if dim >= leaf.dim():
        dims = f"its dimensions are 0 to {leaf.dim() - 1}" if leaf.dim() else "it has no dimension"
        raise ValueError(
            f"pad_dims[{path!r}] names dimension {dim}, and the tensor has shape "
            f"{tuple(leaf.shape)}; {dims}."
        )
    value, where = rule.value, f"pad_dims[{path!r}][{dim}]['value']={rule.value!r}"
    if leaf.dtype is torch.bool and value not in (0, 1):
        raise ValueError(f"{where} does not fit torch.bool; set True or False.")
    if leaf.dtype is torch.bool:
        return
    is_finite = value == value and value not in (float("inf"), -float("inf"))
    is_whole = not (leaf.dtype.is_floating_point or leaf.dtype.is_complex)
    if is_whole and not (is_finite and value == int(value)):
        raise ValueError(f"{where} does not fit {leaf.dtype}; set a whole number.")
    if not is_finite:
        return
    bounds = torch.iinfo(leaf.dtype) if is_whole else torch.finfo(leaf.dtype)
    if not bounds.min <= value <= bounds.max:
        raise ValueError(
            f"{where} does not fit {leaf.dtype}; set a number from {bounds.min} to {bounds.max}."
        )
