"""A graph API for devices that have none: records dispatched operations, and replays them on the same memory."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

from cg_lightning.backends.capture_scope import (
    CAPTURE_LOCK,
    as_capture_error,
    autocast_cache_off,
    garbage_collection_paused,
)
from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from cg_lightning.backends.host_reads import OnCall, invisible_calls
from cg_lightning.backends.illegal_operations import find_illegal
from cg_lightning.core.causes import Cause
from cg_lightning.core.errors import IllegalOperationError

_Autocast = tuple[bool, torch.dtype | None]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def _fix(tree: Any) -> Any:
    """Other tensors on the memory that those in ``tree`` have now, wherever those go.

    One given twice stays one: attention of a sequence to itself takes another kernel. Some kernels look at requires_grad.
    """
    fixed = {
        id(tensor): tensor.detach().requires_grad_(tensor.requires_grad)
        for tensor in _tensors(tree)
    }
    return tree_map_only(Tensor, lambda tensor: fixed[id(tensor)], tree)


def _poison(tensor: Tensor) -> None:
    """Makes a value that nobody can take for a result."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


@dataclasses.dataclass
class _Operation:
    """One recorded call: tensors in ``args``, ``kwargs`` and ``results`` are fixed to the memory they had then."""

    function: OpOverload
    args: Any
    kwargs: Any
    results: list[Tensor | None]
    """What the call allocated; None where a result aliases an input."""
    autocast: _Autocast


