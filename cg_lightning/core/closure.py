"""Inputs and outputs of the closure of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cg_lightning.core.descriptor import Fixed


class ClosureInput(NamedTuple):
    """Everything that the closure depends on and that may differ in the next iteration.

    Tensors are inputs of a graph. All other values are part of its key.
    """

    batch: Any
    """The batch of the step."""
    normalize: Fixed
    """The divisor of the loss: the number of micro-batches of one optimizer step."""
    scale: Tensor | None
    """The factor of the loss before the backward; None without a gradient scaler."""
    hooks: Fixed = Fixed(())
    """What tells the user's hooks from others that run between the step and its backward."""


class ClosureOutput(NamedTuple):
    """The results of the closure. Gradients are changed afterwards, eagerly."""

    loss: Tensor
    """The loss of the step, divided by the number of micro-batches; without its autograd graph."""
    extra: dict[str, Any]
    """The output of the step, without the loss."""
    gradients: dict[str, Tensor | None] | None
    """The gradients of this backward alone, by the names of their parameters.

    Under DDP, also parameters that the backward reaches without giving them a gradient: None. The
    value as a whole is None if the backward has added them to those that are there.
    """


class ReplayedOutput(ClosureOutput):
    """The results of a closure that ran from a graph: the next replay overwrites the gradients."""

    __slots__ = ()


def outliving_graph(output: Any) -> Any:
    """Return an output that stays as it is if its graph is dropped."""
    if not isinstance(output, ReplayedOutput):
        return output
    gradients = output.gradients or {}
    copies = {name: None if each is None else each.clone() for name, each in gradients.items()}
    return ClosureOutput(output.loss, output.extra, None if output.gradients is None else copies)


class GradientsAside:
    """Sets the gradients of earlier backwards aside, while a backward computes new ones.

    Args:
        parameters: The parameters. From now on they have no gradients.
        zero_grad: What Lightning runs before the backward; None: nothing.
    """

    def __init__(
        self, parameters: Iterable[Tensor], zero_grad: Callable[[], None] | None = None
    ) -> None:
        self._held = [(parameter, parameter.grad) for parameter in parameters]
        self._zero_grad = zero_grad
        self.are_given = False
        """Whether the gradients were restored, so that nothing is left to add."""
        self.has_begun = False
        """Whether the backward has begun. Before it, hooks of the user's run."""
        for parameter, _ in self._held:
            parameter.grad = None

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of earlier backwards."""
        return [gradient for _, gradient in self._held if gradient is not None]

    @torch.no_grad()
    def give(self) -> None:
        """Restore all gradients, because one is about to be read, and add what was computed.

        From now on the backward adds to them, as it does without us.
        """
        if self.are_given:
            return
        computed = [parameter.grad for parameter, _ in self._held]
        self.put_back()
        self.are_given = True
        if self._zero_grad is not None:
            self._zero_grad()
        for (parameter, _), gradient in zip(self._held, computed, strict=True):
            if gradient is not None:
                add_gradient(parameter, gradient)

    def put_back(self) -> None:
        """Restore all gradients; idempotent."""
        if not self.are_given:
            for parameter, gradient in self._held:
                parameter.grad = gradient


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Do what PyTorch does with one gradient at the end of a backward."""
    existing = parameter.grad
    if existing is None:
        parameter.grad = gradient
    elif existing.is_sparse and not gradient.is_sparse:
        parameter.grad = gradient + existing
    else:
        existing += gradient


class UnfinishedClosure:
    """A closure whose step has run, and whose backward must run as Lightning runs it.

    Args:
        result: Lightning's result of the step.
        problem: Why a graph cannot hold the backward.
        ran: The names of the hooks between the step and its backward that have run. After
            ``on_before_backward``, the loss for the backward is the one that it was given.
    """

    def __init__(self, result: Any, problem: str, ran: Sequence[str] = ()) -> None:
        self.result = result
        self.problem = problem
        self.ran = ran


class FinishedClosure:
    """A closure that ran as Lightning runs it, to its end.

    Args:
        result: Lightning's result.
    """

    def __init__(self, result: Any) -> None:
        self.result = result
