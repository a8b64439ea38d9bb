"""Operations that copy a tensor of the host to the device of the graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

CASTS = frozenset({"aten::_to_copy", "aten::to", "aten::type_as"})
"""Operations that return their first argument with the type and on the device of others."""
COPIES = frozenset({"aten::copy_", "aten::copy"})
"""Operations that write their second argument to the first one."""
INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_"})
"""Operations that copy the indices, and the value."""


def copied_from_host(
    function: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device
) -> list[Tensor]:
    """Return the tensors of the host that an operation copies to ``device``.

    There are none if it is the CPU. Masks are left out: an operation counts their elements. So is
    the value beside a mask: PyTorch calls ``masked_fill``, which takes it as a number.
    """
    name = function._schema.name
    if device.type == "cpu":
        return []
    if name in CASTS:
        is_copied = args[0].is_cpu and target_of_cast(args, kwargs).type == device.type
        return [args[0]] if is_copied else []
    if name in COPIES:
        return [args[1]] if args[1].is_cpu and args[0].device.type == device.type else []
    if name in INDEXING and args[0].device.type == device.type:
        values = [value for value in args[2:3] if value.is_cpu and not any(map(_is_mask, args[1]))]
        return [*filter(is_copied_index, args[1]), *values]
    return []


def is_copied_index(index: Any) -> bool:
    """Return True for an index on the host that is no mask."""
    return isinstance(index, Tensor) and index.is_cpu and not _is_mask(index)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def target_of_cast(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device:
    """Return the device of what one of :data:`CASTS` returns."""
    for given in (kwargs.get("device"), *args[1:], kwargs.get("other")):
        if isinstance(given, Tensor):
            return given.device
        if isinstance(given, torch.device):
            return given
    own: torch.device = args[0].device
    return own


def type_of_cast(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.dtype:
    """Return the type of what one of :data:`CASTS` returns."""
    for given in (kwargs.get("dtype"), *args[1:], kwargs.get("other")):
        if isinstance(given, Tensor):
            return given.dtype
        if isinstance(given, torch.dtype):
            return given
    own: torch.dtype = args[0].dtype
    return own
