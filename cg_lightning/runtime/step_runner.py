"""Runs each step of one stage in the mode that its batch allows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from cg_lightning.backends import CapturedGraph
from cg_lightning.capture.cache import EvictedError
from cg_lightning.core.descriptor import BatchDescriptor, describe
from cg_lightning.core.errors import CaptureError, UnkeyableBatchError, VerificationError
from cg_lightning.core.forward_context import ForwardContext, override_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.stages import STEPS
from cg_lightning.runtime.graphed_call import GraphedCall
from cg_lightning.runtime.session import WARM_UP, Session
from cg_lightning.runtime.verifier import report_difference

Step = Callable[..., Any]


def _first_parameter(step: Step) -> str:
    try:
        return next(iter(inspect.signature(step).parameters), "")
    except (TypeError, ValueError):  # a callable that does not tell its signature
        return ""


class StepRunner:
    """Stands in for one step method of a LightningModule.

    For each batch it describes, asks for the mode, enters the forward context, and runs the step: as it is in NONE and
    PIECEWISE, from one graph in FULL. Whatever stops that runs the step as it is, and is counted with its reason.

    Args:
        session: What is known of the module.
        stage: ``validate``, ``test`` or ``predict``.
        step: The LightningModule's own step; any callable.
    """

    def __init__(self, session: Session, stage: str, step: Step) -> None:
        self._session = session
        self._stage = stage
        self._step = step
        self._batch_name = _first_parameter(step)
        self._full = GraphedCall(
            STEPS[stage], self._invoke, session.module, CUDAGraphMode.FULL, session.graph_settings
        )

    def graphs(self) -> list[CapturedGraph]:
        """The graphs of the whole step."""
        return self._full.graphs()

    def _invoke(self, batch: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._step(batch, *rest, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the step with these arguments, and gives what it returns."""
        if self._batch_name == "dataloader_iter":
            return self._eager(
                args,
                kwargs,
                None,
                "the step takes dataloader_iter: its batch is not known beforehand",
            )
        if torch.is_grad_enabled():
            return self._eager(args, kwargs, None, "gradients are enabled")
        if not args:
            args, kwargs = (
                (kwargs[self._batch_name],),
                {k: v for k, v in kwargs.items() if k != self._batch_name},
            )
        session = self._session
        session.begin_step()
        dataloader_idx = args[2] if len(args) > 2 else kwargs.get("dataloader_idx", 0)
        try:
            descriptor, leaves = describe(
                args[0],
                stage=self._stage,
                dataloader_idx=dataloader_idx,
                training=session.state.training_flags(),
                known=session.known,
            )
        except UnkeyableBatchError as error:
            return self._eager(args, kwargs, None, str(error))
        mode, descriptor, reason = session.dispatch(descriptor, args[0])
        if mode is CUDAGraphMode.FULL:
            try:
                output = self._full(descriptor, args[0], leaves, args[1:], kwargs)
            except VerificationError as error:
                reason = report_difference(error, session.graph_settings.verification)
                session.refuse_full(descriptor, reason)
                session.stats.count_eager_step(self._stage, descriptor.shapes(), reason)
                return error.output
            except EvictedError as error:
                return self._eager(args, kwargs, descriptor, str(error))
            except (CaptureError, UnkeyableBatchError) as error:
                session.refuse_full(descriptor, str(error))
                if isinstance(error, CaptureError) and error.ran_eagerly:
                    self._refuse_if_strict(str(error), descriptor, error)
                    session.stats.count_eager_step(self._stage, descriptor.shapes(), str(error))
                    return error.output
                return self._lower(args, kwargs, descriptor, error)
            session.stats.count_graphed_step(self._stage, "FULL")  # Enum.name is slow
            return output
        if mode is CUDAGraphMode.PIECEWISE:
            return self._piecewise(args, kwargs, descriptor, reason)
        if reason == WARM_UP:
            return self._warm_up(args, kwargs, descriptor)
        return self._eager(args, kwargs, descriptor, reason)

    def _lower(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        descriptor: BatchDescriptor,
        error: Exception,
    ) -> Any:
        mode, _, reason = self._session.dispatch(descriptor, args[0])
        if mode is CUDAGraphMode.PIECEWISE:
            return self._piecewise(args, kwargs, descriptor, reason)
        return self._eager(args, kwargs, descriptor, reason, error)

    def _piecewise(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        descriptor: BatchDescriptor,
        reason: str,
    ) -> Any:
        session = self._session
        before = session.budget.uses
        with override_forward_context(
            ForwardContext(CUDAGraphMode.PIECEWISE, descriptor, calls={})
        ):
            output = self._step(*args, **kwargs)
        if session.budget.uses > before:
            session.stats.count_graphed_step(self._stage, CUDAGraphMode.PIECEWISE.name)
        else:
            why = session.why_no_graph()
            self._refuse_if_strict(why, descriptor)
            session.stats.count_eager_step(self._stage, descriptor.shapes(), why)
        return output

    def _warm_up(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], descriptor: BatchDescriptor
    ) -> Any:
        session = self._session
        observation = None
        with override_forward_context(ForwardContext(CUDAGraphMode.NONE, descriptor, calls={})):
            if session.wants_observation(descriptor):
                step = functools.partial(self._step, *args, **kwargs)
                output, observation = session.observer.observe(step, args[0])
            else:
                output = self._step(*args, **kwargs)
        session.warmed_up(descriptor, observation)
        session.stats.count_eager_step(self._stage, descriptor.shapes(), WARM_UP)
        return output

    def _eager(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        descriptor: BatchDescriptor | None,
        reason: str,
        error: Exception | None = None,
    ) -> Any:
        self._refuse_if_strict(reason, descriptor, error)
        with override_forward_context(ForwardContext(CUDAGraphMode.NONE, descriptor, calls={})):
            output = self._step(*args, **kwargs)
        self._session.stats.count_eager_step(
            self._stage, descriptor.shapes() if descriptor else "-", reason
        )
        return output

    def _refuse_if_strict(
        self, reason: str, descriptor: BatchDescriptor | None, error: Exception | None = None
    ) -> None:
        if self._session.settings.strict:
            asked = self._session.settings.mode.name
            raise CaptureError(
                f"A step of stage {self._stage!r} ran in a lower mode than mode={asked} asks for: {reason}. Remove the "
                f"cause, choose a lower mode, or set strict=False to run it eagerly.",
                self._session.diagnosis(descriptor),
            ) from error
