"""The one place that knows the collection in which Lightning keeps what ``self.log`` was given.

It is private (``lightning/pytorch/trainer/connectors/logger_connector/result.py``, 2.6), so it is looked at before it is used.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import nn
from torchmetrics import Metric


class LoggedResults:
    """The results of the loop that runs a module.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._skipping: list[Any] = []

    @property
    def collection(self) -> Any:
        """The results of the loop that runs now; None where there is no loop, it keeps none, or not as we know it."""
        results = self._any_collection
        return results if results is not None and self.is_known(results) else None

    def is_supported(self) -> bool:
        """Whether Lightning keeps what is logged now, if anything can be logged now, as we know it."""
        results = self._any_collection
        return results is None or self.is_known(results)

    def is_known(self, results: Any) -> bool:
        """Whether these are results as we know them."""
        return (
            isinstance(results, dict)
            and all(
                hasattr(results, name)
                for name in ("batch", "batch_size", "dataloader_idx", "reset", "metrics")
            )
            and all(
                hasattr(self._connector, name) for name in ("_current_fx", "should_reset_tensors")
            )
            and all(
                isinstance(result, Metric) and {"has_reset", "meta"} <= vars(result).keys()
                for result in results.values()
            )
        )

    def metrics(self) -> list[nn.Module]:
        """The metric behind each logged value."""
        return list((self.collection or {}).values())

    def snapshot(self) -> tuple[Any, dict[str, Any], dict[str, Any], Any]:
        """What a step may change, for :meth:`restore`."""
        results = self.collection
        if results is None:
            return None, {}, {}, None
        return results, dict(results), dict(vars(results)), self._connector._current_fx

    def restore(self, snapshot: tuple[Any, dict[str, Any], dict[str, Any], Any]) -> None:
        """Puts back what a step has changed."""
        results, items, attributes, current_fx = snapshot
        if results is None:
            return
        results.clear()
        results.update(items)
        vars(results).update(attributes)
        self._connector._current_fx = current_fx

    def begin(self) -> None:
        """What the first ``self.log`` of an epoch does before all else; nothing at other times."""
        fx = getattr(self._module, "_current_fx_name", None)
        if (
            self.collection is not None
            and fx is not None
            and self._connector.should_reset_tensors(fx)
        ):
            self.collection.reset(metrics=False, fx=fx)
            self._connector._current_fx = fx

    def skip_values_of_steps(self) -> None:
        """Where no value is logged for each step, keeps Lightning from going through all of them twice a batch to find none."""
        results = self.collection
        if results is not None and not any(result.meta.on_step for result in results.values()):
            vars(results)["metrics"] = _MetricsOfEpochs(results)
            self._skipping.append(results)

    def release(self) -> None:
        """Leaves no trace in any results."""
        for results in self._skipping:
            vars(results).pop("metrics", None)
        self._skipping.clear()

    def effect(self) -> LogEffect:
        """What the step that has just logged did beside updating metrics."""
        results = self.collection
        return LogEffect(
            self, results, dict(results), self._connector._current_fx, results.batch_size
        )

    @property
    def _any_collection(self) -> Any:
        return getattr(getattr(self._module, "_trainer", None), "_results", None)

    @property
    def _connector(self) -> Any:
        return self._module.__dict__["_trainer"]._logger_connector


class _MetricsOfEpochs:
    """Stands in for ``metrics`` of results none of which has a value for each step."""

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


class LogEffect:
    """What ``self.log`` does at each step beside updating metrics."""

    def __init__(
        self,
        owner: LoggedResults,
        results: Any,
        items: dict[str, Any],
        fx: str,
        batch_size: int | None,
    ) -> None:
        self._owner = owner
        self._results = results
        self._items = list(items.items())
        self._connector = owner._connector
        self._fx = fx
        self._batch_size = batch_size

    def is_stale(self) -> bool:
        """Whether other metrics stand behind the logged values than those that were captured."""
        results = self._owner.collection
        return results is not self._results or any(
            results.get(key) is not metric for key, metric in self._items
        )

    def begin_stage(self) -> None:
        """After the first replay of a stage."""
        self._owner.skip_values_of_steps()

    def before(self) -> None:
        """Before a replay."""
        if self._connector._current_fx != self._fx:
            self._owner.begin()

    def after(self) -> None:
        """Leaves what ``self.log`` leaves."""
        self._connector._current_fx = self._fx
        self._results.batch_size = self._batch_size
