"""What is known of one module while a Trainer runs it: decisions, graphs and counts."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections import Counter
from typing import Any

from torch import nn

from cg_lightning.backends import GraphBackend
from cg_lightning.capture.cache import GraphBudget
from cg_lightning.capture.wrapper import CUDAGraphOptions
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor, KnownDescriptors
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.diagnosis.detectors.batch_index import uses_batch_index
from cg_lightning.diagnosis.report import Diagnosis
from cg_lightning.diagnosis.watched_step import Observation
from cg_lightning.diagnosis.watcher import Observer
from cg_lightning.diagnosis.written_tensors import WrittenTensors
from cg_lightning.effects.step_metrics import StepMetrics
from cg_lightning.guards.module_guard import Change, ModuleState
from cg_lightning.report.stats import CUDAGraphStats
from cg_lightning.runtime.changing_values import ChangingValues
from cg_lightning.runtime.dispatcher import UNKNOWN_KEY, CUDAGraphDispatcher, Dispatch
from cg_lightning.runtime.graphed_call import GraphSettings
from cg_lightning.runtime.submodule_runner import PiecewiseTarget
from cg_lightning.runtime.targets import match_targets
from cg_lightning.runtime.verifier import VerificationSettings

WARM_UP = "warm-up"
_collect_once = functools.cache(
    gc.collect
)  # before the first capture of a process: it takes longer than ten captures
_CAPTURE = 4
"""A capture takes as long as about so many eager steps."""
_MOST_UNREST = 24
"""More than so many steps of late spent on captures for nothing: it is better not to capture."""
EFFECTS = {"log": Cause.LOGGED, "log_dict": Cause.LOGGED, "print": Cause.PRINTED}
"""Methods of a LightningModule whose call a graph would freeze."""


@dataclasses.dataclass(frozen=True)
class SessionSettings:
    """The callback's arguments that concern the steps."""

    mode: CUDAGraphMode
    targets: tuple[str, ...] | None
    warmup_steps: int
    copy_outputs: bool
    max_graphs: int
    strict: bool
    verification: VerificationSettings
    sync_free_metrics: bool
    options: CUDAGraphOptions


