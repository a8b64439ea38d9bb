"""Tensors of its batch that a step writes to: ``labels[labels == -100] = 0``.

A graph writes to static inputs, and each replay copies these back to the batch, so later readers of
the batch get the values of eager. That holds if the written memory belongs to the batch alone; a
batch with two tensors that share memory has no key. It does *not* tell whether a
tensor was given another shape or other memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from cg_lightning.core.tree import flatten
from cg_lightning.guards.values import addresses_of


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a plain tensor fills its memory, so that a view of it reaches nothing else."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_conj():
        return False
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


class BatchWrites:
    """Collects which tensors of a batch a watched step writes to. It does *not* hold them.

    Args:
        batch: The batch, before the step.
        device_type: The type of the device that the step runs on.
        held: Addresses of storages that others hold: parameters, for example.
    """

    def __init__(self, batch: Any, device_type: str, held: Set[int]) -> None:
        self._indices: dict[int, int] = {}
        """The numbers of leaves that may be written to, by the addresses of their storages."""
        for index, leaf in enumerate(flatten(batch)[0]):
            if isinstance(leaf, Tensor) and leaf.device.type == device_type and _is_dense(leaf):
                for storage in addresses_of([leaf]) - held:
                    self._indices.setdefault(storage, index)
        self._written: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> bool:
        """Note that an operation writes to these tensors; return False if no replay can do it."""
        storages = addresses_of(tensors)
        if not storages <= self._indices.keys():
            return False
        self._written |= storages
        return True

    def has(self, tensor: Tensor) -> bool:
        """Return whether an operation was seen to write to this tensor of the batch."""
        return not self._written.isdisjoint(addresses_of([tensor]))

    def indices(self) -> Sequence[int]:
        """Return the numbers of the written tensors among the leaves of the batch.

        A tensor that occurs twice has the number of its first place.
        """
        return sorted(self._indices[storage] for storage in self._written)
