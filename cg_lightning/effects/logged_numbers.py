"""``self.log`` of Python numbers: a graph makes the tensor on the device.

Lightning copies the number from the host, which no graph can hold. A tensor that is filled on the
device has the same bits. That the graph freezes the number is right: all that the step read to
compute it is guarded, or keeps the step out of the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import nn

from cg_lightning.effects.late_reads import LateRead
from cg_lightning.modules.interception import replaced_method
from cg_lightning.modules.kinds import is_lightning_module

_EXACT = 2**53
"""Below this number, an ``int`` is exact as a ``float``."""


def _is_exact(value: Any) -> TypeGuard[float]:
    return type(value) in (bool, float) or (type(value) is int and abs(value) < _EXACT)


def _dtype() -> torch.dtype:
    # as Lightning's ``_get_default_dtype``: the user's, but no lower than float32
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32


def with_tensor(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments of ``self.log``, with a tensor instead of the number.

    Args:
        module: The LightningModule.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    value = kwargs["value"] if "value" in kwargs else args[1] if len(args) > 1 else None
    if isinstance(value, LateRead) and value.is_number:
        tensor = value.as_logged(_dtype(), module.device)
    elif _is_exact(value):
        tensor = torch.full((), float(value), dtype=_dtype(), device=module.device)
    else:
        return args, kwargs
    if "value" in kwargs:
        return args, {**kwargs, "value": tensor}
    return (args[0], tensor, *args[2:]), kwargs


@contextlib.contextmanager
def numbers_as_tensors(module: nn.Module) -> Iterator[None]:
    """While this is entered, ``self.log`` gets tensors instead of numbers."""
    if not is_lightning_module(module):
        yield
        return

    def log(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = with_tensor(module, args, kwargs)
        return original(*args, **kwargs)

    with replaced_method(module, "log", log):
        yield
