"""Finds the effects of a step while it is captured.

What is hard here:

- A metric *rebinds* its states: ``update`` sets ``self.tp = self.tp + ...``. So during a capture
  the states are taken out of the attributes; a read that misses gets the static tensor
  (``MetricState.graph_tensor``), and what the attribute is at the end is copied to the static
  tensor by the graph itself. Therefore :meth:`StepRecording.finish` must run *inside* the capture.
- All of that happens with the user's metrics, which must be untouched afterwards, also if the
  capture fails. So everything is put back by the contexts that changed it, in reverse order:
  interceptions, attributes of metrics (after each capture), where states are stored, and the logged
  values (after all captures).
- A check that was deferred (``metrics/deferred_checks.py``) writes to memory from outside the
  graph, and which checks there are is known after a capture only. So a step that checks something
  is captured twice; the graph of the first capture is dropped. See :class:`Recorder` for the order.
- ``LoggedValues.begin`` comes before anything is remembered: it does what the first ``self.log``
  of an epoch would do, outside the graph. Else the reset that it makes would be captured.
- A step may set a counter of updates to what it was plus one, or to a number of its own
  (``reset``). The two are told apart by ``CapturedCount`` (``recording.py``).
- Nothing may wait for the garbage collector: no attribute of a recorder refers to what refers to
  the recorder, once its contexts are left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from cg_lightning.core.errors import CaptureError
from cg_lightning.effects.effect import Effect, ReadChecksLater
from cg_lightning.effects.logged_values import LoggedValues
from cg_lightning.effects.recording import StepRecording
from cg_lightning.effects.step_state import AttributesSnapshot
from cg_lightning.metrics.deferred_checks import CheckedCalls, DeferredCheck, DeferredChecks
from cg_lightning.metrics.members import metrics_of
from cg_lightning.metrics.states import MetricState, MetricStates
from cg_lightning.metrics.sync_free import sync_free


class Recording(Protocol):
    """One captured step."""

    def finish(self) -> tuple[list[Effect], list[Tensor]]:
        """Return the effects of the step, and the tensors that the graph computes for them.

        Call it once, inside the capture and after the step: it writes metric states.

        Raises:
            CaptureError: The step did what a replay cannot do again.
        """


class Recorder(Protocol):
    """Records captures of one step, in this order.

    1. Enter :meth:`prepared`, outside any capture.
    2. Capture the step, with :meth:`step` around it.
    3. If :attr:`has_unreserved_checks`: drop the graph and the effects, call
       :meth:`reserve_checks`, and capture once more, as in 2.
    4. Leave :meth:`prepared`: metrics and logged values are what they were.
    """

    @property
    def has_unreserved_checks(self) -> bool:
        """Whether the latest captured step made checks for which no memory was reserved."""

    def prepared(self) -> AbstractContextManager[None]:
        """While this is entered, metrics have states at fixed addresses."""

    def step(self) -> AbstractContextManager[Recording]:
        """While this is entered, one captured step is recorded."""

    def reserve_checks(self) -> None:
        """Reserve memory for the checks that the latest captured step made."""


class _NoRecording:
    def finish(self) -> tuple[list[Effect], list[Tensor]]:
        return [], []


class NoEffects:
    """The recorder for a submodule: a call that has effects is not captured, so there are none."""

    has_unreserved_checks = False

    def prepared(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def step(self) -> AbstractContextManager[Recording]:
        """Return a context in which nothing is recorded."""
        return contextlib.nullcontext(_NoRecording())

    def reserve_checks(self) -> None:
        """Do nothing."""


class EffectRecorder:
    """Records captures of one step of a module; see :class:`Recorder` for the order.

    Args:
        module: The module.
        states: The states of its metrics.
        logged: What it logs.
        checks: Takes the checks of the graph that is kept.
        sync_free: Replace functions of torchmetrics that wait for the device.
    """

    def __init__(
        self,
        module: nn.Module,
        states: MetricStates,
        logged: LoggedValues,
        checks: DeferredChecks,
        sync_free: bool,
    ) -> None:
        self._module = module
        self._states = states
        self._logged = logged
        self._checks = checks
        self._sync_free = sync_free
        self._metrics: list[nn.Module] = []
        self._metric_states: list[MetricState] = []
        self._checked = CheckedCalls()
        self._reserved: list[DeferredCheck] = []

    @property
    def has_unreserved_checks(self) -> bool:
        """Whether the latest captured step made checks for which no memory was reserved."""
        return len(self._checked.seen) > len(self._reserved)

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """While this is entered, metrics have states at fixed addresses.

        At the end everything is put back. If no exception is raised, the checks of the latest
        captured step are read from then on.

        Raises:
            CaptureError: That step made checks, and was not captured again: they would be lost.
        """
        self._logged.begin()
        self._metrics = _without_repetition([*metrics_of(self._module), *self._logged.metrics()])
        logged_before = self._logged.snapshot()
        try:
            with self._states.held_for_capture(self._metrics) as metric_states:
                self._metric_states = metric_states
                yield
        finally:
            self._logged.restore(logged_before)
        if self.has_unreserved_checks:
            raise CaptureError("the step checks its arguments, and was captured only once")
        self._checks.add(self._reserved)

    @contextlib.contextmanager
    def step(self) -> Iterator[Recording]:
        """While this is entered, one captured step is recorded.

        At the end attributes of metrics are put back: each capture starts from the same ones.
        """
        self._checked = CheckedCalls(self._reserved or None)
        effects = [ReadChecksLater(self._reserved)] if self._reserved else []
        with contextlib.ExitStack() as stack:
            stack.callback(AttributesSnapshot(self._metrics).restore)
            recording = StepRecording(
                self._metrics, self._metric_states, self._states, self._logged, effects
            )
            stack.enter_context(recording.watching(self._checked))
            if self._sync_free:
                stack.enter_context(sync_free(self._checked))
            if not self._logged.is_supported():
                recording.log_calls = stack.enter_context(self._logged.calls.collected())
            yield recording

    def reserve_checks(self) -> None:
        """Reserve memory for the checks that the latest captured step made."""
        self._reserved = [DeferredCheck.of(*seen) for seen in self._checked.seen]


def _without_repetition(metrics: list[nn.Module]) -> list[nn.Module]:
    return list({id(metric): metric for metric in metrics}.values())
