"""Updates of metrics that may follow the step, because the step uses nothing of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.equality import copy_of, same_leaf
from cg_lightning.core.kernel_flags import lasting_flags
from cg_lightning.core.tree import flatten
from cg_lightning.diagnosis.callers import (
    callers,
    is_reader_ours,
    is_search_for_modules,
    is_value_dropped,
)
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.late_unit import LateUnit
from cg_lightning.diagnosis.operands import addresses_in, written_tensors
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.effects.late_updates import VALUE
from cg_lightning.effects.step_state import HostRandomState
from cg_lightning.guards.values import addresses_of
from cg_lightning.metrics.caught_errors import is_exception_handled
from cg_lightning.metrics.units import METHODS, MetricCall, calls_from_outside
from cg_lightning.modules.interception import Interception, ModuleHandler

_LOGS = ("to", "items")
"""What ``self.log`` and ``self.log_dict`` call, and a replay calls again."""
_READ_BY_CALLERS = ("__class__", *METHODS)
_READ_BY_LOG = (*_READ_BY_CALLERS, "device", "_device", "_enable_compute_groups", VALUE)


class LateUpdates(Detector):
    """Decides for each unit of metrics whether its calls may follow the step.

    A graph then leaves the calls out, and what it could not hold in them is no finding of the
    step. That is safe if the call and the rest of the step do not see each other:

    - The step does not use the value of ``metric(...)``, and neither reads nor writes the metric.
      ``self.log`` of it is repeated as well.
    - After the call, the step writes to nothing that the call has read, arguments included. The
      call writes to nothing but the metric.
    - After the call, the step draws no random number.
    - An error of the call leaves the step: nothing in the step handles it.
    - Determinism, inference mode and the like are those of the whole step. Grad mode and autocast
      may be others: they are set again.
    - A replay can make the arguments.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._current: LateUnit | None = None
        self._called: list[LateUnit] = []
        self._flags: tuple[Any, ...] = ()
        self._random: HostRandomState | None = None
        """The state of the host's generators after the latest call."""
        self._own: set[int] = set()
        """Addresses of the metric's states, and of what the current call has made."""
        self._seen: dict[int, tuple[Tensor, list[LateUnit]]] = {}
        """What calls have read, by address, with a tensor that keeps the memory."""
        self._arguments: list[tuple[LateUnit, Tensor, Tensor]] = []
        """Arguments, with copies of them."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        units = self.watch.late_units
        if not units:
            yield
            return
        self._flags = lasting_flags()
        with contextlib.ExitStack() as stack:
            for late in units:
                for metric in late.unit.metrics:
                    handler = _AccessHandler(self, late)
                    stack.callback(Interception(metric, handler).remove)
            stack.callback(self._seen.clear)
            stack.callback(self._arguments.clear)
            stack.enter_context(calls_from_outside([late.unit for late in units], self._call))
            yield
        findings = self.watch.step.findings
        for late in sorted(units, key=lambda late: late.position, reverse=True):
            if late.is_late:
                self.watch.forget_reads(late.unit.metrics)
            else:  # in the order of the step: the first one is its reason
                findings[late.position : late.position] = map(late.explain, late.findings)

    def returned(self, call: Any, output: Any) -> None:
        if call is not self.watch.step:
            return
        self._check_draws()
        with self.watch.paused():
            for late, tensor, before in self._arguments:
                if not same_leaf(tensor, before):
                    late.refuse("whose argument the step changes later")

    def _call(self, call: MetricCall) -> Any:
        late = self.watch.late_unit(call.metric)
        assert late is not None
        self._check_draws()
        self._check_call(late, call)
        late.called(len(self.watch.step.findings))
        self._called.append(late)
        with self.watch.paused():
            self._own = _addresses_inside(late)
            before = HostRandomState()
        self._current = late
        try:
            with self.watch.run.updating(), self.watch.setting_aside(late.findings):
                output = call.original(*call.args, **call.kwargs)
                if self._was_drawn(before):
                    self.watch.report_unless_found(Cause.HOST_RANDOMNESS, "random state moved")
        finally:
            self._current = None
        with self.watch.paused():
            self._random = HostRandomState()
        is_unused = call.method in _LOGS or (call.method == "update" and output is None)
        caller = next(callers(), None)  # None: a container of PyTorch's has called it
        if not is_unused and (caller is None or not is_value_dropped(caller)):
            late.refuse("whose value is used")
        return output

    def _check_call(self, late: LateUnit, call: MetricCall) -> None:
        metric, method, _, args, kwargs = call
        if (method in _LOGS) is not self.watch.is_in_framework or (method == "items" and args):
            late.refuse("that the step uses otherwise")
        if method == "__call__" and late.is_logged:
            late.refuse("that is logged before it is updated")
        if lasting_flags() != self._flags:
            late.refuse("that is updated under settings of its own")
        if method not in _LOGS and any(map(is_exception_handled, callers())):
            late.refuse("that is updated inside try or with")
        for leaf in flatten((args, kwargs))[0]:
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._see(late, leaf)
                with self.watch.paused():
                    self._arguments.append((late, leaf, copy_of(leaf)))
            elif not is_plain_value(leaf):
                late.refuse(f"that is given a {type(leaf).__name__}")
            elif isinstance(leaf, str):  # what is computed from it is no work of the device
                with self.watch.setting_aside(late.findings):
                    words = f"{type(metric).__name__}.{method} reads a text"
                    self.watch.report_unless_found(Cause.METRIC_UPDATED, words)

    def _see(self, late: LateUnit, tensor: Tensor) -> None:
        for address in addresses_of([tensor]) - self._own:
            self._seen.setdefault(address, (tensor, []))[1].append(late)

    def _was_drawn(self, before: HostRandomState) -> bool:
        with self.watch.paused():  # the states are tensors
            return before.was_drawn(self.watch.device_type)

    def _check_draws(self) -> None:
        """Refuse the units that were called if the step has drawn a number since then."""
        if self._random is not None and self._was_drawn(self._random):
            self._refuse_called()

    def _refuse_called(self) -> None:
        for late in self._called:
            late.refuse("after whose update the step draws a random number")

    def access(self, late: LateUnit, name: str, is_write: bool) -> None:
        """Note that something reads or sets an attribute of a metric."""
        if self._current is late or self.watch.is_paused:
            return
        # below the handler and the interception; MetricUpdates passes writes on, and none is ours
        if not is_write and is_reader_ours(sys._getframe(3)):
            return
        if self._current is not None:
            late.refuse("that another metric uses")
            self._current.refuse("that uses another metric")
        elif is_write:
            late.refuse("that the step changes")
        elif not self.watch.is_in_framework:
            if name not in _READ_BY_CALLERS:
                late.refuse("that the step reads")
        elif name == VALUE:
            late.logged()
            effects = self.watch.effects
            if effects is not None and not effects.logged.is_supported():
                late.refuse("that is logged")
        elif name not in _READ_BY_LOG and not is_search_for_modules(sys._getframe(3)):
            late.refuse("that self.log reads")

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._called:
            return
        late = self._current
        if late is None and torch.Tag.nondeterministic_seeded in function.tags:
            self._refuse_called()
        name = function._schema.name
        if name == "aten::lift_fresh":  # torch.tensor has made it, which nothing else shows
            self._own |= addresses_in(args)
        written = addresses_of(written_tensors(function, args, kwargs))
        if late is None:
            for address in written & self._seen.keys():
                for other in self._seen[address][1]:
                    other.refuse("whose argument the step changes later")
            return
        if written - self._own:
            late.refuse("that changes a tensor of the step")
        for leaf in flatten((args, kwargs))[0]:
            if isinstance(leaf, Tensor):
                self._see(late, leaf)

    def after_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._current is not None:
            self._own |= addresses_in(output) - addresses_in((*args, *kwargs.values()))


class _AccessHandler(ModuleHandler):
    def __init__(self, detector: LateUpdates, late: LateUnit) -> None:
        self._detector = detector
        self._late = late

    def on_read(self, name: str) -> None:
        self._detector.access(self._late, name, is_write=False)

    def on_write(self, name: str, value: Any) -> None:
        self._detector.access(self._late, name, is_write=True)


def _addresses_inside(late: LateUnit) -> set[int]:
    modules = [module for metric in late.unit.metrics for module in metric.modules()]
    return addresses_of(
        leaf
        for module in modules
        for leaf in flatten(dict(vars(module)))[0]
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided
    )
