"""Operations that give the same bits each time, and reads of their results.

Operations on integers and booleans are exact. Floating point numbers may only be moved, cast or
compared, because a sum depends on its order. Nearly all operations give these bits on every device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


SCALAR_READS = _aten("item _local_scalar_dense is_nonzero equal")
"""Operations that return a number of Python, and that a graph cannot contain."""
NUMBER_READS = _aten("item _local_scalar_dense")
"""Those that return the number itself, whose bits the step may use."""
COUNTING = _aten("nonzero nonzero_numpy argwhere where masked_select")
"""Operations whose output has as many rows as a mask has elements that are not zero."""
_INDEXING = _aten("index index_put index_put_ _index_put_impl_")
_UP_TO_SIGN = _aten("max min amax amin maximum minimum clamp clamp_min clamp_max")
"""Operations that may return 0.0 or -0.0 if they are given both, but are exact otherwise."""
_ARITHMETIC = _aten("add sub rsub mul div neg index_put index_put_ _index_put_impl_")
"""Arithmetic element by element: the same bits each time, but not on every device.

One value that is set by indices may be added to what is there.
"""
_MOVING_OR_COMPARING = _aten(
    """
    _to_copy to clone copy_ detach alias lift_fresh type_as contiguous view reshape expand expand_as
    slice select unsqueeze squeeze transpose permute t unbind split chunk flatten flip cat stack
    where masked_fill masked_fill_ fill_ zero_ ones zeros full ones_like zeros_like full_like
    new_ones new_zeros new_full eq ne lt le gt ge isnan isinf isfinite abs all any count_nonzero
    logical_not logical_and logical_or logical_xor
    """
)
_OF_FLOATS = _aten(
    "index index_select gather repeat upsample_nearest2d pad constant_pad_nd nonzero"
).union(_MOVING_OR_COMPARING, _UP_TO_SIGN, _ARITHMETIC, SCALAR_READS)
"""Operations that are exact for floating point numbers."""
_RACING = _aten(
    """
    scatter scatter_ index_put index_put_ _index_put_impl_ put put_ index_copy index_copy_
    masked_scatter masked_scatter_
    """
)
"""Operations that may write twice to one element; which write comes last is not defined."""
_OF_ONE_DEVICE = _aten(
    """
    sort argsort msort topk kthvalue median nanmedian mode argmax argmin max min aminmax cummax
    cummin upsample_nearest2d bitwise_left_shift bitwise_right_shift __lshift__ __rshift__
    """
)
"""Operations that devices do differently: they order equal elements, for instance."""
_WHATEVER_THE_VALUES = _aten(
    "arange add sub rsub mul neg sum cumsum bitwise_not bitwise_and bitwise_or bitwise_xor"
).union(_MOVING_OR_COMPARING, _UP_TO_SIGN)
"""Operations that succeed or fail by shapes alone: none looks for an element by its index."""
_OF_EACH_ELEMENT = _aten(
    """
    to _to_copy eq ne lt le gt ge isnan isinf isfinite abs neg bitwise_not logical_not
    """
)
"""Operations whose result has one element for each element, if they are given one tensor."""
_sum, _max = torch.ops.aten.sum.default, torch.ops.aten.max.default
MOST_ELEMENTS = 65536
"""Larger tensors are not computed before the step: the host would take longer than it saves."""


def is_plain(tensor: Tensor) -> bool:
    """Return True for a strided tensor that is no subclass and no lazy view, and has memory."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_neg() or tensor.is_conj())
        and not tensor._is_zerotensor()  # a derivative of forward mode
    )