class Session:
    """Decides for each key in which mode its steps run, and holds what they share.

    A key is decided once it is warm. It is decided anew when submodules or parameters were replaced; when they only lie
    elsewhere, its graphs are captured anew.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: GraphBackend,
        settings: SessionSettings,
        stats: CUDAGraphStats,
    ) -> None:
        self.backend = backend
        self.settings = settings
        self.stats = stats
        self.budget = GraphBudget(settings.max_graphs, backend.synchronize)
        self.module = module
        self.state = ModuleState(module)
        self.metrics = StepMetrics(module, backend.device, settings.sync_free_metrics)
        self.observer = Observer(
            module,
            backend.device.type,
            backend.noticing_host_syncs,
            EFFECTS,
            metrics=self.metrics,
        )
        self.graph_settings = GraphSettings(
            backend,
            settings.options,
            settings.copy_outputs,
            self.budget,
            stats,
            self.state.storage_addresses,
            lambda: self._written.now(),
            (lambda: None) if settings.options.gc_disable else _collect_once,
            settings.verification,
            self.metrics,
        )
        self._full_refused: dict[str | None, str] = {}
        self._installed = False
        self._is_first_step = True
        self._unrest = 0
        """How often the module changed of late, in steps that dropping its graphs has cost."""
        self._change = ""
        self._piecewise: dict[int, PiecewiseTarget] = {}
        self._forget()

    def _forget(self) -> None:
        for target in self._piecewise.values():
            target.remove()
        self._piecewise = {}
        self._dispatcher = CUDAGraphDispatcher()
        self.known: KnownDescriptors = {}
        """Descriptors whose mode is decided."""
        self._sights: Counter[BatchDescriptor] = Counter()
        self._observations: dict[BatchDescriptor, Observation] = {}
        self._written = WrittenTensors()
        self._values = ChangingValues()

    def note_step(self, stage: str, name: str) -> None:
        """Looks at the step method of a stage, before any of its batches."""
        if self.settings.mode.has_full_cudagraphs() and uses_batch_index(self.module, name):
            self._full_refused[stage] = (
                f"{Cause.BATCH_INDEX_USED.value}: {name} does more with it than pass it on"
            )

    def install(self) -> None:
        """Intercepts the submodules that run from graphs, as far as they are known."""
        if not self._installed:
            self._is_first_step = True
        self._installed = True
        if self.settings.mode.has_piecewise_cudagraphs() and self.settings.targets is not None:
            self._add_targets(match_targets(self.module, self.settings.targets)[0], None, 0)
        for target in self._piecewise.values():
            target.install()

    def remove(self, check: bool = True) -> None:
        """Leaves no trace in any submodule. Graphs are kept for the next stage.

        Args:
            check: Raise what metrics would have refused in the meantime; not on the way out of another exception.
        """
        self._installed = False
        for target in self._piecewise.values():
            target.remove()
        self.metrics.release(check)

    def close(self) -> None:
        """Drops every graph."""
        self.remove(check=False)
        self.budget.drop_all()
        self.metrics.close()
        self._forget()

    def begin_step(self) -> None:
        """Looks whether the module is still what the graphs were captured of."""
        self.budget.step += 1
        change = self.state.look()
        if self._is_first_step:
            self._is_first_step = False
            closer = self.state.look_closely()
            change = closer if change is Change.NOTHING else change
        if change is Change.NOTHING:
            self._unrest -= self._unrest > 0
            return
        self.budget.drop_all()
        if self._unrest <= _MOST_UNREST:
            found = [finding for seen in self._observations.values() for finding in seen.findings]
            rebound = [str(finding) for finding in found if finding.cause is Cause.STATE_REBOUND]
            self._change = rebound[0] if rebound and change is Change.REPLACED else change.value
        self._unrest = min(self._unrest + _CAPTURE, 2 * _MOST_UNREST)
        if change in (Change.REPLACED, Change.SETTINGS):
            self._forget()
            self.install()
        for target in self._piecewise.values():
            target.remember()

    def dispatch(self, descriptor: BatchDescriptor, batch: Any) -> Dispatch:
        """Gives the mode of a step whose key is decided, else NONE with the reason ``warm-up``."""
        if self._unrest > _MOST_UNREST:
            return Dispatch(CUDAGraphMode.NONE, descriptor, f"again and again, {self._change}")
        dispatch = self._dispatcher.dispatch(descriptor)
        if dispatch.reason != UNKNOWN_KEY:
            return dispatch
        descriptor = self._values.generalize(descriptor, batch, descriptor in self._sights)
        dispatch = self._dispatcher.dispatch(descriptor)
        if dispatch.reason != UNKNOWN_KEY:
            return dispatch
        if not self._is_warm(descriptor):
            return Dispatch(CUDAGraphMode.NONE, descriptor, WARM_UP)
        self._decide(descriptor)
        self.known[descriptor.fields] = descriptor
        return self._dispatcher.dispatch(descriptor)

    def wants_observation(self, descriptor: BatchDescriptor) -> bool:
        """Whether the next warm-up step of this key should be watched."""
        seen = self._observations.get(descriptor)
        return seen is None or seen.may_settle

    def warmed_up(self, descriptor: BatchDescriptor, observation: Observation | None) -> None:
        """Notes an eager step of a key that is not decided yet."""
        self._sights[descriptor] += 1
        if observation is None:
            return
        self._observations[descriptor] = observation
        self._written.update(observation.written)
        mode = self.settings.mode
        runs_full = mode.has_full_cudagraphs() and not self._why_no_whole_step(descriptor)
        if mode.has_piecewise_cudagraphs() and not runs_full:
            self._find_targets(descriptor)

    def _why_no_whole_step(self, descriptor: BatchDescriptor) -> list[str]:
        findings = [str(finding) for finding in self._observations[descriptor].findings]
        others = (self._full_refused.get(descriptor.stage), self._values.reasons.get(descriptor))
        return [*findings, *[reason for reason in others if reason]]

    def refuse_full(self, descriptor: BatchDescriptor, reason: str) -> None:
        """Runs the key lower from now on."""
        self._dispatcher.refuse(CUDAGraphMode.FULL, descriptor, reason)
        if self.settings.mode.has_piecewise_cudagraphs():
            self._decide_piecewise(descriptor, reason)

    def diagnosis(self, descriptor: BatchDescriptor | None) -> Diagnosis | None:
        """What the watched step of a key showed; None where none was watched."""
        observation = None if descriptor is None else self._observations.get(descriptor)
        return (
            None if observation is None else Diagnosis(list(observation.findings), "", observation)
        )

    def why_no_graph(self) -> str:
        """Why a step in mode PIECEWISE ran no graph."""
        reasons = {
            reason: None
            for target in self._piecewise.values()
            for reason in target.reasons.values()
        }
        return (
            "; ".join(reasons)
            or "no target was called with a warm key; calls from compiled code do not count"
        )

    def _is_warm(self, descriptor: BatchDescriptor) -> bool:
        observation = self._observations.get(descriptor)
        needed = max(
            self.settings.warmup_steps, 2 if observation is not None and observation.settles else 1
        )
        return observation is not None and self._sights[descriptor] >= needed

    def _decide(self, descriptor: BatchDescriptor) -> None:
        mode = self.settings.mode
        findings = self._why_no_whole_step(descriptor)
        if mode.has_full_cudagraphs() and not findings:
            self.state.watch(self._observations[descriptor].reads())
            self._dispatcher.add_cudagraph_key(CUDAGraphMode.FULL, descriptor)
        elif mode.has_piecewise_cudagraphs():
            self._decide_piecewise(descriptor, findings[0] if findings else "")
        else:
            self._dispatcher.refuse(CUDAGraphMode.FULL, descriptor, findings[0])

    def _decide_piecewise(self, descriptor: BatchDescriptor, reason: str) -> None:
        self._find_targets(descriptor)
        if (
            self.settings.targets is None
            and not self._observations[descriptor].largest_capturable()
        ):
            why = (
                reason
                or "the step calls no submodule that has parameters; those of torch.jit do not count"
            )
            self._dispatcher.refuse(CUDAGraphMode.PIECEWISE, descriptor, why)
        else:
            self._dispatcher.add_cudagraph_key(CUDAGraphMode.PIECEWISE, descriptor, reason)

    def _find_targets(self, descriptor: BatchDescriptor) -> None:
        """Adds the targets that the watched step of a key showed, and tells each target what was found in it."""
        observation = self._observations[descriptor]
        if self.settings.targets is None:
            self._add_targets(
                observation.largest_capturable(), observation, self._sights[descriptor]
            )
        for target in self._piecewise.values():
            findings = observation.findings_of(target.path)
            if findings == []:
                reads = observation.reads(target.module)
                self.state.watch(reads)
                target.watch(reads)
            target.note_findings(
                descriptor, None if findings is None else [str(finding) for finding in findings]
            )

    def _add_targets(
        self, targets: dict[str, nn.Module], observation: Observation | None, sights: int
    ) -> None:
        for path, module in targets.items():
            target = self._piecewise.get(id(module))
            if target is None:
                target = PiecewiseTarget(
                    path, module, self.settings.warmup_steps, self.graph_settings
                )
                self._piecewise[id(module)] = target
            if observation is not None:
                target.note_sights(observation.keys_of_calls(module), sights)
            if self._installed:
                target.install()
