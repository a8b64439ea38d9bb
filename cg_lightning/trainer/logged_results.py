"""Adapter for Lightning's private results collection, which stores values passed to ``self.log``.

All access goes through this module. The collection is private (Lightning 2.6,
``lightning/pytorch/trainer/connectors/logger_connector/result.py``), so its attributes are checked
before it is used.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torchmetrics import Metric

from cg_lightning.effects.effect import Effect
from cg_lightning.effects.kinds import RestoreLogResults
from cg_lightning.trainer.log_calls import HeldLogCalls

_RESETS = "should_reset_tensors"
"""A method of the connector: whether ``self.log`` of a hook resets the values of this hook."""


class LoggedResults:
    """The results of the loop that runs a module.

    It implements :class:`~cg_lightning.effects.logged_values.LoggedValues`.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.calls = HeldLogCalls(module)
        self.stage_number = 0
        """Number of stages that have ended."""
        self._skipping: list[Any] = []
        self._hooks: list[str] = []
        """The hooks that have logged in the captured step, in order."""

    @property
    def collection(self) -> Any:
        """The results of the current loop.

        None if there is no loop, if it stores no results, or if their structure is unknown.
        """
        results = self._any_collection
        return results if results is not None and self.is_known(results) else None

    def is_supported(self) -> bool:
        """Return True if the structure of the results is known, or if there are no results."""
        results = self._any_collection
        return results is None or self.is_known(results)

    def is_known(self, results: Any) -> bool:
        """Return True if the structure of these results is known."""
        return (
            isinstance(results, dict)
            and all(
                hasattr(results, name)
                for name in ("batch", "batch_size", "dataloader_idx", "reset", "metrics")
            )
            and all(hasattr(self.connector, name) for name in ("_current_fx", _RESETS))
            and all(
                isinstance(result, Metric) and {"has_reset", "meta"} <= vars(result).keys()
                for result in results.values()
            )
        )

    def metrics(self) -> list[nn.Module]:
        """Return the metric behind each logged value."""
        return list((self.collection or {}).values())

    def snapshot(self) -> tuple[Any, dict[str, Any], dict[str, Any], Any]:
        """Return the state that a step may change, for :meth:`restore`."""
        results = self.collection
        if results is None:
            return None, {}, {}, None
        return results, dict(results), dict(vars(results)), self.connector._current_fx

    def restore(self, snapshot: tuple[Any, dict[str, Any], dict[str, Any], Any]) -> None:
        """Restore the state of a snapshot."""
        results, items, attributes, current_fx = snapshot
        if results is None:
            return
        results.clear()
        results.update(items)
        vars(results).update(attributes)
        self.connector._current_fx = current_fx

    def begin(self, hooks: Sequence[str] = ()) -> None:
        """Reset values as the first ``self.log`` of an epoch does. Otherwise do nothing.

        Args:
            hooks: The hooks that log, in this order, as an effect knows them. Empty: the one that
                runs now.
        """
        if hooks:
            results = self._any_collection  # that of the effect, which was compared
        else:
            results, fx = self.collection, getattr(self._module, "_current_fx_name", None)
            hooks = () if fx is None else (fx,)
        if results is None:
            return
        for fx in hooks:
            if self.connector.should_reset_tensors(fx):
                results.reset(metrics=False, fx=fx)
                self.connector._current_fx = fx

    @contextlib.contextmanager
    def noting_hooks(self) -> Iterator[None]:
        """While this is entered, ``self.log`` resets no values, and :meth:`effect` will do so."""
        self._hooks = []
        if self.collection is None:
            yield
            return
        attributes = vars(self.connector)

        def should_reset(fx: str) -> bool:
            if self._hooks[-1:] != [fx]:
                self._hooks.append(fx)
            return False

        attributes[_RESETS] = should_reset
        try:
            yield
        finally:
            del attributes[_RESETS]

    def begin_batch(self, batch: Any) -> None:
        """Weight what the next step logs by the size of ``batch``, as Lightning does."""
        results = self.collection
        if results is not None:
            results.batch = batch
            results.batch_size = None

    def begin_stage(self) -> None:
        """Skip Lightning's per-step scan of logged values if none has ``on_step=True``."""
        results = self.collection
        if results is not None and not any(result.meta.on_step for result in results.values()):
            vars(results)["metrics"] = _MetricsOfEpochs(results)
            self._skipping.append(results)

    def release(self) -> None:
        """Leave no trace in any results, at the end of a stage."""
        self.stage_number += 1
        for results in self._skipping:
            vars(results).pop("metrics", None)
        self._skipping.clear()

    def effect(self) -> Effect:
        """Return the side effects of ``self.log`` in the last step, except metric updates."""
        results, connector = self.collection, self.connector
        return RestoreLogResults(
            self,
            results,
            [
                (vars(connector), "_current_fx", connector._current_fx),
                (vars(results), "batch_size", results.batch_size),
            ],
            self._hooks,
        )

    @property
    def _any_collection(self) -> Any:
        return getattr(getattr(self._module, "_trainer", None), "_results", None)

    @property
    def connector(self) -> Any:
        """Lightning's object that stores the hook for which values are logged."""
        return self._module.__dict__["_trainer"]._logger_connector


class _MetricsOfEpochs:
    """Replaces ``metrics`` of the results if no value is logged with ``on_step=True``."""

    def __init__(self, results: Any) -> None:
        self._results = results
        self._known = list(results.values())

    def __call__(self, on_step: bool) -> Any:
        results, known = self._results, self._known
        if (
            on_step
            and len(results) == len(known)
            and all(map(operator.is_, results.values(), known))
        ):
            return {"callback": {}, "log": {}, "pbar": {}}
        return type(results).metrics(results, on_step)
