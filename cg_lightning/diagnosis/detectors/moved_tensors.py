"""Parameters and buffers that a step gives other memory: ``self.half()``, ``weight.data = ...``.

A graph would read and write the memory that they had when it was captured. An address alone does
not show it, because freed memory is used again: after ``net.double()`` and ``net.float()`` a weight
may be where it was. So their memory is kept until the step ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from cg_lightning.core.causes import Cause
from cg_lightning.core.lines import Elsewhere
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall


class MovedTensors(Detector):
    """Compares the memory of parameters and buffers with what it was before the step."""

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._before: dict[int, tuple[str, Tensor, Tensor]] = {}
        self._inside: dict[int, _Memory] = {}
        """The memory inside each module that was called, by the id of the module."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        root = self.watch.root
        self._before = {
            id(tensor): (name, tensor, tensor.detach())
            for name, tensor in chain(root.named_parameters(), root.named_buffers())
            if not is_lazy(tensor) and tensor.layout is torch.strided
        }
        memory = _Memory(list(self._before.values()))
        try:
            yield
            self._compare(self.watch.step, memory)
        finally:
            self._before, self._inside = {}, {}

    @contextlib.contextmanager
    def around_call(self, call: ModuleCall) -> Iterator[None]:
        module = call.module
        assert module is not None
        memory = self._inside.get(id(module))
        if memory is None:
            found = [
                self._before.get(id(tensor))
                for inside in self.watch.modules_in(module)
                for tensor in chain(inside._parameters.values(), inside._buffers.values())
            ]
            memory = _Memory([each for each in found if each is not None])
            self._inside[id(module)] = memory
        yield
        self._compare(call, memory)

    def _compare(self, call: ModuleCall, memory: _Memory) -> None:
        if moved := memory.first_moved():
            words = f"{moved} is given other memory"
            self.watch.report(
                Cause.STATE_REBOUND, words, location=Elsewhere.AT_THE_END, calls=[call]
            )


class _Memory:
    """Where tensors were before the step.

    Args:
        tensors: The name of each, the tensor, and another one with its memory before the step.
    """

    def __init__(self, tensors: list[tuple[str, Tensor, Tensor]]) -> None:
        self._names = [name for name, _, _ in tensors]
        self._tensors = [tensor for _, tensor, _ in tensors]
        self._before = _places([before for _, _, before in tensors])

    def first_moved(self) -> str:
        """Return the name of the first tensor that has other memory; empty if there is none."""
        now = _places(self._tensors)
        if now == self._before:
            return ""
        pairs = zip(self._names, self._before, now, strict=True)
        return next(name for name, before, place in pairs if before != place)


def _places(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.dtype, tensor.device, tensor.data_ptr()) for tensor in tensors]
