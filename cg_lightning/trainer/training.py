"""Intercept the closures of training, and restore them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from torch import Tensor

from cg_lightning.backends import CapturedGraph
from cg_lightning.core.causes import Cause
from cg_lightning.core.closure import ClosureInput, FinishedClosure, UnfinishedClosure
from cg_lightning.core.descriptor import Fixed
from cg_lightning.core.kernel_flags import keeps_casts, seeing_mode
from cg_lightning.core.reasons import AUTOCAST, WARM_UP, Reason, Status, seen_by
from cg_lightning.core.stages import STEP_METHODS, TRAIN
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.step_runner import StepRunner
from cg_lightning.trainer.batch_transfer import Transfer
from cg_lightning.trainer.closure_hooks import ClosureHooks, why_not_closed
from cg_lightning.trainer.ddp import StepInDDP
from cg_lightning.trainer.node_hooks import NodeHooks
from cg_lightning.trainer.preconditions import ANOMALY
from cg_lightning.trainer.training_step import InterceptedClosure, TrainingStep, logging_in

_NAME = STEP_METHODS[TRAIN]
_MAKE_CLOSURE = "_make_closure"
_NO_BACKWARD = Reason(Status.CLOSURE_HOOK, "the loop skips the backward")
_NODE_HOOK = Reason(
    Status.CLOSURE_HOOK, f"{Status.CLOSURE_HOOK.value}: a hook of a node of autograd"
)
_SHARED = Reason(
    Cause.BACKWARD, f"{Cause.BACKWARD.value}: two parameters share the memory of a gradient"
)
_ANOMALY = Reason(Status.CLOSURE_HOOK, f"{Status.CLOSURE_HOOK.value}: {ANOMALY}")


class TrainingInstallation:
    """Runs the closures of one LightningModule in ``fit``.

    Lightning's loop makes a closure for each batch by a method of its own. While this is installed,
    the loop *object* has an attribute of that name, which makes a closure that runs from a graph.
    So neither the module nor its class is changed. The optimizer calls the closure as always.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        session: The runtime state of the module in training.
        transfers: Copy and note batches while it is installed, in this order.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        session: Session,
        transfers: Sequence[Transfer] = (),
    ) -> None:
        self._trainer = trainer
        self._module = module
        self.session = session
        self._transfers = transfers
        self._loop = trainer.fit_loop.epoch_loop.automatic_optimization
        is_reduced = trainer.strategy.model is not module
        guard, backend = session.target.guard, session.backend
        self._step = TrainingStep(trainer, module, guard, is_reduced, backend)
        self._ddp: StepInDDP | None = None
        if is_reduced:
            self._ddp = StepInDDP(trainer, module, self._step)
        self._runner = StepRunner(session, TRAIN, _NAME, self._described_step(), self._as_it_is)
        self._hooks = ClosureHooks(trainer, module)
        self._node_hooks = NodeHooks()
        self._is_installed = False

    def install(self) -> None:
        """Intercept the closures; idempotent."""
        if self._is_installed:
            return
        self._is_installed = True
        self.session.install()
        vars(self._loop)[_MAKE_CLOSURE] = self._make_closure
        self._node_hooks.install(self._step.parameters().values())
        if self._ddp is None:  # the reducer may use them as it likes
            self._step.copies.install()
        for transfer in self._transfers:
            transfer.install()

    def begin_epoch(self) -> None:
        """Let the next closure make the comparisons of an epoch."""
        self.session.begin_epoch()

    def remove(self, check: bool = True) -> None:
        """Restore the loop; idempotent. ``check`` is as in :meth:`Session.remove`."""
        if not self._is_installed:
            return
        self._is_installed = False
        vars(self._loop).pop(_MAKE_CLOSURE, None)
        self._node_hooks.remove()
        self._step.copies.forget()
        for transfer in reversed(self._transfers):
            transfer.remove()
        self.session.remove(check)

    def close(self) -> None:
        """Restore the loop, and drop all graphs."""
        self.remove(check=False)
        self._step.copies.remove()  # once: Python 3.13 does not cache a class that changes often
        self.session.close()

    def graphs(self, mode: str) -> list[CapturedGraph]:
        """Return the stored graphs of one mode."""
        return self.session.graphs(mode)

    def _described_step(self) -> Callable[..., Any]:
        # the runner reads the signature of the user's step, for the name of its first parameter
        @functools.wraps(self._module.training_step)
        def compute(given: ClosureInput, *args: Any, closure: InterceptedClosure) -> Any:
            zero_grad = functools.partial(closure.zero_grad, hooks_ran=True)
            is_zeroing = closure._zero_grad_fn is not None
            same = functools.partial(self._hooks.are_those_of, closure.hooks_key, is_zeroing)
            with self.session.backend.capture_stream():
                return self._step.compute(
                    given, *args, zero_grad=zero_grad, hooks=closure.hooks, are_hooks_same=same
                )

        return compute

    def _make_closure(self, kwargs: Any, *args: Any) -> Closure:
        closure = getattr(type(self._loop), _MAKE_CLOSURE)(self._loop, kwargs, *args)
        zero_grad = functools.partial(self._zero_grad, *args)
        return InterceptedClosure(closure, tuple(kwargs.values()), self._run, zero_grad)

    def _zero_grad(self, optimizer: Any, batch_idx: int) -> None:
        """Do what Lightning does after ``on_before_zero_grad``, and count that as called."""
        count = self._loop.optim_progress.optimizer.zero_grad
        count.increment_ready()
        count.increment_started()
        self._loop._optimizer_zero_grad(batch_idx, optimizer)

    def _run(self, closure: InterceptedClosure) -> ClosureResult:
        self._node_hooks.is_in_closure = True
        try:
            with logging_in(self._module, _NAME), torch.no_grad():
                if self._ddp is None:
                    output = self._run_step(closure, *closure.arguments)
                else:
                    step = functools.partial(self._run_step, closure)
                    output = self._ddp.run(step, closure.arguments)
        finally:
            self._node_hooks.is_in_closure = False
        if isinstance(output, FinishedClosure):
            result: ClosureResult = output.result
            return result
        if isinstance(output, UnfinishedClosure):
            with self.session.backend.capture_stream():
                return self._step.finish_as_lightning(closure, output)
        reduce = None if self._ddp is None else self._ddp.reduce
        return self._step.finish(closure, output, reduce)

    def _run_step(self, closure: InterceptedClosure, batch: Any, *args: Any) -> Any:
        if not self.session.target.guard.settings.hold() and not self.session.take_settings():
            self.begin_epoch()
        reason = self._why_as_it_is(closure)
        given = ClosureInput(
            batch,
            Fixed(self._trainer.accumulate_grad_batches),
            self._scale(),
            closure.hooks_key,
        )
        if reason is not None:
            return self._runner.run_as_it_is((given, *args), {"closure": closure}, reason)
        return self._runner.run((given, *args), {"closure": closure})

    def _as_it_is(
        self, given: ClosureInput, *args: Any, closure: InterceptedClosure
    ) -> FinishedClosure | UnfinishedClosure:
        self._step.copies.forget()
        with self.session.backend.capture_stream():
            if self._ddp is not None:  # this runs in its forward
                return UnfinishedClosure(self._step.run(given, *args), "")
            return FinishedClosure(closure.as_it_is())

    def _scale(self) -> Tensor | None:
        """Return the factor of the gradient scaler; None if there is no scaler."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return None
        scale: Tensor = scaler.scale(torch.ones((), device=self.session.backend.device))
        return scale

    def _why_as_it_is(self, closure: InterceptedClosure) -> Reason | None:
        """Return why a closure must run as Lightning runs it; None if it need not.

        Then the closure gets the hooks that a graph of it holds.
        """
        if closure._backward_fn is None:
            return _NO_BACKWARD
        if self._ddp is not None and not self._ddp.may_be_graph:
            return WARM_UP
        if mode := seeing_mode():  # it would see what follows here as well
            return seen_by(mode)
        if torch.is_anomaly_enabled():
            return _ANOMALY
        if keeps_casts(self.session.backend.device.type):
            return AUTOCAST
        if self._node_hooks:
            return _NODE_HOOK
        if closure._zero_grad_fn is None and self._step.share_gradients():
            return _SHARED
        is_zeroing = closure._zero_grad_fn is not None
        closure.hooks, closure.hooks_key, reason = self._hooks.find(is_zeroing)
        return reason or why_not_closed(
            self._trainer,
            self._module,
            self._step.parameters(),
            self.session.target.guard.modules,
        )
