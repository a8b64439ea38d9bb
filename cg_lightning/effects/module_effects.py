"""Everything that the steps of one module leave behind beside their output."""

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
    """Eager runs of one step, made in order to compare them with a replay.

    Made by :meth:`ModuleEffects.comparing`.
    """

    def __init__(self, logged: LoggedValues) -> None:
        self._logged = logged
        self._runs: list[Calls] = []

    def run(self, step: Callable[[], Any]) -> Any:
        """Run ``step`` eagerly; if logging cannot be taken back, its log calls are held."""
        if self._logged.is_supported():
            return step()
        with self._logged.calls.collected() as calls:
            self._runs.append(calls)
            return step()

    def log_calls(self) -> Calls:
        """Return the calls that the first run made, and that were held."""
        return self._runs[0] if self._runs else []


class ModuleEffects:
    """What the steps of one module leave behind: metric states, logged values, deferred checks.

    Args:
        module: The module whose steps are run.
        device: Where the graphs run.
        sync_free: Whether captures replace functions of torchmetrics that wait for the device.
        logged: What the module logs; None if it runs without a Trainer, so that it logs nothing.

    Attributes:
        sync_free: As given.
        logged: As given.
        checks: Checks of all graphs, read before metrics are and at the end of a stage.
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
        """Return all metrics of the module, and those behind what it logs."""
        return [*metrics_of(self._module), *self.logged.metrics()]

    def logged_metrics(self) -> list[nn.Module]:
        """Return the metrics behind what the module logs."""
        return self.logged.metrics()

    def logs_in_graph(self) -> bool:
        """Return True if graphs update what is logged; else log calls are made after a replay."""
        return self.logged.is_supported()

    def recorder(self) -> EffectRecorder:
        """Return a recorder for captures of one step."""
        return EffectRecorder(self._module, self.states, self.logged, self.checks, self.sync_free)

    @contextlib.contextmanager
    def comparing(self) -> Iterator[Comparison]:
        """While this is entered, a step is run several times, of which a user sees one.

        If logging cannot be taken back, no log call is made inside, neither by eager runs nor by
        effects. The calls of the first eager run are made at the end, also if that is an exception.
        """
        comparison = Comparison(self.logged)
        try:
            with self.logged.calls.held():
                yield comparison
        finally:
            self.logged.calls.make(comparison.log_calls())

    def rehearse(self, step: Callable[[], Any]) -> Any:
        """Run ``step`` eagerly without logging anything that could not be taken back.

        Everything else is taken back by the caller (:class:`StepState`).
        """
        return Comparison(self.logged).run(step)

    def release(self, check: bool) -> None:
        """Leave no trace, at the end of a stage. ``check``: see :meth:`MetricStates.release`."""
        self.logged.release()
        self.states.release(check)

    def close(self) -> None:
        """Free all tensors, after :meth:`release` and when the graphs are gone."""
        self.states.close()
        self.checks.close()
