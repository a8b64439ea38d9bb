"""Records what a captured step does to metrics."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import flatten, rebuild
from cg_lightning.effects.attributes import AttributesSnapshot
from cg_lightning.effects.effect import StepEffects
from cg_lightning.metrics.deferred_checks import CheckedCalls, DeferredCheck
from cg_lightning.metrics.members import (
    averages_by_count,
    bookkeeping,
    metrics_of,
    state_names,
    states_of,
)
from cg_lightning.metrics.states import FixedStates, Slot
from cg_lightning.metrics.sync_free import sync_free
from cg_lightning.modules.attributes import is_same_value
from cg_lightning.modules.interception import Interception, ModuleHandler
from cg_lightning.trainer.log_calls import Calls, CapturedLogCalls, LogCalls
from cg_lightning.trainer.logged_results import LoggedResults

_COUNT = 1_000_000
"""What counters of updates start from in a capture: so that counting up is told from starting anew (``reset``)."""


def unsupported_write(metric: nn.Module, name: str, value: Any) -> str:
    """Why a replay could not bring up to date what a step has set an attribute to; empty where it can."""
    if name in state_names(metric) or name in bookkeeping():
        return ""
    if is_same_value(vars(metric).get(name), value):
        return ""
    return f"{type(metric).__name__}.{name} is kept in Python"


def unsupported_read(metric: nn.Module, name: str, written: set[str]) -> str:
    """Why a replay could not do what a step that reads an attribute does; empty where it can."""
    if name == "update_count":  # the property; torchmetrics itself reads ``_update_count``
        return f"{type(metric).__name__}.update_count is read"
    if name == "_computed" and name not in written and vars(metric).get(name) is not None:
        return f"{type(metric).__name__} gives the result of an earlier step"
    return ""


def unsupported_update(metric: nn.Module, written: set[str]) -> str:
    """Why a replay could not do what a step did; empty where it can."""
    if "_forward_cache" in written and averages_by_count(metric):
        return f"{type(metric).__name__}.forward averages by a Python count"
    return ""


def _update_of_a_copy(metric: Metric) -> Callable[..., None]:
    def update(*args: Any, **kwargs: Any) -> None:
        copy.deepcopy(metric).update(*args, **kwargs)

    return update


class Recording:
    """Captures of one step: metrics read and write fixed states, and everything else is put back when they are done.

    Args:
        module: The LightningModule.
        states: The fixed states of its metrics.
        results: What is logged.
        log_calls: Calls of ``self.log``, for where the results are not known.
        sync_free: Whether functions of torchmetrics that wait for the device are replaced.
    """

    def __init__(
        self,
        module: nn.Module,
        states: FixedStates,
        results: LoggedResults,
        log_calls: LogCalls,
        sync_free: bool,
    ) -> None:
        self._sync_free = sync_free
        self._log_calls = log_calls
        self._calls: Calls | None = None
        self._module = module
        self._states = states
        self._results = results
        self._metrics: list[nn.Module] = []
        self._slots: dict[tuple[int, str], Slot] = {}
        self._reads: list[Slot] = []
        self._writes: dict[int, set[str]] = {}
        self._lists: dict[tuple[int, str], list[Any]] = {}
        self._before: dict[int, dict[str, Any]] = {}
        self._checks: list[DeferredCheck] | None = None
        self._checked = CheckedCalls()

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Makes fixed states, outside a capture, and puts the metrics back afterwards."""
        self._results.begin()
        self._metrics = list(
            {
                id(metric): metric
                for metric in (*metrics_of(self._module), *self._results.metrics())
            }.values()
        )
        slots = [slot for metric in self._metrics for slot in self._states.slots(metric)]
        self._slots = {(id(slot.metric), slot.name): slot for slot in slots}
        for slot in slots:
            if slot.home is not None and slot.home is not slot.fixed:
                self._states.give_out(slot.home)
        for slot in slots:
            if slot.home is None:
                slot.fixed.copy_(slot.value())
        logged = self._results.snapshot()
        attributes = AttributesSnapshot(self._metrics)
        homes = self._states.homes()
        for slot in slots:
            slot.home = None
        try:
            yield
        finally:
            attributes.restore()
            for slot, home in homes:
                slot.home = home
            self._results.restore(logged)

    def measured(self) -> None:
        """After a first capture, whose graph is dropped: makes room for the checks that it showed."""
        self._checks = [DeferredCheck.of(*seen) for seen in self._checked.seen]

    @property
    def may_check(self) -> bool:
        """Whether there is anything that may check its arguments."""
        return bool(self._metrics)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the step is captured."""
        self._reads, self._writes = [], {}
        self._checked = CheckedCalls(self._checks)
        self._lists = {}
        for metric in self._metrics:
            for name, default in states_of(metric).items():
                vars(metric).pop(name, None)
                if not isinstance(
                    default, Tensor
                ):  # what a step appends is told from what was there
                    vars(metric)[name] = self._lists[id(metric), name] = []
            if isinstance(metric, Metric):
                vars(metric)["_update_count"] = _COUNT
        self._before = {id(metric): dict(vars(metric)) for metric in self._metrics}
        with contextlib.ExitStack() as stack:
            for metric in self._metrics:
                interception = Interception(metric, _RecordedMetric(self, metric))
                stack.callback(interception.remove)
                if isinstance(metric, Metric):
                    stack.callback(vars(metric).__setitem__, "update", vars(metric)["update"])
                    vars(metric)["update"] = self._checked_update(metric, vars(metric)["update"])
            if self._sync_free:
                stack.enter_context(sync_free(self._checked))
            known = self._results.is_supported()
            self._calls = None if known else stack.enter_context(self._log_calls.collected())
            yield

    def _checked_update(self, metric: Metric, original: Any) -> Any:
        @functools.wraps(original)
        def update(*args: Any, **kwargs: Any) -> None:
            with self._checked.during(_update_of_a_copy(metric), args, kwargs):
                original(*args, **kwargs)

        return update

    def read(self, metric: nn.Module, name: str) -> Any:
        """Gives the fixed tensor of a state that the captured step reads."""
        slot = self._slots.get((id(metric), name))
        if slot is None:
            raise AttributeError(name)
        self._reads.append(slot)
        slot.attributes[name] = slot.fixed
        return slot.fixed

    def check_read(self, metric: nn.Module, name: str) -> None:
        """Raises where a replay could not do what reads this attribute."""
        if reason := unsupported_read(metric, name, self._writes.get(id(metric), set())):
            raise CaptureError(reason)

    def write(self, metric: nn.Module, name: str, value: Any) -> None:
        """Notes what the captured step sets."""
        if reason := unsupported_write(metric, name, value):
            raise CaptureError(reason)
        self._writes.setdefault(id(metric), set()).add(name)

    def finish(self) -> StepEffects:
        """Inside the capture, after the step: writes new states where they are fixed, and tells what else was done."""
        effects = StepEffects(self._states, self._reads, self._checks or [], self._log_calls.make)
        effects.log_calls = CapturedLogCalls(self._calls) if self._calls else None
        logged = set(map(id, self._results.metrics()))
        for metric in self._metrics:
            written = self._writes.get(id(metric), set())
            if reason := unsupported_update(metric, written):
                raise CaptureError(reason)
            self._note_lists(metric, effects)
        self._note_states(effects)
        for metric in self._metrics:
            self._note_attributes(metric, self._writes.get(id(metric), set()), effects)
        if any(key in logged for key in self._writes):
            effects.log = self._results.effect()
        if not logged <= set(map(id, self._metrics)):
            raise CaptureError("a value was logged for the first time")
        return effects

    def _note_states(self, effects: StepEffects) -> None:
        finals = [
            (slot, slot.attributes[slot.name])
            for slot in self._slots.values()
            if slot.name in slot.attributes
        ]
        fixed_storages = {slot.fixed.untyped_storage().data_ptr() for slot in self._slots.values()}
        homes: dict[int, Tensor] = {
            id(value): value for slot, value in finals if value is slot.fixed
        }
        copies: list[tuple[Tensor, Tensor]] = []
        for slot, value in finals:
            if (
                value.shape != slot.fixed.shape
                or value.dtype != slot.fixed.dtype
                or value.device != slot.fixed.device
            ):
                raise CaptureError(
                    f"the state {type(slot.metric).__name__}.{slot.name} changes its shape, dtype or device"
                )
            if id(value) not in homes:
                homes[id(value)] = slot.fixed
                overlaps = value.untyped_storage().data_ptr() in fixed_storages
                copies.append((slot.fixed, value.clone() if overlaps else value))
            effects.homes.append((slot, homes[id(value)]))
        if copies:
            torch._foreach_copy_([fixed for fixed, _ in copies], [value for _, value in copies])
        effects.metrics = list({id(slot.metric): slot.metric for slot, _ in effects.homes}.values())

    def _note_lists(self, metric: nn.Module, effects: StepEffects) -> None:
        for name, default in states_of(metric).items():
            if isinstance(default, Tensor):
                continue
            items = vars(metric)[name]
            if not isinstance(items, list) or not all(isinstance(item, Tensor) for item in items):
                raise CaptureError(
                    f"the state {type(metric).__name__}.{name} is no list of tensors"
                )
            if items:
                same_list = items is self._lists[id(metric), name]
                effects.appended.append((vars(metric), name, len(items), same_list))
                effects.tensors.extend(items)

    def _note_attributes(self, metric: nn.Module, written: set[str], effects: StepEffects) -> None:
        before = self._before[id(metric)]
        for name in sorted(written - state_names(metric)):
            value = vars(metric).get(name)
            if name == "_update_count" and isinstance(value, int) and value >= _COUNT:
                effects.counts.append((vars(metric), name, value - _COUNT))
                continue
            leaves = flatten(value)[0]
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if not all(
                isinstance(leaf, Tensor) or is_plain_value(leaf) or leaf is before.get(name)
                for leaf in leaves
            ):
                raise CaptureError(
                    f"{type(metric).__name__}.{name} is set to what a replay cannot make"
                )
            if tensors and len(tensors) != len(leaves):
                raise CaptureError(
                    f"{type(metric).__name__}.{name} is made of tensors and other values"
                )
            effects.tensors.extend(tensors)
            template = rebuild(value, iter([None] * len(leaves))) if tensors else value
            effects.values.append((vars(metric), name, template, len(tensors)))


class _RecordedMetric(ModuleHandler):
    def __init__(self, recording: Recording, metric: nn.Module) -> None:
        self._recording = recording
        self._metric = metric

    def get_missing(self, name: str) -> Any:
        return self._recording.read(self._metric, name)

    def on_read(self, name: str) -> None:
        self._recording.check_read(self._metric, name)

    def on_write(self, name: str, value: Any) -> None:
        self._recording.write(self._metric, name, value)
