"""Submodules that are padded, in steps that are not: a step may reduce over its batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.forward_context import StepInProgress, current_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import WARM_UP
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.modules.interception import Interception, ModuleHandler
from cg_lightning.padding.padder import PadderOfCalls
from cg_lightning.padding.rules import PadRules
from cg_lightning.report.counts import Counts
from cg_lightning.report.records import EntryRecord, PaddingRecord
from cg_lightning.report.timeline import Ran
from cg_lightning.runtime.outcome import Outcome
from cg_lightning.runtime.padded_steps import PaddedSteps
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.step_runner import StepRunner
from cg_lightning.runtime.targets import match_targets


class PaddedPieces:
    """The submodules of one module that run padded in the steps of one stage.

    Args:
        session: The runtime state of the module.
        stage: The stage.
        rules: Says how leaves of the batch are padded.
    """

    def __init__(self, session: Session, stage: str, rules: PadRules) -> None:
        self._session = session
        self._stage = stage
        self._rules = rules

    def are_known(self) -> bool:
        """Return True if a step has shown them, and the module has the same submodules since."""
        return any(stage == self._stage for stage, _ in self._session.pieces)

    def add(self, watched: WatchedStep) -> bool:
        """Intercept the submodules of a watched step. Return False if none can be padded."""
        session = self._session
        if session.settings.targets is None:
            found = watched.largest_capturable(knows_reads=True)
        else:
            found = match_targets(session.module, tuple(session.settings.targets))[0]
        found.pop("", None)
        for path, module in found.items():
            key = (self._stage, id(module))
            if key not in session.pieces:
                piece = PaddedPiece(session, self._stage, path, module, self._rules)
                session.add_piece(key, piece)
        return bool(found)


class PaddedPiece(ModuleHandler):
    """Replaces the calls of one submodule. Each call is a step of a session of its own.

    So a call is watched, guarded, padded and compared as a step of ``predict`` is. Its graphs count
    as those of a submodule.

    Args:
        session: The runtime state of the module.
        stage: The stage.
        path: The dotted path of the submodule.
        module: The submodule.
        rules: Says how leaves of the batch are padded.
    """

    def __init__(
        self, session: Session, stage: str, path: str, module: nn.Module, rules: PadRules
    ) -> None:
        settings = dataclasses.replace(
            session.settings,
            mode="FULL_AND_PIECEWISE",
            copy_outputs=True,  # one step may call the submodule twice
            strict=False,  # the step around it is judged
            capture_ahead=False,
            compile=False,  # the session of the whole module has compiled it
            targets=None,
        )
        self._stage = stage
        self._path = path
        self._module = module
        self._backend = session.backend
        self._is_inside = False
        effects = ModuleEffects(module, session.backend.device, sync_free=False)
        self._session = Session(
            module,
            session.backend,
            settings,
            _CountsOfPiece(session.stats, path),
            effects,
            sharing=session,
        )
        padder = PadderOfCalls(settings.capture_sizes or (), rules)
        padded = PaddedSteps(self._session, stage, path, self._run_module, padder)
        self._runner = StepRunner(self._session, stage, path, self._run_module, padded=padded)
        self._interception: Interception | None = None

    def install(self) -> None:
        """Intercept the submodule from now on; idempotent."""
        if self._interception is None:
            self._session.install()
            self._interception = Interception(self._module, self)

    def remove(self, check: bool) -> None:
        """Leave no trace in the submodule. ``check`` is as in :meth:`Session.remove`."""
        if self._interception is not None:
            self._interception.remove()
            self._interception = None
            self._session.remove(check)

    def close(self) -> None:
        """Drop all graphs."""
        self.remove(check=False)
        self._session.close()

    def on_call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call, padded if that is known to give the same."""
        context = current_forward_context()
        if (
            self._is_inside
            or context is None
            or context.step is None
            or context.step.batch is None
            or context.cudagraph_runtime_mode is not CUDAGraphMode.PIECEWISE
            or not _is_of(context.batch_descriptor, self._stage)
            or torch.is_grad_enabled()
            or self._backend.is_capturing()
        ):
            return original(*args, **kwargs)
        self._is_inside = True
        try:
            outcome = self._runner.run_with_outcome(((args, kwargs),), {})
        finally:
            self._is_inside = False
        self._report(context.step, outcome)
        return outcome.output

    def _report(self, step: StepInProgress, outcome: Outcome) -> None:
        if outcome.mode is CUDAGraphMode.NONE:
            step.ran_eagerly(self._path, outcome.reason or WARM_UP)
        else:
            step.ran_from_graph()
        if outcome.ran is not Ran.REPLAY:
            step.took_longer()

    def _run_module(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = call
        return self._module(*args, **kwargs)


def _is_of(descriptor: BatchDescriptor | None, stage: str) -> bool:
    return descriptor is not None and descriptor.stage == stage


class _CountsOfPiece(Counts):
    """Counts the calls of one submodule: graphs in the statistics of the module, eager calls here.

    Args:
        counts: The statistics of the module.
        path: The dotted path of the submodule.
    """

    def __init__(self, counts: Counts, path: str) -> None:
        super().__init__()
        self._of_module = counts
        self._path = path

    def entry(self, mode: str, target: str, descriptor: BatchDescriptor) -> EntryRecord:
        """See :meth:`Counts.entry`."""
        path = self._path if mode == "FULL" else f"{self._path}.{target}"
        return self._of_module.entry("PIECEWISE", path, descriptor)

    def padded(self, target: str, descriptor: BatchDescriptor) -> PaddingRecord:
        """See :meth:`Counts.padded`."""
        return self._of_module.padded(self._path, descriptor)
