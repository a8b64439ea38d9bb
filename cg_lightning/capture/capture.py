"""Capture one call of a step or of a submodule."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from cg_lightning.backends import CapturedGraph, GraphBackend
from cg_lightning.backends.capture_scope import autocast_cache_emptied
from cg_lightning.capture.answered_reads import AnsweredReads
from cg_lightning.capture.cache import GraphCache
from cg_lightning.capture.entry import GraphEntry
from cg_lightning.capture.graph import capture_graph, weak_ref_tensors
from cg_lightning.capture.host_constants import HostConstants
from cg_lightning.capture.host_copies import answered_host_copies, leaves_on_device
from cg_lightning.capture.outputs import OutputPlan
from cg_lightning.capture.passed_on import PassedOnValues
from cg_lightning.capture.static_inputs import StaticInputs
from cg_lightning.core.causes import Cause
from cg_lightning.core.closure import ClosureOutput
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import (
    CaptureError,
    OutOfGraphMemoryError,
    RecompileNeededError,
    StateLeftError,
)
from cg_lightning.core.forward_context import ForwardContext, override_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.core.settings import Settings
from cg_lightning.core.tree import containers_in, rebuild
from cg_lightning.effects.batch_entries import BatchEntries, SetBatchEntries
from cg_lightning.effects.effect import Effect, Taker
from cg_lightning.effects.host_draws import DrawAgain, HostDraw
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.effects.places import ChangedAttribute
from cg_lightning.effects.python_changes import recording_changes
from cg_lightning.effects.recorder import Recorder
from cg_lightning.effects.step_state import HeldByModules, HostRandomState, StepState
from cg_lightning.guards.guard_set import GuardSet
from cg_lightning.host_values.path import HostRead
from cg_lightning.metrics.deferred_checks import CheckedCalls
from cg_lightning.metrics.units import MetricUnit
from cg_lightning.modules.compiled import is_compiled, is_compiled_by_callback
from cg_lightning.report.records import EntryRecord

T = TypeVar("T")

# only before the first capture of a process, because it takes longer than ten captures
_collect_once = functools.cache(gc.collect)


WatchCompiled = Callable[[nn.Module, Callable[[], Any], Any], GuardSet]
"""Runs a call of a module as it is written, on a batch. Returns the values that it reads."""


class WrittenTensors(Protocol):
    """Tensors, other than buffers, that steps were seen to write to."""

    def now(self) -> list[Tensor]:
        """Return the current tensors."""


@dataclasses.dataclass(eq=False)
class GraphCall:
    """One call of a step or of a submodule.

    Attributes:
        descriptor: The key of the call.
        function: The callable: ``function(tree, *frozen_args, **frozen_kwargs)``.
        tree: The nested containers whose tensors are the inputs of the graph.
        leaves: The leaves of ``tree``, in order.
        frozen_args: Further positional arguments; a graph freezes them.
        frozen_kwargs: Further keyword arguments; a graph freezes them.
    """

    descriptor: BatchDescriptor
    function: Callable[..., Any]
    tree: Any
    leaves: list[Any]
    frozen_args: tuple[Any, ...] = ()
    frozen_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self) -> Any:
        """Call the function with the original arguments."""
        return self.function(self.tree, *self.frozen_args, **self.frozen_kwargs)

    def run_with(self, leaves: list[Any]) -> Any:
        """Call the function with other leaves in the same containers."""
        return self.run_on(rebuild(self.tree, iter(leaves)))

    def run_on(self, tree: Any) -> Any:
        """Call the function with another tree."""
        return self.function(tree, *self.frozen_args, **self.frozen_kwargs)

    def run_eagerly(self) -> Any:
        """Call the function with a forward context in mode NONE."""
        with override_forward_context(ForwardContext(CUDAGraphMode.NONE, self.descriptor)):
            return self.run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureTarget:
    """The step or submodule to capture.

    Attributes:
        mode: PIECEWISE or FULL.
        module: The module whose state a call may change.
        effects: The side effects of whole steps. None for a submodule, because a call with side
            effects is not captured.
        storage_addresses: The addresses of the storages of parameters and buffers.
        record: The row in the statistics.
        changes: Attributes that the call changes in Python, and that a replay changes as well.
        changed: The value that has changed since an earlier capture; empty if none has.
        reads: Reads of the watched step on the host, which a capture cannot make.
        late: The metrics that are updated after the step; see ``effects/late_updates.py``.
        fills_batch: Whether the call sets or removes entries of its batch.
        copies_from_host: Whether the call copies constants from the host, and no function that it
            calls shows it.
        host_draws: The random numbers of the host that the call draws and does not use.
        batch_writes: The numbers of the leaves that the call writes to.
        only_computes: Whether the call does nothing but compute its output, so that nothing has to
            be put back between two runs.
        guards: The guards of the call. They receive what compiled code reads; None: it has none.
    """

    mode: CUDAGraphMode
    module: nn.Module
    effects: ModuleEffects | None
    storage_addresses: set[int]
    record: EntryRecord
    changes: Sequence[ChangedAttribute] = ()
    changed: Changed = NO_CHANGE
    reads: Sequence[HostRead] = ()
    late: Sequence[MetricUnit] = ()
    fills_batch: bool = False
    copies_from_host: bool = False
    host_draws: Sequence[HostDraw] = ()
    batch_writes: Sequence[int] = ()
    only_computes: bool = False
    guards: GuardSet | None = None


class Capturer:
    """Captures calls for one session.

    Args:
        backend: Captures and replays.
        settings: The options.
        cache: All graphs of the session.
        written: Tensors, other than buffers, that steps write to.
        watch_compiled: Tells what compiled code reads. None: it is not asked.
    """

    def __init__(
        self,
        backend: GraphBackend,
        settings: Settings,
        cache: GraphCache,
        written: WrittenTensors,
        watch_compiled: WatchCompiled | None = None,
    ) -> None:
        self._watch_compiled = watch_compiled
        self._backend = backend
        self.settings = settings
        self.cache = cache
        self._written = written

    def capture(self, target: CaptureTarget, call: GraphCall) -> GraphEntry:
        """Capture ``call``. The capture computes nothing; only a replay of the entry does.

        If the first attempt fails and the cause has a remedy, the remedy is applied and the call is
        captured once more.

        Raises:
            CaptureError: The call could not be captured. State is as before, but all other graphs
                were dropped, because the device got a new random generator that they do not use.
            ValueReadError: The call could not be captured without values that its key leaves out.
            StateLeftError: The capture left graph memory in an attribute. State is as before.
            UnkeyableBatchError: A tensor is on another device, or overlaps itself.
        """
        if not self.settings.capture_options.gc_disable:
            _collect_once()
        began = time.perf_counter()
        # before the capture: to look for modules takes the hash of metrics, which reads their
        # states
        compiled = [module for module in target.module.modules() if is_compiled(module)]
        if compiled:
            if not all(map(is_compiled_by_callback, compiled)):
                self._guard_compiled(target, call)
            self._compile_ahead(target, call)
        held = HeldByModules(target.module, target.effects)
        try:
            entry = self._attempt(target, call, bool(compiled))
        except CaptureError as error:
            had_others = self.cache.drop_all()
            if isinstance(error, RecompileNeededError):
                self._compile_ahead(target, call)
            elif isinstance(error, OutOfGraphMemoryError) and had_others:
                gc.collect()
            else:
                raise
            entry = self._attempt(target, call, bool(compiled))
        if left := held.left():
            held.restore()
            self._backend.synchronize()
            entry.drop()
            raise StateLeftError(f"{Cause.STATE_REBOUND.value}: {left}, in the capture of a graph")
        seconds = time.perf_counter() - began
        target.record.captured(seconds, entry.num_bytes, target.changed)
        return entry

    def _attempt(self, target: CaptureTarget, call: GraphCall, has_compiled: bool) -> GraphEntry:
        inputs = self._static_inputs(call)
        return _Attempt(self._backend, self.settings, inputs, target, call, has_compiled).entry()

    def _compile_ahead(self, target: CaptureTarget, call: GraphCall) -> None:
        """Run the call once with static inputs, so that ``torch.compile`` compiles before it.

        The run is necessary because ``torch.compile`` may compile again for static inputs: those of
        the loader can be inference tensors, and autocast's cache can be on.
        """
        inputs = self._static_inputs(call)
        self._rehearse(target, call, functools.partial(call.run_with, inputs.leaves))

    def _guard_compiled(self, target: CaptureTarget, call: GraphCall) -> None:
        """Run the call once as it is written, to guard what its compiled code reads.

        A watched step cannot see that, because it runs the user's compiled code compiled.
        """
        if self._watch_compiled is None or target.guards is None:
            return
        inputs = self._static_inputs(call)
        tree = rebuild(call.tree, iter(inputs.leaves))
        run = functools.partial(call.run_on, tree)
        watch = functools.partial(self._watch_compiled, target.module, run, tree)
        target.guards.of_compiled = self._rehearse(target, call, watch)

    def _rehearse(self, target: CaptureTarget, call: GraphCall, run: Callable[[], T]) -> T:
        """Run a function that runs the call, and restore all state."""
        before = StepState(
            target.module,
            self._backend,
            target.effects,
            self._written.now(),
            changes=target.changes,
        )
        context = ForwardContext(CUDAGraphMode.NONE, call.descriptor)
        with autocast_cache_emptied(), override_forward_context(context):
            try:
                if target.effects is None:
                    return run()
                result: T = target.effects.rehearse(run, target.late)
                return result
            finally:
                before.restore()

    def _static_inputs(self, call: GraphCall) -> StaticInputs:
        inputs = StaticInputs(call.leaves, call.tree, self._backend.device)
        inputs.copy_from(call.leaves)
        return inputs


class _Needed(NamedTuple):
    """What a call needs memory for, from outside its capture."""

    checked: CheckedCalls
    constants: list[Tensor]
    """The values of its constants, on the host."""


class _Captured(NamedTuple):
    """What a captured call gives, beside its graph."""

    outputs: OutputPlan
    computed: list[Tensor]
    """What the graph computes for the output."""
    effects: list[Effect]
    effect_tensors: list[Tensor]
    """What the graph computes for the effects."""
    takers: list[Taker]
    needed: _Needed | None
    """What has no memory yet, so that the call must be captured once more. None: nothing."""


class _Attempt:
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
        self._call = call
        self._constants = HostConstants(backend.device, target.copies_from_host)
        self._passed_on = PassedOnValues(call.descriptor.leaves)
        self._leaves = self._passed_on.hidden_in(inputs.leaves)
        self._has_compiled = has_compiled
        # what metrics and the user's lists keep is never graph memory
        self._copies_outputs = settings.copy_outputs or bool(
            target.late or target.changes or target.fills_batch
        )

    def entry(self) -> GraphEntry:
        """Capture the call; see :meth:`Capturer.capture` for the errors."""
        target, effects = self._target, self._target.effects
        recording: AbstractContextManager[Recorder] = (
            contextlib.nullcontext(Recorder()) if effects is None else effects.recorder(target.late)
        )
        with (
            override_forward_context(ForwardContext(target.mode, self._call.descriptor)),
            recording as recorder,
            _random_state_put_back() if target.host_draws else contextlib.nullcontext(),
        ):
            graph, captured = self._capture(recorder)
            if (needed := captured.needed) is not None:  # only a capture shows it
                del graph, captured
                recorder.reserve_checks(needed.checked)
                self._constants.make(needed.constants)
                del needed  # it may keep memory of the first graph
                graph, captured = self._capture(recorder)
        self._inputs.keep(self._constants.tensors)
        self._inputs.note_written(target.batch_writes)
        return GraphEntry(
            graph,
            self._inputs,
            captured.outputs,
            captured.computed,
            captured.effects,
            captured.effect_tensors,
            self._copies_outputs or bool(captured.takers),
            target.record,
            captured.takers,
        )

    def _capture(self, recorder: Recorder) -> tuple[CapturedGraph, _Captured]:
        target = self._target
        try:
            return capture_graph(
                self._backend,
                functools.partial(self._run, recorder),
                target.mode,
                self._call.descriptor,
                self._settings.capture_options,
                collect_garbage=False,
            )
        except CaptureError as error:
            cause = self._passed_on.cause_of(error)
            if cause is error:
                raise
            raise cause from error

    def _run(self, recorder: Recorder) -> _Captured:
        """Run the call. It is called inside the capture."""
        target, takers = self._target, list[Taker]()
        with recording_changes(target.changes) as changing, recorder.step() as recording:
            tree = rebuild(self._call.tree, iter(self._leaves))
            containers, entries = list(containers_in(tree)), BatchEntries(tree)
            with self._answering(recording.checked) as constants:
                output = self._call.run_on(tree)
            is_closure = isinstance(output, ClosureOutput)
            finished = recording.finish((leaves_on_device(output), self._leaves))
            effects, tensors = finished.effects, finished.tensors
            if target.host_draws:
                effects.append(DrawAgain(target.host_draws))
            if target.changes:
                output, changes = changing.finish(output)
                effects.append(changes)
                takers.append(changes)
        for taker, values in finished.takers:
            output = (output, values)
            takers.insert(0, taker)
        if target.fills_batch:
            takers.insert(0, SetBatchEntries(entries, output, containers))
            output = (output, (entries.new(), entries.removed()))
        finished.refuse_states_in(leaves_on_device(output))
        plan, computed = OutputPlan.make(
            output, self._leaves, target.storage_addresses, containers, detaches=is_closure
        )
        # outputs that are not copied out must not share memory with those of other graphs
        is_weak = self._settings.capture_options.weak_ref_output
        if is_weak and (self._copies_outputs or takers):
            computed = weak_ref_tensors(computed, self._backend)
            tensors = weak_ref_tensors(tensors, self._backend)
        have_memory = recording.checked.have_memory() and self._constants.are_made(constants)
        needed = None if have_memory else _Needed(recording.checked, constants)
        return _Captured(plan, computed, effects, tensors, takers, needed)

    @contextlib.contextmanager
    def _answering(self, checked: CheckedCalls) -> Iterator[list[Tensor]]:
        """While this is entered, the call gets answers for what no capture can do.

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
                    stack.enter_context(answered_host_copies(device))
            stack.enter_context(self._passed_on.during_step())
            yield constants


@contextlib.contextmanager
def _random_state_put_back() -> Iterator[None]:
    """At the end, put back the states of the random generators of the host."""
    before = HostRandomState()
    try:
        yield
    finally:
        before.restore()
