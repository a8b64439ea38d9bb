"""Copies and numbers that the step does not read: a replay makes them after the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.copies_to_host import answered_copies_to_host, answered_reads
from cg_lightning.backends.host_reads import UNSEEN_READS
from cg_lightning.backends.illegal_operations import find_illegal
from cg_lightning.backends.imported_functions import with_notice
from cg_lightning.core.causes import Cause
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.detectors.logging import LOGGING_METHODS
from cg_lightning.diagnosis.findings import Location, find_location
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.uses_of_read import ReadUse, use_of_read
from cg_lightning.effects.late_reads import METHODS, ReadPlace, can_be_late
from cg_lightning.modules.kinds import is_lightnings_own

_READS = (*UNSEEN_READS, "__reduce_ex__", "__dlpack__", "data_ptr", "__format__", "__repr__")
"""Methods that may read a tensor of the host, and that no operation shows."""


class HostCopies(Detector):
    """Allows ``x.cpu()`` until the step reads the copy. Submodules that copy get no graph.

    ``x.item()`` and the like are allowed if the source shows that the step only passes the value
    on.

    If a module is compiled, nothing is allowed: compiled code may have guards on the methods that a
    capture would replace. Copies that metrics make for themselves are not allowed either.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._copies: dict[int, tuple[Tensor, Location]] = {}
        """Each copy and the line that makes it, by the id of the copy."""
        self._late_reads: set[ReadPlace] = set()
        root = watch.root
        self._inside = frozenset(id(module) for _, module in watch.modules) | {id(root)}
        self._logs = watch.is_lightning and all(
            is_lightnings_own(root, name) for name in LOGGING_METHODS
        )

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
            if self.watch.effects is not None and not self.watch.has_backward:
                stack.enter_context(answered_reads(METHODS, self._answer_read))
            try:
                yield
                self.watch.notes.late_reads = frozenset(self._late_reads)
            finally:
                self._copies.clear()

    def _answer_read(
        self, tensor: Tensor, name: str, frame: FrameType, read: Callable[[], Any]
    ) -> Any:
        watch = self.watch
        is_known = type(tensor) is Tensor and can_be_late(tensor, name)
        is_on_device = tensor.device.type == watch.device_type or id(tensor) in self._copies
        is_of_step = watch.is_about_step and not (watch.is_paused or watch.is_in_framework)
        use = use_of_read(frame.f_code, frame.f_lasti) if is_known and is_of_step else None
        if use is None or not is_on_device or not self._is_harmless(use, frame):
            return read()
        watch.notes.late_targets.update(use.targets(frame))
        operation = "aten::item" if name == "item" else f"Tensor.{name}"
        watch.report(Cause.HOST_SYNC, operation, calls=watch.stack[1:])
        self._late_reads.add((id(frame.f_code), frame.f_lasti))
        with watch.copying_to_host():
            return read()

    def _is_harmless(self, use: ReadUse, frame: FrameType) -> bool:
        if not use.is_harmless(frame, self.watch.root, self._inside):
            return False
        if not use.is_logged:
            return True
        effects = self.watch.effects
        with self.watch.paused():
            return self._logs and effects is not None and effects.logged.is_supported()

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
        is_passed_on = self.watch.copies_to_host or function is torch.ops.aten.detach.default
        if not self._copies or is_passed_on:
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
        if id(tensor) in self._copies and not self.watch.copies_to_host:
            location = self._copies[id(tensor)][1].user
            calls = [self.watch.step]
            self.watch.note_operation(reads_host_value=False)
            self.watch.report(Cause.HOST_SYNC, "Tensor.cpu", location=location, calls=calls)
