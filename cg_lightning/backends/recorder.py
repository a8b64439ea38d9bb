"""A graph API for devices without one: records operations and replays them on the same memory.

The recorder has to do two things at once: compute the same bits as eager, and forgive no more than
CUDA would. It is no speed-up; a replay costs more than an eager step.

**It is adversarial on purpose.** A lenient stand-in passes tests that fail on a GPU. So a capture
restores every byte that existed before it and poisons everything that it allocated: only a replay
computes. A replay reads the addresses of the capture, not the tensors that took their place since.
It overwrites the outputs that other graphs of the pool hold weakly. Operations that CUDA cannot
capture raise.

**Bits.** A dispatch mode alone changes results: see ``dispatch_mode.py``. Three more things are
recorded, because kernels depend on them: the autocast state of each operation, and whether
gradients are enabled (an LSTM then keeps more for its backward); ``requires_grad`` of each
argument; and identity, since attention of a sequence to itself takes another kernel than attention
to an equal copy. An early version gave each argument a tensor of its own and differed in the last
bits on some processors.

**Writes.** Schemas are not complete: batch norm updates its statistics without declaring it.
``_may_write`` therefore trusts only the schemas of ``aten`` operations that are not norms. An
operation that only makes a view is not recorded: later operations have the memory of the view
among their arguments.

**What must not be reordered.** ``_remember`` copies the bytes before the operation runs. ``_fix``
detaches the arguments before the operation runs, because it may change how they are read. ``undo``
runs after the mode is left, otherwise it would be recorded. The compiler's stance is the last
context, as in ``cuda.py``; a dispatch mode alone would keep compiled code compiled for good.

It knows no streams, no allocator, and no work that bypasses the dispatcher.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

from cg_lightning.backends.capture_scope import (
    CAPTURE_LOCK,
    as_capture_error,
    autocast_cache_emptied,
    capture_looks_eager,
    garbage_collection_paused,
    release_frames,
)
from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from cg_lightning.backends.followed_generators import FollowedGenerators, FollowsGenerators
from cg_lightning.backends.host_reads import OnCall, invisible_calls
from cg_lightning.backends.illegal_operations import find_illegal
from cg_lightning.backends.operation_writes import may_write_undeclared
from cg_lightning.core.causes import Cause
from cg_lightning.core.equality import numbers_of
from cg_lightning.core.errors import CaptureError, IllegalOperationError
from cg_lightning.core.settings import BackendName

_Autocast = tuple[bool, torch.dtype | None]


def _address(tensor: Tensor) -> int:
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise CaptureError(f"the recorder records no {kind} tensors.")
    return tensor.untyped_storage().data_ptr()


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def _fix(tree: Any) -> Any:
    """Return ``tree`` with new tensors on the same memory, which keep it if the originals move.

    A tensor that occurs twice stays one object, and ``requires_grad`` is kept, because kernels are
    selected by both.
    """
    fixed = {
        id(tensor): tensor.detach().requires_grad_(tensor.requires_grad)
        for tensor in _tensors(tree)
    }
    return tree_map_only(Tensor, lambda tensor: fixed[id(tensor)], tree)


def _poison(tensor: Tensor) -> None:
    """Write a value that no one can mistake for a result."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.logical_not_()
    else:
        numbers = numbers_of(tensor)
        numbers.fill_(torch.iinfo(numbers.dtype).max)


@dataclasses.dataclass
class _Operation:
    """One recorded call. All its tensors are fixed to the memory that they had in the capture."""

    function: OpOverload
    args: Any
    kwargs: Any
    results: list[Tensor | None]
    """The tensors that the call allocated; None for a result that aliases an input."""
    autocast: _Autocast
    has_gradients: bool
    """Whether gradients were enabled."""


class _Pool:
    """The graphs of one device and thread. Each may use memory that another holds only weakly."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[RecordedGraph] = weakref.WeakSet()

    def overwrite_weakly_held(self, replaying: RecordedGraph) -> None:
        for graph in self.graphs:
            if graph is not replaying:
                for tensor in graph.weakly_held:
                    _poison(tensor)


class _Pools(threading.local):
    """The pools of one thread: graphs that share a pool must not be replayed at the same time."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, _Pool] = {}


_pools = _Pools()
_recording = threading.local()


def _may_write(function: OpOverload) -> bool:
    """Return True if the operation may write to its arguments."""
    return function._schema.is_mutable or may_write_undeclared(function)


