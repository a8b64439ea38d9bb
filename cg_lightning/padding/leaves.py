"""The tensors of one shape of batch, padded: which, up to where, and with what."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Fill(enum.Enum):
    """What padding is filled with."""

    GIVEN = "rows: the last row again; other dimensions: the value of the settings"
    OTHER = "mirrored values of the last row and of the first position; not in positions of masks"
    """For the check that nothing depends on it. Floats are larger than all real values.

    Integers that a negative number pads are like masks.
    """
    BELOW = "the same, but floats are smaller than all real values"
    NAN = "rows of floats: NaN; all else as in OTHER"
    """NaN spreads to all results that are computed from it."""


class Parts(NamedTuple):
    """The parts of a padded tensor, as views: to make them takes longer than to write."""

    real: Tensor
    """Where the tensor itself is."""
    others: list[tuple[int, Tensor, bool | int | float]]
    """Each padded dimension but the first, its padding, and what that is filled with."""
    rows: tuple[Tensor, Tensor] | None
    """The padding of dimension 0, and the row that is repeated there; None: it is not padded."""
    joined: tuple[Tensor, int, Tensor] | None
    """If one dimension is padded, and not the first: the whole tensor, this dimension, and what is
    joined to the tensor there. Then one operation writes all."""


class PaddedLeaf(NamedTuple):
    """One tensor of a batch that is padded."""

    real: tuple[int, ...]
    """Its shape."""
    padded: tuple[int, ...]
    """The shape that it is padded to."""
    values: Mapping[int, bool | int | float]
    """What the padding of each dimension but the first is filled with."""
    is_float: bool = True

    def empty(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a new tensor of the padded shape, with any values."""
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        return torch.empty_permuted(self.padded, order, dtype=tensor.dtype, device=device)

    def pad(self, tensor: Tensor, fill: Fill) -> Tensor:
        """Return a new tensor of the padded shape."""
        new = self.empty(tensor, tensor.device)
        self.write(self.parts_of(new), tensor, fill)
        return new

    def parts_of(self, new: Tensor) -> Parts:
        """Return the parts of a tensor of the padded shape."""
        others = [
            (dim, new.narrow(dim, self.real[dim], self.padded[dim] - self.real[dim]), value)
            for dim, value in self.values.items()
        ]
        rows = self.real[0]
        more_rows = (new[rows:], new[rows - 1]) if rows < self.padded[0] else None
        joined = None
        if len(others) == 1 and more_rows is None:
            dim, padding, value = others[0]
            joined = (new, dim, new.new_full((), value).expand_as(padding))
        return Parts(new[tuple([slice(size) for size in self.real])], others, more_rows, joined)

    def write(self, parts: Parts, tensor: Tensor, fill: Fill) -> None:
        """Write a tensor, and all of its padding."""
        if parts.joined is not None and fill is Fill.GIVEN:
            new, dim, padding = parts.joined
            torch.cat((tensor, padding), dim, out=new)
            return
        parts.real.copy_(tensor)
        for _, more, value in parts.others:
            more.fill_(value)
        if fill is not Fill.GIVEN and parts.others and not _is_mask(tensor):
            other = _mirrored(tensor, fill is Fill.BELOW)
            for dim, more, value in parts.others:
                if value < 0 and not tensor.is_floating_point():
                    continue  # such a label is ignored; another one may end the process
                part = more[tuple([slice(each) for each in self._without(dim)])]
                part.copy_(other.narrow(dim, 0, 1).expand_as(part))
        if parts.rows is None:
            return
        rows, last = parts.rows
        rows.copy_(last)
        if fill is not Fill.GIVEN:
            part = rows[tuple([slice(size) for size in self._without(0)])]
            part.copy_(_mirrored(tensor, fill is Fill.BELOW)[-1].expand_as(part))
            if fill is Fill.NAN and tensor.is_floating_point():
                part.fill_(float("nan"))

    def _without(self, dim: int) -> list[int | None]:
        return [None if each == dim else size for each, size in enumerate(self.real)]


def _is_mask(tensor: Tensor) -> bool:
    """Return True for a mask, whose padding may have no other value.

    In a mask occur only 0 and 1, or only 0 and numbers that hide a score when they are added to it.
    Floats that are all 0 are no mask; they may be the silence before a recording.
    """
    if tensor.dtype is torch.bool:
        return True
    if not tensor.is_floating_point():
        return bool(((tensor == 0) | (tensor == 1)).all())
    is_zero = tensor == 0
    is_mask = (is_zero | (tensor == 1)).all() | (is_zero | (tensor <= _HIDES)).all()
    return bool(is_mask & tensor.any())


