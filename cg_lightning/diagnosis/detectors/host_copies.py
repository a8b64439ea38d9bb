"""Copies to the host that the step does not read: a replay makes them after the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.copies_to_host import answered_copies_to_host
from cg_lightning.backends.host_reads import UNSEEN_READS
from cg_lightning.backends.illegal_operations import find_illegal
from cg_lightning.backends.imported_functions import with_notice
from cg_lightning.core.causes import Cause
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import Location, find_location
from cg_lightning.diagnosis.step_watch import StepWatch

_READS = (*UNSEEN_READS, "__reduce_ex__", "__dlpack__", "data_ptr", "__format__", "__repr__")
"""Methods that may read a tensor of the host, and that no operation shows."""


class HostCopies(Detector):
    """Allows ``x.cpu()`` until the step reads the copy. Submodules that copy get no graph.

    If a module is compiled, nothing is allowed: compiled code may have guards on the methods that a
    capture would replace. Copies that metrics make for themselves are not allowed either.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._copies: dict[int, tuple[Tensor, Location]] = {}
        """Each copy and the line that makes it, by the id of the copy."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        if self.watch.hidden:
            yield
            return
        with contextlib.ExitStack() as stack:
            for name in _READS:
                replacement = with_notice(getattr(Tensor, name), self._note_read)
                stack.enter_context(patch.object(Tensor, name, replacement))
            stack.enter_context(answered_copies_to_host(self.watch.backend.device, self._answer))
            try:
                yield
            finally:
                self._copies.clear()

    def _answer(self, tensor: Tensor, copy: Callable[[], Tensor]) -> Tensor:
        watch, where = self.watch, find_location()
        is_plain = type(tensor) is Tensor and not tensor.requires_grad
        is_of_step = watch.is_about_step and not (watch.is_paused or watch.is_in_framework)
        if not (is_plain and is_of_step) or where.is_in_library("torchmetrics"):
            return copy()
        watch.report(Cause.HOST_SYNC, "Tensor.cpu", calls=watch.stack[1:])
        with watch.copying_to_host():
            # on the CPU it is the tensor itself, which the step may read
            made = tensor.detach() if tensor.is_cpu else copy()
        self._copies[id(made)] = made, where
        return made

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._copies or function is torch.ops.aten.detach.default:
            return
        # another detector reports what a graph cannot hold, and has more to say; but no capture
        # answers a read of a copy
        is_illegal = find_illegal(function, args, kwargs, self.watch.device_type) is not None
        if not is_illegal or self.watch.reads_host_value:
            for tensor in tensors_in((args, kwargs)):
                self._note_read(tensor)

    def after_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if function is torch.ops.aten.detach.default and id(args[0]) in self._copies:
            self._copies[id(output)] = output, self._copies[id(args[0])][1]

    def _note_read(self, tensor: Tensor, *_: Any, **__: Any) -> None:
        if id(tensor) in self._copies:
            location = self._copies[id(tensor)][1].user
            calls = [self.watch.step]
            self.watch.note_operation(reads_host_value=False)
            self.watch.report(Cause.HOST_SYNC, "Tensor.cpu", location=location, calls=calls)
