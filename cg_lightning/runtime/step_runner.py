"""Replace one step method of a module: describe the batch, ask for a decision, run, count."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from cg_lightning.capture.call import GraphCall
from cg_lightning.capture.entry import GraphEntry
from cg_lightning.core.causes import Cause
from cg_lightning.core.closure import outliving_graph
from cg_lightning.core.descriptor import (
    KINDS_OF_TENSOR,
    NUM_OF_BATCH,
    BatchDescriptor,
    complete_fields,
    describe_batch,
    describe_fields,
    describe_without_batch,
)
from cg_lightning.core.errors import CaptureError, UnkeyableBatchError, VerificationError
from cg_lightning.core.forward_context import (
    ForwardContext,
    StepInProgress,
    enter_forward_context,
    leave_forward_context,
    override_forward_context,
)
from cg_lightning.core.kernel_flags import seeing_mode
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import WARM_UP, Reason, Status, joined, seen_by
from cg_lightning.modules.interception import without_interception
from cg_lightning.padding.entry import PaddedEntry
from cg_lightning.report.records import HostTime, StepsRecord
from cg_lightning.report.timeline import Ran
from cg_lightning.runtime.ahead import CaptureAhead
from cg_lightning.runtime.keys import KeyState, Variant
from cg_lightning.runtime.outcome import Outcome
from cg_lightning.runtime.padded_steps import PaddedSteps
from cg_lightning.runtime.plans import NEW_KEY, Action, Plan
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.target import reason_of
from cg_lightning.runtime.trial import StepTimes

Step = Callable[..., Any]
NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
_LOADER_ITERATOR = Reason(
    Status.LOADER_ITERATOR, "the step takes dataloader_iter: its batch is not known beforehand"
)
_GRADIENTS = Reason(Status.GRADIENTS, "gradients are enabled")
_NO_WARM_TARGET = Reason(
    Status.NO_TARGET, "no target was called with a warm key; calls from compiled code do not count"
)
_WITHOUT_KEY = ForwardContext()
"""Submodules do not describe their calls, and report to no step."""
_COMPILED = contextlib.nullcontext()
_ENTRIES = (GraphEntry, PaddedEntry)
_MAY_BE_STRICT_ABOUT = {
    *(Status.WARM_UP, Status.CHANGED, Status.VALUE_READ),
    *(Cause.ROWS_NOT_INDEPENDENT, Cause.POSITIONS_NOT_INDEPENDENT, Cause.PADDING_TOO_LARGE),
}
"""``strict`` does not raise for these reasons, because a capture may follow such steps."""


def first_parameter(step: Step) -> str:
    """Return the name of the batch parameter. Empty if the signature cannot be read."""
    try:
        names = list(inspect.signature(step).parameters)
    except (TypeError, ValueError):  # built in, for example
        return ""
    return names[0] if names else ""


def _how(action: Action, outcome: Outcome) -> Ran:
    """Return how a step ran, if it was not a plain replay."""
    if action in (Action.WATCH, Action.WARM_UP):
        return Ran.WARM_UP
    if outcome.ran is not None:
        return outcome.ran
    if outcome.mode is NONE:
        return Ran.EAGER
    return Ran.CAPTURE if action is Action.CAPTURE else Ran.COMPARED


def _slow_step() -> StepInProgress:
    """Return the record of a watched or traced step, in which times of calls do not count."""
    step = StepInProgress()
    step.took_longer()
    return step


class StepRunner:
    """Runs each step of one stage in the mode that its batch allows.

    In FULL the step is one graph. In NONE and PIECEWISE the step runs as it is, in a forward
    context. If a step cannot run from graphs, it runs as it is and is counted with its reason.

    Args:
        session: The runtime state of the module.
        stage: ``validate``, ``test`` or ``predict``.
        name: The name of the step in the statistics.
        step: The step method.
        as_it_is: Replaces the step if it is neither watched nor captured nor compared. None: the
            step.
        padded: Pads batches. None: they run in their own shape.
    """

    def __init__(
        self,
        session: Session,
        stage: str,
        name: str,
        step: Step,
        as_it_is: Step | None = None,
        padded: PaddedSteps | None = None,
    ) -> None:
        self._session = session
        self._stage = stage
        self._name = name
        self._step = step
        self._as_it_is = as_it_is or step
        self._batch_name = first_parameter(step)
        self._dispatcher = session.target.dispatcher
        self._times = session.stats.timeline.rows
        self._padded = padded
        self._compares_index = False
        """Whether a watched step has compared ``batch_idx``, so that guards compare it."""
        self._settled: dict[tuple[Any, ...], Plan] = {}
        """Steps that run eagerly until the next epoch, by the fields that need only the batch."""
        self._settled_in_turn = 0
        """Number of such steps since the latest other one."""
        self._ending = -1
        """The dataloader to which the next number belongs."""
        self._end = 0.0
        """The step of the session at which it ends at the earliest."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one step, and return its output. See :meth:`run_with_outcome`."""
        return self.run_with_outcome(args, kwargs).output

    def run_with_outcome(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        """Run one step, and return how it ran.

        Args:
            args: The positional arguments: the batch, then ``batch_idx`` and ``dataloader_idx`` if
                Lightning passes them.
            kwargs: The keyword arguments.

        Raises:
            CaptureError: With ``strict=True``, the step ran in a lower mode than asked.
            VerificationError: With ``strict=True``, a replay differed from eager.
        """
        if self._batch_name == "dataloader_iter":
            return self._run_as_it_is(args, kwargs, _LOADER_ITERATOR)
        if torch.is_grad_enabled():
            return self._run_as_it_is(args, kwargs, _GRADIENTS)
        if mode := seeing_mode():
            return self._run_as_it_is(args, kwargs, seen_by(mode))
        start = perf_counter()
        session = self._session
        session.cache.step += not session.is_part
        if not args:
            kwargs = dict(kwargs)
            args = (kwargs.pop(self._batch_name),)
        loader = args[2] if len(args) > 2 else kwargs.get("dataloader_idx", 0)
        why_no_key: UnkeyableBatchError | None = None
        try:
            of_batch, leaves = describe_batch(args[0], self._stage, loader)
        except UnkeyableBatchError as error:
            why_no_key = error
        else:
            if self._settled and not session.is_first_step and of_batch in self._settled:
                return self._run_settled(self._settled[of_batch], args, kwargs)
            if self._padded is None and self._dispatcher.is_new(of_batch):
                outcome = self._run_if_new(of_batch, leaves, args, kwargs)
                if outcome is not None:
                    return outcome
        self._settled_in_turn = 0
        if session.is_resting:
            session.wake()
        if session.is_first_step or not session.target.guard.check():
            self._settled.clear()
            session.check_module()
        if self._compares_index:
            session.set_batch_index(args[1])
        training = session.target.guard.flags_after_check()
        if why_no_key is None:
            fields = complete_fields(of_batch, training)
        else:
            described = self._describe_with_objects(args[0], loader, training)
            if described is None:
                reason = reason_of(why_no_key)
                return self._run_without_key(args, kwargs, loader, training, reason)
            fields, leaves = described
        state = self._dispatcher.known(fields)
        plan = self._dispatcher.plan(self._state(state, fields, args[0]), leaves)
        if plan.action is Action.REPLAY:
            return self._replay(plan, leaves, args[0], start)
        if plan.action is Action.EAGER:
            return self._run_for_reason(plan, args, kwargs)
        return self._run(plan, args, kwargs, leaves)

    def _run_if_new(
        self,
        of_batch: tuple[Any, ...],
        leaves: list[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Outcome | None:
        """Run a warm-up step of a key that will most likely not come again; None if it may.

        Each such step pays for the work here, and no graph will ever win it back. So nothing is
        made of the key, the module is compared before the next step of a key that comes again, and
        shapes are printed only if a user asks for the statistics.

        Args:
            of_batch: The fields of the key that need only the batch. They are new.
            leaves: The leaves of the batch.
            args: The positional arguments of the step.
            kwargs: The keyword arguments of the step.
        """
        session, loader = self._session, of_batch[4]
        if session.is_first_step or not KINDS_OF_TENSOR.issuperset(map(type, leaves)):
            return None
        left = self._end - session.cache.step  # or more
        if loader != self._ending or left < self._dispatcher.least_steps_left:
            # asked only if it may matter, because a Trainer takes its time to answer
            length, left = session.stage_length, math.inf
            if length is not None and session.examples is None:
                left = length.steps_left(self._stage, loader)
            self._ending, self._end = loader, session.cache.step + left
        if not self._dispatcher.runs_once(of_batch, left):
            return None
        began = perf_counter()
        token = enter_forward_context(_WITHOUT_KEY)
        try:
            output = self._as_it_is(*args, **kwargs)
        finally:
            leave_forward_context(token)
        seconds = perf_counter() - began
        self._times.append((self._stage, Ran.WARM_UP, seconds, NEW_KEY))
        session.stats.ran_once(self._stage, of_batch, seconds, NEW_KEY)
        return Outcome(output, NONE, NEW_KEY, Ran.WARM_UP)

    def _replay(self, plan: Plan, leaves: list[Any], batch: Any, start: float) -> Outcome:
        session, variant = self._session, plan.variant
        assert variant is not None and isinstance(variant.entry, _ENTRIES)  # noqa: PT018
        times = None if variant.trial is None else self._step_times(start)
        entry = variant.entry
        if session.ranges.is_on:
            with session.ranges.range("replay"):
                output = entry.replay(leaves, session.cache.step, batch)
        else:
            output = entry.replay(leaves, session.cache.step, batch)
        seconds = perf_counter() - start
        entry.count_timed(seconds)
        self._times.append((self._stage, Ran.REPLAY, seconds, None))
        if times is not None:
            output = outliving_graph(output)
            self._timed(plan, times, is_eager=False)
        return Outcome(output, FULL, None, Ran.REPLAY)

    def _describe_with_objects(
        self, batch: Any, loader: int, training: tuple[bool | bytes, ...]
    ) -> tuple[tuple[Any, ...], list[Any]] | None:
        """Return the key of a batch with objects that the step may pass on; None if it may not."""
        if not self._session.settings.runtime_policy.has_full_cudagraphs():
            return None
        try:
            fields, leaves = describe_fields(
                batch,
                stage=self._stage,
                dataloader_idx=loader,
                training=training,
                objects=True,
            )
        except UnkeyableBatchError:
            return None
        key = BatchDescriptor(*fields)
        # a step without tensors in its batch takes them from the objects
        is_read = self._session.changing_values.are_read(key) or key.batch_size is None
        return None if is_read else (fields, leaves)

    def _run_without_key(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loader: int,
        training: tuple[bool | bytes, ...],
        reason: Reason,
    ) -> Outcome:
        """Run a step whose batch cannot be part of a key. Calls in it have their own keys."""
        session = self._session
        if not session.settings.runtime_policy.has_piecewise_cudagraphs():
            return self._run_as_it_is(args, kwargs, reason)
        state = self._dispatcher.state(describe_without_batch(self._stage, loader, training))
        state.without_batch = state.without_batch or reason
        return self._run(self._dispatcher.plan(state), args, kwargs, [])

    def _state(self, state: KeyState | None, fields: tuple[Any, ...], batch: Any) -> KeyState:
        if state is not None and state.variants:
            if state.sights == 1:
                self._session.changing_values.note_repeat(state.descriptor)
            return state
        descriptor = BatchDescriptor(*fields) if state is None else state.descriptor
        values = self._session.changing_values
        general = values.without_changing_values(descriptor, batch, state is not None)
        if general is not descriptor:
            for key in values.take_keys_before(general):
                self._dispatcher.forget(key)
        state = self._dispatcher.state(general.fields, general)
        if self._padded is not None:
            self._padded.begin(state, batch)
        return state

    def _run(
        self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]
    ) -> Outcome:
        began = perf_counter()
        length = self._session.stage_length
        if length is not None and self._session.examples is None:
            left = length.steps_left(self._stage, plan.state.descriptor.dataloader_idx)
            plan = self._dispatcher.within(plan, left, self._padded is None)
            if plan.action is Action.REPLAY:
                return self._replay(plan, leaves, args[0], began)
        if plan.action is Action.EAGER:
            return self._run_for_reason(plan, args, kwargs)
        descriptor, variant = plan.state.descriptor, plan.variant
        captures = self._dispatcher.captures
        compilation = self._session.compilation
        compiled = compilation.seconds
        if plan.action in (Action.CAPTURE, Action.VERIFY):
            outcome = self._capture_or_verify(plan, args, kwargs, leaves)
        elif plan.action is Action.PIECEWISE:
            outcome = self._run_piecewise(plan, args, kwargs)
        elif plan.action is Action.WATCH:
            outcome = self._watch(plan, args, kwargs, leaves)
        elif plan.action is Action.WARM_UP:
            outcome = self._warm_up(plan, args, kwargs)
        else:
            outcome = self._run_in_trial(plan, args, kwargs)
        why, reason = plan.state.without_batch, outcome.reason
        if why is not None and reason is not None and reason.kind is Status.WARM_UP:
            outcome = outcome._replace(reason=reason.because_of(why))
        seconds, how = perf_counter() - began, _how(plan.action, outcome)
        own = seconds - (compilation.seconds - compiled)  # compilation is reported apart
        if plan.action is Action.WARM_UP:
            self._host_time(NONE, descriptor).add(own)
        has_watched = plan.action is Action.WATCH and self._padded is not None
        if self._dispatcher.compares_times and not (how is Ran.EAGER or has_watched):
            self._dispatcher.took(plan, captures, own)
        self._times.append((self._stage, how, seconds, outcome.reason))
        self._finish(outcome, descriptor, variant)
        return outcome._replace(ran=how)

    def _run_for_reason(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        """Run a step eagerly that never has a graph. Each such step pays for the work here."""
        began = perf_counter()
        # without a key, submodules do not describe their calls
        outcome = self._run_eagerly(None, args, kwargs, plan.reason)
        seconds = perf_counter() - began
        self._dispatcher.costs.ran_eagerly(seconds)
        self._times.append((self._stage, Ran.EAGER, seconds, plan.reason))
        self._finish(outcome, plan.state.descriptor, plan.variant)
        if self._padded is None and self._dispatcher.is_settled(plan):
            self._settled[plan.state.descriptor.fields[:NUM_OF_BATCH]] = plan
        return outcome._replace(ran=Ran.EAGER)

    def _run_settled(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        """Run a step eagerly, and ask nobody about it."""
        self._settled_in_turn += 1
        if not self._session.is_resting:
            self._session.rest(self._settled_in_turn)
        began = perf_counter()
        token = enter_forward_context(_WITHOUT_KEY)
        try:
            with self._session.compilation.outside_captures():
                output = self._as_it_is(*args, **kwargs)
        finally:
            leave_forward_context(token)
        self._dispatcher.ran_as_settled(plan.state)
        self._times.append((self._stage, Ran.EAGER, perf_counter() - began, plan.reason))
        outcome = Outcome(output, NONE, plan.reason, Ran.EAGER)
        self._finish(outcome, plan.state.descriptor, plan.variant)
        return outcome

    def _capture_or_verify(
        self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]
    ) -> Outcome:
        """Run a step from its graph, as planned, or in a lower mode if the capture fails."""
        session, variant, descriptor = self._session, plan.variant, plan.state.descriptor
        assert variant is not None
        call = GraphCall(descriptor, self._invoke, args[0], leaves, args[1:], kwargs)
        outcome: Outcome | None
        with session.ranges.range(plan.action.name.lower()):
            if self._padded is not None and variant.padding is not None:
                outcome = self._padded.run(plan, call)
            else:
                outcome = session.target.run(self._name, plan, call)
        if variant.reason is not None and variant.reason.kind is Status.VALUE_READ:
            session.changing_values.note_read(descriptor, variant.reason.leaf)
        if variant.mode is not FULL:
            session.find_submodules(descriptor, variant, plan.state.warmup_runs)
        if outcome is not None:
            output = without_interception(outliving_graph(outcome.output))
            return outcome._replace(output=output)
        if variant.mode is PIECEWISE:
            return self._run_piecewise(plan, args, kwargs)
        return self._run_eagerly(descriptor, args, kwargs, variant.reason)

    def _invoke(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return self._step(batch, *args, **kwargs)

    def _watch(
        self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]
    ) -> Outcome:
        padded = self._padded
        call = GraphCall(plan.state.descriptor, self._invoke, args[0], leaves, args[1:], kwargs)
        padding = None if padded is None else padded.padding_of(plan.state, args[0])
        if padded is not None and padding is None and padded.may_be_known(plan.state, call):
            if plan.state.sights == 1:  # its shape may not come again
                return self._warm_up(plan, args, kwargs)
            return self._run_for_its_way(padded, plan, call)
        step = functools.partial(self._step, args[0], **kwargs)
        context = ForwardContext(NONE, plan.state.descriptor, _slow_step())
        as_written = self._session.compilation.outside_captures()
        with override_forward_context(context), self._session.ranges.range("watch"), as_written:
            output, watched = self._session.watcher.watch(step, args[0], args[1:])
        if watched.comparisons:
            self._compares_index = True
            self._session.set_batch_index(args[1])
        session = self._session
        if padded is None:
            session.watched(plan, watched)
        else:
            padded.watched(plan, call, watched, padding)
        if (
            session.examples is not None
            and (watched.may_be_full_next_time or not session.full_reason(plan.state, watched))
            and not watched.late  # the state of these metrics in Python cannot be restored
            and session.target.guard.check()  # or else the step has changed the module
        ):
            ahead = CaptureAhead(session, self._stage, self._name, self._invoke)
            loader = plan.state.descriptor.dataloader_idx
            ahead.run(session.examples, loader, args[1:], kwargs)
        return Outcome(without_interception(output), NONE, plan.reason)

    def _run_for_its_way(self, padded: PaddedSteps, plan: Plan, call: GraphCall) -> Outcome:
        """Run a step eagerly. If it goes the way of a watched step, its key is not watched."""
        self._dispatcher.ran_eagerly(plan.state)
        context = ForwardContext(NONE, plan.state.descriptor, _slow_step())
        with override_forward_context(context), self._session.compilation.outside_captures():
            return Outcome(padded.run_for_its_way(call), NONE, plan.reason)

    def _warm_up(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        self._dispatcher.ran_eagerly(plan.state)
        # submodules would describe each call, for a key that hardly comes again
        seen = None if plan.reason is NEW_KEY else plan.state.descriptor
        if not self._dispatcher.compares_times or seen is None:
            return self._run_eagerly(seen, args, kwargs, plan.reason)
        times = self._step_times(perf_counter())
        outcome = self._run_eagerly(seen, args, kwargs, plan.reason)
        times.stop()
        plan.state.warm_up_times.append(times)
        return outcome

    def _run_in_trial(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        """Run a step eagerly although it or its submodules have graphs, to compare times."""
        times = self._step_times(perf_counter())
        outcome = self._run_eagerly(None, args, kwargs, plan.reason, times)
        self._timed(plan, times, is_eager=True)
        return outcome

    def _step_times(self, began: float) -> StepTimes:
        return StepTimes(self._session.backend.stopwatch, began)

    def _timed(self, plan: Plan, times: StepTimes, is_eager: bool) -> None:
        """Add the time of a step that has just run to its trial."""
        times.stop()
        assert plan.variant is not None and plan.variant.trial is not None  # noqa: PT018
        plan.variant.trial.add(times, is_eager)
        self._session.settle(plan)

    def _run_piecewise(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        assert plan.variant is not None
        start = perf_counter()
        progress = StepInProgress(
            batch=None if plan.variant.padding is None else args[0],
            times=None if plan.variant.trial is None else self._step_times(start),
        )
        context = ForwardContext(PIECEWISE, plan.state.descriptor, progress)
        with override_forward_context(context), self._as_written_if_part():
            output = self._step(*args, **kwargs)
        seconds, reason = perf_counter() - start, plan.variant.reason
        if progress.times is not None and progress.graphs and progress.is_warm:
            self._timed(plan, progress.times, is_eager=False)
        if progress.misses and plan.variant is not plan.state.pieces:
            plan.state.miss = progress.misses[0]
        self._dispatcher.ran_in_pieces(plan.variant, bool(progress.graphs))
        if progress.graphs:
            if progress.is_warm:
                time = plan.variant.time
                if time is None:
                    time = plan.variant.time = self._host_time(PIECEWISE, plan.state.descriptor)
                time.steps += 1
                time.seconds += seconds
            how = Ran.PIECEWISE if progress.is_warm else Ran.PIECES_CAPTURED
            return Outcome(output, PIECEWISE, reason, how)
        return Outcome(output, NONE, joined(progress.reasons.values()) or reason or _NO_WARM_TARGET)

    def _as_written_if_part(self) -> contextlib.AbstractContextManager[None]:
        """Is entered while a padded submodule runs in pieces: only the whole of it is compiled."""
        session = self._session
        return session.compilation.outside_captures() if session.is_part else _COMPILED

    def _run_eagerly(
        self,
        descriptor: BatchDescriptor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reason: Reason | None,
        times: StepTimes | None = None,
    ) -> Outcome:
        progress = StepInProgress(times=times)
        context = ForwardContext(NONE, descriptor, progress)
        with override_forward_context(context), self._session.compilation.outside_captures():
            return Outcome(self._as_it_is(*args, **kwargs), NONE, reason)

    def _host_time(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> HostTime:
        return self._session.stats.host_time(self._stage, mode.name, descriptor.shapes())

    def run_as_it_is(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: Reason) -> Any:
        """Run one step eagerly, and count it with its reason. See :meth:`run`."""
        return self._run_as_it_is(args, kwargs, reason).output

    def _run_as_it_is(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: Reason
    ) -> Outcome:
        began = perf_counter()
        outcome = self._run_eagerly(None, args, kwargs, reason)
        self._times.append((self._stage, Ran.EAGER, perf_counter() - began, reason))
        self._finish(outcome, None, None)
        return outcome._replace(ran=Ran.EAGER)

    def _finish(
        self, outcome: Outcome, descriptor: BatchDescriptor | None, variant: Variant | None
    ) -> None:
        """Count the step. With ``strict=True``, raise if it ran in a lower mode than asked."""
        session = self._session
        if outcome.mode is not FULL:
            self._count(outcome, descriptor, variant)
        if session.settings.strict and outcome.reason is not None:
            self._refuse(outcome, outcome.reason, variant)

    def _count(
        self, outcome: Outcome, descriptor: BatchDescriptor | None, variant: Variant | None
    ) -> None:
        record = None if variant is None else variant.record
        if (
            isinstance(record, StepsRecord)
            and record.mode == outcome.mode.name
            and record.reason is outcome.reason
        ):
            record.steps += 1
            return
        shapes = "-" if descriptor is None else descriptor.shapes()
        reason = outcome.reason
        if outcome.mode is NONE:
            reason = reason or WARM_UP
        record = self._session.stats.ran(self._stage, outcome.mode.name, shapes, reason)
        if variant is not None:
            variant.record = record

    def _refuse(self, outcome: Outcome, reason: Reason, variant: Variant | None) -> None:
        policy = self._session.settings.runtime_policy
        if reason.kind is Status.VERIFICATION:
            raise VerificationError(str(reason), outcome.output)
        if reason.kind in _MAY_BE_STRICT_ABOUT:
            return
        if outcome.mode is PIECEWISE and policy is not FULL:
            return
        raise CaptureError(
            f"A step of stage {self._stage!r} ran in a lower mode than mode={policy.name} asks "
            f"for: {reason}. Remove the cause, choose a lower mode, or set strict=False to run it "
            "eagerly.",
            self._session.diagnosis(variant),
        )
