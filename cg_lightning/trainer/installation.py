"""Puts step runners on a LightningModule for the time of a stage, and takes them off again."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from cg_lightning.backends import CapturedGraph
from cg_lightning.core.stages import STEP_METHODS
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
        if self._step is not None:
            return
        import functools

        name = STEP_METHODS[stage]
        if stage not in self._runners:
            self.session.note_step(stage, name)
            self._runners[stage] = StepRunner(self.session, stage, name, getattr(self.module, name))
        self.session.install()
        runner = self._runners[stage]
        original = getattr(self.module, name)

        @functools.wraps(original)
        def step(*args, **kwargs):
            return runner.run(args, kwargs)

        vars(step)["__wrapped__"] = getattr(original, "__wrapped__", original)
        vars(self.module)[name] = step
        self._step = name

    def graphs_of_steps(self) -> list[CapturedGraph]:
        """The graphs of whole steps."""
        return [graph for runner in self._runners.values() for graph in runner.graphs()]

    def remove(self, check: bool = True) -> None:
        """Leaves no trace on the module; idempotent. ``check`` is as in :meth:`Session.remove`."""
        if self._step is not None:
            vars(self.module).pop(self._step)
            self._step = None
            self.session.remove(check)

    def close(self) -> None:
        """Removes everything, and drops the graphs."""
        self.remove(check=False)
        self.session.close()
        self._runners.clear()
