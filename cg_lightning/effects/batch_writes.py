"""Tensors of its batch that a step writes to: ``labels[labels == -100] = 0``.

A graph writes to static inputs, and each replay copies these back to the batch, so everybody who
sees the batch later sees what eager has written there. That holds if the written memory belongs to
the batch alone; two tensors of a batch that share memory have no key. It does *not* tell whether a
tensor was given another shape or other memory.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cg_lightning.core.tree import flatten


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a plain tensor fills its memory: a view of it reaches nothing else."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_conj():
        return False
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


class BatchWrites:
    """Collects which tensors of a batch a watched step writes to.

    Args:
        batch: The batch, before the step.
        device_type: The type of the device that the step runs on.
        held: Where the storages begin that others hold: parameters, for example.
    """

    def __init__(self, batch: Any, device_type: str, held: Container[int]) -> None:
        self._by_storage: dict[int, tuple[int, Tensor]] = {}
        for index, leaf in enumerate(flatten(batch)[0]):
            if isinstance(leaf, Tensor) and leaf.device.type == device_type and _is_dense(leaf):
                storage = _storage(leaf)
                if storage not in held:
                    self._by_storage.setdefault(storage, (index, leaf))
        self._written: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> bool:
        """Note that an operation writes to these tensors; return False if no replay can do it."""
        storages = {_storage(tensor) for tensor in tensors}
        if not storages <= self._by_storage.keys():
            return False
        self._written |= storages
        return True

    def written(self) -> list[Tensor]:
        """Return the tensors of the batch that were written to."""
        return [self._by_storage[storage][1] for storage in self._written]

    def indices(self) -> Sequence[int]:
        """Return the numbers of the written tensors among the leaves of the batch.

        A tensor that occurs twice has the number of its first place.
        """
        return sorted(self._by_storage[storage][0] for storage in self._written)
