"""Events of the device that a step records and somebody keeps: no replay would record them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import Location, find_location
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall


class DeviceEvents(Detector):
    """Reports events that exist before or after the step.

    A graph orders its streams by the events that its step records. Outside of it, they belong to
    the capture: who asks one of them for its time, or waits for it, gets an error.
    """

    causes = (Cause.OPAQUE,)

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._recorded: list[tuple[weakref.ref[Any], Location, list[ModuleCall]]] = []

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        with contextlib.ExitStack() as replaced:
            for kind in self.watch.backend.event_types:
                replaced.enter_context(patch.object(kind, "record", self._noting(kind.record)))
            yield
        for event, location, calls in self._recorded:
            if event() is not None:
                self.watch.report(
                    Cause.OPAQUE,
                    f"{type(event()).__name__}.record",
                    location=location,
                    module=calls[-1].path,
                    calls=calls,
                )
        self._recorded.clear()

    def _noting(self, record: Callable[..., None]) -> Callable[..., None]:
        thread = threading.get_ident()

        def noted(event: Any, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == thread and not self.watch.is_paused:
                calls = list(self.watch.stack)
                self._recorded.append((weakref.ref(event), find_location(), calls))
            record(event, *args, **kwargs)

        return noted
