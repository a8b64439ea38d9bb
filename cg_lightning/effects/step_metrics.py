"""The metrics of one module while a Trainer runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.tree import flatten
from cg_lightning.effects.attributes import AttributesSnapshot
from cg_lightning.effects.recorder import Recording
from cg_lightning.metrics.deferred_checks import DeferredChecks
from cg_lightning.metrics.members import metrics_of, states_of
from cg_lightning.metrics.states import FixedStates
from cg_lightning.trainer.log_calls import Calls, LogCalls
from cg_lightning.trainer.logged_results import LoggedResults


class StepMetrics:
    """Metric states, logged values and deferred checks of one module.

    Args:
        module: The LightningModule.
        device: Where the graphs run.
        sync_free: Whether captures replace functions of torchmetrics that wait for the device.
    """

    def __init__(self, module: nn.Module, device: torch.device, sync_free: bool) -> None:
        self.sync_free = sync_free
        self._module = module
        self.results = LoggedResults(module)
        self.log_calls = LogCalls(module)
        self.checks = DeferredChecks()
        self.states = FixedStates(device, self.checks.raise_if_met)

    def record(self) -> Recording:
        """Records the captures of one step."""
        return Recording(self._module, self.states, self.results, self.log_calls, self.sync_free)

    def run_eagerly(self, step: Callable[[], Any], calls: Calls) -> Any:
        """Runs a step that is compared with its graph; where logging it cannot be taken back, notes calls instead.

        Args:
            step: The step.
            calls: Takes the calls of ``self.log``.
        """
        if self.results.is_supported():
            return step()
        with self.log_calls.collected() as made:
            output = step()
        calls.extend(made)
        return output

    def release(self, check: bool) -> None:
        """Leaves no trace; ``check`` is as in :meth:`FixedStates.release`."""
        self.results.release()
        self.states.release(check)

    def close(self) -> None:
        """Lets go of all tensors, after :meth:`release` and when the graphs are gone."""
        self.states.close()
        self.checks.close()

    def all(self) -> list[nn.Module]:
        """All metrics of the module, and those behind what it logs."""
        return [*metrics_of(self._module), *self.results.metrics()]

    def metrics(self) -> list[nn.Module]:
        """As :meth:`all`, by the name that the diagnosis asks for."""
        return self.all()

    def logged_metrics(self) -> list[nn.Module]:
        """Gives those behind what the module logs."""
        return self.results.metrics()

    def logs_in_graph(self) -> bool:
        """Whether a graph can hold ``self.log``; otherwise the call is made after each replay."""
        return self.results.is_supported()


class MetricsSnapshot:
    """What a step may change in metrics and logged values, to put it back: for verification.

    Args:
        metrics: The metrics of a module.
    """

    def __init__(self, metrics: StepMetrics) -> None:
        self._metrics = metrics
        everything = metrics.all()
        tensors = {id(tensor): tensor for tensor in metrics.states.tensors()}
        for metric in everything:
            values = [vars(metric).get(name) for name in states_of(metric)]
            tensors.update({id(value): value for value in values if isinstance(value, Tensor)})
        self._tensors = [(tensor, tensor.clone()) for tensor in tensors.values()]
        self._attributes = AttributesSnapshot(everything)
        lists = [
            value for metric in everything for value in vars(metric).values() if type(value) is list
        ]
        self._lists = [(value, list(value)) for value in lists]
        self._homes = metrics.states.homes()
        self._logged = metrics.results.snapshot()

    def restore(self) -> None:
        """Puts everything back in place."""
        for tensor, value in self._tensors:
            if (
                torch.is_inference_mode_enabled() or not tensor.is_inference()
            ):  # else nobody can have written it
                tensor.copy_(value)
        self._attributes.restore()
        for items, before_items in self._lists:
            items[:] = before_items
        for slot, home in self._homes:
            slot.home = home
        self._metrics.results.restore(self._logged)

    def values(self) -> list[tuple[str, Any]]:
        """Names and values, as they are now: of states, of what the latest step gave, and of the counts."""
        return [
            (f"{type(metric).__name__}.{name}", leaf.clone() if isinstance(leaf, Tensor) else leaf)
            for metric in self._metrics.all()
            for name in (*states_of(metric), "_forward_cache", "_update_count", "_computed")
            for leaf in flatten(getattr(metric, name, None))[0]
        ]
