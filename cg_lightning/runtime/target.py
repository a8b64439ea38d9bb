"""A step or a submodule that may run from graphs."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import MutableMapping
from typing import NamedTuple

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from cg_lightning.capture.call import CaptureTarget, GraphCall
from cg_lightning.capture.capture import Capturer
from cg_lightning.capture.entry import GraphEntry
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import (
    CaptureError,
    CompiledCodeError,
    NoRoomError,
    StateLeftError,
    UnkeyableBatchError,
    ValueReadError,
)
from cg_lightning.core.kernel_flags import differing_flag
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import NO_CHANGE, Changed, Reason, Status
from cg_lightning.core.tree import leaf_paths
from cg_lightning.diagnosis.findings import location_of
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.effects.side_effects import SideEffects
from cg_lightning.guards.guard_set import GuardSet
from cg_lightning.guards.module_guard import ModuleGuard
from cg_lightning.guards.sources import describe_change
from cg_lightning.guards.written_settings import WrittenSettings
from cg_lightning.host_values.path import ReadPath
from cg_lightning.report.counts import Counts
from cg_lightning.report.records import EntryRecord
from cg_lightning.runtime.costs import CostsOfRuns
from cg_lightning.runtime.dispatcher import CUDAGraphDispatcher
from cg_lightning.runtime.outcome import Outcome
from cg_lightning.runtime.plans import Action, Plan
from cg_lightning.runtime.verifier import Verdict, Verifier

_costs_of_runs: MutableMapping[nn.Module, CostsOfRuns] = WeakIdKeyDictionary()
_MOST_MOVES = 2
"""After so many moves of an input, a submodule's graphs copy their inputs."""
_NEW_RUN = Changed("a new run, since graphs live as long as their run")
_DROPPED = Changed("its graph was dropped, to make room for another one")


def _reason_of_capture(error: CaptureError) -> Reason:
    """Return the reason for a failed capture, with the user's line that failed."""
    where = location_of(error)
    if where is None:
        return Reason(Status.CAPTURE_FAILED, str(error))
    return Reason(
        Status.CAPTURE_FAILED,
        f"{error} ({where})",
        where.user,
        library_location=where.library,
    )


def reason_of(error: Exception) -> Reason:
    """Return the reason for an error that a capture or a key has raised."""
    kind: Status | Cause = Status.CAPTURE_FAILED
    if isinstance(error, UnkeyableBatchError):
        kind = Status.NO_KEY
    elif isinstance(error, StateLeftError):
        kind = Cause.STATE_REBOUND
    elif isinstance(error, NoRoomError):
        kind = Status.EVICTED
    elif isinstance(error, CompiledCodeError):
        return error.reason
    elif isinstance(error, ValueReadError):
        return Reason(Status.VALUE_READ, str(error), error.location, leaf=error.leaf)
    elif isinstance(error, CaptureError):
        return _reason_of_capture(error)
    return Reason(kind, str(error))


class TargetParts(NamedTuple):
    """What all targets of one session use."""

    capturer: Capturer
    """Captures; it has the options and the cache."""
    verifier: Verifier
    """Compares with eager."""
    stats: Counts
    """Counts."""
    written_settings: WrittenSettings | None = None
    """See :class:`~cg_lightning.guards.module_guard.ModuleGuard`."""


