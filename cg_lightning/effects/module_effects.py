"""All side effects of the steps of one module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cg_lightning.effects.logged_values import Calls, LoggedValues, NothingLogged
from cg_lightning.effects.recorder import EffectRecorder
from cg_lightning.metrics.deferred_checks import DeferredChecks
from cg_lightning.metrics.members import metrics_of
from cg_lightning.metrics.states import MetricStates


class Comparison:
    """Eager runs of one step that are compared with a replay.

    Made by :meth:`ModuleEffects.comparing`.
    """

    def __init__(self, logged: LoggedValues) -> None:
        self._logged = logged
        self._runs: list[Calls] = []

    def run(self, step: Callable[[], Any]) -> Any:
        """Run ``step`` eagerly. If logging cannot be undone, only collect its log calls."""
        if self._logged.is_supported():
            return step()
        with self._logged.calls.collected() as calls:
            self._runs.append(calls)
            return step()

    def log_calls(self) -> Calls:
        """Return the log calls that were collected in the first run."""
        return self._runs[0] if self._runs else []


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
        self.states = MetricStates(device, self.checks.raise_if_met)
        self._module = module

    def metrics(self) -> list[nn.Module]:
        """Return all metrics of the module, and the metrics behind its logged values."""
        return [*metrics_of(self._module), *self.logged.metrics()]

    def logged_metrics(self) -> list[nn.Module]:
        """Return the metrics behind the logged values."""
        return self.logged.metrics()

    def logs_in_graph(self) -> bool:
        """Return True if graphs update logged values. If not, log calls follow each replay."""
        return self.logged.is_supported()

    def recorder(self) -> EffectRecorder:
        """Return a recorder for captures of one step."""
        return EffectRecorder(self._module, self.states, self.logged, self.checks, self.sync_free)

    @contextlib.contextmanager
    def comparing(self) -> Iterator[Comparison]:
        """While this is entered, a step runs several times, but the user sees only one run.

        If logging cannot be undone, neither eager runs nor effects call ``self.log`` inside. The
        calls of the first eager run are made at the end, even after an exception.
        """
        comparison = Comparison(self.logged)
        try:
            with self.logged.calls.held():
                yield comparison
        finally:
            self.logged.calls.make(comparison.log_calls())

    def rehearse(self, step: Callable[[], Any]) -> Any:
        """Run ``step`` eagerly, without log calls that cannot be undone.

        The caller restores everything else (:class:`StepState`).
        """
        return Comparison(self.logged).run(step)

    def release(self, check: bool) -> None:
        """Leave no trace, at the end of a stage. See :meth:`MetricStates.release` for ``check``."""
        self.logged.release()
        self.states.release(check)

    def close(self) -> None:
        """Free all tensors. Call it after :meth:`release`, when all graphs are dropped."""
        self.states.close()
        self.checks.close()
