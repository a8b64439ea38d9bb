"""Watches one eager step under all detectors, without changing what it computes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from cg_lightning.backends import GraphBackend
from cg_lightning.backends.capture_scope import CAPTURE_LOCK
from cg_lightning.core.causes import Cause
from cg_lightning.core.lines import learn_cells
from cg_lightning.diagnosis.call_events import CallEvents
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.detectors.attribute_reads import AttributeReads
from cg_lightning.diagnosis.detectors.backward import Backward, report_older_graphs
from cg_lightning.diagnosis.detectors.batch_attributes import BatchAttributes
from cg_lightning.diagnosis.detectors.batch_index import BatchIndex
from cg_lightning.diagnosis.detectors.compiled import CompiledModules
from cg_lightning.diagnosis.detectors.copied_constants import CopiedConstants
from cg_lightning.diagnosis.detectors.device_events import DeviceEvents
from cg_lightning.diagnosis.detectors.global_reads import GlobalReads
from cg_lightning.diagnosis.detectors.hooks import ForwardHooks
from cg_lightning.diagnosis.detectors.host_constants import HostConstants
from cg_lightning.diagnosis.detectors.host_copies import HostCopies
from cg_lightning.diagnosis.detectors.host_reads import HostReads
from cg_lightning.diagnosis.detectors.host_values import HostValues
from cg_lightning.diagnosis.detectors.late_updates import LateUpdates
from cg_lightning.diagnosis.detectors.logging import Logging
from cg_lightning.diagnosis.detectors.metric_updates import MetricUpdates
from cg_lightning.diagnosis.detectors.mode_dependent import ModeDependent
from cg_lightning.diagnosis.detectors.moved_tensors import MovedTensors
from cg_lightning.diagnosis.detectors.mutations import Mutations
from cg_lightning.diagnosis.detectors.operations import Operations
from cg_lightning.diagnosis.detectors.printing import Printing
from cg_lightning.diagnosis.detectors.random_numbers import RandomNumbers
from cg_lightning.diagnosis.detectors.rebound_state import ReboundState
from cg_lightning.diagnosis.detectors.tensor_attributes import TensorAttributes
from cg_lightning.diagnosis.detectors.trainer_reads import TrainerReads
from cg_lightning.diagnosis.detectors.world import World
from cg_lightning.diagnosis.operation_mode import OperationMode
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.host_values.path import ReadPath
from cg_lightning.modules.interception import Interception, ModuleHandler, can_intercept

DETECTORS: tuple[type[Detector], ...] = (
    # Entered from first to last, left from last to first.
    CompiledModules,  # stays first: when it is left, it asks whether the others found anything
    BatchIndex,
    ReboundState,  # before the next two: its comparisons then meet none of their interceptions
    AttributeReads,
    TensorAttributes,
    BatchAttributes,
    TrainerReads,
    LateUpdates,  # before the next one, which reports at its end
    MetricUpdates,
    Logging,
    Printing,
    World,
    DeviceEvents,
    RandomNumbers,
    ForwardHooks,
    Mutations,
    MovedTensors,
    HostValues,  # before those that report reads: it says which of them a capture can answer
    CopiedConstants,  # after HostValues, which asks it, and before Operations, which report copies
    Backward,
    ModeDependent,
    Operations,
    HostReads,  # after all that compare tensors: on a GPU a comparison waits for the device
    HostConstants,  # after HostReads, which replaces the same functions and reports
    HostCopies,  # likewise
    GlobalReads,  # stays last: it receives every call, of our functions as well
)


class StepWatcher:
    """Watches steps of one module. A watched step computes what an eager one computes.

    Compiled modules run compiled, so they are watched from outside: their arguments and state are
    compared before and after. Compiled functions and methods, and what the callback compiles, run
    as they were written, in watched steps only.

    Args:
        root: The module whose step runs.
        backend: Where it runs.
        effects: The side effects of the steps. None: a graph of the whole step can hold neither
            ``self.log`` nor updates of metrics.
        run_logging: Whether ``self.log`` and ``self.print`` are executed.
        has_backward: Whether the step computes its gradients itself.
        detectors: The detectors, in the order in which they are entered.
    """

    def __init__(
        self,
        root: nn.Module,
        backend: GraphBackend,
        *,
        effects: ModuleEffects | None,
        run_logging: bool = True,
        has_backward: bool = False,
        detectors: tuple[type[Detector], ...] = DETECTORS,
    ) -> None:
        self._root = root
        self._backend = backend
        self._effects = effects
        self._run_logging = run_logging
        self._has_backward = has_backward
        self._detectors = detectors

    def watch(
        self,
        step: Callable[..., Any],
        batch: Any,
        arguments: tuple[Any, ...] = (),
        stops_at: frozenset[Cause] = frozenset(),
    ) -> tuple[Any, WatchedStep]:
        """Run ``step`` once; return its output, and what it showed.

        Args:
            step: The step. It is called with ``arguments``.
            batch: The batch that it runs on.
            arguments: What Lightning gives the step after the batch: ``batch_idx`` is the first.
            stops_at: What the step may not do.

        Raises:
            StoppedStep: The step was about to do something with a cause in ``stops_at``.
        """
        learn_cells()
        watch = StepWatch(
            self._root,
            self._backend,
            batch,
            effects=self._effects,
            run_logging=self._run_logging,
            has_backward=self._has_backward,
            stops_at=stops_at,
        )
        detectors = [kind(watch) for kind in self._detectors]
        for detector in detectors:
            arguments = detector.arguments(arguments)
        mode = OperationMode(watch, detectors)
        try:
            # detectors replace functions of modules and classes; those of two threads do not nest
            with (
                CAPTURE_LOCK,
                watch.garbage,
                _intercepted_calls(watch, detectors),
                contextlib.ExitStack() as stack,
            ):
                for detector in detectors:
                    stack.enter_context(detector.around_step())
                with watch.run.running(mode, detectors):
                    output = step(*arguments)
                    for detector in detectors:
                        detector.returned(watch.step, output)
            if self._has_backward:
                report_older_graphs(watch)
            result = watch.result()
        finally:
            watch.release()
            for detector in detectors:
                vars(detector).clear()
        return output, result

    def host_values(self, step: Callable[[], Any], batch: Any) -> ReadPath | None:
        """Run ``step``, of which all else is known; return its host reads."""
        detectors = (CompiledModules, HostValues)
        watcher = StepWatcher(self._root, self._backend, effects=None, detectors=detectors)
        return watcher.watch(step, batch)[1].path


class _CallHandler(ModuleHandler):
    """Runs the calls of one module under those detectors that watch calls."""

    def __init__(
        self, watch: StepWatch, path: str, module: nn.Module, detectors: Sequence[Detector]
    ) -> None:
        self._watch = watch
        self._path = path
        self._module = module
        self._detectors = detectors
        self._with_returned = [
            detector for detector in detectors if type(detector).returned is not Detector.returned
        ]

    def on_call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        events = self._watch.call_events
        # compiled code runs without reports, to the end of its call
        if events is None or id(self._module) in self._watch.hidden or not events.pause():
            return self._run(original, args, kwargs)
        try:
            return self._run(functools.partial(_reported, events, original), args, kwargs)
        finally:
            events.resume()

    def _run(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = self._watch.new_call(self._path, self._module, args, kwargs)
        with self._watch.calling(call), contextlib.ExitStack() as stack:
            for detector in self._detectors:
                stack.enter_context(detector.around_call(call))
            output = original(*args, **kwargs)
            for detector in self._with_returned:
                detector.returned(call, output)
            return output


def _reported(
    events: CallEvents, original: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call ``original``, and let Python report what it calls, but nothing around it."""
    events.resume()
    try:
        return original(*args, **kwargs)
    finally:
        events.pause()


@contextlib.contextmanager
def _intercepted_calls(watch: StepWatch, detectors: Sequence[Detector]) -> Iterator[None]:
    detectors = [
        detector for detector in detectors if type(detector).around_call is not Detector.around_call
    ]
    with contextlib.ExitStack() as stack:
        for path, module in watch.modules:
            if can_intercept(module):
                handler = _CallHandler(watch, path, module, detectors)
                stack.callback(Interception(module, handler).remove)
        yield
