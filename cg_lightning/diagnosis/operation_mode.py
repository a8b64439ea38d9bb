"""Tells detectors of each operation that PyTorch dispatches in a watched step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch._ops import HigherOrderOperator

from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector

if TYPE_CHECKING:
    from cg_lightning.diagnosis.step_watch import StepWatch


class OperationMode(EagerDispatchMode):
    """Tells detectors of each dispatched operation.

    It does not watch the functions inside operators such as ``torch.cond``.
    """

    supports_higher_order_operators = True

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch.device_type)
        self._watch = watch
        self._before: list[Callable[..., None]] = []
        self._after: list[Callable[..., None]] = []

    @property
    def is_autocast_enabled(self) -> bool:
        """Whether autocast is on; it cannot be asked inside a dispatched operation."""
        return self._autocast

    def tell(self, detectors: Sequence[Detector]) -> None:
        """Set the detectors: those that override the methods are told."""
        self._before = [
            detector.before_operation
            for detector in detectors
            if type(detector).before_operation is not Detector.before_operation
        ]
        self._after = [
            detector.after_operation
            for detector in detectors
            if type(detector).after_operation is not Detector.after_operation
        ]

    def dispatch(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`~cg_lightning.backends.dispatch_mode.EagerDispatchMode`."""
        if isinstance(function, HigherOrderOperator):
            self._watch.report(Cause.OPAQUE, f"torch.ops.higher_order.{function.name()}")
            return function(*args, **kwargs)
        if self._watch.is_paused:
            return self.call(function, args, kwargs)
        self._run(self._before, function, args, kwargs)
        if self._watch.reads_host_value or self._watch.copies_constant:
            with self._watch.backend.ignoring_host_syncs():
                output = self.call(function, args, kwargs)
        else:
            output = self.call(function, args, kwargs)
        self._run(self._after, function, args, kwargs, output)
        return output

    def _run(self, told: list[Callable[..., None]], *operation: Any) -> None:
        events = self._watch.call_events
        is_paused = events is not None and events.pause()
        try:
            for each in told:
                each(*operation)
        finally:
            if is_paused:
                events.resume()  # type: ignore[union-attr]
