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
from cg_lightning.effects.effect import Effect, methods
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.effects.recorder import NoEffects, Recorder
from cg_lightning.effects.step_state import StepState
from cg_lightning.modules.compiled import is_compiled, is_for_lack_of_compiled_code
from cg_lightning.report.stats import CUDAGraphStats, EntryRecord
from cg_lightning.runtime.verifier import VerificationSettings, verify


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
    metrics: ModuleEffects | None = None
    """What whole steps leave behind beside their output; None: nothing, so that a call that does is not captured."""


@dataclasses.dataclass
class _Entry:
    inputs: StaticInputs
    tree: Any
    context: ForwardContext
    record: EntryRecord
    plan: OutputPlan
    effects: list[Effect]
    num_effect_tensors: int
    place: Place
    replays: int = 0

    def __post_init__(self) -> None:
        self.is_valid = methods(self.effects, "is_valid")
        self.before_replay = methods(self.effects, "before_replay")
        self.after_replay = methods(self.effects, "after_replay")


def _call(function: Callable[[], Any]) -> Any:
    return function()


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
        self._recorder: Recorder | None = None
        self._effects: list[Effect] = []
        self._num_effect_tensors = 0

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
        if entry is None or not all(is_valid() for is_valid in entry.is_valid):
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
            for before_replay in entry.before_replay:
                before_replay()
            with override_forward_context(entry.context):
                computed = self._wrapper(entry.tree, *rest)
        number = len(computed) - entry.num_effect_tensors
        tensors = iter([tensor.clone() for tensor in computed[number:]])
        computed = computed[:number]
        for after_replay in entry.after_replay:
            after_replay(tensors)
        if self._settings.copy_outputs:
            computed = [tensor.clone() for tensor in computed]
        return entry, entry.plan.restore(leaves, computed)

    def _verified(
        self, descriptor: BatchDescriptor, tree: Any, leaves: list[Any], rest: tuple[Any, ...]
    ) -> Any:
        with contextlib.ExitStack() as stack:
            run: Callable[[Callable[[], Any]], Any] = _call
            if self._metrics is not None:
                run = stack.enter_context(self._metrics.comparing()).run
            verdict = verify(
                lambda: run(lambda: self._run_eagerly(descriptor, tree, rest)),
                lambda: self._run_graph(descriptor, tree, leaves, rest)[1],
                self._module,
                self._settings.backend,
                self._settings.verification.tolerance,
                self._metrics,
                leaves,
                self._settings.written(),
            )
        if verdict.difference:
            self._drop_from_budget(descriptor)
            raise VerificationError(
                f"stage {descriptor.stage!r}, {self._target}, shapes {descriptor.shapes()}: {verdict.difference}",
                verdict.output,
            )
        self._entries[descriptor].record.within_spread |= verdict.within_spread
        return verdict.output

    def _run_eagerly(self, descriptor: BatchDescriptor, tree: Any, rest: tuple[Any, ...]) -> Any:
        with override_forward_context(ForwardContext(CUDAGraphMode.NONE, descriptor)):
            return self._invoke(tree, *rest)

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
            run = _call if self._metrics is None else self._metrics.rehearse
            run(lambda: self._run_eagerly(descriptor, rebuild(tree, iter(inputs.leaves)), rest))
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
        for effect in entry.effects:
            effect.drop()
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
        self._recorder = NoEffects() if self._metrics is None else self._metrics.recorder()
        try:
            with override_forward_context(context), self._recorder.prepared():
                # not through the wrapper, which replays what it has captured
                capture = functools.partial(
                    self._wrapper._capture,
                    self._settings.backend,
                    descriptor,
                    (static_tree, *rest),
                    {},
                )
                capture()
                if self._recorder.has_unreserved_checks:
                    self._effects = []
                    self._wrapper.concrete_cudagraph_entries.pop(descriptor)
                    self._recorder.reserve_checks()
                    capture()
                computed = self._wrapper(static_tree, *rest)
        finally:
            self._capturing = self._recorder = None
        record = self._settings.stats.record(self._mode.name, self._target, descriptor)
        record.seconds += time.perf_counter() - began
        record.captures += 1
        record.bytes = (
            self._wrapper.concrete_cudagraph_entries[descriptor].cudagraph.num_bytes
            + inputs.num_bytes
        )
        assert self._plan is not None
        effects, self._effects = self._effects, []
        place = self._place(descriptor)
        self._settings.budget.add(place)
        entry = self._entries[descriptor] = _Entry(
            inputs,
            static_tree,
            context,
            record,
            self._plan,
            effects,
            self._num_effect_tensors,
            place,
        )
        return entry, computed

    def _run(self, tree: Any, *rest: Any) -> list[Tensor]:
        """What the wrapper captures: gives the computed tensors alone, and keeps the plan for the others."""
        assert self._capturing is not None, "the wrapper runs this in captures only"
        assert self._recorder is not None
        with self._recorder.step() as recording:
            output = self._invoke(tree, *rest)
            self._effects, tensors = recording.finish()
        self._num_effect_tensors = len(tensors)
        self._plan, computed = OutputPlan.make(
            output, self._capturing.leaves, self._settings.module_storages()
        )
        return [*computed, *tensors]
