"""Capture graphs of batches that have not come yet. The user sees no run of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

from torch import Tensor

from cg_lightning.capture.call import GraphCall
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor, describe_fields
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.forward_context import (
    ForwardContext,
    StepInProgress,
    override_forward_context,
)
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import Reason, Status
from cg_lightning.diagnosis.step_watch import StoppedStep
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.effects.containers import ContainersSnapshot
from cg_lightning.effects.step_state import (
    HeldByModules,
    HostRandomState,
    StepState,
    TablesSnapshot,
    can_be_written,
)
from cg_lightning.guards.values import FrozenValues
from cg_lightning.modules.attributes import names_of_frameworks
from cg_lightning.modules.kinds import is_metric
from cg_lightning.runtime.examples import Example, Examples
from cg_lightning.runtime.keys import KeyState
from cg_lightning.runtime.plans import Action, Plan
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.target import reason_of

T = TypeVar("T")
_CANNOT_BE_UNDONE = frozenset({Cause.PRINTED, Cause.WORLD, Cause.OPAQUE, Cause.TRAINER_READ})
"""A run ahead is stopped before it does anything with one of these causes."""
_MOST_LOOKS = 3
"""Watched runs of one batch."""


class CaptureAhead:
    """Captures the whole step for given batches, after a first real batch was watched.

    The step runs on each batch as often as in a warm-up, then it is captured. After each run all
    state is restored: of metrics, logged values, modules and random generators. The first real
    batch must have shown that the step is one graph, so that it does nothing else in Python. If a
    batch takes another path that prints or writes to a file, its run is stopped before that. The
    first replays are compared with eager later, on real batches.

    Args:
        session: The runtime state of the module.
        stage: The stage.
        name: The name of the step in the statistics.
        step: The step: ``step(batch, *args, **kwargs)``.
    """

    def __init__(self, session: Session, stage: str, name: str, step: Callable[..., Any]) -> None:
        self._session = session
        self._stage = stage
        self._name = name
        self._step = step
        self._dispatcher = session.target.dispatcher

    def run(
        self, examples: Examples, loader: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Capture all examples of one dataloader.

        Args:
            examples: The batches.
            loader: Index of the dataloader of the current batch.
            args: Further positional arguments of the current step.
            kwargs: Its keyword arguments.
        """
        random = HostRandomState()
        taken = examples.take(self._stage, loader)
        random.restore()
        for example in examples.progress(taken):
            try:
                reason = self._capture(example, loader, args, kwargs)
            except Exception as error:
                if self._session.settings.strict:
                    raise
                text = f"the step raised {type(error).__name__}: {error}"
                reason = Reason(Status.CAPTURE_FAILED, text)
            if reason is not None:
                examples.not_captured(example, reason)

    def _capture(
        self, example: Example, loader: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Reason | None:
        """Return why it was not captured; None if there is a graph."""
        batch = self.undone(example.load)
        training = self._session.target.guard.flags()
        try:
            fields, leaves = describe_fields(
                batch, stage=self._stage, dataloader_idx=loader, training=training
            )
        except UnkeyableBatchError as error:
            return reason_of(error)
        state = self._dispatcher.known(fields)
        is_new = state is None or not state.variants
        descriptor = BatchDescriptor(*fields) if state is None else state.descriptor
        if state is not None and any(v.entry and v.entry.is_valid() for v in state.variants):
            return None
        call = GraphCall(descriptor, self._step, batch, leaves, args, kwargs)
        most = self._session.settings.max_graphs
        if len(self._session.cache.entries()) >= most:
            return Reason(Status.EVICTED, f"more graphs than max_graphs={most}")
        is_captured = False
        try:
            reason = self._capture_call(call)
            is_captured = reason is None
            return reason
        finally:
            if is_new and not is_captured:
                self._dispatcher.forget(descriptor)  # its first real batch begins with nothing

    def capture_padded(self, call: GraphCall) -> Reason | None:
        """Capture the call of a padded batch. Return why it was not captured.

        Args:
            call: The step with the padded batch.
        """
        state = self._dispatcher.known(call.descriptor.fields)
        is_new = state is None or not state.variants
        reason: Reason | None = None
        try:
            reason = self._capture_call(call)
        except Exception as error:  # of the user's code, which was not written for such a batch
            text = f"the step raised {type(error).__name__} for the padded batch: {error}"
            reason = Reason(Status.CAPTURE_FAILED, text)
        if is_new and reason is not None:
            self._dispatcher.forget(call.descriptor)
        return reason

    def _capture_call(self, call: GraphCall) -> Reason | None:
        session = self._session
        state = self._dispatcher.state(call.descriptor.fields, call.descriptor)
        plan = self._warm_up(call, state)
        if plan.action is not Action.CAPTURE:
            return plan.reason or Reason(Status.NO_TARGET, "the step is no graph")
        capture = functools.partial(session.target.capture_ahead, self._name, plan, call)
        with session.ranges.range("capture"):
            return self.undone(capture, call.tree)

    def _warm_up(self, call: GraphCall, state: KeyState) -> Plan:
        """Run the step until its key is warm; return the plan for the next run."""
        for _ in range(self._session.settings.warmup_steps + _MOST_LOOKS):
            plan = self._dispatcher.plan(state, call.leaves)
            if plan.action is Action.WATCH:
                try:
                    watched = self._watch(call)
                except StoppedStep as stopped:
                    return Plan(Action.EAGER, state, None, stopped.finding.reason())
                if reason := self._why_not(state, watched):
                    return Plan(Action.EAGER, state, None, reason)
                self._session.watched(plan, watched)
            elif plan.action is Action.WARM_UP:
                self._dispatcher.ran_eagerly(state)
                self.rehearse(call, functools.partial(self._run_timed, call))
            else:
                break
        return plan

    def _run_timed(self, call: GraphCall) -> None:
        """Run the step eagerly, for the column of eager times."""
        began = perf_counter()
        with self._session.compilation.outside_captures():
            call.run()
        seconds = perf_counter() - began
        self._session.stats.host_time(self._stage, "NONE", call.descriptor.shapes()).add(seconds)

    def _watch(self, call: GraphCall) -> WatchedStep:
        watcher = self._session.watcher
        step = functools.partial(self._step, call.tree, **call.frozen_kwargs)
        with self._session.ranges.range("watch"):
            given = (step, call.tree, call.frozen_args, _CANNOT_BE_UNDONE)
            return self.rehearse(call, lambda: watcher.watch(*given)[1])

    def _why_not(self, state: KeyState, watched: WatchedStep) -> Reason | None:
        """Return why a step cannot be captured ahead; None if it can."""
        reason = self._session.full_reason(state, watched)
        if reason is not None:
            return reason
        if watched.comparisons:
            # guards compare the batch_idx of the current step, which is that of another batch
            return Reason(Cause.BATCH_INDEX_USED, "it compares batch_idx")
        if watched.late:
            return Reason(Cause.METRIC_UPDATED, "it updates a metric that no graph can hold")
        kept = {id(tensor) for tensor in self._tensors()}
        if any(id(tensor) not in kept for tensor in watched.written.now()):
            return Reason(Cause.STATE_REBOUND, "it writes to a tensor that no module holds")
        return None

    def rehearse(self, call: GraphCall, function: Callable[[], T]) -> T:
        """Call a function that runs a call eagerly, and restore all state."""

        def run() -> T:
            context = ForwardContext(CUDAGraphMode.NONE, call.descriptor, StepInProgress())
            with override_forward_context(context):
                result: T = self._session.effects.rehearse(function)
            return result

        return self.undone(run, call.tree)

    def undone(self, function: Callable[[], T], batch: Any = None) -> T:
        """Call ``function``, and restore all state.

        Args:
            function: The function.
            batch: The batch that it may change.
        """
        session = self._session
        before = StepState(session.module, session.backend, session.effects, self._tensors(), batch)
        held = HeldByModules(session.module, session.effects)  # attributes of buffers as well
        tables = TablesSnapshot(session.module)
        of_metrics = ContainersSnapshot(
            (name, value)
            for metric in session.effects.metrics()
            for known in [names_of_frameworks(metric)]
            for name, value in vars(metric).items()
            if name not in known
        )
        try:
            session.effects.logged.begin_batch(batch)
            return function()
        finally:
            tables.restore()
            before.restore()
            held.restore()
            of_metrics.restore()

    def _tensors(self) -> list[Tensor]:
        """Return the tensors that modules hold in attributes, and others that steps write to."""
        session = self._session
        held = [
            value
            for child in session.module.modules()
            if not is_metric(child)
            for known in [names_of_frameworks(child)]
            for name, value in vars(child).items()
            if name not in known
        ]
        tensors = [*FrozenValues(held).tensors, *session.written.now()]
        unique = {id(tensor): tensor for tensor in tensors if can_be_written(tensor)}
        return list(unique.values())
