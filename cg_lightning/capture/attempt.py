"""One attempt to capture a call, and a second one if the first shows what needs memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor

from cg_lightning.backends import CapturedGraph, GraphBackend
from cg_lightning.capture.answered_reads import AnsweredReads, expected_checks
from cg_lightning.capture.call import CaptureTarget, GraphCall
from cg_lightning.capture.entry import Captured, GraphEntry
from cg_lightning.capture.graph import capture_graph, weak_ref_tensors
from cg_lightning.capture.host_constants import HostConstants
from cg_lightning.capture.host_copies import answered_host_copies, leaves_on_device
from cg_lightning.capture.lent_gradients import LentGradients
from cg_lightning.capture.outputs import OutputPlan
from cg_lightning.capture.passed_on import PassedOnValues
from cg_lightning.capture.static_inputs import StaticInputs
from cg_lightning.core.closure import ClosureOutput
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.forward_context import ForwardContext, override_forward_context
from cg_lightning.core.settings import Settings
from cg_lightning.core.tree import containers_in, rebuild
from cg_lightning.effects.batch_entries import BatchEntries, SetBatchEntries
from cg_lightning.effects.effect import Taker
from cg_lightning.effects.host_draws import DrawAgain
from cg_lightning.effects.python_changes import recording_changes
from cg_lightning.effects.recorder import Recorder
from cg_lightning.effects.step_state import HostRandomState
from cg_lightning.metrics.deferred_checks import CheckedCalls


class _Needed(NamedTuple):
    """Objects of a call that need memory from outside its capture."""

    checked: CheckedCalls
    constants: list[Tensor]
    """The values of its constants, on the host."""


class Attempt:
    """One attempt to capture a call.

    Args:
        backend: Captures and replays.
        settings: The options.
        inputs: The static inputs of the graph.
        target: The step or submodule.
        call: The call.
        has_compiled: Whether the call may run code of ``torch.compile``, which may have guards on
            functions that are replaced.
    """

    def __init__(
        self,
        backend: GraphBackend,
        settings: Settings,
        inputs: StaticInputs,
        target: CaptureTarget,
        call: GraphCall,
        has_compiled: bool,
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._inputs = inputs
        self._target = target
        self._does = target.side_effects
        self._call = call
        self._constants = HostConstants(backend.device, target.copies_from_host)
        self._passed_on = PassedOnValues(call.descriptor.leaves)
        self._leaves = self._passed_on.hidden_in(inputs.leaves)
        self._has_compiled = has_compiled
        # what metrics and the user's lists keep is never graph memory
        self._copies_outputs = settings.copy_outputs or bool(
            self._does.late or self._does.changes or self._does.fills_batch
        )

    def entry(self) -> GraphEntry:
        """Capture the call; see :meth:`Capturer.capture` for the errors."""
        target, effects = self._target, self._target.effects
        recording: AbstractContextManager[Recorder] = (
            contextlib.nullcontext(Recorder())
            if effects is None
            else effects.recorder(self._does.late)
        )
        with (
            override_forward_context(ForwardContext(target.mode, self._call.descriptor)),
            recording as recorder,
            _random_state_restored() if self._does.host_draws else contextlib.nullcontext(),
        ):
            expected = expected_checks(target.reads, self._backend.device)
            recorder.reserve_checks(expected, are_expected=True)
            graph, captured, needed = self._capture(recorder)
            if needed is not None:  # only a capture shows it
                del graph, captured
                recorder.reserve_checks(needed.checked)
                self._constants.make(needed.constants)
                del needed  # it may keep memory of the first graph
                graph, captured, _ = self._capture(recorder)
        self._inputs.keep(self._constants.tensors)
        self._inputs.note_written(self._does.batch_writes)
        return GraphEntry(
            graph,
            self._inputs,
            captured,
            target.record,
            self._copies_outputs or bool(captured.takers),
        )

    def _capture(self, recorder: Recorder) -> tuple[CapturedGraph, Captured, _Needed | None]:
        target = self._target
        try:
            graph, (captured, needed) = capture_graph(
                self._backend,
                functools.partial(self._run, recorder),
                target.mode,
                self._call.descriptor,
                self._settings.capture_options,
                collect_garbage=False,
            )
            return graph, captured, needed
        except CaptureError as error:
            cause = self._passed_on.cause_of(error)
            if cause is error:
                raise
            raise cause from error

    def _run(self, recorder: Recorder) -> tuple[Captured, _Needed | None]:
        """Run the call. It is called inside the capture.

        Returns:
            What the call gives, and what has no memory yet, so that it must be captured once more.
        """
        target, does, takers = self._target, self._does, list[Taker]()
        with recording_changes(does.changes) as changing, recorder.step() as recording:
            tree = rebuild(self._call.tree, iter(self._leaves))
            containers, entries = list(containers_in(tree)), BatchEntries(tree)
            with self._answering(recording.checked) as constants:
                output = self._call.run_on(tree)
            is_closure = isinstance(output, ClosureOutput)
            finished = recording.finish((leaves_on_device(output), self._leaves))
            effects, tensors = finished.effects, finished.tensors
            if does.host_draws:
                effects.append(DrawAgain(does.host_draws))
            if does.changes:
                output, changes = changing.finish(output)
                effects.append(changes)
                takers.append(changes)
        for taker, values in finished.takers:
            output = (output, values)
            takers.insert(0, taker)
        if does.fills_batch:
            takers.insert(0, SetBatchEntries(entries, output, containers))
            output = (output, (entries.new(), entries.removed()))
        finished.refuse_states_in(leaves_on_device(output))
        others = [*tensors, *self._leaves, *target.held]
        gradients = LentGradients.of(output, others) if is_closure else None
        if gradients is not None:
            output = gradients.left_out_of(output)
            takers.append(gradients)
        plan, computed = OutputPlan.make(
            output,
            self._leaves,
            target.held,
            containers,
            target.held_containers,
            detaches=is_closure,
        )
        # outputs that are not copied out must not share memory with those of other graphs
        is_weak = self._settings.capture_options.weak_ref_output
        if is_weak and (self._copies_outputs or takers):
            computed = weak_ref_tensors(computed, self._backend)
            tensors = weak_ref_tensors(tensors, self._backend)
            if gradients is not None:
                gradients.hold_weakly(self._backend)
        have_memory = recording.checked.have_memory() and self._constants.are_made(constants)
        needed = None if have_memory else _Needed(recording.checked, constants)
        return Captured(plan, computed, effects, tensors, takers), needed

    @contextlib.contextmanager
    def _answering(self, checked: CheckedCalls) -> Iterator[list[Tensor]]:
        """While this is entered, operations of the call that no capture can do are answered.

        The context gives the constants that the call asks for; see :class:`HostConstants`.
        """
        target, device = self._target, self._backend.device
        constants: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if target.reads:
                reads = AnsweredReads(target.reads, checked, device.type)
                stack.enter_context(reads.answering())
            if not self._has_compiled:
                constants = stack.enter_context(self._constants.answered())
                if target.effects is not None:  # only a whole step may keep such copies
                    stack.enter_context(answered_host_copies(device, self._does.late_reads))
            stack.enter_context(self._passed_on.during_step())
            yield constants


@contextlib.contextmanager
def _random_state_restored() -> Iterator[None]:
    """At the end, restore the states of the random generators of the host."""
    before = HostRandomState()
    try:
        yield
    finally:
        before.restore()
