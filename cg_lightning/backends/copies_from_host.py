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

    There are none if it is the CPU. Masks are left out, because an operation counts their elements.
    The value that is set with a mask is left out, because ``masked_fill`` takes it as a number.
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
        values = [value for value in args[2:3] if value.is_cpu and not reads_a_mask(args[1])]
        return [*filter(is_copied_index, args[1]), *values]
    return []


def is_copied_index(index: Any) -> bool:
    """Return True for an index on the host that is no mask."""
    return isinstance(index, Tensor) and index.is_cpu and not _is_mask(index)


def reads_a_mask(indices: Any) -> bool:
    """Return True if one of the indices of an operation is a mask."""
    return any(map(_is_mask, indices or ()))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def target_of_cast(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device:
    """Return the device of what one of :data:`CASTS` returns."""
    device: torch.device = _of_cast(args, kwargs, "device", torch.device)
    return device


def type_of_cast(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.dtype:
    """Return the type of what one of :data:`CASTS` returns."""
    dtype: torch.dtype = _of_cast(args, kwargs, "dtype", torch.dtype)
    return dtype


def _of_cast(args: Sequence[Any], kwargs: dict[str, Any], name: str, kind: type) -> Any:
    """Return the value that a cast names. If it names none, return that of its tensor."""
    for given in (kwargs.get(name), *args[1:], kwargs.get("other")):
        if isinstance(given, kind):
            return given
        if isinstance(given, Tensor):
            return getattr(given, name)
    return getattr(args[0], name)
