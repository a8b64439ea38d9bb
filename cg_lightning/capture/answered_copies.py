"""Answers copies from the host in a captured call, with constants that are on the device.

All work except the copy is done on the host, as in eager, even a conversion to another type. So the
bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.copies_from_host import (
    CASTS,
    COPIES,
    copied_from_host,
    is_copied_index,
    type_of_cast,
)
from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from cg_lightning.backends.tensor_makers import beside_the_step


class AnsweredCopies(EagerDispatchMode):
    """Answers the copies of one captured call.

    Args:
        device: The device of the graphs.
        answer: Returns a tensor on the device for one on the host.
    """

    def __init__(self, device: torch.device, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__(device.type)
        self._device = device
        self._answer = answer

    def dispatch(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`~cg_lightning.backends.dispatch_mode.EagerDispatchMode`."""
        if not copied_from_host(function, args, kwargs, self._device):
            return self.call(function, args, kwargs)
        name = function._schema.name
        if name in CASTS:
            layout = kwargs.get("memory_format") or torch.preserve_format
            return self._copied(args[0], type_of_cast(args, kwargs), layout)
        if name in COPIES:
            args = (args[0], self._copied(args[1], args[0].dtype), *args[2:])
        else:
            indices = [self._index(each) for each in args[1]]
            values = [self._copied(each, each.dtype) if each.is_cpu else each for each in args[2:3]]
            args = (args[0], indices, *values, *args[3:])
        return self.call(function, args, kwargs)

    def _index(self, value: Any) -> Any:
        return self._copied(value, value.dtype) if is_copied_index(value) else value

    def _copied(
        self,
        source: Tensor,
        dtype: torch.dtype,
        layout: torch.memory_format = torch.preserve_format,
    ) -> Tensor:
        with beside_the_step():
            value = source.detach().to(dtype, copy=True, memory_format=layout)
        return self._answer(value)
