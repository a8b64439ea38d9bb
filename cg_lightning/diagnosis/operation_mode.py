"""Reports to detectors each operation that PyTorch dispatches in a watched step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch._ops import HigherOrderOperator, OpOverload

from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.operation_log import MOST_OPERATIONS, Operation, plain_arguments
from cg_lightning.diagnosis.step_run import Observer
from cg_lightning.diagnosis.step_watch import StepWatch


class OperationMode(EagerDispatchMode):
    """Reports each dispatched operation to those observers that override the methods for it.

    It does not watch the functions inside operators such as ``torch.cond``.

    Args:
        watch: The step that is watched.
        observers: The observers.
    """

    supports_higher_order_operators = True

    def __init__(self, watch: StepWatch, observers: Sequence[Observer]) -> None:
        super().__init__(watch.device_type)
        self._watch = watch
        self._before = [
            observer.before_operation
            for observer in observers
            if type(observer).before_operation is not Observer.before_operation
        ]
        self._after = [
            observer.after_operation
            for observer in observers
            if type(observer).after_operation is not Observer.after_operation
        ]

    def dispatch(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`~cg_lightning.backends.dispatch_mode.EagerDispatchMode`."""
        if isinstance(function, HigherOrderOperator):
            self._watch.report(Cause.OPAQUE, f"torch.ops.higher_order.{function.name()}")
            return function(*args, **kwargs)
        if self._watch.is_paused:
            return self.call(function, args, kwargs)
        self._note(function, args, kwargs)
        self._run(self._before, function, args, kwargs)
        if self._watch.reads_host_value or self._watch.copies_constant:
            with self._watch.backend.ignoring_host_syncs():
                output = self.call(function, args, kwargs)
        else:
            output = self.call(function, args, kwargs)
        self._run(self._after, function, args, kwargs, output)
        return output

    def _note(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        operations = self._watch.notes.operations
        if len(operations) < MOST_OPERATIONS:
            operations.append(Operation(function.name(), plain_arguments(args, kwargs)))

    def _run(self, methods: list[Callable[..., None]], *operation: Any) -> None:
        events = self._watch.call_events
        is_paused = events is not None and events.pause()
        try:
            for each in methods:
                each(*operation)
        finally:
            if is_paused:
                events.resume()  # type: ignore[union-attr]
