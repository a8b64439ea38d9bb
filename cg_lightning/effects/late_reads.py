"""Values that a step reads from a tensor and only passes on: ``self.losses.append(loss.item())``.

A graph cannot wait for such a value. The watched step has shown that the step only keeps, returns
or logs it (``diagnosis/uses_of_read.py``). So a capture gets a :class:`LateRead` in its place,
which supports no operation. Each replay reads a value of its own, after the graph, where the step
keeps or returns it. What is logged stays on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cg_lightning.core.errors import CaptureError

ReadPlace = tuple[int, int]
"""The id of the code that reads a value, and the offset of the instruction."""
METHODS = ("item", "numpy", "tolist")
"""Methods of tensors that give such values."""


def can_be_late(tensor: Tensor, method: str) -> bool:
    """Return whether a replay can read such a value later."""
    if tensor.requires_grad or tensor.is_complex() or tensor.layout is not torch.strided:
        return False
    return method != "item" or tensor.numel() == 1


class LateRead:
    """Replaces a value while its step is captured.

    Args:
        source: The tensor of the graph.
        method: The method that reads it.
        copy: What stands for the copy on the host that is read; None if there is none.
    """

    __slots__ = ("copy", "method", "source")

    def __init__(self, source: Tensor, method: str, copy: Tensor | None = None) -> None:
        self.method = method
        self.copy = copy if method == "numpy" else None
        """What an array shares its memory with."""
        self.source = source
        """For an array, the tensor itself: on the CPU it shares its memory."""
        if method != "numpy":  # the step may change the tensor later
            self.source = source.detach().clone()

    @property
    def is_number(self) -> bool:
        """Whether it is one number."""
        return self.method == "item"

    def as_logged(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor that Lightning makes of the number, with the same bits.

        Python makes a ``float`` of an integer first, which may round.
        """
        value = self.source.reshape(())
        value = value if value.is_floating_point() else value.double()
        return value.to(device, dtype, copy=True)

    def _refuse(self, *_: Any) -> Any:
        raise CaptureError("a value is read, which the watched step only passed on")

    __bool__ = __int__ = __float__ = __complex__ = __index__ = _refuse
    __len__ = __iter__ = __getitem__ = __setitem__ = __contains__ = __array__ = _refuse
    __round__ = __trunc__ = __floor__ = __ceil__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __pow__ = __rpow__ = _refuse
    __divmod__ = __rdivmod__ = __repr__ = __str__ = __format__ = __reduce__ = _refuse
