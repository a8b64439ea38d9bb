"""Copies to the host in a captured step: ``self.outputs.append(logits.cpu())``.

A graph cannot wait for such a copy, but nothing in the step reads it: the watched step has shown
that (``diagnosis/detectors/host_copies.py``). So a :class:`HostCopy` replaces it, which supports
no operation. Each replay makes a copy of its own, after the graph, where the step keeps or returns
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cg_lightning.backends.copies_to_host import answered_copies_to_host
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import flatten

_HOST = torch.device("cpu")
_ITSELF = ("cpu", "detach")
"""Names of methods that return the same copy once more."""
_READ_NOTHING = (
    *("__get__", "__hash__", "__len__", "dim", "element_size", "is_complex", "is_contiguous"),
    *("is_floating_point", "is_inference", "ndimension", "nelement", "numel", "size", "stride"),
)
"""Names of methods that ask for no value. Attributes are read by ``__get__``."""


class HostCopy(Tensor):
    """Replaces the copy of a tensor: it has the same shape, but no values.

    Args:
        source: The tensor of the graph.
    """

    source: Tensor

    @staticmethod
    def __new__(cls, source: Tensor) -> HostCopy:
        """Make a tensor without memory."""
        made: HostCopy = Tensor._make_wrapper_subclass(
            cls, source.shape, strides=source.stride(), dtype=source.dtype, device=_HOST
        )
        made.source = source
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Refuse every use that reads values."""
        name = func.__name__
        if name in _ITSELF:
            return args[0]
        if name not in _READ_NOTHING:
            _refuse(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # it is a class method, as documented
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Refuse dispatched operations, such as those of ``.T`` and of C++ code."""
        _refuse(func)


def _refuse(function: Any) -> None:
    name = getattr(function, "__name__", function)
    raise CaptureError(f"{name} reads a copy on the host, which the watched step did not do")


def answered_host_copies(device: torch.device) -> AbstractContextManager[None]:
    """While this is entered, copies of the captured step are :class:`HostCopy` objects."""

    def answer(tensor: Tensor, copy: Callable[[], Tensor]) -> Tensor:
        if type(tensor) is not Tensor or tensor.requires_grad:
            return copy()
        # the step may change the tensor later; a copy of the CPU is the tensor itself
        return HostCopy(tensor if tensor.is_cpu else tensor.clone())

    return answered_copies_to_host(device, answer)


def leaves_on_device(tree: Any) -> list[Any]:
    """Return the leaves of a tree, with each copy replaced by the tensor that it copies."""
    return [leaf.source if isinstance(leaf, HostCopy) else leaf for leaf in flatten(tree)[0]]


def places_of_copies(leaves: list[Any]) -> list[list[int]]:
    """Return the positions of copies among the leaves of an output: one list for each copy."""
    places: dict[int, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, HostCopy):
            places.setdefault(id(leaf), []).append(index)
    return list(places.values())
