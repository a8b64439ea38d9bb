"""Replacements for functions of PyTorch that check their arguments on the host.

They compute what the original computes, with the same operations. Only the check is made on the
device, and eager's error is raised later (:mod:`~cg_lightning.metrics.deferred_checks`). What comes
after the check must be harmless for arguments that eager refuses. So only distributions whose
methods are plain arithmetic are in the list: ``Categorical``, for example, would read out of
bounds. The error must not be caught, so a call inside ``try`` or ``with`` is not replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Cauchy, Exponential, HalfNormal, Laplace, Normal

from cg_lightning.metrics.caught_errors import may_be_caught
from cg_lightning.metrics.deferred_checks import CheckedCalls

_NO_SHAPE = torch.Size()
_ARITHMETIC = (Normal, Laplace, Cauchy, Exponential, HalfNormal)


def may_come_later(**_: Any) -> bool:
    """Return True if an error may be raised later: it is not caught, and gradients are off."""
    return not torch.is_grad_enabled() and not may_be_caught()


class RepeatedCall(NamedTuple):
    """A call that raises the error of eager."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def cholesky(
    checked: CheckedCalls, original: Any, matrices: Tensor, *, upper: bool = False
) -> Tensor:
    """Decompose matrices of shape ``(..., n, n)``; refuse those that are not positive-definite."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrices, upper=upper)
    checked.refuse_if(info.any())
    return factor


def gaussian_nll_loss(
    checked: CheckedCalls,
    original: Any,
    input: Tensor,
    target: Tensor,
    var: Tensor,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Compute the loss, and refuse negative variances."""
    checked.refuse_if((var < 0).any())
    if var.size() != input.size() and input.size()[:-1] == var.size():
        var = var.unsqueeze(-1)
    var = var.clone()
    with torch.no_grad():
        var.clamp_(min=eps)
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss += 0.5 * math.log(2 * math.pi)
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


def takes_tensors(input: Any, target: Any, var: Any, **_: Any) -> bool:
    """Return True if the variance is a tensor."""
    tensors = all(type(given) is Tensor for given in (input, target, var))
    return tensors and may_come_later()


def _parameters(distribution: Any) -> dict[str, Tensor]:
    return {name: getattr(distribution, name) for name in distribution.arg_constraints}


def valid_parameters(
    checked: CheckedCalls,
    original: Any,
    distribution: Any,
    batch_shape: torch.Size = _NO_SHAPE,
    event_shape: torch.Size = _NO_SHAPE,
    validate_args: bool | None = None,
) -> None:
    """Make a distribution, and refuse parameters that do not satisfy its constraints."""
    original(distribution, batch_shape, event_shape, validate_args=False)
    del distribution._validate_args  # the class has the default
    if validate_args is not None:
        distribution._validate_args = validate_args
    for name, value in _parameters(distribution).items():
        valid = distribution.arg_constraints[name].check(value)
        checked.refuse_if(~valid.all())


def checks_parameters(distribution: Any, validate_args: bool | None, **_: Any) -> bool:
    """Return True if the distribution is in the list, and checks its parameters."""
    checks = distribution._validate_args if validate_args is None else validate_args
    return bool(checks) and type(distribution) in _ARITHMETIC and may_come_later()


def repeat_init(original: Any, distribution: Any, *_: Any, **__: Any) -> RepeatedCall:
    """Return the call that makes such a distribution again."""
    kind, parameters = type(distribution), _parameters(distribution)
    return RepeatedCall(kind, (), {**parameters, "validate_args": True})


def valid_sample(checked: CheckedCalls, original: Any, distribution: Any, value: Tensor) -> None:
    """Refuse a value outside the support. Shapes are part of the key."""
    checked.refuse_if(~distribution.support.check(value).all())


def checks_sample(distribution: Any, value: Any) -> bool:
    """Return True if the distribution is in the list, and the value is a tensor."""
    is_known = type(distribution) in _ARITHMETIC and type(value) is Tensor
    return is_known and may_come_later()


def repeat_sample(original: Any, distribution: Any, value: Tensor) -> RepeatedCall:
    """Return the call that checks such a value again."""
    kind = type(distribution)

    def check(value: Tensor, **parameters: Tensor) -> None:
        original(kind(**parameters, validate_args=False), value)

    return RepeatedCall(check, (value,), _parameters(distribution))
