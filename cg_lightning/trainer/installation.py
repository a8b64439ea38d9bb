"""Puts step runners on a LightningModule for the time of a stage, and takes them off again."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from cg_lightning.backends import CapturedGraph
from cg_lightning.core.stages import STEPS
from cg_lightning.modules.interception import Interception
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.step_runner import StepRunner


class Installation:
    """What one callback has put on one LightningModule."""

    def __init__(self, module: LightningModule, session: Session) -> None:
        self.module = module
        self.session = session
        self._runners: dict[str, StepRunner] = {}
        self._steps: dict[str, Interception] = {}
        self._step: Interception | None = None

    def install(self, stage: str) -> None:
        """Makes the step of ``stage`` run through a :class:`StepRunner`; idempotent."""
        if self._step is not None:
            return
        name = STEPS[stage]
        if stage not in self._runners:  # graphs are kept from one validation inside fit to the next
            self.session.note_step(stage, name)
            self._runners[stage] = StepRunner(self.session, stage, getattr(self.module, name))
        self.session.install()
        self._step = self._steps.get(stage)
        if self._step is None or not self._step.resume():
            if self._step is not None:
                self._step.remove()
            self._step = Interception(self.module, methods={name: self._runners[stage].as_method()})
            self._steps[stage] = self._step

    def graphs_of_steps(self) -> list[CapturedGraph]:
        """The graphs of whole steps."""
        return [graph for runner in self._runners.values() for graph in runner.graphs()]

    def remove(self, check: bool = True) -> None:
        """Leaves no trace on the module; idempotent. ``check`` is as in :meth:`Session.remove`."""
        if self._step is not None:
            self._step.suspend()
            self._step = None
            self.session.remove(check)

    def close(self) -> None:
        """Removes everything, and drops the graphs."""
        self.remove(check=False)
        self.session.close()
        for step in self._steps.values():
            step.remove()
        self._steps.clear()
        self._runners.clear()
