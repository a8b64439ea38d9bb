"""Calls that wait for the device, and that the dispatcher does not show."""

from __future__ import annotations

from contextlib import AbstractContextManager

from cg_lightning.backends.host_indices import place_of_indexing
from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector


class HostReads(Detector):
    """Asks the backend to notice what it would wait for."""

    def around_step(self) -> AbstractContextManager[None]:
        return self.watch.backend.noticing_host_syncs(self._notice)

    def _notice(self, cause: Cause, operation: str) -> None:
        if not self.watch.takes_index(place_of_indexing()):
            self.watch.report(cause, operation)
