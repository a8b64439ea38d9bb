"""One module in one run: build, start and stop the parts that run its steps.

No policy is here: a session collects facts for the dispatcher, and does what it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Protocol

from torch import nn

from cg_lightning.backends import CapturedGraph, GraphBackend
from cg_lightning.capture.cache import GraphCache
from cg_lightning.capture.call import GraphCall
from cg_lightning.capture.capture import Capturer
from cg_lightning.capture.entry import GraphEntry
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import CompiledCodeError
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import Changed, Reason, Status
from cg_lightning.core.settings import Settings
from cg_lightning.diagnosis.detectors.undone_reads import AbandonedRun, UndoneReads
from cg_lightning.diagnosis.report import Diagnosis
from cg_lightning.diagnosis.watched_step import WatchedStep, WrittenTensors
from cg_lightning.diagnosis.watcher import StepWatcher
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.guards.comparisons import ComparedSource, Condition
from cg_lightning.guards.guard_set import GuardSet, Unguarded
from cg_lightning.guards.module_guard import Change
from cg_lightning.guards.recorded_setters import RecordedSetters
from cg_lightning.guards.sources import Source
from cg_lightning.guards.written_settings import WrittenSettings
from cg_lightning.host_values.host_copies import HostCopies
from cg_lightning.modules.compilation import Compilation
from cg_lightning.modules.kinds import is_metric
from cg_lightning.padding.leaves import PaddedLeaves
from cg_lightning.report.counts import Counts
from cg_lightning.runtime.changing_values import ChangingValues
from cg_lightning.runtime.examples import Examples
from cg_lightning.runtime.first_difference import FirstDifference
from cg_lightning.runtime.keys import Guards, KeyState, Variant
from cg_lightning.runtime.plans import GuardScope, Plan
from cg_lightning.runtime.profiling import Profiler, Ranges
from cg_lightning.runtime.stage_length import StageLength
from cg_lightning.runtime.submodule_runner import SubmoduleRunner
from cg_lightning.runtime.submodules import Submodules
from cg_lightning.runtime.target import GraphTarget, TargetParts
from cg_lightning.runtime.targets import match_targets
from cg_lightning.runtime.verifier import Replayed, Verdict, Verifier


class Piece(Protocol):
    """A submodule that is padded in steps that are not."""

    def install(self) -> None:
        """Intercept it; idempotent."""

    def remove(self, check: bool) -> None:
        """Leave no trace. ``check`` is as in :meth:`Session.remove`."""

    def close(self) -> None:
        """Drop all graphs."""


_FIRST_REST = 4
"""After so many steps in a row that ask no guards, nothing is intercepted for them."""
_BATCH_INDEX = "batch_idx"
NO_TARGET = Reason(
    Status.NO_TARGET,
    "no submodule with parameters was called (those of torch.jit cannot be captured)",
)
_MAY_READ = (
    "the step may read a value of its batch that is another one in each batch: it handles errors, "
    "or asks for classes"
)


class Session:
    """Runtime state for one module: the dispatcher, the graphs, the submodules, and counters.

    The dispatcher decides (:class:`~cg_lightning.runtime.dispatcher.CUDAGraphDispatcher`). If
    submodules or hooks were replaced, all keys start again. If only the addresses of parameters
    have changed, graphs are captured again.

    Args:
        module: The LightningModule, or any module.
        backend: Captures and replays.
        settings: The options.
        stats: Counts.
        effects: The side effects of the steps.
        profiler: The profiler of the Trainer, if it has one.
        sharing: The session of a larger module, whose graphs, host copies, ranges and stages it
            shares.
        has_backward: Whether the steps compute their gradients themselves.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: GraphBackend,
        settings: Settings,
        stats: Counts,
        effects: ModuleEffects,
        profiler: Profiler | None = None,
        *,
        has_backward: bool = False,
        sharing: Session | None = None,
    ) -> None:
        self.ranges: Ranges = Ranges(backend, profiler) if sharing is None else sharing.ranges
        self.module = module
        self.backend = backend
        self.settings = settings
        self.stats = stats
        self.effects = effects
        self.cache: GraphCache = (
            GraphCache(backend, settings.max_graphs, settings.max_graph_bytes)
            if sharing is None
            else sharing.cache
        )
        self.watcher = StepWatcher(module, backend, effects=effects, has_backward=has_backward)
        self.changing_values = ChangingValues()
        self._written_settings = WrittenSettings()
        self._recorded_setters = RecordedSetters()
        self.host_copies: HostCopies = HostCopies() if sharing is None else sharing.host_copies
        self.written = WrittenTensors()
        """Tensors, other than buffers, that steps were seen to write to."""
        self.compilation: Compilation = (
            Compilation(settings.compile_arguments, stats, only_captures=settings.pads)
            if sharing is None
            else sharing.compilation
        )
        self.is_part = sharing is not None
        """Whether the module is a part of a larger one, whose steps are counted."""
        capturer = Capturer(
            backend, settings, self.cache, self.written, self._watch_compiled, self.compilation
        )
        is_compiled = settings.compile_arguments is not None
        tolerance = "close" if is_compiled else settings.verify_tolerance
        first = FirstDifference(capturer, backend)
        self._verifier = Verifier(backend, tolerance, self.written, self.compilation, first)
        may_drop = not settings.strict and backend.stopwatch(0.0) is not None
        parts = TargetParts(capturer, self._verifier, stats, self._written_settings)
        min_saving = settings.min_saving if may_drop else 0.0
        self.target = GraphTarget(module, CUDAGraphMode.FULL, parts, effects, min_saving)
        self._submodules = Submodules(parts, backend, self.ranges)
        self.pieces: dict[tuple[str, int], Piece] = {}
        """Submodules that are padded, by stage and ``id`` of the module."""
        self.stage_length: StageLength | None = None if sharing is None else sharing.stage_length
        """Knows how many batches of a stage are left; None: captures need not pay within it."""
        self._is_installed = False
        self._weights: list[int] = []
        """The versions of parameters and buffers when the latest stage began, if batches are
        padded."""
        self._arguments: dict[str, Any] = {}
        """The arguments of the current step that guards compare, by name."""
        self.examples: Examples | None = None
        """Batches to capture ahead; None: none."""
        self.is_first_step = True
        """True until the first step after :meth:`install` or :meth:`begin_epoch`."""
        self.is_resting = False
        """Whether nothing is intercepted for guards, because no step asks them."""
        self._rests_after = _FIRST_REST

    def set_batch_index(self, batch_idx: Any) -> None:
        """Store the ``batch_idx`` of the current step for the guards."""
        self._arguments[_BATCH_INDEX] = batch_idx

    def install(self) -> None:
        """Intercept all submodules that are known to run from graphs."""
        if not self._is_installed:
            self.begin_epoch()
            self.ranges.begin_stage()
            if self.settings.pads:
                self._note_weights()
        self._is_installed = True
        if not self.is_part:
            self.compilation.install(self.module)
        targets = self.settings.targets
        if self.settings.runtime_policy.has_piecewise_cudagraphs() and targets is not None:
            self._submodules.add(match_targets(self.module, tuple(targets))[0])
        self._submodules.install()
        self._written_settings.install()
        self._recorded_setters.install()
        self.is_resting = False
        for piece in self.pieces.values():
            piece.install()

    def rest(self, steps: int) -> None:
        """Intercept nothing for guards, if there is no graph to guard.

        Args:
            steps: Number of steps in a row that have asked no guards.
        """
        if steps < self._rests_after or self.pieces or self.cache.entries():
            return
        self.is_resting = True
        self._written_settings.remove()
        self._recorded_setters.remove()

    def wake(self) -> None:
        """Intercept again. The next step compares what is compared once per epoch."""
        self._rests_after *= 2  # what an epoch compares takes long
        self.install()
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Let the next step compare what is compared once per epoch."""
        self.is_first_step = True

    def _note_weights(self) -> None:
        """Let padded graphs be compared again if weights have changed since the last stage.

        If a branch is multiplied by a weight of 0, a comparison cannot find an error in it.
        """
        tensors = [*self.module.parameters(), *self.module.buffers()]
        versions = [0 if each.is_inference() else each._version for each in tensors]
        if versions != self._weights:
            self._weights = versions
            self.target.dispatcher.compare_padded_again()

    def add_piece(self, key: tuple[str, int], piece: Piece) -> None:
        """Intercept a submodule that is padded, from now on."""
        self.pieces[key] = piece
        if self._is_installed:
            piece.install()

    def remove(self, check: bool = True) -> None:
        """Leave no trace in any submodule. Graphs are kept for the next stage.

        Args:
            check: Raise the errors of deferred checks of metrics. Pass False while another
                exception is handled.
        """
        self._is_installed = False
        self._submodules.remove()
        for piece in self.pieces.values():
            piece.remove(check)
        if not self.is_part:
            self.compilation.remove()
        self._written_settings.remove()
        self._recorded_setters.remove()
        self.host_copies.clear()
        self.effects.release(check)

    def close(self) -> None:
        """Drop every graph."""
        self.remove(check=False)
        for piece in self.pieces.values():
            piece.close()
        self.pieces.clear()
        self.cache.drop_all()
        self.effects.close()
        self.target.dispatcher.reset()
        self._written_settings.clear()
        self._submodules.clear()

    def check_module(self) -> None:
        """Find out how the module has changed.

        Call it at the first step of a stage, and after the module's guard has failed.
        """
        guard = self.target.guard
        if not guard.check():
            failure = guard.failure()
            self._module_changed(failure.change, failure.text)
        if self.is_first_step:
            self.is_first_step = False
            epoch_failure = guard.check_epoch()
            if epoch_failure is not None:
                self._module_changed(epoch_failure.change, epoch_failure.text)
            self._drop(self.target.dispatcher.begin_epoch())
            self._submodules.begin_epoch()

    def take_settings(self) -> bool:
        """Accept the current settings of submodules, if no graph depends on what has changed.

        Returns:
            False if a graph may have frozen a setting whose change was not recorded.
        """
        guard, written = self.target.guard, self._written_settings.written
        if self.cache.entries() and not all(key in written for key in guard.settings.changed()):
            return False
        guard.settings.take_held()
        return True

    def _module_changed(self, change: Change, text: Changed) -> None:
        self.target.guard.refresh()
        if change is Change.MOVED:
            # submodules have guards of their own
            self.target.dispatcher.changed(text)
            self._drop(self.target.dispatcher.entries())
            return
        self.cache.drop_all()
        self.compilation.compile_again()
        self.target.dispatcher.reset(text)
        self.changing_values = ChangingValues()
        self.written.clear()
        self._written_settings.clear()
        self._submodules.clear(text)
        for piece in self.pieces.values():
            piece.close()
        self.pieces.clear()
        if self._is_installed:
            self.install()

    def _drop(self, entries: Iterable[object]) -> None:
        for entry in entries:
            if isinstance(entry, GraphEntry):  # the graph of a padded entry belongs to another key
                self.cache.drop(entry)

    def watched(
        self,
        plan: Plan,
        watched: WatchedStep,
        padding: PaddedLeaves | None = None,
        in_pieces: Reason | None = None,
    ) -> None:
        """Report a watched step to the dispatcher, and find the submodules to capture.

        Args:
            plan: The decision to watch.
            watched: The watched step.
            padding: How its batch is padded, if it is to run from the graph of a padded batch.
            in_pieces: Why only its submodules are padded; None if it is padded whole, or not.
        """
        if plan.variant is None and plan.state.variants and not plan.state.has_other_host_value():
            self.compilation.compile_again()
        full = self.full_reason(plan.state, watched) or in_pieces
        piecewise = None
        if self.settings.targets is None and not watched.largest_capturable():
            obstacle = watched.obstacle()
            piecewise = NO_TARGET
            if obstacle is not None:
                path, finding = obstacle
                piecewise = finding.reason().of_submodule(path)
        self.target.copies_from_host |= watched.copies_from_host()
        self.target.guard.add_classes(watched.classes.values())
        for generator in watched.generators:
            self.backend.follow(generator)
        dispatcher = self.target.dispatcher
        judged = dispatcher.judge_watched(plan.state, full, piecewise, padding is not None)
        is_full = CUDAGraphMode.FULL in judged.modes
        if full is not None and full.kind is Status.VALUE_READ:
            self.changing_values.note_read(plan.state.descriptor)
        variant = Variant(
            self._guards(watched, judged.guards),
            judged.modes,
            judged.reason,
            watched.needs_second_look,
            watched.did_one_time_work,
            watched,
            path=watched.path if is_full else None,
            padding=padding,
            trial=judged.trial,
        )
        if variant.path is not None and watched.path is not None:
            watched.path.use(self.host_copies)
        self._drop(dispatcher.watched(plan.state, variant, plan.variant))
        self.written.update(watched.written)
        if not is_full and in_pieces is None:
            self.find_submodules(plan.state.descriptor, variant, plan.state.warmup_runs)
        elif dispatcher.wants_pieces(plan.state, variant):
            # now, because the guards of submodules need the values that the watched step has read
            self.find_submodules(
                plan.state.descriptor,
                dispatcher.add_pieces(plan.state, watched),
                plan.state.warmup_runs,
            )

    def _guards(self, watched: WatchedStep, scope: GuardScope) -> Guards:
        """Return the guards of a watched step."""
        if scope is GuardScope.NONE:
            return Unguarded()
        of_trainer_only = scope is GuardScope.TRAINER
        compared, sources = watched.compared(), watched.sources()
        if watched.comparisons:
            source = Source(self._arguments, _BATCH_INDEX, _BATCH_INDEX)
            compared.append(ComparedSource(source, watched.comparisons, Cause.BATCH_INDEX_USED))
        if of_trainer_only:
            sources = [each for each in sources if each.belongs_to_trainer]
        late = {id(metric): metric for unit in watched.late for metric in unit.metrics}
        modules = [
            (path, module)
            for path, module in self.module.named_modules()
            if not of_trainer_only and id(module) not in late
        ]
        guards = self._guard_set(sources, compared, modules, late.values())
        return Unguarded() if of_trainer_only and guards.is_empty else guards

    def _guard_set(
        self,
        sources: Iterable[Source],
        compared: Iterable[Condition],
        modules: Iterable[tuple[str, nn.Module]],
        left_out: Iterable[nn.Module] = (),
    ) -> GuardSet:
        """Return guards of values that were read in Python, and of the settings of modules.

        Modules that are ``left_out`` of the graph have none.
        """
        named = list(modules)
        self._record_settings_of(named)
        settings = self._written_settings.frozen(named)
        inside = [*self.target.guard.modules, *left_out]
        guards = GuardSet(sources, inside, compared, settings)
        self._written_settings.add((type(each).__name__, each) for each in guards.hidden_modules)
        return guards

    def _record_settings_of(self, named: list[tuple[str, nn.Module]]) -> None:
        """Note from now on which settings of modules are written."""
        if not self._written_settings.contains(named):
            self.target.guard.check_epoch()  # earlier writes were not recorded
            self._written_settings.add(named)

    def _watch_compiled(self, module: nn.Module, run: Callable[[], Any], batch: Any) -> GuardSet:
        """Run a call of ``module`` as it is written, and return guards of what it reads.

        Raises:
            CompiledCodeError: Its code does what a graph would freeze.
        """
        watcher = StepWatcher(module, self.backend, effects=None, detectors=(UndoneReads,))
        try:
            _, watched = watcher.watch(run, batch)
        except AbandonedRun as abandoned:
            raise CompiledCodeError(abandoned.reason) from None
        if watched.findings:
            raise CompiledCodeError(watched.findings[0].reason())
        guards = GuardSet(watched.sources(), self.target.guard.modules)
        self._written_settings.add((type(each).__name__, each) for each in guards.hidden_modules)
        return guards

    def full_reason(self, state: KeyState, watched: WatchedStep) -> Reason | None:
        """Return why a watched step cannot be one graph; None if it can."""
        if state.without_batch is not None:
            return state.without_batch
        if watched.findings:
            return watched.findings[0].reason()
        for kind in self.changing_values.kinds_passed_on(state.descriptor):
            _, line = watched.kinds_compared.get(id(kind), (kind, ""))
            if where := watched.unseen_use or line:
                return Reason(Status.VALUE_READ, _MAY_READ, where)
        varying = None if watched.path is None else state.varying()
        return varying or self.changing_values.reason(state.descriptor)

    def find_submodules(self, step: BatchDescriptor, variant: Variant, runs: int) -> None:
        """Intercept the submodules of a watched step, and pass each one its findings.

        Args:
            step: The key of the step.
            variant: The result of watching.
            runs: Number of steps with this key so far.
        """
        watched = variant.watched
        if CUDAGraphMode.PIECEWISE not in variant.modes or watched is None:
            return
        if self.settings.targets is None:
            # a submodule that reads a new value each time stays eager; its inner ones need not
            varying = self._submodules.varying_sources(step)
            self._submodules.add(watched.largest_capturable(besides=varying))
        allowed: dict[SubmoduleRunner, list[tuple[str, nn.Module]]] = {}
        for runner in self._submodules.runners():
            findings = watched.findings_of(runner.path)
            if findings:
                runner.refuse(step, findings[0].reason().of_submodule(runner.path))
            elif findings is not None:
                # in pieces, metrics are never in a graph
                named = runner.module.named_modules(prefix=runner.path)
                allowed[runner] = [(path, each) for path, each in named if not is_metric(each)]
        self._record_settings_of([*chain.from_iterable(allowed.values())])
        for runner, inside in allowed.items():
            module = runner.module
            runner.target.copies_from_host |= watched.copies_from_host(module)
            guards = self._guard_set(watched.sources(module), watched.compared(module), inside)
            runner.allow(step, guards, watched.keys_of_calls(module), runs)

    def compare(
        self,
        name: str,
        plan: Plan,
        call: GraphCall,
        get_entry: Callable[[], Replayed],
        padded: GraphCall,
    ) -> Verdict:
        """Compare a whole step with eager.

        Args:
            name: The name of the step in the statistics.
            plan: The decision.
            call: The step.
            get_entry: See :meth:`Verifier.check`.
            padded: The step with the padded batch, whose graph is compared.
        """
        target = self.target.capture_target(name, plan, padded)
        return self._verifier.check(target, call, get_entry, self.cache.step)

    def difference(self, found: Any, expected: Any) -> str:
        """Return the first leaf of an output that differs from eager's; empty if none does."""
        return self._verifier.difference(found, expected)

    def settle(self, plan: Plan) -> None:
        """Find out if graphs pay, after a step whose time was taken. Drop those that do not."""
        variant = plan.variant
        assert variant is not None and variant.trial is not None  # noqa: PT018
        entry = variant.entry
        settled = self.target.dispatcher.settle(plan.state, variant)
        if settled is None:
            return
        if isinstance(entry, GraphEntry):
            entry.record.saved(settled.saving)
        for piece, saving in settled.pieces.items():
            piece.note_saving(plan.state.descriptor, saving)
        unused = list(settled.entries)
        for piece in settled.left_alone:
            unused += piece.leave_alone(plan.state.descriptor, settled.pieces[piece])
        if self.settings.copy_outputs:  # or else the user may still read what is in their memory
            self._drop(unused)

    def graphs(self, mode: str) -> list[CapturedGraph]:
        """Return the stored graphs of one mode."""
        return [entry.graph for entry in self.cache.entries() if entry.record.mode == mode]

    def diagnosis(self, variant: Variant | None) -> Diagnosis | None:
        """Return the diagnosis of a variant's watched step; None if no step was watched."""
        if variant is None or variant.watched is None:
            return None
        return Diagnosis(list(variant.watched.findings), "", variant.watched)
