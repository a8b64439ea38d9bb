"""What a step does to metrics that a graph cannot hold, or a replay not bring up to date."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from cg_lightning.core.causes import NO_SUBMODULE, Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.metrics.members import states_of
from cg_lightning.metrics.support import (
    ListStates,
    unsupported_read,
    unsupported_update,
    unsupported_write,
)
from cg_lightning.metrics.sync_free import SyncFree, replacing
from cg_lightning.modules.interception import Interception, ModuleHandler


class MetricUpdates(Detector):
    """Reports updates of metrics.

    If there are effects, a graph of the whole step can hold updates, but only those that a replay
    can bring up to date. Without effects, and in submodules, every update is reported.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._metrics = watch.metrics
        self._counted = [metric for metric in watch.metrics if isinstance(metric, Metric)]
        self._reported: set[str] = set()

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        effects = self.watch.effects
        with self._noticing_counts():
            if effects is None:
                before = self._counts()
                yield
                if self._counts() != before:
                    self._report_update()
                return
            with self._noticing_unsupported_updates(effects):
                yield

    @contextlib.contextmanager
    def around_call(self, call: ModuleCall) -> Iterator[None]:
        before = self._counts()
        yield
        if self._counts() != before:
            self._report_update()

    def report_once(self, reason: str) -> None:
        """Report why a replay cannot do what the step did; an empty reason is ignored."""
        if reason and reason not in self._reported:
            self._reported.add(reason)
            self.watch.report(Cause.METRIC_UPDATED, reason)

    def _report_update(self) -> None:
        is_held = self.watch.effects is not None
        with self.watch.only_for_submodules() if is_held else contextlib.nullcontext():
            self.watch.report_unless_found(Cause.METRIC_UPDATED, "update")

    def _counts(self) -> list[int]:
        return [vars(metric)["_update_count"] for metric in self._counted]

    @contextlib.contextmanager
    def _noticing_counts(self) -> Iterator[None]:
        """Notice counts of metrics that are no submodules: a replay does not update these."""
        thread, original = threading.get_ident(), Metric.__setattr__
        known = set(map(id, self.watch.all_metrics))
        inside = set(map(id, self._metrics))

        def write(metric: Metric, name: str, value: Any) -> None:
            if name == "_update_count" and threading.get_ident() == thread:
                if id(metric) not in known:
                    is_held = self.watch.late_unit(metric) is not None
                    self.watch.report(Cause.METRIC_UPDATED, "update" if is_held else NO_SUBMODULE)
                elif id(metric) in inside and vars(metric).get(name) != value:
                    self._report_update()
            original(metric, name, value)

        with patch.object(Metric, "__setattr__", write):
            yield

    @contextlib.contextmanager
    def _noticing_unsupported_updates(self, effects: ModuleEffects) -> Iterator[None]:
        handlers = [_MetricHandler(metric, self) for metric in self._metrics]
        ungrouped = [
            metric
            for metric in self._metrics
            if isinstance(metric, MetricCollection) and not metric._groups_checked
        ]
        devices = _devices(effects.logged.metrics())
        with contextlib.ExitStack() as stack:
            for handler in handlers:
                stack.callback(Interception(handler.metric, handler).remove)
            if effects.sync_free:
                stack.enter_context(replacing(self._only_for_submodules, self._metrics))
            yield
        for handler in handlers:
            late = self.watch.late_unit(handler.metric)
            findings = self.watch.step.findings if late is None else late.findings
            with self.watch.setting_aside(findings):
                handler.finish()
        # a collection waits for the device when it forms its groups, and what is logged when it is
        # first given a place there
        formed_groups = any(collection._groups_checked for collection in ungrouped)
        if formed_groups or _devices(effects.logged.metrics()) != devices:
            self.watch.notes.did_one_time_work = True

    def _only_for_submodules(
        self, original: Callable[..., Any], replacement: SyncFree
    ) -> Callable[..., Any]:
        """A function that waits for the device, and that captures of whole steps replace."""

        def function(*args: Any, **kwargs: Any) -> Any:
            if not replacement.applies(*args, **kwargs):
                return original(*args, **kwargs)
            with self.watch.only_for_submodules():
                return original(*args, **kwargs)

        return function


class _MetricHandler(ModuleHandler):
    """Observes reads and writes of one metric."""

    def __init__(self, metric: nn.Module, detector: MetricUpdates) -> None:
        self.metric = metric
        self._detector = detector
        self._written: set[str] = set()
        self._shapes = _shapes(metric)
        self._lists = ListStates(metric)

    def on_read(self, name: str) -> None:
        self._detector.report_once(unsupported_read(self.metric, name, self._written))
        self._detector.report_once(self._lists.unsupported_read(name, sys._getframe(2)))

    def on_write(self, name: str, value: Any) -> None:
        self._written.add(name)
        self._detector.report_once(unsupported_update(self.metric, {name}))
        self._detector.report_once(unsupported_write(self.metric, name, value))
        self._detector.report_once(self._lists.unsupported_write(name, sys._getframe(2)))

    def finish(self) -> None:
        """Report what only the end of the step shows."""
        now = _shapes(self.metric)
        for name in sorted(self._written & set(now)):
            if now[name] != self._shapes.get(name, now[name]):
                state = f"{type(self.metric).__name__}.{name}"
                self._detector.report_once(f"{state} changes its shape or dtype")


def _shapes(metric: nn.Module) -> dict[str, Any]:
    states = {name: getattr(metric, name) for name in states_of(metric)}
    return {
        name: (state.shape, state.dtype)
        for name, state in states.items()
        if isinstance(state, Tensor)
    }


def _devices(metrics: list[nn.Module]) -> list[tuple[int, list[Any]]]:
    states = [(metric, [getattr(metric, name) for name in states_of(metric)]) for metric in metrics]
    return [
        (id(metric), [value.device for value in values if isinstance(value, Tensor)])
        for metric, values in states
    ]
