"""Copies of the gradients that a graph has computed, which the user may keep.

What is hard here: each replay writes its gradients to the same memory, so parameters get copies of
them. New memory for each copy, which ``zero_grad`` frees one iteration later, takes a tenth of the
time of a small iteration. So the copies of the latest iteration are written again, if nothing shows
that this was done:

- Nobody refers to them: no variable, no view, no saved tensor of autograd, no array of NumPy, no
  weak reference. Python and PyTorch count references.
- They are as they were made: same memory, shape, strides and ``requires_grad``, no attributes. The
  counters of their changes are set to those of eager.
- Only the current stream of this process may use their memory. ``record_stream``, and a queue that
  sends a tensor, say that another one does, which no reference shows. From then on the allocator is
  responsible for the memory, and not this file.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from cg_lightning.backends import GraphBackend
from cg_lightning.capture.lent_gradients import set_versions
from cg_lightning.capture.outputs import (
    GroupedCopies,
    copy_with_strides,
    is_cloned_with_strides,
)
from cg_lightning.guards.module_guard import Placement, layout_and_gradient_of, layout_of
from cg_lightning.modules.interception import UsersOfMemory

# private: how many references PyTorch has to a tensor and to its memory
_of_tensor: Callable[[Tensor], int] | None = getattr(Tensor, "_use_count", None)
_of_memory: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_address_of = operator.attrgetter("_cdata")
_attributes_of = operator.attrgetter("__dict__")


def _references(tensors: Sequence[Tensor]) -> list[int]:
    """Return how many references there are to tensors and to their memory."""
    assert _of_tensor is not None and _of_memory is not None  # noqa: PT018
    memory = list(map(Tensor.untyped_storage, tensors))
    return [
        *map(sys.getrefcount, tensors),
        *map(weakref.getweakrefcount, tensors),
        *map(_of_tensor, tensors),
        *map(sys.getrefcount, memory),
        *map(_of_memory, map(_address_of, memory)),
    ]


class GradientCopies:
    """Copies gradients of a graph to memory that belongs to the user until the next iteration.

    Args:
        backend: The backend of the graphs.
    """

    def __init__(self, backend: GraphBackend) -> None:
        self._backend = backend
        self._sources: list[Tensor] = []
        """The latest gradients."""
        self._layouts: list[Any] = []
        self._are_usual = True
        """Whether ``clone`` keeps their strides."""
        self._grouped: GroupedCopies | None = None
        """Copies them; None: their strides are unusual."""
        self._copies: list[Tensor] = []
        """Those of the latest iteration; empty if their memory is not used again."""
        self._placement = Placement([])
        self._addresses = frozenset[int]()
        """Those of their memory."""
        self._versions: list[int] = []
        """How often the gradients were changed when the graph was captured, as in eager."""
        self._alone: list[int] = []
        """The numbers of references if nobody else refers to them."""
        self._stream: Hashable = None
        self._heard: UsersOfMemory | None = None

    def install(self) -> None:
        """Listen for other streams and processes that use a gradient; idempotent."""
        can_count = _of_tensor is not None and _of_memory is not None
        if self._heard is None and can_count and set_versions is not None:
            self._heard = UsersOfMemory(self._may_be_used)

    def remove(self) -> None:
        """Free the memory, and listen no more; idempotent."""
        self.forget()
        self._sources, self._layouts, self._grouped = [], [], None
        if self._heard is not None:
            self._heard.remove()
            self._heard = None

    def forget(self) -> None:
        """Let the user have the latest copies for good."""
        self._copies, self._placement = [], Placement([])

    def make(self, gradients: list[Tensor]) -> list[Tensor]:
        """Return copies of gradients that nothing overwrites as long as somebody can see them.

        Args:
            gradients: Strided tensors. The next replay may write to them.
        """
        if len(gradients) != len(self._sources) or not all(
            map(operator.is_, gradients, self._sources)
        ):
            self._take(gradients)
        grouped = self._grouped
        if grouped is None:
            return list(map(copy_with_strides, gradients))
        placement, copies = self._placement, self._copies  # another thread may forget them now
        if copies and self._are_free(copies, placement):
            grouped.write_to(copies)
            self._set_versions(copies)
            return copies
        del placement, copies  # first: their memory may serve
        self.forget()
        copies = grouped.make()
        self._set_versions(copies)
        if self._heard is not None:
            self._placement = Placement(copies, layout_and_gradient_of)
            self._addresses = frozenset([each.untyped_storage().data_ptr() for each in copies])
            self._alone = _references(copies)
            self._stream = self._backend.current_stream()
            self._copies = copies
        return copies

    def _take(self, gradients: list[Tensor]) -> None:
        """Take note of the gradients of another graph."""
        layouts = list(map(layout_of, gradients))
        if layouts != self._layouts:
            self.forget()
            self._are_usual = all(map(is_cloned_with_strides, gradients))
        self._grouped = GroupedCopies(gradients) if self._are_usual else None
        self._sources, self._layouts = gradients, layouts
        self._versions = [each._version for each in gradients]

    def _set_versions(self, copies: list[Tensor]) -> None:
        if set_versions is not None:
            set_versions(copies, self._versions)

    def _are_free(self, copies: list[Tensor], placement: Placement) -> bool:
        return (
            self._stream == self._backend.current_stream()
            and _references(copies) == self._alone
            and not any(map(_attributes_of, copies))
            and placement.check()
        )

    def _may_be_used(self, held: Any) -> None:
        """Called before another stream or process may use the memory of a tensor or storage."""
        try:
            with torch._C.DisableTorchFunction():
                memory = held if isinstance(held, torch.UntypedStorage) else held.untyped_storage()
                is_ours = memory.data_ptr() in self._addresses
        except RuntimeError:  # its memory is inside other tensors
            is_ours = True
        if is_ours:
            self.forget()
