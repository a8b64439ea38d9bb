"""``torch.cuda.CUDAGraph``. No other file uses ``torch.cuda``.

What is hard here is not the capture that works, but the capture that fails. The states below were
seen on a GPU with torch 2.11.

**A failed capture damages the process.** The current stream stays the capture stream. The memory
pool stays in the state "recording". The default generator stays in capture state, so the next
``torch.randn`` raises "Offset increment outside graph capture". A cuSOLVER handle that was used
fails its next call. ``_recover`` has one repair for each of these. The pool cannot be repaired, so
it is replaced. Diagnosis finds most illegal operations before a capture; ``_recover`` is for the
operations that it missed.

**The order in ``_recover`` matters.** ``capture_end`` comes first, then the caller's stream. The
anchor graph is dropped last, because no graph can be destroyed while a stream captures. An early
version dropped it first, and it died during the capture. The synchronization raises an
asynchronous error of the capture once, so it must be inside ``_recover`` and not in the next step
of the user.

**A pool must not outlive its graphs.** After the last graph of a pool is dropped, the next capture
into that pool fails an internal assert of the allocator. An anchor graph of one small kernel keeps
each pool in use, so that every other graph may be dropped at any time.

**Inference mode.** The first capture creates the state tensor of the generator, and all later
replays write it. ``capture_begin`` and ``capture_end`` therefore run with inference mode off. The
function between them runs in the mode of its caller.

**The compiler's stance is the last context.** A capture runs nothing, so nothing may be compiled in
it. The stance takes effect when its object is made, not when it is entered. An early version made
the object before it had the lock.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from cg_lightning.backends.capture_scope import (
    CAPTURE_LOCK,
    as_capture_error,
    autocast_cache_emptied,
    capture_looks_eager,
    garbage_collection_paused,
    no_warning_of_other_streams,
    nodes_of_other_streams_allowed,
    release_frames,
)
from cg_lightning.backends.followed_generators import FollowedGenerators, FollowsGenerators
from cg_lightning.backends.host_reads import OnCall, noticed
from cg_lightning.backends.texts_of_pytorch import SYNC_WARNING, is_of_cusolver, is_sync_warning
from cg_lightning.core.causes import Cause
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.settings import BackendName
from cg_lightning.core.tree import tensors_in

_UNSEEN_CALLS = (
    (torch.cuda, "synchronize", Cause.HOST_SYNC),
    (torch.accelerator, "synchronize", Cause.HOST_SYNC),
    (torch.cuda.Event, "synchronize", Cause.HOST_SYNC),
    (torch.cuda.Event, "query", Cause.OPAQUE),
    (torch.cuda.Event, "elapsed_time", Cause.OPAQUE),
    (torch.cuda.Stream, "query", Cause.OPAQUE),
    (torch.cuda.CUDAGraph, "capture_begin", Cause.GRAPHED_ALREADY),
    (torch.cuda.CUDAGraph, "replay", Cause.GRAPHED_ALREADY),
)
"""Calls that no capture can contain, and that PyTorch's sync debug mode does not show."""

# private: takes a tenth of the time of ``torch.cuda.current_stream``
_address_of_stream: Callable[[int], int] | None = getattr(
    torch._C, "_cuda_getCurrentRawStream", None
)


def is_available() -> bool:
    """Return True if there is a CUDA device."""
    return torch.cuda.is_available()


def current_device() -> torch.device:
    """Return the default CUDA device of PyTorch."""
    return torch.device("cuda", torch.cuda.current_device())


class CUDACapturedGraph(torch.cuda.CUDAGraph):
    """A graph and the number of bytes that its capture reserved."""

    num_bytes = 0


