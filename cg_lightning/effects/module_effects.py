"""All side effects of the steps of one module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from cg_lightning.effects.late_updates import (
    Arguments,
    CollectedCalls,
    LateCall,
    LateStep,
    LateUpdates,
)
from cg_lightning.effects.logged_values import Calls, LoggedValues, NothingLogged
from cg_lightning.effects.recorder import EffectRecorder, recording_effects
from cg_lightning.metrics.deferred_checks import DeferredChecks
from cg_lightning.metrics.members import metrics_held, metrics_of
from cg_lightning.metrics.states import MetricStates
from cg_lightning.metrics.units import MetricUnit


class Comparison:
    """Eager runs of one step that are compared with a replay.

    Made by :meth:`ModuleEffects.comparing`.
    """

    def __init__(self, logged: LoggedValues, late: LateStep) -> None:
        self._logged = logged
        self._late = late
        self._runs: list[tuple[Calls, CollectedCalls]] = []
        self._late_calls: tuple[Sequence[LateCall], list[Arguments]] | None = None

    def run(self, step: Callable[[], Any]) -> Any:
        """Run ``step`` eagerly. Only collect what must not run twice.

        These are late calls of metrics, and log calls if logging cannot be undone.
        """
        with contextlib.ExitStack() as stack:
            late_calls = stack.enter_context(self._late.collected())
            log_calls: Calls = []
            if not self._logged.is_supported():
                log_calls = stack.enter_context(self._logged.calls.collected())
            self._runs.append((log_calls, late_calls))
            return step()

    def late_arguments(self) -> list[tuple[str, Any]]:
        """Return names and values of the arguments of late calls, of the latest run or replay."""
        return self._late.updates.latest_arguments()

    def keep_replay(self) -> None:
        """Note that the user gets the output of the latest replay, and so do late calls.

        An argument may be a part of the output, and what a callback writes there counts.
        """
        self._late_calls = self._late.updates.latest()

    def finish(self) -> None:
        """Make the calls that were collected in the first run, or in the replay that is kept."""
        if not self._runs:
            return
        log_calls, late_calls = self._runs[0]
        kept = self._late_calls or (late_calls.calls, late_calls.arguments)
        self._late.updates.make(*kept)
        self._late.updates.fill(self._logged.metrics())
        self._logged.calls.make(log_calls)


class ModuleEffects:
    """All side effects of the steps of one module: metric states, logged values, deferred checks.

    Args:
        module: The module whose steps are run.
        device: The device of the graphs.
        sync_free: True if captures replace functions of torchmetrics that wait for the device.
        logged: The logged values. None if the module runs without a Trainer and logs nothing.

    Attributes:
        sync_free: As given.
        logged: As given.
        checks: Deferred checks of all graphs. They are read before a metric state is read, and at
            the end of a stage.
        states: Metric states at fixed addresses.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        sync_free: bool = True,
        logged: LoggedValues | None = None,
    ) -> None:
        self.sync_free = sync_free
        self.logged: LoggedValues = NothingLogged() if logged is None else logged
        self.checks = DeferredChecks()
        self.states = MetricStates(device, self.checks)
        self._late = LateUpdates()
        self._module = module

    def metrics(self) -> list[nn.Module]:
        """Return all metrics of the module, and the metrics behind its logged values."""
        return [*metrics_of(self._module), *self.logged.metrics()]

    def reachable_metrics(self) -> list[nn.Module]:
        """Return the same metrics, and those that it has in containers and objects."""
        held = [each for metric in metrics_held(self._module) for each in metrics_of(metric)]
        return [*self.metrics(), *{id(metric): metric for metric in held}.values()]

    def recorder(self, late: Sequence[MetricUnit] = ()) -> AbstractContextManager[EffectRecorder]:
        """Return a context that gives a recorder for captures of one step.

        Args:
            late: The metrics that are updated after the step.
        """
        step = LateStep(self._late, late)
        return recording_effects(
            self._module, self.states, self.logged, step, self.checks, self.sync_free
        )

    @contextlib.contextmanager
    def comparing(self, late: Sequence[MetricUnit] = ()) -> Iterator[Comparison]:
        """While this is entered, a step runs several times, but the user sees only one run.

        Neither eager runs nor effects make late calls of metrics inside; if logging cannot be
        undone, they do not call ``self.log`` either. The calls of the first eager run are made at
        the end, even after an exception.

        Args:
            late: The metrics that are updated after the step.
        """
        comparison = Comparison(self.logged, LateStep(self._late, late))
        try:
            with self.logged.calls.held(), self._late.held():
                yield comparison
        finally:
            comparison.finish()

    def rehearse(self, step: Callable[[], Any], late: Sequence[MetricUnit] = ()) -> Any:
        """Run ``step`` eagerly, without calls that cannot be undone.

        The caller restores everything else (:class:`StepState`).
        """
        return Comparison(self.logged, LateStep(self._late, late)).run(step)

    def release(self, check: bool) -> None:
        """Leave no trace, at the end of a stage. See :meth:`MetricStates.release` for ``check``."""
        self.logged.release()
        self.states.release(check)

    def close(self) -> None:
        """Free all tensors. Call it after :meth:`release`, when all graphs are dropped."""
        self.states.close()
        self.checks.close()
