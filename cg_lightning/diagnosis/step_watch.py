"""Sees what a running step does that a graph could not hold."""

from __future__ import annotations

import builtins
import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torchmetrics import Metric

from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from cg_lightning.backends.illegal_operations import find_illegal
from cg_lightning.core.causes import Cause
from cg_lightning.core.equality import same_leaf
from cg_lightning.core.tree import flatten
from cg_lightning.diagnosis.detectors.global_reads import GlobalReads
from cg_lightning.diagnosis.location import users_location
from cg_lightning.diagnosis.watched_step import Call, Finding
from cg_lightning.guards.values import addresses_of
from cg_lightning.modules.kinds import is_user_file


def _addresses_in(values: Any) -> set[int]:
    return addresses_of(leaf for leaf in flatten(values)[0] if isinstance(leaf, Tensor))


class Watch(EagerDispatchMode):
    """Collects findings for all calls that are under way.

    Args:
        device_type: Where the step runs.
        step: The step.
        states: Those of metrics.
    """

    def __init__(self, device_type: str, step: Call, states: Iterable[Tensor] = ()) -> None:
        super().__init__(device_type)
        self.stack = [step]
        self.written_outside: dict[int, Tensor] = {}
        """Tensors that were written to and not made in the step, by the address of their storage; all of the storage."""
        self.globals = GlobalReads(self.add_read)
        self._made = addresses_of(states) | step.input_addresses
        self.is_in_framework = False
        """Whether what reads attributes of the module is Lightning, in ``self.log``."""
        self._paused = False
        self._first = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While we ourselves compare something, nothing is a finding."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def add(self, cause: Cause, operation: str) -> None:
        """Adds a finding to every call that is under way."""
        if self._paused:
            return
        finding = Finding(cause, operation, self.stack[-1].path, users_location())
        for call in self.stack[self._first :]:
            call.findings.append(finding)

    def add_read(self, read: tuple[Any, str]) -> None:
        """Notes an attribute or a global for every call that is under way."""
        owner, name = read
        for call in self.stack:
            call.reads[id(owner), name] = owner

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Enters the mode. Functions compiled by ``torch.compile`` run as they were before: under a dispatch mode they would do
        so for good.
        """
        with super().watching():
            self._stance = torch.compiler.set_stance("force_eager")
            try:
                yield
            finally:
                self._stance.__exit__(None, None, None)

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """While a compiled module runs, and compiled it shall be."""
        self._stance.__exit__(None, None, None)
        is_innermost = _get_current_dispatch_mode() is self
        if is_innermost:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            if is_innermost:
                self.__enter__()  # type: ignore[no-untyped-call]
            self._stance = torch.compiler.set_stance("force_eager")

    @contextlib.contextmanager
    def sparing_the_step(self) -> Iterator[None]:
        """While something runs that a graph of the whole step can hold, and that of a submodule cannot."""
        before, self._first = self._first, 1
        try:
            yield
        finally:
            self._first = before

    def add_for_submodules(self, cause: Cause, operation: str) -> None:
        """Adds a finding to every call of a submodule that is under way."""
        with self.sparing_the_step():
            self.add(cause, operation)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return self.call(func, args, kwargs)
        if (cause := find_illegal(func, args, kwargs, self.device_type)) is not None:
            self.add(cause, func._schema.name)
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            self.add(Cause.HOST_RANDOMNESS, f"{func._schema.name} with a generator of its own")
        caches_a_cast = (
            self._autocast and func._schema.name == "aten::_to_copy"
        )  # autocast does so with gradients
        if torch.is_grad_enabled() and not caches_a_cast and self._tracks_gradients(args):
            self.add(Cause.GRADIENTS, func._schema.name)
        if func._schema.is_mutable:
            self._find_mutated_inputs(func, args, kwargs)
        output = self.call(func, args, kwargs)
        self._made |= _addresses_in(output) - _addresses_in((args, kwargs))
        return output

    def _tracks_gradients(self, args: tuple[Any, ...]) -> bool:
        """Whether what is computed has a gradient: metrics enable gradients for the value of a batch, which has none."""
        if torch.is_inference_mode_enabled():
            return False
        return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in flatten(args)[0])

    def _find_mutated_inputs(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        named = zip(func._schema.arguments, args, strict=False)
        written = [
            value
            for argument, value in named
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [
            kwargs[a.name]
            for a in func._schema.arguments
            if a.alias_info is not None and a.name in kwargs
        ]
        self.add_mutation(
            [leaf for leaf in flatten(written)[0] if isinstance(leaf, Tensor)], func._schema.name
        )

    def add_mutation(self, written: list[Tensor], operation: str) -> None:
        """Adds a finding to every call that is under way and was given one of these tensors."""
        addresses = addresses_of(written)
        for tensor in written:
            address = tensor.untyped_storage().data_ptr()
            if address not in self._made and address not in self.written_outside:
                with torch.inference_mode(False):
                    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                    self.written_outside[address] = whole.set_(tensor.untyped_storage())
        for call in self.stack:
            if call.input_addresses & addresses:
                call.findings.append(
                    Finding(Cause.INPUT_MUTATED, operation, self.stack[-1].path, users_location())
                )


class Copies:
    """Copies of tensors, to see what was written to where no operation tells: in compiled code, by kernels of one's own."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._pairs = [
            (tensor, tensor.clone()) for tensor in tensors if tensor.layout is torch.strided
        ]

    def changed(self) -> list[Tensor]:
        """Those that are no longer what they were."""
        return [tensor for tensor, before in self._pairs if not same_leaf(tensor, before)]


@contextlib.contextmanager
def other_metrics_noticed(known: list[nn.Module], watch: Watch) -> Iterator[None]:
    """Notices metrics that are no submodules (in a dict, say): nobody would bring up to date what they hold."""
    thread, original = threading.get_ident(), Metric.__setattr__
    ids = set(map(id, known))

    def write(metric: Metric, name: str, value: Any) -> None:
        if name == "_update_count" and threading.get_ident() == thread and id(metric) not in ids:
            watch.add(Cause.METRIC_UPDATED, f"{type(metric).__name__} is no submodule")
        original(metric, name, value)

    with patch.object(Metric, "__setattr__", write):
        yield


@contextlib.contextmanager
def printing_noticed(watch: Watch) -> Iterator[None]:
    """Notices ``print``, and what the user's own functions log by ``logging``."""
    original, handle, thread = builtins.print, logging.Logger.handle, threading.get_ident()

    def noticed(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread:
            watch.add(Cause.PRINTED, "print")
        original(*args, **kwargs)

    def noticed_record(logger: logging.Logger, record: logging.LogRecord) -> None:
        if threading.get_ident() == thread and is_user_file(record.pathname):
            watch.add(Cause.PRINTED, "logging")
        handle(logger, record)

    with (
        patch.object(builtins, "print", noticed),
        patch.object(logging.Logger, "handle", noticed_record),
    ):
        yield
