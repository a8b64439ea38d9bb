"""Find the side effects of a step while it is captured.

What is hard here:

- A metric *rebinds* its states: ``update`` sets ``self.tp = self.tp + ...``. So the states are
  removed from the attributes during a capture. The first read of a state returns the static tensor
  (``MetricState.graph_tensor``). At the end, the graph itself copies the final attribute to the
  static tensor. Therefore :meth:`StepRecording.finish` must run *inside* the capture.
- The user's own metrics are used, and must be unchanged afterwards, even if the capture fails. So
  each context restores what it has changed, in reverse order: interceptions, attributes of metrics
  (after each capture), locations of states, and logged values (after all captures).
- A deferred check (``metrics/deferred_checks.py``) writes to memory from outside the graph, but
  only a capture shows which checks exist. So a step with checks is captured twice, and the first
  graph is dropped. See :class:`Recorder` for the order.
- ``LoggedValues.begin`` must come before all snapshots. It does the reset of the first ``self.log``
  of an epoch outside the graph. Otherwise the graph would contain that reset.
- A step may increment a counter of updates, or set it to another number (``reset``).
  ``CapturedCount`` (``recording.py``) distinguishes the two.
- Nothing may depend on the garbage collector: after its contexts are left, no recorder is part of a
  reference cycle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch import nn

from cg_lightning.core.errors import CaptureError
from cg_lightning.effects.attributes import AttributesSnapshot
from cg_lightning.effects.kinds import ReadChecksLater
from cg_lightning.effects.late_updates import LateStep
from cg_lightning.effects.logged_numbers import numbers_as_tensors
from cg_lightning.effects.logged_values import LoggedValues
from cg_lightning.effects.recording import RecordedParts, Recording, StepRecording
from cg_lightning.metrics.deferred_checks import CheckedCalls, DeferredCheck, DeferredChecks
from cg_lightning.metrics.members import metrics_of
from cg_lightning.metrics.states import MetricStates
from cg_lightning.metrics.sync_free import sync_free


class Recorder:
    """Records captures of one step, in this order.

    1. Enter the context that gives the recorder, outside any capture.
    2. Capture the step, with :meth:`step` around it.
    3. If its checks have no memory (``recording.checked.have_memory()``): drop the graph and the
       effects, call :meth:`reserve_checks`, and capture once more, as in 2.
    4. Leave the context. Metrics and logged values are then as they were before.

    This class itself is for a submodule. Its calls have no effects, because others are not
    captured.
    """

    def step(self) -> AbstractContextManager[Recording]:
        """While this is entered, one captured step is recorded."""
        return contextlib.nullcontext(Recording(CheckedCalls()))

    def reserve_checks(self, checked: CheckedCalls, are_expected: bool = False) -> None:
        """Reserve memory for the checks that a captured step has made, or that are expected."""


@contextlib.contextmanager
def recording_effects(
    module: nn.Module,
    states: MetricStates,
    logged: LoggedValues,
    late: LateStep,
    checks: DeferredChecks,
    sync_free: bool,
) -> Iterator[EffectRecorder]:
    """While this is entered, metrics have states at fixed addresses, and captures are recorded.

    At the end everything is restored. If no exception was raised, the checks of the last captured
    step are read from then on.

    Args:
        module: The module.
        states: The states of its metrics.
        logged: Its logged values.
        late: The metrics that are updated after the step.
        checks: Receives the checks of the final graph.
        sync_free: Replace functions of torchmetrics that wait for the device.

    Raises:
        CaptureError: That step made checks and was not captured again, so they would be lost.
    """
    logged.begin()
    found = {id(metric): metric for metric in (*metrics_of(module), *logged.metrics())}
    metrics = [metric for metric in found.values() if not late.is_late(metric)]
    logged_before = logged.snapshot()
    try:
        with states.held_for_capture(metrics) as tensors:
            parts = RecordedParts(metrics, tensors, states, logged, late)
            recorder = EffectRecorder(module, parts, sync_free)
            yield recorder
    finally:
        logged.restore(logged_before)
    checks.add(recorder.checks())


class EffectRecorder(Recorder):
    """Records captures of one step of a module; :func:`recording_effects` makes it.

    Args:
        module: The module.
        parts: What the step may change.
        sync_free: Replace functions of torchmetrics that wait for the device.
    """

    def __init__(self, module: nn.Module, parts: RecordedParts, sync_free: bool) -> None:
        self._module = module
        self._parts = parts
        self._sync_free = sync_free
        self._checked = CheckedCalls()
        """The calls of the last step."""
        self._reserved: list[DeferredCheck] = []
        """The checks of the step, for which memory is reserved."""
        self._are_expected = False

    @contextlib.contextmanager
    def step(self) -> Iterator[Recording]:
        """While this is entered, one captured step is recorded.

        At the end the attributes of metrics are restored, so each capture starts from the same.
        """
        parts = self._parts
        self._checked = CheckedCalls(self._reserved or None, self._are_expected)
        effects = [ReadChecksLater(self._reserved)] if self._reserved else []
        with contextlib.ExitStack() as stack:
            stack.callback(AttributesSnapshot(parts.metrics).restore)
            recording = StepRecording(self._checked, parts, effects)
            recording.late_calls = stack.enter_context(parts.late.collected())
            stack.enter_context(recording.watching())
            if self._sync_free:
                stack.enter_context(sync_free(self._checked, parts.metrics))
            if parts.logged.is_supported():
                stack.enter_context(numbers_as_tensors(self._module))
                stack.enter_context(parts.logged.noting_hooks())
            else:
                recording.log_calls = stack.enter_context(parts.logged.calls.collected())
            yield recording

    def reserve_checks(self, checked: CheckedCalls, are_expected: bool = False) -> None:
        """See :class:`Recorder`."""
        self._are_expected = are_expected
        self._reserved = [DeferredCheck.of(*seen) for seen in checked.seen]

    def checks(self) -> list[DeferredCheck]:
        """Return the checks of the last captured step.

        Raises:
            CaptureError: They have no memory, so they would be lost.
        """
        if not self._checked.have_memory():
            raise CaptureError("the step checks its arguments, and was captured only once")
        return self._reserved
