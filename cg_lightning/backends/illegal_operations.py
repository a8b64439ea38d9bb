"""The table of operations that a CUDA graph cannot contain, for the recorder and diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.copies_from_host import CASTS, COPIES, reads_a_mask, target_of_cast
from cg_lightning.core.causes import Cause


def _table(cause: Cause, names: str) -> dict[str, Cause]:
    return {f"aten::{name}": cause for name in names.split()}


# in inference mode, composite operations arrive in one piece (item, linalg_inv); under no_grad, in
# parts (_local_scalar_dense)
_ILLEGAL = {
    **_table(
        Cause.HOST_SYNC,
        """
        item _local_scalar_dense is_nonzero equal allclose ctc_loss
        _nested_tensor_from_mask_left_aligned _choose_qparams_per_tensor
        """,
    ),
    **_table(
        Cause.DATA_DEPENDENT_SHAPE,
        """
        nonzero nonzero_numpy argwhere masked_select bincount combinations _pack_padded_sequence
        _nested_tensor_from_mask _nested_tensor_from_tensor_list _nested_from_padded
        to_sparse to_sparse_csr to_sparse_csc to_sparse_bsr to_sparse_bsc
        _to_sparse _to_sparse_csr _to_sparse_csc _to_sparse_bsr _to_sparse_bsc
        _unique _unique2 unique_dim unique_consecutive unique_dim_consecutive
        """,
    ),
    **_table(
        Cause.HOST_CHECKED_LINEAR_ALGEBRA,
        """
        _linalg_check_errors linalg_solve linalg_inv inverse linalg_cholesky cholesky
        linalg_lu_factor linalg_ldl_factor linalg_eig linalg_eigvals linalg_eigh linalg_eigvalsh
        linalg_svd linalg_svdvals svd linalg_lstsq linalg_pinv pinverse linalg_matrix_rank
        linalg_cond linalg_tensorinv linalg_tensorsolve cholesky_inverse linalg_matrix_power
        """,
    ),
}
_INDEX_PUTS = ("aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")


def _illegal_index_put(args: Sequence[Any]) -> bool:
    indices, value = args[1], args[2]
    masks = [index for index in indices if index is not None]
    # PyTorch calls masked_fill in this case
    masked_fill = len(masks) == 1 and isinstance(value, Tensor) and value.numel() == 1
    return reads_a_mask(indices) and not masked_fill


def _crosses_devices(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if name in COPIES:
        return _are_different(args[0].device, args[1].device)
    return name in CASTS and _are_different(target_of_cast(args, kwargs), args[0].device)


def _are_different(one: torch.device, other: torch.device) -> bool:
    """Return True for two devices. Without a number, it is the current one of its type."""
    has_numbers = one.index is not None and other.index is not None
    return one.type != other.type or (has_numbers and one.index != other.index)


def _made_from_python(tensor: Tensor, device_type: str) -> bool:
    """Return True if values were copied to the device of the graphs.

    A scalar on the CPU is not copied: it is an argument of the kernels that read it.
    """
    return tensor.device.type == device_type and (device_type != "cpu" or tensor.dim() > 0)


def find_illegal(
    function: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], device_type: str
) -> Cause | None:
    """Return why a CUDA graph on such a device cannot contain this call, or None if it can."""
    name = function._schema.name
    cause = _ILLEGAL.get(name)
    if cause is not None:
        return cause
    if function.namespace in _COLLECTIVES:
        return Cause.COLLECTIVE
    if name == "aten::lift_fresh":
        return Cause.TENSOR_FROM_PYTHON if _made_from_python(args[0], device_type) else None
    if name == "aten::repeat_interleave":
        by_tensor = function._overloadname in ("Tensor", "self_Tensor")
        is_open = by_tensor and kwargs.get("output_size") is None
        return Cause.DATA_DEPENDENT_SHAPE if is_open else None
    if name == "aten::where" and len(args) == 1:
        return Cause.DATA_DEPENDENT_SHAPE
    if name == "aten::index" and reads_a_mask(args[1]):
        return Cause.DATA_DEPENDENT_SHAPE
    if name in _INDEX_PUTS and _illegal_index_put(args):
        return Cause.DATA_DEPENDENT_SHAPE
    if name == "aten::one_hot" and (len(args) < 2 or args[1] == -1):
        return Cause.HOST_SYNC
    if _crosses_devices(name, args, kwargs):
        return Cause.CROSS_DEVICE_COPY
    return None
