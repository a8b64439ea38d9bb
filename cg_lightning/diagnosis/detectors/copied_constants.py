"""Constants of the host that a step copies to the device: indices, and tensors of the CPU.

What is hard here: a graph freezes whatever a step on a device reads of a tensor on the host, and
operations on the host are no part of a graph. So each such tensor that lived before the step is
guarded by what is in it. What the step itself makes of these, and of Python values, is constant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.copies_from_host import copied_from_host
from cg_lightning.backends.host_indices import place_of_indexing
from cg_lightning.backends.host_reads import TO_DLPACK, UNSEEN_READS
from cg_lightning.backends.imported_functions import replaced_where_imported, with_notice
from cg_lightning.core.causes import Cause
from cg_lightning.core.lines import Elsewhere
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.detector import ReplacingDetector
from cg_lightning.diagnosis.findings import find_location
from cg_lightning.diagnosis.operands import HeldOperand, written_tensors
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.guards.host_tensors import is_guardable, source_of_host_tensor
from cg_lightning.guards.sources import Source
from cg_lightning.guards.values import has_memory
from cg_lightning.metrics.members import states_of

_READS = (*UNSEEN_READS, "__dlpack__")
"""Methods that read a tensor of the host, or return its memory, without an operation."""


class _Filled(NamedTuple):
    """A tensor of the host that a step fills with a number, and that it may have made unseen.

    TorchScript makes such tensors (``torch.tensor(2)`` in PyTorch 2.11) without an operation.
    """

    held: HeldOperand
    location: str
    """The line that fills it."""
    calls: list[ModuleCall]
    """The calls under way."""


class CopiedConstants(ReplacingDetector):
    """Allows ``x[:, [-1, 0]]`` and ``self.table.to(x.device)``: a capture copies before the graph.

    What a list holds is Python's, as for
    :class:`~cg_lightning.diagnosis.detectors.host_constants.HostConstants`. If it holds tensors, a
    capture fails, because it does not know them. If a module is compiled, nothing is allowed.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._is_elsewhere = watch.device_type != "cpu"
        self._made: dict[int, bool] = {}
        """Whether a tensor that the step makes on the host is constant, by its storage."""
        self._kept: list[Tensor] = []
        """All of them: their addresses must not be used again."""
        self._filled: list[_Filled] = []
        self._sources: dict[int, tuple[Source, Any]] = {}
        """Tensors of the host that the step reads and has not made, and what was in them."""
        states = [
            getattr(metric, name) for metric in watch.all_metrics for name in states_of(metric)
        ]
        self._states = set(map(_storage, tensors_in(states)))
        """States of metrics, which have effects of their own."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        try:
            with self.replacing():
                yield
            with self.watch.paused():
                changed = [
                    each for each, before in self._sources.values() if each.value() != before
                ]
            for source in changed:
                readers = [call for call in self.watch.calls() if source.key in call.sources]
                words = f"{source.path} changes"
                self.watch.report(
                    Cause.STATE_REBOUND, words, location=Elsewhere.AT_THE_END, calls=readers
                )
            for held, location, calls in self._filled:
                if held.is_held_by_others():
                    words = _writes("aten::fill_")
                    self.watch.report(Cause.STATE_REBOUND, words, location=location, calls=calls)
        finally:
            self._kept.clear()
            self._filled.clear()
            self._sources.clear()

    def replace(self, replaced: contextlib.ExitStack) -> None:
        for name in _READS if self._is_elsewhere else ():
            replacement = with_notice(getattr(Tensor, name), self._note_read)
            replaced.enter_context(patch.object(Tensor, name, replacement))
        if self._is_elsewhere:
            readers = {"to_dlpack": (TO_DLPACK, with_notice(TO_DLPACK, self._note_read))}
            replaced.enter_context(replaced_where_imported(readers))

    def before_read(self, tensor: Tensor) -> None:
        self._read(tensor)

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        watch = self.watch
        is_lifted = function._schema.name == "aten::lift_fresh"
        if self._is_elsewhere and not (is_lifted or watch.is_in_framework):
            self._note_uses(function, args, kwargs)
        copies_constant = not (watch.hidden or watch.makes_constant) and (
            self._is_index(args[0]) if is_lifted else self._copies(function, args, kwargs)
        )
        watch.note_operation(copies_constant=copies_constant)
        if copies_constant:
            watch.note_copy_from_host()

    def after_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.watch.note_operation(copies_constant=False)
        if not self._is_elsewhere:
            return
        made = _on_host((output,))
        if not made:
            return
        given = tensors_in((args, kwargs))
        known = set(map(_storage, given))
        if self.watch.makes_on_host and function._schema.name == "aten::lift_fresh":
            known = set()
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        for tensor in made:
            if _storage(tensor) not in known:
                is_constant = not known or all(map(self._is_constant, given))
                self._made[_storage(tensor)] = is_constant and not is_random
                self._kept.append(tensor)

    def _is_index(self, made: Tensor) -> bool:
        is_elsewhere = made.device == self.watch.backend.device
        if not made.dim() or not (is_elsewhere or made.is_cpu):
            return False
        if made.dtype not in (torch.int64, torch.bool):
            return False
        place = place_of_indexing()
        if place is not None and is_elsewhere:  # of an array, PyTorch makes a tensor on the host
            self.watch.note_index(place)
        return place is not None

    def _copies(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        copied = copied_from_host(function, args, kwargs, self.watch.backend.device)
        return bool(copied) and all(map(self._is_constant, copied))

    def _note_uses(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        watch = self.watch
        on_host = [*_on_host(args), *_on_host(kwargs.values())]
        if len(on_host) == 1 and _fills_all(function, args):
            storage = _storage(on_host[0])
            if storage not in self._made and storage not in self._states:
                self._made[storage] = True
                held = HeldOperand(on_host[0])
                self._filled.append(_Filled(held, find_location().user, [*watch.stack]))
            return
        for tensor in on_host:
            self._read(tensor)
        if not on_host or torch.Tag.inplace_view in function.tags:
            return
        given = tensors_in((args, kwargs))
        for tensor in written_tensors(function, args, kwargs):
            storage = _storage(tensor)
            if tensor.is_cpu and storage in self._made:
                self._made[storage] &= all(map(self._is_constant, given))
            elif tensor.is_cpu and storage not in self._states:
                watch.report(Cause.STATE_REBOUND, _writes(function._schema.name))

    def _is_constant(self, tensor: Tensor) -> bool:
        if not tensor.is_cpu:
            return False
        known = self._made.get(_storage(tensor))
        return is_guardable(tensor) if known is None else known

    def _read(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if not storage or storage in self._made or storage in self._states:
            return
        if id(tensor) not in self._sources:
            with self.watch.paused():
                source = source_of_host_tensor(tensor)
                self._sources[id(tensor)] = (source, source.value())
        self.watch.read(self._sources[id(tensor)][0])

    def _note_read(self, tensor: Tensor, *_: Any, **__: Any) -> None:
        if tensor.is_cpu:
            self.watch.note_unseen_read(tensor)


def _writes(operation: str) -> str:
    return f"{operation} writes to a tensor on the host"


def _fills_all(function: OpOverload, args: tuple[Any, ...]) -> bool:
    """Return True if an operation writes a number to all memory of a tensor."""
    if function is not torch.ops.aten.fill_.Scalar or not has_memory(args[0]):
        return False
    return bool(args[0].nbytes == args[0].untyped_storage().nbytes())


def _on_host(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors of the host among the arguments or outputs of an operation, quickly."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.is_cpu:
                found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _on_host(value)
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if has_memory(tensor) else 0
