"""Parameters and buffers that a step gives other memory: ``self.half()``, ``weight.data = ...``.

A graph would read and write the memory that they had when it was captured. An address alone does
not show it, because freed memory is used again: after ``net.double()`` and ``net.float()`` a weight
may be where it was. So their memory is kept until the step ends.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import AT_THE_END
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall


class MovedTensors(Detector):
    """Compares the memory of parameters and buffers with what it was before the step."""

    causes = (Cause.STATE_REBOUND,)

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._before: dict[int, tuple[str, Tensor, Tensor]] = {}
        self._inside: dict[str, list[int]] = defaultdict(list)
        """The ids of the tensors in each submodule, by its path."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        root = self.watch.root
        for name, tensor in chain(
            root.named_parameters(remove_duplicate=False),
            root.named_buffers(remove_duplicate=False),
        ):
            if not is_lazy(tensor) and tensor.layout is torch.strided:
                self._before[id(tensor)] = (name, tensor, tensor.detach())
                for path in accumulate(name.split(".")[:-1], "{}.{}".format):
                    self._inside[path].append(id(tensor))
        try:
            yield
            self._compare(self.watch.step, list(self._before))
        finally:
            self._before.clear()

    @contextlib.contextmanager
    def around_call(self, call: ModuleCall) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        yield
        self._compare(call, self._inside[call.path])

    def _compare(self, call: ModuleCall, tensors: list[int]) -> None:
        for key in tensors:
            name, tensor, before = self._before.get(key, ("", None, None))
            if tensor is not None and before is not None and _is_elsewhere(tensor, before):
                words = f"{name} is given other memory"
                self.watch.report(Cause.STATE_REBOUND, words, location=AT_THE_END, calls=[call])
                return


def _is_elsewhere(tensor: Tensor, before: Tensor) -> bool:
    is_same_kind = (tensor.dtype, tensor.device) == (before.dtype, before.device)
    return not is_same_kind or tensor.data_ptr() != before.data_ptr()
