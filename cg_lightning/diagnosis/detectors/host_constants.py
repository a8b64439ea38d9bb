"""Tensors that a step makes of Python values: a graph clones what was made before its capture."""

from __future__ import annotations

import contextlib

from torch import Tensor

from cg_lightning.backends.tensor_makers import MakerCall, answered_makers
from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector


class HostConstants(Detector):
    """Allows calls such as ``torch.tensor([1.0, 2.0], device=...)``.

    The values are Python's, so they are as constant as a number in the code: what changes is
    guarded or found by the other detectors. If a module is compiled, nothing is allowed: compiled
    code may have guards on the functions that a capture would replace.
    """

    def around_step(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.watch.hidden else answered_makers(self._answer)

    def _answer(self, call: MakerCall) -> Tensor:
        device = self.watch.backend.device
        if not call.is_constant_on(device):
            if call.is_made_on(device):
                self.watch.report_unless_found(Cause.TENSOR_FROM_PYTHON, f"torch.{call.name}")
            elif call.copies_values:
                with self.watch.making_on_host():
                    return call.run()
            return call.run()
        with self.watch.making_constant():
            return call.run()
