"""What all detectors have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from cg_lightning.diagnosis.step_run import Observer
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall


class Detector(Observer):
    """Finds one kind of thing that a graph cannot hold, or that it would freeze.

    A detector is made for one watched step. It overrides the methods that it needs, and reports
    what it finds to its :class:`~cg_lightning.diagnosis.step_watch.StepWatch`.

    Args:
        watch: The step that is watched.
    """

    def __init__(self, watch: StepWatch) -> None:
        self.watch = watch

    def arguments(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of the step after its batch. It is called before
        :meth:`around_step`.

        A detector may replace an argument by an object that behaves alike and records its use.
        """
        return arguments

    def around_step(self) -> AbstractContextManager[None]:
        """Is entered before the step and left after it; reports before it is left."""
        return contextlib.nullcontext()

    def around_call(self, call: ModuleCall) -> AbstractContextManager[None]:
        """Is entered before a call of a module and left after it; ``call`` is on the stack."""
        return contextlib.nullcontext()

    def returned(self, call: ModuleCall, output: Any) -> None:
        """Is called with what a call (or the step), the last on the stack, has returned."""


class ReplacingDetector(Detector):
    """A detector that replaces functions of PyTorch, but not while compiled code runs.

    Args:
        watch: The step that is watched.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._replaced = contextlib.ExitStack()

    def replace(self, replaced: contextlib.ExitStack) -> None:
        """Replace the functions, until ``replaced`` is closed."""
        raise NotImplementedError

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """While the step runs."""
        try:
            self.replace(self._replaced)
            yield
        finally:
            self._replaced.close()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """See :class:`Detector`."""
        self._replaced.close()
        try:
            yield
        finally:
            self.replace(self._replaced)