_HIDES = -1e4
"""A score that this is added to has no weight after a softmax, in 16 bits as well."""


def _mirrored(tensor: Tensor, is_below: bool) -> Tensor:
    """Return values that the tensor may have, in other places; floats are outside its range."""
    if tensor.is_complex():
        return -2 * tensor
    if tensor.dtype is torch.bool:
        return tensor ^ (tensor.any() & ~tensor.all())
    least, most = tensor.amin(), tensor.amax()
    mirrored = least + (most - tensor)
    if not tensor.is_floating_point():
        # labels of which -100 is ignored
        return mirrored if least >= 0 else tensor.flip(*range(tensor.dim()))
    distance = 4 * mirrored.abs() + 1
    return least - distance if is_below else most + distance


class PaddedLeaves:
    """How the batches of one shape are padded.

    Args:
        leaves: The tensors that are padded, by their place among the leaves of the batch.
        elements: Elements of all tensors of the batch.
    """

    def __init__(self, leaves: dict[int, PaddedLeaf], elements: int) -> None:
        self._leaves = leaves
        changed = leaves.values()
        self.has_rows = any(leaf.real[0] < leaf.padded[0] for leaf in changed)
        """Whether dimension 0 is padded."""
        self.has_positions = any(leaf.real[1:] != leaf.padded[1:] for leaf in changed)
        """Whether another dimension is padded."""
        self._has_floats = any(leaf.is_float for leaf in changed)
        self.elements = elements
        """Elements of all tensors of a batch."""
        self.padded_elements = elements + sum(
            math.prod(leaf.padded) - math.prod(leaf.real) for leaf in changed
        )
        """Elements of all tensors of a padded batch."""

    def further_fills(self) -> list[Fill]:
        """Return what padding is filled with besides OTHER. Only floats differ from that."""
        return [Fill.BELOW, *[Fill.NAN] * self.has_rows] if self._has_floats else []

    @property
    def places(self) -> Collection[int]:
        """The places of the tensors that are padded, among the leaves of the batch."""
        return self._leaves.keys()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that tensors are padded to."""
        return tuple([leaf.padded for leaf in self._leaves.values()])

    def empty(self, leaves: Sequence[Any], device: torch.device | None = None) -> list[Any]:
        """Return leaves like those of the padded batch, on ``device``, or else where the batch is.

        What is padded has any values.
        """
        like = list(leaves)
        for index, leaf in self._leaves.items():
            like[index] = leaf.empty(like[index], device or like[index].device)
        return like

    def pad(self, leaves: Sequence[Any], fill: Fill = Fill.GIVEN) -> list[Any]:
        """Return the leaves of the padded batch. Leaves that are not padded are the same."""
        padded = list(leaves)
        for index, leaf in self._leaves.items():
            padded[index] = leaf.pad(leaves[index], fill)
        return padded

    def parts_of(self, static: Sequence[Any]) -> dict[int, Parts]:
        """Return the parts of tensors of the padded shapes, by the place of the leaf."""
        with torch.inference_mode(False):  # written to in steps of both modes
            return {index: leaf.parts_of(static[index]) for index, leaf in self._leaves.items()}

    def pad_into(
        self, static: Sequence[Any], parts: Mapping[int, Parts], leaves: Sequence[Any], fill: Fill
    ) -> list[Any]:
        """Return the leaves of the padded batch. What is padded is written to other tensors.

        Args:
            static: These tensors, of the padded shapes.
            parts: What :meth:`parts_of` returns for them.
            leaves: The leaves of the batch.
            fill: What the padding is filled with.
        """
        padded = list(leaves)
        for index, leaf in self._leaves.items():
            leaf.write(parts[index], leaves[index], fill)
            padded[index] = static[index]
        return padded

    def padding_of(self, leaves: Sequence[Any]) -> dict[int, Tensor]:
        """Return an element of padding with a value of the settings, by the place of the leaf.

        Args:
            leaves: The leaves of the batch.
        """
        return {
            index: leaves[index].new_full((1,), next(iter(leaf.values.values())))
            for index, leaf in self._leaves.items()
            if leaf.values
        }

    def pad_some(self, leaves: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return some leaves of the padded batch, by their place."""
        return {
            index: self._leaves[index].pad(tensor, Fill.GIVEN) if index in self._leaves else tensor
            for index, tensor in leaves.items()
        }