class GraphTarget:
    """Captures and verifies calls of one step or submodule, and reports to its dispatcher.

    Both runners use it: :class:`~cg_lightning.runtime.step_runner.StepRunner` and
    :class:`~cg_lightning.runtime.submodule_runner.SubmoduleRunner` only adapt arguments and
    context. A plain replay does not pass through this class: the runner replays the entry itself.

    Args:
        module: The module whose state a call may change.
        mode: PIECEWISE or FULL.
        parts: What all targets of a session use.
        effects: The side effects of whole steps; None for a submodule.
        min_saving: The share of a step's time that graphs must save; 0: times are not compared.
    """

    def __init__(
        self,
        module: nn.Module,
        mode: CUDAGraphMode,
        parts: TargetParts,
        effects: ModuleEffects | None = None,
        min_saving: float = 0.0,
    ) -> None:
        settings = parts.capturer.settings
        self.module = module
        self.mode = mode
        self.cache = parts.capturer.cache
        self.guard = ModuleGuard(
            module, has_code=mode is CUDAGraphMode.FULL, written=parts.written_settings
        )
        self.copies_from_host = False
        """Whether a watched call copied constants from the host by itself."""
        self.after_change = NO_CHANGE
        """The change of the module for which an earlier target was given up; empty: none was."""
        self.dispatcher = CUDAGraphDispatcher(
            settings.runtime_policy if mode is CUDAGraphMode.FULL else mode,
            settings.warmup_steps,
            settings.next_verification,
            watches=mode is CUDAGraphMode.FULL,
            least_steps=settings.verify_replays + 2,
            min_saving=min_saving,
        )
        if mode is CUDAGraphMode.FULL:
            self.dispatcher.costs.of_runs = _costs_of_runs.setdefault(module, CostsOfRuns())
        self._captured: dict[BatchDescriptor, int] = {}
        """The memory of graphs, in bytes, by keys that had one; the latest one last."""
        self._settings = settings
        self._parts = parts
        self._effects = effects

    def run(self, name: str, plan: Plan, call: GraphCall) -> Outcome | None:
        """Capture the call, or compare a replay of it with eager, as the plan says.

        Args:
            name: The name of the target in the statistics.
            plan: The decision.
            call: The call.

        Returns:
            The outcome. None if the capture failed, or if there is no room for another graph, and
            the call has not run yet.
        """
        variant = plan.variant
        assert variant is not None
        has_graph = isinstance(variant.entry, GraphEntry) and not variant.entry.is_dropped
        if not has_graph and (why := self.why_no_room(call.descriptor)):
            self.dispatcher.no_room(plan.state, variant, why)
            return None
        target = self.capture_target(name, plan, call)
        get_entry = functools.partial(self._get_entry, target, plan, call)
        if plan.action is Action.CAPTURE and self._settings.next_verification(0) != 0:
            try:
                entry = get_entry()
            except NoRoomError as error:
                self.dispatcher.no_room(plan.state, variant, str(error), was_captured=True)
                return None
            except (CaptureError, UnkeyableBatchError) as error:
                self.dispatcher.refused(variant, self._reason_of(name, error))
                return None
            output = entry.replay(call.leaves, self.cache.step, call.tree)
            entry.count()
            return Outcome(output, self.mode)
        verdict = self._parts.verifier.check(target, call, get_entry, self.cache.step)
        if isinstance(verdict.error, NoRoomError):
            why = str(verdict.error)
            self.dispatcher.no_room(plan.state, variant, why, was_captured=True)
            return Outcome(verdict.output, CUDAGraphMode.NONE, variant.reason)
        if verdict.error is not None:
            return self._refused(plan, self._reason_of(name, verdict.error), verdict.output)
        if verdict.difference:
            return self._refused(plan, self._report(name, call, verdict), verdict.output)
        assert isinstance(variant.entry, GraphEntry)
        variant.entry.count()
        return Outcome(verdict.output, self.mode)

    def why_no_room(self, key: BatchDescriptor) -> str:
        """Return why a key cannot have a graph now; empty if it can."""
        return self.cache.why_no_room(self._captured.get(key, 0))

    def _reason_of(self, name: str, error: Exception) -> Reason:
        reason = reason_of(error)
        return reason.of_submodule(name) if self.mode is CUDAGraphMode.PIECEWISE else reason

    def capture_ahead(self, name: str, plan: Plan, call: GraphCall) -> Reason | None:
        """Capture the call, and do not run it. The first replay is compared with eager.

        Args:
            name: The name of the target in the statistics.
            plan: The decision.
            call: The call.

        Returns:
            Why it could not be captured; None if there is a graph.
        """
        assert plan.variant is not None
        target = self.capture_target(name, plan, call)
        if not target.record.captures:  # it was planned: nothing has changed
            target = dataclasses.replace(target, changed=NO_CHANGE)
        try:
            self._get_entry(target, plan, call)
        except (CaptureError, UnkeyableBatchError) as error:
            return reason_of(error)
        self.dispatcher.captured_ahead(plan.variant)
        return None

    def capture_target(self, name: str, plan: Plan, call: GraphCall) -> CaptureTarget:
        """Return what a capture and a comparison need to know about the target of a call."""
        variant = plan.variant
        assert variant is not None
        watched = variant.watched
        guards = variant.guards if isinstance(variant.guards, GuardSet) else None
        held = [] if guards is None else guards.tensors()
        record = self._parts.stats.entry(self.mode.name, name, call.descriptor)
        record.fastest_call = plan.state.fastest_call
        return CaptureTarget(
            mode=self.mode,
            module=self.module,
            effects=self._effects,
            held=[*self.guard.tensors, *held],
            held_containers=[] if guards is None else guards.containers(),
            record=record,
            side_effects=SideEffects() if watched is None else watched,
            changed=self._changed(record, plan, call),
            reads=variant.path.reads if isinstance(variant.path, ReadPath) else [],
            copies_from_host=self.copies_from_host,
            # known only for a variant that a watched step of another key has shown
            only_computes=variant.is_taken_over and variant.only_computes,
            operations=() if watched is None or variant.padding is not None else watched.operations,
            guards=guards,
            reads_in_place=self.mode is CUDAGraphMode.PIECEWISE
            and plan.state.inputs_moved < _MOST_MOVES,
        )

    def _changed(self, record: EntryRecord, plan: Plan, call: GraphCall) -> Changed:
        """Return what has changed since an earlier capture; empty if there was none."""
        if plan.action is not Action.CAPTURE:
            return NO_CHANGE
        key = call.descriptor
        if record.captures:
            dropped = _DROPPED if key in self._captured else self.after_change
            return plan.state.ledger.why or dropped or _NEW_RUN
        alike = (key.stage, key.dataloader_idx, key.call)
        keys = [k for k in self._captured if (k.stage, k.dataloader_idx, k.call) == alike]
        if not keys:
            return NO_CHANGE
        before = keys[-1]
        root = "batch" if self.mode is CUDAGraphMode.FULL else "arguments"
        changed = key.difference(before, leaf_paths(call.tree, root))
        changed = changed or self.guard.explain_flags(key.training, before.training)
        flag = differing_flag(key.flags, before.flags)
        return changed or (NO_CHANGE if flag is None else describe_change(*flag))

    def _report(self, name: str, call: GraphCall, verdict: Verdict) -> Reason:
        """Warn about a replay that differs from eager, and return the reason for the lower mode."""
        where = f"stage {call.descriptor.stage!r}, {name}, shapes {call.descriptor.shapes()}"
        text = f"{where}: {verdict.difference}"
        if not self._settings.strict:
            warnings.warn(
                "CUDAGraphCallback: a replay differed from eager and was dropped; eager's "
                f"result was used: {text}.",
                stacklevel=2,
            )
        submodule = name if self.mode is CUDAGraphMode.PIECEWISE else ""
        return Reason(Status.VERIFICATION, f"verification: {text}", submodule=submodule)

    def _get_entry(self, target: CaptureTarget, plan: Plan, call: GraphCall) -> GraphEntry:
        variant = plan.variant
        assert variant is not None
        if isinstance(variant.entry, GraphEntry):
            if variant.entry.is_valid():
                return variant.entry
            self.cache.drop(variant.entry)
        owner = self.cache.make_room()
        if owner is not None:
            dispatcher, state = owner
            dispatcher.evicted(state, self.cache.why_evicted)
        entry = self._parts.capturer.capture(target, call)
        self._captured.pop(call.descriptor, None)
        self._captured[call.descriptor] = entry.num_bytes
        for dispatcher, state in self.cache.make_room_for(entry):
            dispatcher.evicted(state, self.cache.why_too_large)
        self.cache.add(entry, (self.dispatcher, plan.state))
        self.dispatcher.captured(plan.state, variant, entry)
        return entry

    def _refused(self, plan: Plan, reason: Reason, output: object) -> Outcome:
        assert plan.variant is not None
        if isinstance(plan.variant.entry, GraphEntry):
            self.cache.drop(plan.variant.entry)
        self.dispatcher.refused(plan.variant, reason)
        return Outcome(output, CUDAGraphMode.NONE, reason)
