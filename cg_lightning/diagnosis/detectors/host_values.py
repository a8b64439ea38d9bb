"""Reads on the host whose values are known before the step: they depend on batch and module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.host_indices import place_of_indexing
from cg_lightning.core.tree import flatten
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import find_location
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.host_values.provenance import Provenance
from cg_lightning.modules.kinds import is_metric


class HostValues(Detector):
    """Reports to the watch which reads a capture of the whole step can answer.

    If a module is compiled, there are none, because its operations cannot be observed.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        members = [
            table
            for module in watch.root.modules()
            if not is_metric(module)  # graphs have states at addresses of their own
            for table in (module._parameters, module._buffers)
        ]
        self._provenance = Provenance(flatten(watch.batch)[0], self._where, members)
        if watch.hidden:
            self._provenance.give_up()

    def _where(self) -> tuple[str, str, str]:
        user, library = find_location()
        return user, library, self.watch.stack[-1].path if self.watch.stack else ""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        try:
            yield
            with self.watch.paused():
                self.watch.notes.path = self._provenance.path()
        finally:
            self._provenance.give_up()  # it holds the batch

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # a number that is only passed on is read after the replay
        is_about_step = self.watch.is_about_step and not self.watch.copies_to_host
        with self.watch.paused():  # it may wait for the device
            is_known = self._provenance.begin(function, args, kwargs, is_about_step)
        self.watch.note_operation(reads_host_value=is_known)

    def after_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._provenance.end(output)
        if function._schema.name == "aten::lift_fresh" and self._is_constant(output):
            with self.watch.paused():
                self._provenance.note_constant(output)
        self.watch.note_operation(reads_host_value=False)

    def _is_constant(self, made: Tensor) -> bool:
        """Return whether a tensor that was just made of Python values is the same in each step."""
        if self.watch.makes_constant or self.watch.copies_constant:
            return True
        # the number in ``labels[labels == -100] = 0``
        return made.dim() == 0 and place_of_indexing() is not None
