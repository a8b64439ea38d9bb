"""A call that runs through a graph wrapper: inputs are copied into static ones, outputs are copied out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.backends import CapturedGraph, GraphBackend
from cg_lightning.backends.capture_scope import autocast_cache_off
from cg_lightning.capture.cache import GraphBudget, Place
from cg_lightning.capture.outputs import OutputPlan
from cg_lightning.capture.static_inputs import StaticInputs
from cg_lightning.capture.wrapper import CUDAGraphOptions, CUDAGraphWrapper
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import CaptureError, VerificationError
from cg_lightning.core.forward_context import ForwardContext, override_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.tree import rebuild
from cg_lightning.effects.effect import StepEffects
from cg_lightning.effects.recorder import Recording
from cg_lightning.effects.step_metrics import StepMetrics
from cg_lightning.modules.compiled import is_compiled, is_for_lack_of_compiled_code
from cg_lightning.report.stats import CUDAGraphStats, EntryRecord
from cg_lightning.runtime.verifier import StepState, VerificationSettings, verify
from cg_lightning.trainer.log_calls import Calls


@dataclasses.dataclass(frozen=True)
class GraphSettings:
    """What all graphs of one run share."""

    backend: GraphBackend
    options: CUDAGraphOptions
    copy_outputs: bool
    budget: GraphBudget
    stats: CUDAGraphStats
    module_storages: Callable[[], set[int]]
    """Where the storages of parameters and buffers begin, now."""
    written: Callable[[], list[Tensor]]
    """Tensors, other than buffers, that steps were seen to write to."""
    before_capture: Callable[[], object]
    """Called before each capture."""
    verification: VerificationSettings
    metrics: StepMetrics | None = None
    """What whole steps leave behind beside their output; None: nothing, so that a call that does is not captured."""


@dataclasses.dataclass
class _Entry:
    inputs: StaticInputs
    tree: Any
    context: ForwardContext
    record: EntryRecord
    plan: OutputPlan
    effects: StepEffects | None
    place: Place
    replays: int = 0


class GraphedCall:
    """Runs ``invoke(tree, *rest)`` from graphs, one for each descriptor.

    Whoever calls it has described the batch: leaves of equal descriptors have equal shapes. Tensors of the tree are static
    inputs; ``rest`` is frozen at capture. An output that *is* a tensor of the batch, a parameter or a buffer is returned as
    that very object; other tensors are copied out, or with ``copy_outputs=False`` returned as the graph wrote them.

    Args:
        target: What it is called in the summary.
        invoke: What to capture.
        module: Whose state a call may change.
        mode: PIECEWISE or FULL.
        settings: What all graphs of one run share.
    """

    def __init__(
        self,
        target: str,
        invoke: Callable[..., Any],
        module: nn.Module,
        mode: CUDAGraphMode,
        settings: GraphSettings,
    ) -> None:
        self._target = target
        self._module = module
        self._invoke = invoke
        self._mode = mode
        self._settings = settings
        options = dataclasses.replace(
            settings.options,
            gc_disable=True,  # before_capture collects
            # outputs that are not copied out must not share memory with those of other graphs
            weak_ref_output=settings.options.weak_ref_output and settings.copy_outputs,
        )
        self._wrapper = CUDAGraphWrapper(self._run, mode, options, backend=settings.backend)
        self._entries: dict[BatchDescriptor, _Entry] = {}
        self._places: dict[BatchDescriptor, Place] = {}
        self._capturing: StaticInputs | None = None
        self._plan: OutputPlan | None = None
        self._metrics = settings.metrics if mode is CUDAGraphMode.FULL else None
        self._recording: Recording | None = None
        self._effects: StepEffects | None = None

    def __call__(
        self, descriptor: BatchDescriptor, tree: Any, leaves: list[Any], *rest: Any
    ) -> Any:
        """Captures or replays, and gives what eager would.

        Raises:
            CaptureError: The capture failed.
            EvictedError: The graph had to make room for others, again and again.
            UnkeyableBatchError: A tensor lies on another device, or overlaps itself.
            VerificationError: The replay was compared with eager and differs. The entry is gone; the error carries what
                eager gives.
        """
        entry = self._entries.get(descriptor)
        if entry is None:
            self._settings.budget.make_room(self._place(descriptor))
        if self._settings.verification.wants(0 if entry is None else entry.replays):
            output = self._verified(descriptor, tree, leaves, rest)
            entry = self._entries[descriptor]
        else:
            entry, output = self._run_graph(descriptor, tree, leaves, rest)
        entry.replays += 1
        entry.record.replays += 1
        self._settings.budget.use(entry.place)
        return output

    def _run_graph(
        self, descriptor: BatchDescriptor, tree: Any, leaves: list[Any], rest: tuple[Any, ...]
    ) -> tuple[_Entry, Any]:
        entry = self._entries.get(descriptor)
        if entry is None or (entry.effects is not None and not entry.effects.prepare_replay()):
            self._drop_from_budget(descriptor)
            try:
                entry, computed = self._capture(descriptor, tree, leaves, rest)
            except CaptureError as error:
                # recovery gives the device another random generator, which graphs from before would not draw from
                had_others = self._settings.budget.drop_all()
                if is_for_lack_of_compiled_code(error):
                    self._compile(descriptor, tree, leaves, rest)
                elif had_others and isinstance(error.__cause__, torch.OutOfMemoryError):
                    gc.collect()
                else:
                    raise
                entry, computed = self._capture(descriptor, tree, leaves, rest)
        else:
            entry.inputs.copy_from(leaves)
            with override_forward_context(entry.context):
                computed = self._wrapper(entry.tree, *rest)
        if entry.effects is not None:
            number = len(computed) - entry.effects.num_tensors
            entry.effects.after_replay([tensor.clone() for tensor in computed[number:]])
            computed = computed[:number]
        if self._settings.copy_outputs:
            computed = [tensor.clone() for tensor in computed]
        return entry, entry.plan.restore(leaves, computed)

    def _verified(
        self, descriptor: BatchDescriptor, tree: Any, leaves: list[Any], rest: tuple[Any, ...]
    ) -> Any:
        runs: list[Calls] = []

        def eager() -> Any:
            runs.append([])
            return self._run_eagerly(descriptor, tree, rest, runs[-1])

        failed = None
        with contextlib.nullcontext() if self._metrics is None else self._metrics.log_calls.held():
            try:
                verdict = verify(
                    eager,
                    lambda: self._run_graph(descriptor, tree, leaves, rest)[1],
                    self._module,
                    self._settings.backend,
                    self._settings.verification.tolerance,
                    self._metrics,
                    leaves,
                    self._settings.written(),
                )
            except CaptureError as error:
                failed = error
        if self._metrics is not None:
            self._metrics.log_calls.make(runs[0])
        if failed is not None:
            raise failed
        if verdict.difference:
            self._drop_from_budget(descriptor)
            raise VerificationError(
                f"stage {descriptor.stage!r}, {self._target}, shapes {descriptor.shapes()}: {verdict.difference}",
                verdict.output,
            )
        self._entries[descriptor].record.within_spread |= verdict.within_spread
        return verdict.output

    def _run_eagerly(
        self, descriptor: BatchDescriptor, tree: Any, rest: tuple[Any, ...], calls: Calls
    ) -> Any:
        with override_forward_context(ForwardContext(CUDAGraphMode.NONE, descriptor)):
            if self._metrics is None:
                return self._invoke(tree, *rest)
            return self._metrics.run_eagerly(lambda: self._invoke(tree, *rest), calls)

    def _compile(
        self, descriptor: BatchDescriptor, tree: Any, leaves: list[Any], rest: tuple[Any, ...]
    ) -> None:
        """Runs the call with static inputs, and takes it all back: for them ``torch.compile`` compiles anew, before a capture.

        They are other inputs to it where those of the loader are inference tensors, or autocast's cache is on.
        """
        inputs = self._static_inputs(tree, leaves)
        before = StepState(
            self._module, self._settings.backend, self._metrics, self._settings.written()
        )
        with autocast_cache_off():
            self._run_eagerly(descriptor, rebuild(tree, iter(inputs.leaves)), rest, [])
        before.restore()

    def _static_inputs(self, tree: Any, leaves: list[Any]) -> StaticInputs:
        inputs = StaticInputs(leaves, tree, self._settings.backend.device)
        inputs.copy_from(leaves)
        return inputs

    def graphs(self) -> list[CapturedGraph]:
        """All graphs."""
        return [entry.cudagraph for entry in self._wrapper.concrete_cudagraph_entries.values()]

    def _place(self, descriptor: BatchDescriptor) -> Place:
        return self._places.setdefault(descriptor, Place(functools.partial(self._drop, descriptor)))

    def _drop_from_budget(self, descriptor: BatchDescriptor) -> None:
        if (entry := self._entries.get(descriptor)) is not None:
            self._settings.budget.drop(entry.place)

    def _drop(self, descriptor: BatchDescriptor) -> None:
        """Forgets the graph of ``descriptor`` and frees its static inputs."""
        entry = self._entries.pop(descriptor)
        if entry.effects is not None:
            entry.effects.drop()
        self._wrapper.concrete_cudagraph_entries.pop(descriptor)

    def _capture(
        self, descriptor: BatchDescriptor, tree: Any, leaves: list[Any], rest: tuple[Any, ...]
    ) -> tuple[_Entry, list[Tensor]]:
        self._settings.before_capture()
        if any(map(is_compiled, self._module.modules())):
            self._compile(descriptor, tree, leaves, rest)
        inputs = self._static_inputs(tree, leaves)
        context = ForwardContext(self._mode, descriptor)
        static_tree = rebuild(tree, iter(inputs.leaves))
        began = time.perf_counter()
        self._capturing = inputs
        self._recording = None if self._metrics is None else self._metrics.record()
        prepared = (
            contextlib.nullcontext() if self._recording is None else self._recording.prepared()
        )
        try:
            with override_forward_context(context), prepared:
                if self._recording is not None and self._recording.may_check:
                    self._measure(self._recording, static_tree, rest)
                computed = self._wrapper(static_tree, *rest)
        finally:
            self._capturing = self._recording = None
        record = self._settings.stats.record(self._mode.name, self._target, descriptor)
        record.seconds += time.perf_counter() - began
        record.captures += 1
        record.bytes = (
            self._wrapper.concrete_cudagraph_entries[descriptor].cudagraph.num_bytes
            + inputs.num_bytes
        )
        assert self._plan is not None
        effects, self._effects = self._effects, None
        if effects is not None and self._metrics is not None:
            self._metrics.checks.add(effects.checks)
        place = self._place(descriptor)
        self._settings.budget.add(place)
        entry = self._entries[descriptor] = _Entry(
            inputs, static_tree, context, record, self._plan, effects, place
        )
        return entry, computed

    def _measure(self, recording: Recording, tree: Any, rest: tuple[Any, ...]) -> None:
        """Captures in order to see which checks there are; the graph is dropped."""
        options = self._settings.options
        self._settings.backend.capture(
            lambda: self._run(tree, *rest),
            collect_garbage=False,
            capture_error_mode=options.capture_error_mode,
        )
        recording.measured()

    def _run(self, tree: Any, *rest: Any) -> list[Tensor]:
        """What the wrapper captures: gives the computed tensors alone, and keeps the plan for the others."""
        assert self._capturing is not None, "the wrapper runs this in captures only"
        tensors: list[Tensor] = []
        if self._recording is None:
            output = self._invoke(tree, *rest)
        else:
            with self._recording.running():
                output = self._invoke(tree, *rest)
                self._effects = self._recording.finish()
            tensors = self._effects.take_tensors()
        self._plan, computed = OutputPlan.make(
            output, self._capturing.leaves, self._settings.module_storages()
        )
        return [*computed, *tensors]
