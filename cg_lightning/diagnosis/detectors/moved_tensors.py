"""Parameters and buffers that a step gives other memory: ``self.half()``, ``weight.data = ...``.

A graph would read and write the memory that they had when it was captured. An address alone does
not show it, because freed memory is used again: after ``net.double()`` and ``net.float()`` a weight
may be where it was. So their memory is kept until the step ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

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
        self._before: dict[int, _Memory] = {}
        self._inside: dict[int, list[_Memory]] = {}
        """The tensors inside each module that was called, by the id of the module."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        root = self.watch.root
        self._before = {
            id(tensor): _Memory(name, tensor, tensor.detach())
            for name, tensor in chain(root.named_parameters(), root.named_buffers())
            if not is_lazy(tensor)
        }
        try:
            yield
            self._compare(self.watch.step, self._before.values())
        finally:
            self._before, self._inside = {}, {}

    @contextlib.contextmanager
    def around_call(self, call: ModuleCall) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        module = call.module
        assert module is not None
        inside = self._inside.get(id(module))
        if inside is None:
            tensors = chain(module.parameters(), module.buffers())
            found = [self._before.get(id(tensor)) for tensor in tensors]
            inside = self._inside[id(module)] = [each for each in found if each is not None]
        yield
        self._compare(call, inside)

    def _compare(self, call: ModuleCall, tensors: Iterable[_Memory]) -> None:
        moved = next((each.name for each in tensors if each.is_elsewhere()), None)
        if moved is not None:
            words = f"{moved} is given other memory"
            self.watch.report(Cause.STATE_REBOUND, words, location=AT_THE_END, calls=[call])


class _Memory(NamedTuple):
    name: str
    tensor: Tensor
    before: Tensor

    def is_elsewhere(self) -> bool:
        tensor, before = self.tensor, self.before
        is_same_kind = (tensor.dtype, tensor.device) == (before.dtype, before.device)
        return not is_same_kind or tensor.data_ptr() != before.data_ptr()
