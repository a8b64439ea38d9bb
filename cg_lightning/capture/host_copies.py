"""Copies to the host in a captured step: ``self.outputs.append(logits.cpu())``, ``loss.item()``.

A graph cannot wait for such a copy, but nothing in the step reads it: the watched step has shown
that (``diagnosis/detectors/host_copies.py``). So a :class:`HostCopy` replaces it, which supports
no operation. Each replay makes a copy of its own, after the graph, where the step keeps or returns
one. A value that the step only passes on is a ``LateRead`` (``effects/late_reads.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cg_lightning.backends.copies_to_host import answered_copies_to_host, answered_reads
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import flatten
from cg_lightning.effects.late_reads import METHODS, LateRead, ReadPlace, can_be_late

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


@contextlib.contextmanager
def answered_host_copies(
    device: torch.device, late_reads: frozenset[ReadPlace] = frozenset()
) -> Iterator[None]:
    """While this is entered, copies of the captured step are :class:`HostCopy` objects.

    Args:
        device: The device of the graphs.
        late_reads: Where the step reads values that it only passes on.
    """

    def answer(tensor: Tensor, copy: Callable[[], Tensor]) -> Tensor:
        if type(tensor) is not Tensor or tensor.requires_grad:
            return copy()
        # the step may change the tensor later; a copy of the CPU is the tensor itself
        return HostCopy(tensor if tensor.is_cpu else tensor.clone())

    def answer_read(tensor: Tensor, name: str, frame: FrameType, read: Callable[[], Any]) -> Any:
        source = tensor.source if isinstance(tensor, HostCopy) else tensor
        is_known = (id(frame.f_code), frame.f_lasti) in late_reads
        is_on_device = type(source) is Tensor and source.device.type == device.type
        if not (is_known and is_on_device and can_be_late(source, name)):
            return read()
        return LateRead(source, name, tensor if tensor is not source else None)

    with contextlib.ExitStack() as stack:
        stack.enter_context(answered_copies_to_host(device, answer))
        if late_reads:
            stack.enter_context(answered_reads(METHODS, answer_read))
        yield


def leaves_on_device(tree: Any) -> list[Any]:
    """Return the leaves of a tree, with each copy replaced by the tensor that it copies."""
    return [leaf.source if _is_on_host(leaf) else leaf for leaf in flatten(tree)[0]]


def _is_on_host(leaf: Any) -> bool:
    return isinstance(leaf, (HostCopy, LateRead))


class _Place(NamedTuple):
    leaf: int
    """The position among the leaves."""
    number: int
    """Leaves with one number are one object."""
    method: str
    """The method that reads the copy; empty for the copy itself."""


class CopyPlaces:
    """Where one copy is among the leaves of an output, and what is read of it."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._numbers: dict[int, int] = {}

    def add(self, index: int, leaf: HostCopy | LateRead) -> None:
        """Add a leaf."""
        number = self._numbers.setdefault(id(leaf), len(self._numbers))
        method = leaf.method if isinstance(leaf, LateRead) else ""
        self._places.append(_Place(index, number, method))

    def fill(self, leaves: list[Any]) -> None:
        """Replace the tensors of the graph by one copy, and by what is read of it."""
        copy = leaves[self._places[0].leaf].cpu()
        made: dict[int, Any] = {}
        for place, number, method in self._places:
            if number not in made:
                made[number] = getattr(copy, method)() if method else copy
            leaves[place] = made[number]


def places_of_copies(leaves: list[Any]) -> list[CopyPlaces]:
    """Return where copies are among the leaves of an output. An array of one shares its memory."""
    found: dict[int, CopyPlaces] = {}
    for index, leaf in enumerate(leaves):
        if _is_on_host(leaf):
            copy = leaf.copy if isinstance(leaf, LateRead) and leaf.copy is not None else leaf
            found.setdefault(id(copy), CopyPlaces()).add(index, leaf)
    return list(found.values())
