"""Tensors that do not keep their memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cg_lightning.backends import GraphBackend, resolve_backend
from cg_lightning.core.tree import flatten, rebuild


def weak_ref_tensors(output: Any, backend: GraphBackend | None = None) -> Any:
    """Gives ``output`` with each tensor replaced by one on the same memory that does not keep it.

    Dtype, shape and strides are kept; what is no tensor stays as it is. A CUDA tensor so made must not be read once its
    memory was freed, which PyTorch cannot notice. On other devices the new tensor does keep the memory.

    Args:
        output: Any nest of containers and tensors (vLLM's function of this name takes lists and tuples).
        backend: The backend that the memory belongs to; None: that of each tensor's device.
    """
    leaves, _ = flatten(output)
    return rebuild(
        output,
        iter([_weak(leaf, backend) if isinstance(leaf, Tensor) else leaf for leaf in leaves]),
    )


def _weak(tensor: Tensor, backend: GraphBackend | None) -> Tensor:
    backend = backend or resolve_backend("auto", tensor.device)
    return tensor.detach() if backend is None else backend.weak_ref_tensor(tensor)
