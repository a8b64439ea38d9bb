"""Operations on one float tensor ``(8, 8)``. The diagnosis is compared with real captures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _labels(x: Tensor) -> Tensor:
    return torch.arange(8, device=x.device) % 4


def _spd(x: Tensor) -> Tensor:
    return x @ x.T + 8 * torch.eye(8, device=x.device)


def _images(x: Tensor) -> Tensor:
    return x.reshape(1, 1, 8, 8)


def _weights(x: Tensor) -> Tensor:
    return x[:3, :3].reshape(1, 1, 3, 3)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    # arithmetic, reductions, comparisons
    "add": lambda x: x + x,
    "add a number": lambda x: x + 2.5,
    "mul": lambda x: x * x,
    "div": lambda x: x / (x.abs() + 1),
    "floor_divide": lambda x: x // 2,
    "remainder": lambda x: x % 3,
    "pow": lambda x: x**2,
    "exp": torch.exp,
    "log1p": lambda x: x.abs().log1p(),
    "sqrt": lambda x: x.abs().sqrt(),
    "erf": torch.erf,
    "clamp": lambda x: x.clamp(-1, 1),
    "round": torch.round,
    "sum": torch.sum,
    "mean": lambda x: x.mean(0),
    "var": lambda x: x.var(1),
    "amax": lambda x: x.amax(1),
    "max with indices": lambda x: x.max(1),
    "argmax": lambda x: x.argmax(1),
    "cumsum": lambda x: x.cumsum(0),
    "logsumexp": lambda x: x.logsumexp(1),
    "norm": lambda x: x.norm(dim=1),
    "gt": lambda x: x > 0,
    "any": lambda x: (x > 0).any(),
    "isnan": torch.isnan,
    "nan_to_num": torch.nan_to_num,
    "where": lambda x: torch.where(x > 0, x, -x),
    "topk": lambda x: x.topk(3),
    "sort": lambda x: x.sort(),
    "argsort": lambda x: x.argsort(),
    "median": lambda x: x.median(1),
    "kthvalue": lambda x: x.kthvalue(2),
    "quantile": lambda x: x.quantile(0.5, dim=1),
    "searchsorted": lambda x: torch.searchsorted(x.sort().values, x),
    "bucketize": lambda x: torch.bucketize(x, torch.arange(4.0, device=x.device)),
    "histc": lambda x: x.histc(4, -2, 2),
    "cdist": lambda x: torch.cdist(x, x),
    # shapes and indices
    "reshape": lambda x: x.reshape(4, 16),
    "transpose": lambda x: x.t().contiguous(),
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, x]),
    "chunk": lambda x: x.chunk(2),
    "pad": lambda x: F.pad(x, (1, 1)),
    "roll": lambda x: x.roll(1, 0),
    "flip": lambda x: x.flip(0),
    "expand": lambda x: x[:1].expand(8, 8) + 1,
    "tril": torch.tril,
    "diag": torch.diag,
    "gather": lambda x: x.gather(1, _labels(x)[:, None]),
    "scatter": lambda x: x.scatter(1, _labels(x)[:, None], 0.0),
    "scatter_add": lambda x: x.scatter_add(0, _labels(x)[None].expand(8, 8), x),
    "index_select": lambda x: x.index_select(0, _labels(x)),
    "index with integers": lambda x: x[_labels(x)],
    "index with a slice": lambda x: x[1:3, ::2],
    "index_add": lambda x: x.index_add(0, _labels(x), x),
    "index_put with integers": lambda x: x.index_put((_labels(x),), x[0]),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "assign a number by mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "take_along_dim": lambda x: x.take_along_dim(x.argsort(1), 1),
    "one_hot of known length": lambda x: F.one_hot(_labels(x), 4),
    "repeat_interleave by a number": lambda x: x.repeat_interleave(2, 0),
    "meshgrid": lambda x: torch.meshgrid(x[0], x[1], indexing="ij"),
    # tensors made in the step
    "zeros": lambda x: torch.zeros(3, device=x.device),
    "full_like": lambda x: torch.full_like(x, 2.0),
    "arange": lambda x: torch.arange(8, device=x.device),
    "linspace": lambda x: torch.linspace(0, 1, 8, device=x.device),
    "eye": lambda x: torch.eye(8, device=x.device),
    "new_zeros": lambda x: x.new_zeros(3),
    "scalar_tensor on the device": lambda x: torch.full((), 2.0, device=x.device),
    "to another dtype": lambda x: x.to(torch.float16),
    "double": lambda x: x.double(),
    # random numbers
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(3, device=x.device),
    "randint": lambda x: torch.randint(0, 5, (3,), device=x.device),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    # layers
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x,
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "conv2d": lambda x: F.conv2d(_images(x), _weights(x)),
    "conv_transpose2d": lambda x: F.conv_transpose2d(_images(x), _weights(x)),
    "max_pool2d": lambda x: F.max_pool2d(_images(x), 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(_images(x), 1),
    "interpolate": lambda x: F.interpolate(_images(x), scale_factor=2, mode="bilinear"),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "group_norm": lambda x: F.group_norm(x[None], 2),
    "embedding": lambda x: F.embedding(_labels(x), x),
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "relu in place": lambda x: F.relu_(x.clone()),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.reshape(1, 2, 4, 8)] * 3),
    "grid_sample": lambda x: F.grid_sample(
        _images(x), x[:4, :2].reshape(1, 2, 2, 2), align_corners=False
    ),
    # losses
    "cross_entropy": lambda x: F.cross_entropy(x, _labels(x)),
    "nll_loss": lambda x: F.nll_loss(x.log_softmax(1), _labels(x)),
    "mse_loss": lambda x: F.mse_loss(x, x + 1),
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(
        x, x.sigmoid()
    ),
    "kl_div": lambda x: F.kl_div(x.log_softmax(1), x.softmax(1), reduction="batchmean"),
    "huber_loss": lambda x: F.huber_loss(x, x * 2),
    # linear algebra without checks on the host
    "cholesky_ex": lambda x: torch.linalg.cholesky_ex(_spd(x)),
    "inv_ex": lambda x: torch.linalg.inv_ex(_spd(x)),
    "vector_norm": lambda x: torch.linalg.vector_norm(x),
    # host syncs
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: bool(x.sum() > 0),
    "int as a size": lambda x: x[: int(x.abs().sum()) % 8],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "str": str,
    "equal": lambda x: torch.equal(x, x + 0),
    "allclose": lambda x: torch.allclose(x, x + 0),
    "in a condition": lambda x: x if (x > 0).all() else -x,
    "one_hot of unknown length": lambda x: F.one_hot(_labels(x)),
    # data-dependent shapes
    "nonzero": lambda x: x.nonzero(),
    "argwhere": lambda x: torch.argwhere(x > 0),
    "where with one argument": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "assign a tensor by mask": lambda x: x.clone().index_put((x > 0,), x[x > 0]),
    "unique": lambda x: x.round().unique(),
    "to_sparse": lambda x: x.to_sparse(),
    "unique_consecutive": lambda x: x.round().unique_consecutive(),
    "bincount": lambda x: _labels(x).bincount(),
    "repeat_interleave by a tensor": lambda x: x.repeat_interleave(_labels(x), 0),
    # linear algebra with checks on the host
    "inv": lambda x: torch.linalg.inv(_spd(x)),
    "solve": lambda x: torch.linalg.solve(_spd(x), x),
    "cholesky": lambda x: torch.linalg.cholesky(_spd(x)),
    "eigh": lambda x: torch.linalg.eigh(_spd(x)),
    "svd": lambda x: torch.linalg.svd(x),
    "lstsq": lambda x: torch.linalg.lstsq(_spd(x), x).solution,
    "matrix_rank": lambda x: torch.linalg.matrix_rank(x),
    # tensors made from Python values, for the device
    "tensor of a number": lambda x: torch.tensor(2.0, device=x.device),
    "tensor of a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
}
MADE_BEFORE = (
    *("cpu", "to the host"),
    *("one_hot of unknown length", "bincount", "repeat_interleave by a tensor"),
    *("tensor of a number", "tensor of a list", "as_tensor", "new_tensor"),
)
"""Of these, the callback makes or knows the result outside the graph; the wrapper does not."""
