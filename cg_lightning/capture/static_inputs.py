"""Input tensors at fixed addresses."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.descriptor import ALIGNMENT
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.tree import leaf_paths


def without_repeats(tensor: Tensor) -> Tensor:
    """Return the part of an expanded tensor that is stored in memory.

    For an expanded ``(batch, heads, time)`` view this is ``(batch, 1, time)``.
    """
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor have one place in memory."""
    reach = 1  # dimensions in order of stride: each must step over all that the smaller ones reach
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _empty_like(tensor: Tensor, address: int, device: torch.device) -> Tensor:
    """Return an empty tensor of the same layout, with the same alignment as ``address``."""
    shape, strides, dtype = tensor.shape, tensor.stride(), tensor.dtype
    offset = address % ALIGNMENT // tensor.element_size()
    if not offset:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    pairs = zip(shape, strides, strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in pairs) if tensor.numel() else 0
    whole = torch.empty(offset + reach, dtype=dtype, device=device)
    return whole.as_strided(shape, strides, offset)


def _seen_as(leaf: Tensor, static: Tensor) -> Tensor:
    """Return a static tensor as a step sees it: with the class and ``requires_grad`` of the leaf.

    Copies go to the static tensor itself, since autograd forbids to write to such a leaf.
    """
    if type(leaf) is nn.Parameter:
        return nn.Parameter(static, requires_grad=leaf.requires_grad)
    return static.detach().requires_grad_() if leaf.requires_grad else static


def _is_in(leaf: Tensor, storages: Collection[int]) -> bool:
    """Whether a tensor that a step sees as it is lies in one of these storages."""
    is_plain = type(leaf) is Tensor and not leaf.requires_grad and leaf.numel()
    return bool(is_plain) and leaf.untyped_storage().data_ptr() in storages


class StaticInputs:
    """Stores one static tensor for each tensor of a batch: same shape, dtype, strides, alignment
    and device.

    The tensors are made with inference mode off, so that steps under ``no_grad`` and steps in
    inference mode can both write to them. The class does *not* check keys: the leaves passed to
    :meth:`copy_from` must have the shapes of the leaves passed to the constructor.

    Tensors in memory of graphs have a fixed address already: they are read where they are.

    Args:
        leaves: The leaves of the batch. Leaves that are not tensors are stored as they are.
        batch: The batch, for messages.
        device: The device of the graphs.
        fixed: The addresses of storages that hold the outputs of other graphs.

    Raises:
        UnkeyableBatchError: A tensor is on another device, or overlaps itself.
    """

    def __init__(
        self,
        leaves: list[Any],
        batch: Any,
        device: torch.device,
        fixed: Collection[int] = (),
    ) -> None:
        self.leaves: list[Any] = list(leaves)
        self.in_place: list[tuple[int, int]] = []
        """The leaves that are read where they are: their numbers and addresses."""
        # by data type: index, stored part, address, whether expanded
        self._groups: dict[torch.dtype, list[tuple[int, Tensor, int, bool]]] = {}
        self._kept: list[Tensor] = []
        self._written: list[tuple[int, Tensor]] = []
        self.are_written = False
        """Whether the graph writes to static tensors, so :meth:`copy_back` has to follow it."""
        made: dict[int, Tensor] = {}  # a tensor that occurs twice gets one static tensor
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if id(leaf) in made:
                self.leaves[index] = made[id(leaf)]
                continue
            if leaf.device != device:
                raise UnkeyableBatchError(
                    leaf_paths(batch)[index], f"is on {leaf.device}, the graphs run on {device}"
                )
            stored = without_repeats(leaf)
            if overlaps_itself(stored):
                raise UnkeyableBatchError(leaf_paths(batch)[index], "overlaps itself in memory")
            if fixed and _is_in(leaf, fixed):
                # an alias, because the user may change the shape of the tensor itself
                made[id(leaf)] = self.leaves[index] = leaf.detach()
                self.in_place.append((index, leaf.data_ptr()))
                continue
            with torch.inference_mode(False):
                static = _empty_like(stored, leaf.data_ptr(), device)
                whole = static.expand(leaf.shape) if stored is not leaf else static
                made[id(leaf)] = self.leaves[index] = _seen_as(leaf, whole)
            group = self._groups.setdefault(static.dtype, [])
            group.append((index, static, static.data_ptr(), stored is not leaf))

    @property
    def num_bytes(self) -> int:
        """Memory of the static tensors, in bytes."""
        copied = [static for group in self._groups.values() for _, static, _, _ in group]
        tensors = [*copied, *self._kept]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def keep(self, tensors: list[Tensor]) -> None:
        """Keep further tensors alive that the graph reads and that never change."""
        self._kept = tensors

    def note_written(self, indices: Sequence[int]) -> None:
        """Note which static tensors, by the numbers of their leaves, the graph writes to."""
        self._written = [(index, self.leaves[index]) for index in indices]
        self.are_written = bool(self._written)

    def copy_back(self, leaves: list[Any]) -> None:
        """Copy the static tensors that the graph has written to the tensors of ``leaves``."""
        for index, static in self._written:
            leaves[index].copy_(static)

    def copy_from(self, leaves: list[Any]) -> None:
        """Copy the tensors of ``leaves``: those of one data type with one grouped copy.

        A tensor that is at the static address already is skipped.
        """
        # a grouped copy of several data types makes a copy of each tensor, and takes longer
        for group in self._groups.values():
            sources: list[Tensor] = []
            targets: list[Tensor] = []
            for index, static, address, expanded in group:
                source = leaves[index]
                if source.data_ptr() == address:
                    continue
                if expanded:
                    source = without_repeats(source)
                assert source.shape == static.shape, "a copy must never broadcast"
                sources.append(source)
                targets.append(static)
            if len(targets) == 1:
                targets[0].copy_(sources[0])
            elif targets:
                torch._foreach_copy_(targets, sources)
