"""Closures under DDP: graphs compute the gradients of one rank, and DDP reduces them.

What is hard here:

- **No collective is in a graph.** The step runs in the forward of DDP, as without us: DDP brings
  the buffers of all ranks into line before it. A graph computes the gradients of its rank. Mostly
  they are reduced in DDP's buckets (:mod:`~cg_lightning.trainer.ddp_buckets`). With other options
  of DDP, they are handed to its reducer by a backward that computes nothing, so hooks of the
  communication and unused parameters are DDP's own. Either way the collectives are those of eager,
  so each rank may run its step from a graph or not.
- **The first backward that DDP reduces is Lightning's.** In it, DDP learns the order in which
  gradients become ready, and lays out its buckets by it. That layout decides the last bit of sums
  over three ranks or more.
- **A graph must not run DDP's hooks.** They belong to the nodes that set ``.grad``. So the
  gradients are asked for, and these nodes do not run
  (:class:`~cg_lightning.trainer.training_step.TrainingStep`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cg_lightning.core.closure import ClosureOutput, ReplayedOutput, UnfinishedClosure
from cg_lightning.core.stages import STEP_METHODS, TRAIN
from cg_lightning.trainer.closure_hooks import HOOKS_OF_GRAPHS
from cg_lightning.trainer.ddp_buckets import DDPBuckets
from cg_lightning.trainer.redirection import run_in_wrapper
from cg_lightning.trainer.training_step import TrainingStep

_NO_LOSS = (
    "Skipping the `training_step` by returning None in distributed training is not supported."
    " It is recommended that you rewrite your training logic to avoid having to skip the step in"
    " the first place."
)
"""The error of Lightning."""

ClosureStep = Callable[..., ClosureOutput | UnfinishedClosure]


class StepInDDP:
    """Runs the steps of closures in the forward of DDP.

    Args:
        trainer: The Trainer. Its strategy wraps the module in DDP.
        module: The LightningModule in it.
        step: Knows its parameters, and copies gradients.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, step: TrainingStep) -> None:
        wrapper = trainer.strategy.model
        assert isinstance(wrapper, DistributedDataParallel)
        self._trainer = trainer
        self._wrapper = wrapper
        self._module = module
        self._step = step
        self._has_reduced = False

    @property
    def may_be_graph(self) -> bool:
        """Whether a step may run otherwise than as it is."""
        return self._has_reduced

    def run(
        self, step: ClosureStep, arguments: tuple[Any, ...]
    ) -> ClosureOutput | UnfinishedClosure:
        """Run a step in the forward of DDP, without its backward.

        Args:
            step: Runs the step with the arguments that DDP hands on.
            arguments: The batch, and the other arguments that Lightning gives the step.

        Returns:
            The loss and the gradients of this rank, which :meth:`reduce` reduces. Or a closure
            whose backward makes DDP reduce the gradients, those of a graph included.

        Raises:
            RuntimeError: The step has returned no loss, which Lightning does not allow.
        """
        wrapper = self._wrapper
        is_reduced = wrapper.require_backward_grad_sync
        ran: list[ClosureOutput | UnfinishedClosure] = []

        def forward(*args: Any) -> ClosureOutput | tuple[Tensor | None, dict[str, Any]]:
            with torch.no_grad():
                output = step(*args)
            ran.append(output)
            if isinstance(output, UnfinishedClosure):
                return output.result.closure_loss, output.result.extra
            if self._may_reduce(output):
                # or else the reducer waits for a backward, and takes the next one for it
                wrapper.require_backward_grad_sync = False
                return output
            return self._with_gradients(output), output.extra

        try:
            with torch.enable_grad():
                output = run_in_wrapper(
                    self._trainer.strategy, self._module, STEP_METHODS[TRAIN], forward, *arguments
                )
        finally:
            wrapper.require_backward_grad_sync = is_reduced
        if isinstance(output, ClosureOutput):
            wrapper.require_forward_param_sync = True  # as after any step that is reduced
            return output
        loss, extra = output
        if loss is None and self._trainer.world_size > 1:
            raise RuntimeError(_NO_LOSS)
        self._has_reduced = self._has_reduced or is_reduced
        result, output = ClosureResult(loss, extra=extra), ran[0]
        if not isinstance(output, UnfinishedClosure):
            return UnfinishedClosure(result, "", HOOKS_OF_GRAPHS)
        if output.ran:  # hooks may have changed the loss of the backward
            result.loss = output.result.loss
        return UnfinishedClosure(result, "", output.ran)

    def _may_reduce(self, output: ClosureOutput) -> bool:
        """Return True if :meth:`reduce` can do what DDP does in a backward."""
        if not self._wrapper.require_backward_grad_sync or output.gradients is None:
            return False
        buckets = self._buckets
        return buckets is not None and buckets.hold_all(self._step.parameters(), output.gradients)

    @functools.cached_property
    def _buckets(self) -> DDPBuckets | None:
        """The buckets of DDP; None if DDP must reduce by itself.

        They are asked for once, in a forward after the first backward that DDP has reduced. When
        DDP started it, it laid them out for good.
        """
        return DDPBuckets.of(self._wrapper)

    def reduce(self) -> None:
        """Reduce the gradients that parameters have, after a step that :meth:`run` returned."""
        assert self._buckets is not None, "run has returned a closure with a backward"
        self._buckets.reduce()

    def _with_gradients(self, output: ClosureOutput) -> Tensor:
        """Return the loss with a backward that gives the parameters the gradients of a graph."""
        parameters = self._step.parameters()
        assert output.gradients is not None, "no backward here adds gradients"
        names = list(output.gradients)
        if isinstance(output, ReplayedOutput):
            lent = list(output.gradients.values())
            copies = iter(self._step.copies.make([each for each in lent if each is not None]))
            gradients = [None if each is None else next(copies) for each in lent]
        else:
            gradients = [output.gradients.pop(name) for name in names]
        chosen = [parameters[name] for name in names]
        return _given_gradients(output.loss, gradients, *chosen)


class _GivenGradients(torch.autograd.Function):
    """A loss whose backward gives gradients that were computed before."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        # without another reference, a parameter without a gradient takes them uncopied
        gradients, ctx.gradients = tuple(ctx.gradients), None
        return None, None, *gradients


_given_gradients: Callable[..., Tensor] = _GivenGradients.apply
