"""Comparisons of two leaves of an output: bitwise, or within a tolerance; and copies to compare.

Sparse and nested tensors are compared as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The dtype of the bits of a number, by its size in bytes."""
PACKED = frozenset(
    getattr(torch, name)
    for name in (
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
        *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    )
    if hasattr(torch, name)
)
"""The dtypes that only name what is in the bytes: PyTorch neither copies nor compares them."""


def numbers_of(tensor: Tensor) -> Tensor:
    """Return a tensor in the same memory that can be copied and compared; often itself."""
    return tensor.view(INTEGERS[tensor.element_size()]) if tensor.dtype in PACKED else tensor


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor of any dtype."""
    copy = numbers_of(tensor).clone()
    return copy.view(tensor.dtype) if tensor.dtype in PACKED else copy


def same_leaf(one: Any, other: Any) -> bool:
    """Return True if two leaves are equal in type, dtype, shape and every bit.

    NaN equals NaN, whatever its bits. 0.0 and -0.0 are different. Strides do *not* matter.
    """
    if type(one) is np.ndarray and type(other) is np.ndarray:
        return one is other or _same_array(one, other)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(
            one is other or one == other or (one != one and other != other)
        )
    if (one.dtype, one.layout, one.is_nested) != (other.dtype, other.layout, other.is_nested):
        return False
    if one.is_nested:  # it may have no shape
        parts, others = parts_of(one), parts_of(other)
        return len(parts) == len(others) and all(map(same_leaf, parts, others))
    if one.shape != other.shape:
        return False
    if one.layout is not torch.strided:
        return all(map(same_leaf, parts_of(one), parts_of(other)))
    if one.is_quantized:
        return torch.equal(one, other)
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(numbers_of(one), numbers_of(other))
    if one.is_complex():
        one, other = (
            torch.view_as_real(one.resolve_conj()),
            torch.view_as_real(other.resolve_conj()),
        )
    one, other = one.resolve_neg(), other.resolve_neg()
    integers = INTEGERS[one.element_size()]
    equal = one.contiguous().view(integers) == other.contiguous().view(integers)
    return bool(equal.all()) or bool((equal | (one.isnan() & other.isnan())).all())


def _same_array(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.dtype.kind == "f" and one.dtype.itemsize <= max(INTEGERS):
        return same_leaf(torch.tensor(one), torch.tensor(other))
    return bool(np.array_equal(one, other))


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the strided tensors that a tensor consists of, which may be the tensor itself."""
    if tensor.is_nested:
        if tensor.layout is torch.strided:
            return list(tensor.unbind())
        return [tensor.values(), tensor.offsets()]  # type: ignore[attr-defined]
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def close_leaf(one: Any, other: Any) -> bool:
    """Return True if two leaves are equal within the tolerance of ``torch.testing.assert_close``.

    NaN equals NaN. Leaves that are neither tensors nor numbers must be the same.
    """
    try:
        torch.testing.assert_close(one, other, equal_nan=True)
    except AssertionError:
        return False
    except TypeError:  # it knows tensors and numbers only
        return same_leaf(one, other)
    return True
