"""Events of the device that a step records and that live longer: no replay records them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

from cg_lightning.backends.imported_functions import with_notice
from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import Location, find_location
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall


class _Recorded(NamedTuple):
    """An event that the step has recorded."""

    event: Any
    location: Location
    calls: list[ModuleCall]
    """The calls that were under way."""


_OWN_REFERENCES = 2
"""That of :class:`_Recorded`, and that of the call which counts them."""


class DeviceEvents(Detector):
    """Reports events that exist before or after the step.

    A graph orders its streams by the events that its step records. Outside of it, they belong to
    the capture: to ask one of them for its time, or to wait for it, raises an error.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        # by id, and not by weak references: those to events of torch 2.11 are not cleared
        self._recorded: dict[int, _Recorded] = {}

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        with contextlib.ExitStack() as replaced:
            for kind in self.watch.backend.event_types:
                record = with_notice(kind.record, self._note)
                replaced.enter_context(patch.object(kind, "record", record))
            yield
        for recorded in self._recorded.values():
            if sys.getrefcount(recorded.event) > _OWN_REFERENCES:
                self.watch.report(
                    Cause.OPAQUE,
                    f"{type(recorded.event).__name__}.record",
                    location=recorded.location,
                    module=recorded.calls[-1].path,
                    calls=recorded.calls,
                )
        self._recorded.clear()

    def _note(self, event: Any, *_: Any, **__: Any) -> None:
        if not self.watch.is_paused:
            recorded = _Recorded(event, find_location(), list(self.watch.stack))
            self._recorded.setdefault(id(event), recorded)
