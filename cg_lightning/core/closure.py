"""What goes into the closure of a training step, and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
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


class GradientsAside:
    """The gradients of earlier micro-batches, while a backward computes new ones in their place.

    Args:
        parameters: The parameters. From now on they have no gradients.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._held = {id(parameter): (parameter, parameter.grad) for parameter in parameters}
        self._given: set[int] = set()
        for parameter, _ in self._held.values():
            parameter.grad = None

    @torch.no_grad()
    def give(self, parameter: Tensor) -> None:
        """Put back a gradient that is about to be read, with what the backward has added to it.

        From now on the backward adds to it, as it does without us.
        """
        _, gradient = self._held.get(id(parameter), (None, None))
        if gradient is None or id(parameter) in self._given:
            return
        self._given.add(id(parameter))
        if parameter.grad is not None:
            gradient += parameter.grad
        parameter.grad = gradient

    def is_given(self, parameter: Tensor) -> bool:
        """Return whether the gradient of a parameter was put back, so nothing is left to add."""
        return id(parameter) in self._given

    def put_back(self) -> None:
        """Put back all other gradients."""
        for parameter, gradient in self._held.values():
            if not self.is_given(parameter):
                parameter.grad = gradient


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