class _Recorder(EagerDispatchMode):
    """Runs and records each operation, and stores the bytes that it overwrites."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device.type)
        self.operations: list[_Operation] = []
        self.created: dict[int, Tensor] = {}
        self.weakly_held: list[Tensor] = []
        self._overwritten: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def dispatch(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (cause := find_illegal(function, args, kwargs, self.device_type)) is not None:
            _refuse(cause, function._schema.name)
        inputs = _tensors(args, kwargs)
        if _may_write(function):
            self._remember(inputs)
        casts = self.casts_inside(function)
        autocast = (casts, torch.get_autocast_dtype(self.device_type) if casts else None)
        fixed_args, fixed_kwargs = _fix((args, kwargs))
        output = self.call(function, args, kwargs)
        # an in-place view changes one tensor object, and no memory
        if torch.Tag.inplace_view not in function.tags:
            known = {_address(tensor) for tensor in inputs}
            results = [
                self._created(tensor) if _address(tensor) not in known else None
                for tensor in _tensors(output)
            ]
            pure_view = (
                bool(results)
                and not any(r is not None for r in results)
                and not _may_write(function)
            )
            if not pure_view:
                self.operations.append(
                    _Operation(
                        function,
                        fixed_args,
                        fixed_kwargs,
                        results,
                        autocast,
                        torch.is_grad_enabled(),
                    )
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
        """Restore every byte that existed before the capture, and poison all others."""
        for storage, before in self._overwritten.values():
            storage.copy_(before)
        for operation in self.operations:
            for result in operation.results:
                if result is not None:
                    _poison(result)


class RecordedGraph:
    """Recorded operations, on the memory that they used in the capture."""

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
        """Run the operations, and overwrite the weakly held memory of other graphs in the pool."""
        # in inference mode, inference tensors and all other tensors can be written
        with torch.inference_mode():
            self._pool.overwrite_weakly_held(self)
            for operation in self._operations:
                enabled, dtype = operation.autocast
                with (
                    torch.set_grad_enabled(operation.has_gradients),
                    torch.autocast(
                        self._device_type, dtype=dtype, enabled=enabled, cache_enabled=False
                    ),
                ):
                    output = operation.function(*operation.args, **operation.kwargs)
                for fixed, fresh in zip(operation.results, _tensors(output), strict=True):
                    if fixed is not None:
                        fixed.copy_(fresh)


def _refuse(cause: Cause, operation: str) -> None:
    raise IllegalOperationError(f"{operation} cannot be captured in a CUDA graph: {cause.value}")


class RecorderBackend(FollowsGenerators):
    """The contract of CUDA graphs without a GPU, for laptops, CI and tests.

    It is stricter than CUDA, so a test that passes here should pass on a GPU. It is no speed-up.
    """

    name: BackendName = "recorder"
    event_types: tuple[type[Any], ...] = ()
    why_no_captures = ""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = _pools.by_device.setdefault(device, _Pool())
        super().__init__(FollowedGenerators(torch.get_rng_state, torch.set_rng_state))

    def is_capturing(self) -> bool:
        """Return True if this thread is recording."""
        return getattr(_recording, "recorder", None) is not None

    def capture(
        self, function: Callable[[], Any], *, collect_garbage: bool, capture_error_mode: str
    ) -> tuple[RecordedGraph, Any]:
        """See :class:`~cg_lightning.backends.base.GraphBackend`.

        ``capture_error_mode`` is ignored, because there are no streams.
        """
        recorder = _Recorder(self.device)
        random_state = self.get_random_state()
        with (
            CAPTURE_LOCK,
            garbage_collection_paused(collect_garbage),
            autocast_cache_emptied(),
            capture_looks_eager(),
            invisible_calls(_refuse),
            # compiled code does not dispatch operations, so the original code is recorded
            torch.compiler.set_stance("force_eager"),
        ):
            _recording.recorder = recorder
            try:
                with recorder.watching():
                    output = function()
            except Exception as error:
                release_frames(error)
                raise as_capture_error(error) from error
            finally:
                _recording.recorder = None
                with torch.inference_mode():
                    recorder.undo()
                self.set_random_state(random_state)
        return RecordedGraph(recorder, self._pool, self.device.type), output

    def noticing_host_syncs(self, on_call: OnCall) -> AbstractContextManager[None]:
        """Report calls that would wait for a GPU and that CPU tensors do not dispatch."""
        return invisible_calls(on_call)

    def ignoring_host_syncs(self) -> AbstractContextManager[None]:
        """Do nothing: calls are noticed when they are made, so ``on_call`` can ignore them."""
        return contextlib.nullcontext()

    def can_follow(self, generator: torch.Generator) -> bool:
        """Return True for generators of this device: recorded operations draw from them."""
        return generator.device == self.device

    def batch_copies(self) -> None:
        """Return None, because the recorder knows no streams."""

    def late_copies(self) -> None:
        """Return None, because there is nothing to wait for."""

    def stopwatch(self, began: float) -> None:
        """Return None, because a replay is slower than eager by nature."""

    def current_stream(self) -> Hashable:
        """Return a constant: there are no streams."""
        return 0

    def capture_stream(self) -> AbstractContextManager[None]:
        """Do nothing, because the recorder knows no streams."""
        return contextlib.nullcontext()

    def range(self, name: str) -> AbstractContextManager[None]:
        """Do nothing: there is no trace of a device."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Do nothing, because a replay is complete when it returns."""

    def weak_ref_tensor(self, tensor: Tensor) -> Tensor:
        """Return another tensor on the same memory. Replays of other graphs poison it."""
        weak = tensor.detach()
        recorder = getattr(_recording, "recorder", None)
        if recorder is not None and _address(tensor) in recorder.created:
            recorder.weakly_held.append(weak)
        return weak