def is_exact(function: OpOverload, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Return True if an operation gives the same bits each time, and takes little time."""
    tensors = [*inputs, *outputs]
    if function.namespace != "aten" or torch.Tag.nondeterministic_seeded in function.tags:
        return False
    if function._schema.name in _RACING and not _writes_one_value(function, inputs):
        return False
    if not all(map(is_plain, tensors)) or sum(t.numel() for t in tensors) > MOST_ELEMENTS:
        return False
    if not any(map(_is_inexact, tensors)):
        return True
    if function._schema.name not in _OF_FLOATS or any(tensor.is_complex() for tensor in tensors):
        return False
    # devices convert numbers that an integer cannot hold to different integers
    to_integers = any(not _is_inexact(t) and t.dtype is not torch.bool for t in outputs)
    return not (any(map(_is_inexact, inputs)) and to_integers)


def _writes_one_value(function: OpOverload, inputs: Sequence[Tensor]) -> bool:
    """Return True if all writes of an operation in ``_RACING`` write the same value."""
    if function._schema.name in _INDEXING:
        return inputs[-1].numel() == 1  # the values are its last tensor
    return function._overloadname == "value"


def has_sign_of_zero(function: OpOverload) -> bool:
    """Return False for an operation whose zeros may have another sign the next time."""
    return function._schema.name not in _UP_TO_SIGN


def is_same_on_host(function: OpOverload, outputs: Iterable[Tensor] = ()) -> bool:
    """Return True if an exact operation gives the same bits on the host as on the device."""
    name = function._schema.name
    if name in _ARITHMETIC and any(map(_is_inexact, outputs)):
        return False
    if name in ("aten::max", "aten::min") and function._overloadname in ("default", "other"):
        return True  # a value, and no index
    return name not in _OF_ONE_DEVICE


def cannot_fail(function: OpOverload) -> bool:
    """Return True if an operation that has succeeded once does so for all values.

    An index that is out of range ends the process on a GPU.
    """
    is_nonzero = function is torch.ops.aten.where.default
    return function._schema.name in _WHATEVER_THE_VALUES and not is_nonzero


def is_of_each_element(function: OpOverload) -> bool:
    """Return True if an operation on one tensor computes each element of its own."""
    return function._schema.name in _OF_EACH_ELEMENT


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def counted_masks(name: str, args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors whose elements an operation counts to know the shape of its output."""
    if name == "aten::masked_select":
        return [args[1]]
    if name == "aten::where" and len(args) > 1:
        return []
    if name in COUNTING:
        return [args[0]]
    if name not in _INDEXING:
        return []
    if name != "aten::index" and _fills(args[1], args[2]):
        return []
    return masks_in(args[1])


def sizing(
    function: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[OpOverload, Tensor] | None:
    """Return what is read of which tensor to know the shape of an output: its sum, or its maximum.

    None for operations with a shape that depends on no values, and where nothing can answer.
    """
    name = function._schema.name
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        place = {"Tensor": 0, "self_Tensor": 1}.get(function._overloadname)
        return (_sum, args[place]) if place is not None and _has_rows(args[place]) else None
    is_open = name == "aten::one_hot" and (len(args) < 2 or args[1] == -1)
    is_counted = name == "aten::bincount" and args[1:2] in ((), (None,)) and "weights" not in kwargs
    if is_open or is_counted:
        return (_max, args[0]) if _has_rows(args[0]) else None
    return None


def _has_rows(tensor: Tensor) -> bool:
    is_integer = tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return is_integer and tensor.dim() > 0 and tensor.numel() > 1


def is_unique(function: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation finds the different values of integers, whose number is read."""
    if function._schema.name == "aten::_unique2":
        is_usual = kwargs.get("sorted", args[1] if len(args) > 1 else True)
    else:
        is_usual = kwargs.get("dim") is None and len(args) < 4  # else it compares rows
    names = ("aten::_unique2", "aten::unique_consecutive")
    return function._schema.name in names and is_usual and _has_rows(args[0])


def masks_in(indices: Iterable[Any]) -> list[Tensor]:
    """Return the masks among the indices of an indexing operation."""
    return [
        index
        for index in indices
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
    ]


def _fills(indices: Sequence[Any], value: Any) -> bool:
    """Return True if PyTorch calls ``masked_fill`` instead."""
    given = [index for index in indices if index is not None]
    return len(given) == 1 and isinstance(value, Tensor) and value.numel() == 1
