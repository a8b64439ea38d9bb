"""Answers reads on the host in a captured step, with the values that the watched step read.

What is hard here:

- Reads are answered by their position. The step takes the path of the watched one, because its
  guards hold and the batch gives the same values. If a read deviates, the capture fails.
- A graph computes each value that was read once more, and sets a flag if it differs. The flags are
  deferred checks (``metrics/deferred_checks.py``), because reading one would wait for the device.
- A tensor whose shape depends on a count is made with the count that was read:
  ``nonzero_static`` in place of ``nonzero``, with the same strides. Missing rows are -1, which is
  an index that exists, so nothing is read out of bounds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from cg_lightning.core.errors import CaptureError, CUDAGraphError
from cg_lightning.host_values.exact_operations import (
    COUNTING,
    SCALAR_READS,
    counted_masks,
    is_unique,
    masks_in,
    sizing,
)
from cg_lightning.host_values.path import HostRead
from cg_lightning.metrics.deferred_checks import CheckedCalls

_GIVE_ROWS = ("aten::nonzero", "aten::argwhere")
"""Operations that return all indices in one tensor. Others return one tensor for each dimension."""


class AnsweredReads(EagerDispatchMode):
    """Answers the reads of one captured step.

    Args:
        reads: The reads of the watched step, in order.
        checked: Takes the conditions under which an answer is wrong.
        device_type: Type of the device of the graphs.
    """

    def __init__(self, reads: Sequence[HostRead], checked: CheckedCalls, device_type: str) -> None:
        super().__init__(device_type)
        self._reads = reads
        self._checked = checked
        self._given = 0

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Answer the reads inside.

        Raises:
            CaptureError: The step makes other reads than the watched one.
        """
        with self.watching():
            yield
        if self._given != len(self._reads):
            raise CaptureError(
                f"the captured step read {self._given} values on the host, "
                f"the watched one {len(self._reads)}"
            )

    def dispatch(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`~cg_lightning.backends.dispatch_mode.EagerDispatchMode`."""
        name = function._schema.name
        if name in SCALAR_READS:
            read = self._next(name)
            if not read.is_constant:
                self._check(read, _is_other(name, args, read.value))
            return read.value
        if is_unique(function, args, kwargs):
            return self._unique(name, args, kwargs)
        if (sized := sizing(function, args, kwargs)) is not None:
            return self._sized(function, args, kwargs, *sized)
        masks = counted_masks(name, args)
        if not masks:
            return self.call(function, args, kwargs)
        if name == "aten::masked_select":
            return self._selected(args[0], masks[0])
        if name in COUNTING:
            rows = self._rows(name, masks[0])
            return rows if name in _GIVE_ROWS else list(rows.unbind(1))
        indices: list[Any] = []
        for index in args[1]:
            indices += self._rows(name, index).unbind(1) if masks_in([index]) else [index]
        return self.call(function, (args[0], indices, *args[2:]), kwargs)

    def _sized(
        self,
        function: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        by: OpOverload,
        tensor: Tensor,
    ) -> Any:
        """Return the output of an operation with a known shape."""
        name = function._schema.name
        if name == "aten::bincount":
            sign = self._next(name)
            self._check(sign, torch.ne((tensor < 0).any(), sign.value))
            tensor = tensor.clamp(min=0)
        read = self._next(name)
        if not read.is_constant:
            self._check(read, torch.ne(by(tensor), read.value))
        if name == "aten::repeat_interleave":
            return self.call(function, args, {**kwargs, "output_size": read.value})
        if name == "aten::one_hot":
            return self.call(function, (tensor, read.value + 1), {})
        least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
        counts = tensor.new_zeros(max(read.value + 1, least), dtype=torch.long)
        return counts.scatter_add_(0, tensor.long(), torch.ones_like(tensor, dtype=torch.long))

    def _unique(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the different values, the index of each element among them, and their counts."""
        read = self._next(name)
        consecutive = name == "aten::unique_consecutive"
        names = ["return_inverse", "return_counts"]
        wanted = dict(zip(names if consecutive else ["sorted", *names], args[1:], strict=False))
        wanted.update(kwargs)
        flat = args[0].flatten()
        ordered = flat if consecutive else flat.sort().values
        starts = torch.cat([flat.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
        if not read.is_constant:
            self._check(read, torch.ne(starts.count_nonzero(), read.value))
        first = torch.nonzero_static(starts, size=read.value).squeeze(1)
        values = ordered[first]
        inverse = counts = flat.new_empty(0, dtype=torch.long)
        if wanted.get("return_inverse"):
            inverse = starts.cumsum(0) - 1 if consecutive else torch.searchsorted(values, flat)
            inverse = inverse.view(args[0].shape)
        if wanted.get("return_counts"):
            counts = torch.diff(first, append=first.new_full((1,), len(flat)))
        return values, inverse, counts

    def _counted(self, name: str, mask: Tensor) -> HostRead:
        read = self._next(name)
        if not read.is_constant:
            self._check(read, torch.ne(mask.count_nonzero(), read.value))
        return read

    def _selected(self, tensor: Tensor, mask: Tensor) -> Tensor:
        read = self._counted("aten::masked_select", mask)
        tensor, wide = torch.broadcast_tensors(tensor, mask)
        if not wide.numel():
            return tensor.new_empty(0)
        count = read.value * wide.numel() // mask.numel()
        return tensor[tuple(torch.nonzero_static(wide, size=count).unbind(1))]

    def _rows(self, name: str, mask: Tensor) -> Tensor:
        """Return the indices of the elements that are not zero, of shape (count, dimensions)."""
        read = self._counted(name, mask)
        same = torch.empty_strided(
            (read.value, mask.dim()), read.strides, dtype=torch.int64, device=mask.device
        )
        # an empty mask ends the process with torch 2.8 on a GPU
        return same.copy_(torch.nonzero_static(mask, size=read.value)) if mask.numel() else same

    def _next(self, name: str) -> HostRead:
        read = self._reads[self._given] if self._given < len(self._reads) else None
        if read is None or read.operation != name:
            raise CaptureError(f"the captured step reads {name}, which the watched one did not")
        self._given += 1
        return read

    def _check(self, read: HostRead, is_other: Tensor | None) -> None:
        if is_other is not None:
            with self._checked.during(raise_other_value, (is_other, str(read)), {}):
                self._checked.refuse_if(is_other)


def _is_other(name: str, args: tuple[Any, ...], value: Any) -> Tensor | None:
    """Return whether a read would give another value than ``value``; None if it cannot."""
    if name == "aten::equal":
        one, other = args
        return None if one.shape != other.shape else torch.ne((one == other).all(), value)
    scalar = args[0].reshape(())
    if name == "aten::is_nonzero":
        return torch.ne(scalar != 0, value)
    if isinstance(value, float) and math.isnan(value):
        return torch.logical_not(scalar.isnan())
    return torch.ne(scalar, value)


def expected_checks(reads: Iterable[HostRead], device: torch.device) -> CheckedCalls:
    """Return the checks of a captured step that makes these reads, if it makes no other checks."""
    expected = CheckedCalls()
    for read in reads:
        if not read.is_constant:
            flag = torch.empty((), dtype=torch.bool, device=device)
            expected.seen.append((raise_other_value, (flag, str(read)), {}))
    return expected


def raise_other_value(_: Tensor, read: str) -> None:
    """Raise for a batch whose host values are not those of the graph: no batch has reached it."""
    raise CUDAGraphError(
        f"A graph was replayed for a batch with another host value than the one that it holds: "
        f"{read}. The results since then are wrong. This is a mistake of cg_lightning; please "
        "report it. verify_replays=0 does not avoid it; mode='PIECEWISE' does."
    )
