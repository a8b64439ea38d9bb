"""The backward of a training step, and the gradients that the step reads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cg_lightning.core.causes import Cause
from cg_lightning.core.closure import ClosureOutput, UnfinishedClosure
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import NOT_YOURS, is_our_file
from cg_lightning.diagnosis.watched_step import ModuleCall

_TORCH = f"{Path(torch.__file__).parent}/"


class Backward(Detector):
    """Reports a backward that a graph of the closure cannot hold.

    A graph computes new gradients, and the parameters have those of the iteration before until
    then. So a step must not read ``parameter.grad``. Other tensors have no gradients after a
    replay, so a step must not ask for them by ``retain_grad``.
    """

    causes = (Cause.BACKWARD,)

    def around_step(self) -> AbstractContextManager[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        return self._noticing_reads() if self.watch.has_backward else contextlib.nullcontext()

    def returned(self, call: ModuleCall, output: Any) -> None:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        if call is not self.watch.step:
            return
        if isinstance(output, UnfinishedClosure):
            self.watch.report(Cause.BACKWARD, output.problem, location=NOT_YOURS)
        elif isinstance(output, ClosureOutput):
            for name, gradient in output.gradients.items():
                if gradient is not None and gradient.layout is not torch.strided:
                    words = f"the gradient of {name} is sparse"
                    self.watch.report(Cause.BACKWARD, words, location=NOT_YOURS)

    @contextlib.contextmanager
    def _noticing_reads(self) -> Iterator[None]:
        inherited: Any = Tensor.grad  # of a base class that is written in C
        original: Any = Tensor.retain_grad
        watch = self.watch

        def get(tensor: Tensor) -> Tensor | None:
            file = sys._getframe(1).f_code.co_filename
            if not (is_our_file(file) or file.startswith(_TORCH)):
                watch.report(Cause.BACKWARD, "the step reads a gradient")
                context = current_forward_context()
                if context is not None and context.step is not None and context.step.aside:
                    context.step.aside.give(tensor)
            return inherited.__get__(tensor)  # type: ignore[no-any-return]

        def retain_grad(tensor: Tensor) -> None:
            watch.report(Cause.BACKWARD, "retain_grad")
            original(tensor)

        grad = property(get, inherited.__set__, inherited.__delete__)
        with patch.object(Tensor, "grad", grad), patch.object(Tensor, "retain_grad", retain_grad):
            yield
