"""Whether two leaves of outputs are the same number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same_leaf(one: Any, other: Any) -> bool:
    """Whether two leaves are equal in type, dtype, shape and every element, NaN being equal to NaN.

    It does *not* tell 0.0 from -0.0, nor one NaN from another.
    """
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one is other or one == other or (one != one and other != other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (one.is_floating_point() and bool(torch.isclose(one, other, 0, 0, equal_nan=True).all()))
