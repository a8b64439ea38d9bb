"""Input tensors at fixed addresses, which the graphs of one key read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.tree import leaf_paths


def without_repeats(tensor: Tensor) -> Tensor:
    """Return the part of an expanded tensor that is really stored: ``(batch, 1, time)`` of a ``(batch, heads, time)`` view."""
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


class StaticInputs:
    """Holds a tensor for each tensor of a batch, of the same shape, dtype, strides and device.

    They are made with inference mode off, so that steps under ``no_grad`` and under inference mode can both write them.
    It does *not* check keys: the leaves given to :meth:`copy_from` must have the shapes of those it was made of.

    Args:
        leaves: The leaves of the batch; what is no tensor is kept as it is.
        tree: The batch, for messages.
        device: Where the graphs run.

    Raises:
        UnkeyableBatchError: A tensor lies on another device, or overlaps itself.
    """

    def __init__(self, leaves: list[Any], tree: Any, device: torch.device) -> None:
        self.leaves: list[Any] = list(leaves)
        self._tensors: list[
            tuple[int, Tensor, int, bool]
        ] = []  # index, stored part, address, whether expanded
        made: dict[int, Tensor] = {}  # one tensor given twice stays one tensor
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if id(leaf) in made:
                self.leaves[index] = made[id(leaf)]
                continue
            if leaf.device != device:
                raise UnkeyableBatchError(
                    leaf_paths(tree)[index], f"is on {leaf.device}, the graphs run on {device}"
                )
            stored = without_repeats(leaf)
            if overlaps_itself(stored):
                raise UnkeyableBatchError(leaf_paths(tree)[index], "overlaps itself in memory")
            with torch.inference_mode(False):
                static = torch.empty_strided(
                    stored.shape, stored.stride(), dtype=leaf.dtype, device=device
                )
            self._tensors.append((index, static, static.data_ptr(), stored is not leaf))
            made[id(leaf)] = self.leaves[index] = (
                static.expand(leaf.shape) if stored is not leaf else static
            )

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(static.untyped_storage().nbytes() for _, static, _, _ in self._tensors)

    def copy_from(self, leaves: list[Any]) -> None:
        """Writes the tensors of ``leaves``, in one grouped copy; those that already lie here are left alone."""
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        for index, static, address, expanded in self._tensors:
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