class _Pool:
    """The graphs of one device. Memory that one of them holds only weakly may be used by any other."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[RecordedGraph] = weakref.WeakSet()

    def overwrite_weakly_held(self, replaying: RecordedGraph) -> None:
        for graph in self.graphs:
            if graph is not replaying:
                for tensor in graph.weakly_held:
                    _poison(tensor)


_pools: dict[torch.device, _Pool] = {}
_recording = threading.local()


def _may_write(function: OpOverload) -> bool:
    """Whether the schema says so, or is known not to: batch norm updates running statistics without declaring it."""
    return (
        function._schema.is_mutable
        or "norm" in function._schema.name
        or function.namespace != "aten"
    )


class _Recorder(EagerDispatchMode):
    """Runs each operation, keeps it, and remembers the bytes that it overwrites."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device.type)
        self.operations: list[_Operation] = []
        self.created: dict[int, Tensor] = {}
        self.weakly_held: list[Tensor] = []
        self._overwritten: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (cause := find_illegal(func, args, kwargs, self.device_type)) is not None:
            _refuse(cause, func._schema.name)
        inputs = _tensors(args, kwargs)
        if _may_write(func):
            self._remember(inputs)
        casts = self.casts_inside(func)
        autocast = (casts, torch.get_autocast_dtype(self.device_type) if casts else None)
        fixed_args, fixed_kwargs = _fix((args, kwargs))
        output = self.call(func, args, kwargs)
        if (
            torch.Tag.inplace_view not in func.tags
        ):  # those change how one tensor object is read, and no memory
            known = {_address(tensor) for tensor in inputs}
            results = [
                self._created(tensor) if _address(tensor) not in known else None
                for tensor in _tensors(output)
            ]
            pure_view = (
                bool(results) and not any(r is not None for r in results) and not _may_write(func)
            )
            if not pure_view:
                self.operations.append(
                    _Operation(func, fixed_args, fixed_kwargs, results, autocast)
                )
        return output

    def _created(self, tensor: Tensor) -> Tensor:
        fixed = tensor.detach()
        self.created.setdefault(_address(tensor), fixed)
        return fixed

    def _remember(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address and address not in self.created and address not in self._overwritten:
                self._overwritten[address] = (storage, storage.clone())

    def undo(self) -> None:
        """Puts back every byte that existed before the capture, and poisons those that did not."""
        for storage, before in self._overwritten.values():
            storage.copy_(before)
        for operation in self.operations:
            for result in operation.results:
                if result is not None:
                    _poison(result)


class RecordedGraph:
    """Operations that were recorded once, on the memory they then used."""

    def __init__(self, recorder: _Recorder, pool: _Pool, device_type: str) -> None:
        self.num_bytes = sum(
            tensor.untyped_storage().nbytes() for tensor in recorder.created.values()
        )
        self.weakly_held = recorder.weakly_held
        self._operations = recorder.operations
        self._pool = pool
        self._device_type = device_type
        pool.graphs.add(self)

    def replay(self) -> None:
        """Computes what was recorded, and overwrites what other graphs of the pool hold only weakly."""
        # inference mode lets tensors be written that were made in it, and those that were not
        with torch.inference_mode():
            self._pool.overwrite_weakly_held(self)
            for operation in self._operations:
                enabled, dtype = operation.autocast
                with torch.autocast(
                    self._device_type, dtype=dtype, enabled=enabled, cache_enabled=False
                ):
                    output = operation.function(*operation.args, **operation.kwargs)
                for fixed, fresh in zip(operation.results, _tensors(output), strict=True):
                    if fixed is not None:
                        fixed.copy_(fresh)


def _refuse(cause: Cause, operation: str) -> None:
    raise IllegalOperationError(f"{operation} cannot be captured in a CUDA graph: {cause.value}")


class RecorderBackend:
    """The contract of CUDA graphs without a GPU, for laptops, CI and tests. It is no speed-up: a replay costs more.

    It is adversarial on purpose, so that what passes here passes on a GPU. A capture leaves all bytes that existed before
    as they were, and poisons what it allocated: only a replay computes. A replay reads the addresses of the capture, not
    the tensors that have since taken their place, and poisons the outputs that other graphs hold weakly. Operations that
    CUDA could not capture raise. It knows no streams, no allocator, and no work that does not go through the dispatcher.
    """

    name = "recorder"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = _pools.setdefault(device, _Pool())

    def is_capturing(self) -> bool:
        """Whether this thread is recording."""
        return getattr(_recording, "recorder", None) is not None

    def capture(
        self, function: Callable[[], Any], *, collect_garbage: bool, capture_error_mode: str
    ) -> tuple[RecordedGraph, Any]:
        """See :class:`~cg_lightning.backends.base.GraphBackend`; ``capture_error_mode`` means nothing without streams."""
        del capture_error_mode
        recorder = _Recorder(self.device)
        random_state = torch.get_rng_state()
        with (
            CAPTURE_LOCK,
            garbage_collection_paused(collect_garbage),
            autocast_cache_off(),
            invisible_calls(_refuse),
            # compiled code is no operations: what it was made of is recorded. Under a mode alone it would stay so for good
            torch.compiler.set_stance("force_eager"),
        ):
            _recording.recorder = recorder
            try:
                with recorder.watching():
                    output = function()
            except Exception as error:
                raise as_capture_error(error) from error
            finally:
                _recording.recorder = None
                with torch.inference_mode():
                    recorder.undo()
                torch.set_rng_state(random_state)
        return RecordedGraph(recorder, self._pool, self.device.type), output

    def noticing_host_syncs(self, on_call: OnCall) -> AbstractContextManager[None]:
        """Sees what a GPU would have to wait for, and a CPU tensor does without the dispatcher."""
        return invisible_calls(on_call)

    def get_random_state(self) -> Tensor:
        """The state of the CPU generator, which the recorder draws from."""
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        """Sets the state of the CPU generator."""
        torch.set_rng_state(state)

    def synchronize(self) -> None:
        """Does nothing: a replay is done when it returns."""

    def weak_ref_tensor(self, tensor: Tensor) -> Tensor:
        """Another tensor on the same memory, which later replays of other graphs poison."""
        weak = tensor.detach()
        recorder = getattr(_recording, "recorder", None)
        if recorder is not None and _address(tensor) in recorder.created:
            recorder.weakly_held.append(weak)
        return weak
