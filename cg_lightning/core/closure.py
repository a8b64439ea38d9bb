"""What goes into the closure of a training step, and what comes out of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from cg_lightning.core.descriptor import Fixed


class ClosureInput(NamedTuple):
    """Everything that the closure depends on and that may be another one in the next iteration.

    Tensors are inputs of a graph. All other values are part of its key.
    """

    batch: Any
    """The batch of the step."""
    normalize: Fixed
    """What the loss is divided by: the number of micro-batches of one optimizer step."""
    requires_grad: Fixed
    """Which tensors of the module require gradients, one byte each."""
    scale: Tensor | None
    """What the loss is multiplied by before the backward; None without a gradient scaler."""


class ClosureOutput(NamedTuple):
    """What the closure computes. It changes no gradient: that is done afterwards, eagerly."""

    loss: Tensor
    """The loss of the step, divided by the number of micro-batches; without its autograd graph."""
    extra: dict[str, Any]
    """What the step returns besides the loss."""
    gradients: dict[str, Tensor | None]
    """The gradients of this backward alone, by the names of their parameters.

    Under DDP, also parameters that the backward reaches without giving them a gradient: None.
    """


class UnfinishedClosure:
    """A closure whose step has run, and whose backward must run as Lightning runs it.

    Args:
        result: Lightning's result of the step.
        problem: Why a graph cannot hold the backward.
    """

    def __init__(self, result: Any, problem: str) -> None:
        self.result = result
        self.problem = problem


class FinishedClosure:
    """A closure that ran as Lightning runs it, to its end.

    Args:
        result: Lightning's result.
    """

    def __init__(self, result: Any) -> None:
        self.result = result
