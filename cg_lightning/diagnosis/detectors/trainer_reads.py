"""What a step reads from the Trainer: a graph would freeze it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import is_read_by_user
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.modules.interception import Interception, ModuleHandler


class ReadNames(ModuleHandler):
    """Reports reads of some attributes, unless Lightning itself reads them in ``self.log``."""

    def __init__(self, watch: StepWatch, cause: Cause, names: tuple[str, ...]) -> None:
        self._watch = watch
        self._cause = cause
        self._names = names

    def on_read(self, name: str) -> None:
        """See :class:`~cg_lightning.modules.interception.ModuleHandler`."""
        if name not in self._names or self._watch.is_in_framework:
            return
        if not name.startswith("_") or is_read_by_user():  # ``self.trainer`` reads it as well
            self._watch.report(self._cause, f"self.{name}")


class TrainerReads(Detector):
    """Reports reads of ``self.trainer`` and of what it counts."""

    causes = (Cause.TRAINER_READ,)

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        root = self.watch.root
        if not self.watch.is_lightning or id(root) in self.watch.hidden:
            yield
            return
        names = ("trainer", "_trainer", "current_epoch", "global_step")
        interception = Interception(root, ReadNames(self.watch, Cause.TRAINER_READ, names))
        try:
            yield
        finally:
            interception.remove()
