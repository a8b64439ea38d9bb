"""Numbers that a step reads from a tensor and only passes on: ``self.losses.append(loss.item())``.

A graph cannot wait for such a number. The watched step has shown that the step only keeps, returns
or logs it (``diagnosis/uses_of_number.py``). So a capture gets a :class:`HostNumber` in its place,
which supports no operation. Each replay reads a number of its own, after the graph, where the step
keeps or returns it. What is logged stays on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cg_lightning.core.errors import CaptureError

NumberPlace = tuple[int, int]
"""The id of the code that reads a number, and the offset of the instruction."""


def can_be_number(tensor: Tensor) -> bool:
    """Return whether ``item()`` gives a number that a replay can read later."""
    return not (tensor.requires_grad or tensor.is_complex()) and tensor.numel() == 1


class HostNumber:
    """Replaces a number while its step is captured.

    Args:
        source: The tensor of the graph with the number.
    """

    __slots__ = ("source",)

    def __init__(self, source: Tensor) -> None:
        # the step may change the tensor later
        self.source = source.detach().reshape(()).clone()

    def as_logged(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor that Lightning makes of the number, with the same bits.

        Python makes a ``float`` of an integer first, which may round.
        """
        value = self.source if self.source.is_floating_point() else self.source.double()
        return value.to(device, dtype, copy=True)

    def _refuse(self, *_: Any) -> Any:
        raise CaptureError("a number is read, which the watched step only passed on")

    __bool__ = __int__ = __float__ = __complex__ = __index__ = _refuse
    __round__ = __trunc__ = __floor__ = __ceil__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __pow__ = __rpow__ = _refuse
    __divmod__ = __rdivmod__ = __repr__ = __str__ = __format__ = __reduce__ = _refuse
