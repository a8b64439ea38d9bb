"""Reduce the gradients of a graph over the ranks in the buckets of DDP, without a backward.

DDP reduces in hooks of C++ that run one by one for each parameter, in a backward. If all gradients
are there already, a few grouped operations do the same:

- Gradients are copied to the bucket and divided by the number of ranks, each bucket is summed over
  the ranks, and the sums are copied back.
- The buckets are those of DDP's reducer, in its order. So the collectives are the same, and another
  rank may leave them to DDP in the same step. Each element has the same place in its bucket, which
  decides the last bit of sums over three ranks or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cg_lightning.capture.outputs import is_cloned_with_strides

_OPTIONS_OF_DDP = (
    *("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "mixed_precision"),
    *("_use_python_reducer", "_delay_all_reduce_params", "_comm_hooks"),
)
"""Attributes of DDP. If one is set, DDP does more, or something else."""


class DDPBuckets:
    """The buckets of DDP, as memory of their own.

    Args:
        wrapper: The module in DDP, which has laid out its buckets for good.
        buckets: Those of its reducer.
    """

    def __init__(self, wrapper: DistributedDataParallel, buckets: list[Any]) -> None:
        self._wrapper = wrapper
        self._group = wrapper.process_group
        self._share = 1.0 / dist.get_world_size(self._group)
        self._buffers: list[Tensor] = [bucket.buffer() for bucket in buckets]
        self._parameters: list[Tensor] = [p for bucket in buckets for p in bucket.parameters()]
        self._places: list[Tensor] = [
            part.as_strided(parameter.size(), parameter.stride())
            for bucket in buckets
            for parameter, part in zip(bucket.parameters(), bucket.gradients(), strict=True)
        ]
        self._named: Mapping[str, nn.Parameter] | None = None
        self._names: list[str] = []

    @classmethod
    def of(cls, wrapper: DistributedDataParallel) -> DDPBuckets | None:
        """Return the buckets of DDP; None if DDP must reduce by itself, or has no final ones yet.

        The reducer is private. If it is not what it was in PyTorch 2.13, DDP reduces.
        """
        reducer: Any = getattr(wrapper, "reducer", None)
        get_buckets = getattr(reducer, "_get_zeros_like_grad_buckets", None)
        join = getattr(wrapper, "_join_config", None)
        if type(wrapper) is not DistributedDataParallel or get_buckets is None or join is None:
            return None
        if join.enable or any(getattr(wrapper, name, True) for name in _OPTIONS_OF_DDP):
            return None
        if getattr(wrapper, "skip_all_reduce_unused_params", False):
            return None
        if not getattr(wrapper, "_has_rebuilt_buckets", False):
            return None
        # private, and the only sign of a built-in hook of the communication
        if wrapper._get_ddp_logging_data().get("comm_hook"):
            return None
        buckets = get_buckets()
        parameters = [p for bucket in buckets for p in bucket.parameters()]
        if not all(map(is_cloned_with_strides, parameters)):
            return None
        return cls(wrapper, buckets)

    def hold_all(
        self, named: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor | None]
    ) -> bool:
        """Return True if the gradients are those of all parameters, and nobody else reduces them.

        Args:
            named: The parameters of the module by name. Another mapping has other parameters.
            gradients: New gradients by the names of their parameters.
        """
        if self._wrapper._comm_hooks:  # one may come at any time
            return False
        if named is not self._named:
            names = {id(parameter): name for name, parameter in named.items()}
            self._names = [names.get(id(parameter), "") for parameter in self._parameters]
            self._named = named
        new = [gradients.get(name) for name in self._names]
        return all(each is not None and each.layout is torch.strided for each in new)

    @torch.no_grad()
    def reduce(self) -> None:
        """Replace the gradient of each parameter by its mean over the ranks, in place."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        assert len(gradients) == len(self._parameters), "hold_all has looked at others"
        torch._foreach_copy_(self._places, gradients)
        torch._foreach_mul_(self._buffers, self._share)
        sums = [
            dist.all_reduce(buffer, group=self._group, async_op=True) for buffer in self._buffers
        ]
        for each in sums:
            each.wait()
        torch._foreach_copy_(gradients, self._places)
