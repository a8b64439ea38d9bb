"""Cuts the output for a padded batch to the shapes that eager gives for the batch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cg_lightning.capture.outputs import copy_with_strides
from cg_lightning.capture.static_inputs import overlaps_itself
from cg_lightning.core.tree import flatten, rebuild


class OutputCut:
    """Shapes and strides of an eager output: what the output for a padded batch is cut to.

    Args:
        output: The output of eager, for a batch that was not padded.
    """

    def __init__(self, output: Any) -> None:
        leaves, self.structure = flatten(output)
        self._layouts = [
            (tuple(leaf.shape), leaf.stride()) if isinstance(leaf, Tensor) else None
            for leaf in leaves
        ]
        self._of_one = self._layouts[0] if self.structure is None else None
        """The layout of an output that is one tensor; None for any other output."""

    def copies(self, computed: Sequence[Tensor]) -> list[Tensor]:
        """Return a copy of the part of each tensor that belongs to the batch.

        Args:
            computed: The leaves of the output for the padded batch, in graph memory.
        """
        return [
            copy_with_strides(tensor) if layout is None else _copied(tensor, *layout)
            for tensor, layout in zip(computed, self._layouts, strict=True)
        ]

    def cut(self, output: Any, padded: Sequence[Any], real: Sequence[Any]) -> Any:
        """Return the output for the batch. What cannot be cut to its shape stays as it is.

        Args:
            output: The output for the padded batch.
            padded: The leaves of the padded batch.
            real: The leaves of the batch: an output that is one of them is returned as it is.
        """
        if self._of_one is not None and type(output) is Tensor:
            for one, other in zip(padded, real, strict=True):
                if output is one:
                    return other
            return _cut(output, *self._of_one)
        leaves, structure = flatten(output)
        if structure != self.structure:
            return output
        given = {id(one): other for one, other in zip(padded, real, strict=True)}
        done: dict[int, Any] = {}  # a tensor that occurs twice stays one tensor
        cut = []
        for leaf, layout in zip(leaves, self._layouts, strict=True):
            if isinstance(leaf, Tensor) and layout is not None:
                if id(leaf) not in done:
                    done[id(leaf)] = given[id(leaf)] if id(leaf) in given else _cut(leaf, *layout)
                leaf = done[id(leaf)]
            cut.append(leaf)
        return rebuild(output, iter(cut))


def _cut(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    if tensor.shape == shape and tensor.stride() == strides:
        return tensor
    return _copied(tensor, shape, strides)


def _copied(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Return a copy of the first part of a tensor with this shape; of all of it if it has none."""
    if tensor.dim() != len(shape) or any(map(operator.gt, shape, tensor.shape)):
        return copy_with_strides(tensor)
    part = tensor if tensor.shape == shape else tensor[tuple([slice(size) for size in shape])]
    new = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy_with_strides(part) if overlaps_itself(new) else new.copy_(part)