class CUDABackend(FollowsGenerators):
    """Captures on one persistent side stream, into one memory pool for each device and thread.

    An anchor graph keeps the pool in use. After a failed capture, the pool is replaced.
    """

    name: BackendName = "cuda"
    event_types: tuple[type[Any], ...] = (torch.cuda.Event,)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None
        super().__init__(
            FollowedGenerators(
                lambda: torch.cuda.get_rng_state(device),
                lambda state: torch.cuda.set_rng_state(state, device),
            )
        )

    @property
    def why_no_captures(self) -> str:
        """See :class:`~cg_lightning.backends.base.GraphBackend`."""
        # with it, replays fail and the process dies (torch 2.11)
        if torch.cuda.get_allocator_backend() != "cudaMallocAsync":
            return ""
        return (
            "graphs need PyTorch's own allocator, and PYTORCH_CUDA_ALLOC_CONF chooses "
            "cudaMallocAsync; choose backend:native"
        )

    def is_capturing(self) -> bool:
        """Return True if the current stream is capturing."""
        return torch.cuda.is_current_stream_capturing()

    def capture(
        self, function: Callable[[], Any], *, collect_garbage: bool, capture_error_mode: str
    ) -> tuple[CUDACapturedGraph, Any]:
        """See :class:`~cg_lightning.backends.base.GraphBackend`."""
        if why := self.why_no_captures:
            raise CaptureError(f"Nothing can be captured: {why}.")
        with CAPTURE_LOCK, torch.cuda.device(self.device):
            # the stance takes effect when its object is made, so it must be the last one
            with (
                garbage_collection_paused(collect_garbage),
                autocast_cache_emptied(),
                nodes_of_other_streams_allowed,
                capture_looks_eager(),
                torch.compiler.set_stance("fail_on_recompile"),
            ):
                if self._anchor is None:
                    self._make_pool()
                before = torch.cuda.memory_reserved(self.device)
                graph, output = self._capture(function, capture_error_mode)
                graph.num_bytes = max(0, torch.cuda.memory_reserved(self.device) - before)
            return graph, output

    @contextlib.contextmanager
    def noticing_host_syncs(self, on_call: OnCall) -> Iterator[None]:
        """Report host syncs, found by PyTorch's sync debug mode, and what else no capture contains.

        The mode misses some functions and methods, which are replaced. The mode belongs to the
        process: if another thread waits while it ends, PyTorch's warning may appear.

        PyTorch warns of a wait when the function that Python called returns. That may be several
        operations after the one that waited.
        """
        show = warnings.showwarning
        thread, mode = threading.get_ident(), torch.cuda.get_sync_debug_mode()

        def notice(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            if not is_sync_warning(message):
                show(message, *args, **kwargs)
            elif threading.get_ident() == thread:
                on_call(Cause.HOST_SYNC, "synchronizing CUDA operation")

        with warnings.catch_warnings(), contextlib.ExitStack() as replaced:
            for owner, name, cause in _UNSEEN_CALLS:
                function = noticed(owner, name, cause, on_call)
                replaced.enter_context(patch.object(owner, name, function))
            warnings.filterwarnings("always", message=f".*{SYNC_WARNING}")
            warnings.filterwarnings("ignore", message=".*Synchronization debug mode is a prototype")
            warnings.showwarning = notice
            try:
                torch.cuda.set_sync_debug_mode("warn")
                yield
            finally:
                torch.cuda.set_sync_debug_mode(mode)

    @contextlib.contextmanager
    def ignoring_host_syncs(self) -> Iterator[None]:
        """See :class:`~cg_lightning.backends.base.GraphBackend`."""
        mode = torch.cuda.get_sync_debug_mode()
        if not mode:  # the first change of the mode shows a warning
            yield
            return
        torch.cuda.set_sync_debug_mode("default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def can_follow(self, generator: torch.Generator) -> bool:
        """Return True for generators of this device, if PyTorch registers them with graphs."""
        return generator.device == self.device and hasattr(
            torch.cuda.CUDAGraph, "register_generator_state"
        )

    def batch_copies(self) -> CUDABatchCopies:
        """Return copies on a stream of their own."""
        return CUDABatchCopies(self.device)

    def late_copies(self) -> CUDALateCopies:
        """Return copies through pinned memory."""
        return CUDALateCopies(self.device)

    def stopwatch(self, began: float) -> CUDAStopwatch:
        """See :class:`~cg_lightning.backends.base.GraphBackend`."""
        return CUDAStopwatch(torch.cuda.current_stream(self.device), began)

    def current_stream(self) -> Hashable:
        """Return the stream, or its address."""
        if _address_of_stream is None:
            return torch.cuda.current_stream(self.device)
        return _address_of_stream(self.device.index)

    @contextlib.contextmanager
    def capture_stream(self) -> Iterator[None]:
        """Run on the stream of captures what a later capture may meet again.

        A parameter has one node that takes its gradient. It belongs to the stream of the forward
        that made it, and lives as long as a tensor of that forward. Before torch 2.13, a capture
        whose backward meets a node of another stream fails.
        """
        caller = torch.cuda.current_stream(self.device)
        if caller == self._stream:
            with no_warning_of_other_streams:
                yield
            return
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream), no_warning_of_other_streams:
                yield
        finally:
            caller.wait_stream(self._stream)

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Mark an NVTX range."""
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()

    def synchronize(self) -> None:
        """Wait for the device, and first for a capture of another thread, during which it fails."""
        with CAPTURE_LOCK:
            torch.cuda.synchronize(self.device)

    def weak_ref_tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the same memory without ownership, with the same dtype and strides."""
        if not tensor.is_cuda or not tensor.numel():
            return tensor
        storage = tensor.untyped_storage()
        weak = torch._C._construct_storage_from_data_pointer(
            storage.data_ptr(), tensor.device, storage.nbytes()
        )
        metadata = {
            "size": tensor.size(),
            "stride": tensor.stride(),
            "storage_offset": tensor.storage_offset(),
            "dtype": tensor.dtype,
            "device": tensor.device,
            "is_cuda": True,
        }
        return torch._C._construct_CUDA_Tensor_From_Storage_And_Metadata(metadata, weak)

    def _make_pool(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False):
            anchored = torch.zeros(1, device=self.device)
        self._anchor, _ = self._capture(anchored.zero_, "thread_local")

    def _capture(
        self, function: Callable[[], Any], capture_error_mode: str
    ) -> tuple[CUDACapturedGraph, Any]:
        graph = CUDACapturedGraph()
        caller = torch.cuda.current_stream(self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda.set_stream(self._stream)
        began = False
        try:
            # the first capture makes the state of the generator, and later replays write it
            with torch.inference_mode(False):
                for generator in self._generators:
                    graph.register_generator_state(generator)
                graph.capture_begin(pool=self._pool, capture_error_mode=capture_error_mode)
            began = True
            output = function()
            with torch.inference_mode(False), warnings.catch_warnings():
                # a submodule that only returns its input gives an empty graph, which is fine
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                graph.capture_end()
        except BaseException as error:
            self._recover(graph, caller, began, error)
            release_frames(error)
            if not isinstance(error, Exception):
                raise
            raise as_capture_error(error) from error
        # before a capture, PyTorch writes the generator's seed and offset on the capture's stream,
        # and before a replay on the caller's; on a busy device, the former could come last
        caller.wait_stream(self._stream)
        torch.cuda.set_stream(caller)
        return graph, output

    def _recover(
        self,
        graph: torch.cuda.CUDAGraph,
        caller: torch.cuda.Stream,
        began: bool,
        error: BaseException,
    ) -> None:
        """Repair the state of the process after a failed capture. It never raises."""
        pool, self._pool = self._pool, None
        if began and torch.cuda.is_current_stream_capturing():
            # it reports the error that is already being raised
            with contextlib.suppress(Exception):
                graph.capture_end()
        torch.cuda.set_stream(caller)
        # it fails if PyTorch ended the capture itself
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
        default = torch.cuda.default_generators[self.device.index]
        for generator in (default, *self._generators):
            with contextlib.suppress(Exception), torch.inference_mode(False):
                generator.graphsafe_set_state(generator.clone_state())
        # an asynchronous error of the capture is raised here, once
        with contextlib.suppress(Exception):
            torch.cuda.synchronize(self.device)
        # the cuSOLVER handle fails its next call after this error (torch 2.11); make that call here
        if is_of_cusolver(error):
            with contextlib.suppress(Exception):
                torch.linalg.svd(torch.eye(2, device=self.device))
        self._anchor = None  # last: no graph can be destroyed while a stream captures


class CUDAStopwatch:
    """Takes the time of a step on the host and on the device, by two events.

    A step costs the longer of both, because the host prepares the next step meanwhile. If the
    device waits for the host within the step, its time contains that as well.

    Args:
        stream: The stream of the step.
        began: The value of ``time.perf_counter()`` when the host began.
    """

    def __init__(self, stream: torch.cuda.Stream, began: float) -> None:
        self._stream = stream
        self._began = began
        self._host_seconds = 0.0
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._start.record(stream)

    def stop(self) -> None:
        """End the step, on the host now, and on the device once it is done."""
        self._end.record(self._stream)
        self._host_seconds = perf_counter() - self._began

    def seconds(self) -> float | None:
        """Return the longer of both times, in seconds. None: the device is not done."""
        if not self._end.query():
            return None
        device_seconds: float = self._start.elapsed_time(self._end) / 1e3
        return max(self._host_seconds, device_seconds)


class CUDABatchCopies:
    """Copies batches on a side stream; see :class:`~cg_lightning.backends.base.BatchCopies`.

    The allocator gives the memory of a copy to the side stream again only after the computing
    stream has passed the point at which the copy was freed. So a host that runs far ahead of the
    device would hold many batches. It waits once two steps are queued.
    """

    _MOST_STEPS_QUEUED = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._steps: deque[torch.cuda.Event] = deque()

    def is_device_busy(self) -> bool:
        """See :class:`~cg_lightning.backends.base.BatchCopies`."""
        return not torch.cuda.current_stream(self._device).query()

    def run(self, copy: Callable[[], Any]) -> Any:
        """Run ``copy`` on the side stream; the current stream waits for it on the device."""
        computing = torch.cuda.current_stream(self._device)
        step = torch.cuda.Event()
        step.record(computing)
        self._steps.append(step)
        if len(self._steps) > self._MOST_STEPS_QUEUED:
            self._steps.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            batch = copy()
        computing.wait_stream(self._stream)
        for tensor in tensors_in(batch):
            if tensor.is_cuda:
                tensor.record_stream(computing)
        return batch


class CUDALateCopies:
    """Copies to the host later; see :class:`~cg_lightning.backends.base.LateCopies`.

    A GPU copies by itself into pinned memory only. What the user gets is in ordinary memory, as in
    eager.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = torch.cuda.Event()
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        """What is copied, the copy, and what gets its values.

        The memory of the first may be of another stream or library, which would use it again.
        """
        self._pinned: dict[Hashable, Tensor] = {}
        """The memory of the latest copies by its layout, for the next ones."""
        self._lock = threading.Lock()

    def can_copy(self, tensor: Tensor) -> bool:
        """Return True for ordinary tensors of the device, of which nothing is left to compute."""
        is_ordinary = tensor.layout is torch.strided and not tensor.requires_grad
        is_computed = not (tensor.is_conj() or tensor.is_neg())
        return tensor.device == self._device and is_ordinary and is_computed

    def start(self, tensor: Tensor) -> Tensor:
        """Queue the copy."""
        with self._lock:
            pinned = self._pinned.pop(_layout(tensor), None)
        if pinned is None:
            pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with torch.inference_mode():  # which may write to tensors of either kind
            pinned.copy_(tensor, non_blocking=True)
        self._done.record(torch.cuda.current_stream(self._device))
        result = torch.empty_like(pinned, pin_memory=False)
        with self._lock:
            self._pending.append((tensor, pinned, result))
        return result

    def finish(self) -> None:
        """Wait for the device, and fill the results."""
        with self._lock:
            if not self._pending:
                return
            self._done.synchronize()
            with torch.inference_mode():  # which may write to tensors of either kind
                for _, pinned, result in self._pending:
                    result.data.copy_(pinned)  # the version of the result stays 0
            self._pinned = {_layout(pinned): pinned for _, pinned, _ in self._pending}
            self._pending.clear()


def _layout(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype


def make_graphed_callable(module: nn.Module, sample: Tensor) -> Callable[[Tensor], Tensor]:
    """Graph a module for one input shape by PyTorch's own function, for the benchmark.

    It replaces ``forward`` of the module.

    Raises:
        RuntimeError: There is no CUDA device.
    """
    if not is_available():
        raise RuntimeError("torch.cuda.make_graphed_callables needs a CUDA device")
    graphed: Any = torch.cuda.make_graphed_callables(module, (sample,))
    return lambda x: graphed(x)


def reserved_bytes() -> int:
    """Return the bytes of the device that PyTorch's allocator has reserved."""
    return torch.cuda.memory_reserved() if is_available() else 0


def device_name() -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name()


class _Backends(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[torch.device, CUDABackend] = {}


_backends = _Backends()


def cuda_backend(device: torch.device) -> CUDABackend:
    """Return the backend of one device and this thread; all its captures share a stream and a pool.

    Graphs that share a pool must not be replayed at the same time: another thread's replay could
    come between a replay and the copies of its outputs.
    """
    backends = _backends.by_device
    if device not in backends:
        backends[device] = CUDABackend(device)
    return backends[device]
