"""``torch.cuda.CUDAGraph``. The only file that touches ``torch.cuda``."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from cg_lightning.backends.capture_scope import (
    CAPTURE_LOCK,
    as_capture_error,
    autocast_cache_off,
    garbage_collection_paused,
)
from cg_lightning.backends.host_reads import OnCall
from cg_lightning.core.causes import Cause

_SYNC_WARNING = "called a synchronizing CUDA operation"


def is_available() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()


def current_device() -> torch.device:
    """The CUDA device that PyTorch uses by default."""
    return torch.device("cuda", torch.cuda.current_device())


class CUDACapturedGraph(torch.cuda.CUDAGraph):
    """A graph that knows what memory it took."""

    num_bytes = 0


class CUDABackend:
    """Captures on one persistent side stream, into one memory pool for each device.

    A pool whose last graph is gone cannot be captured into again (an internal assert of PyTorch's allocator, seen in
    2.11). So an anchor graph of one small kernel keeps it; a failed capture leaves its pool unusable, which then is
    replaced.
    """

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None

    def is_capturing(self) -> bool:
        """Whether the current stream is capturing."""
        return torch.cuda.is_current_stream_capturing()

    def capture(
        self, function: Callable[[], Any], *, collect_garbage: bool, capture_error_mode: str
    ) -> tuple[CUDACapturedGraph, Any]:
        """See :class:`~cg_lightning.backends.base.GraphBackend`."""
        with CAPTURE_LOCK, torch.cuda.device(self.device):
            # what a compiler computes in advance must not be computed inside a capture, which runs nothing. The stance is set
            # when its object is made, so that comes last
            with (
                garbage_collection_paused(collect_garbage),
                autocast_cache_off(),
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
        """Sees what waits for the device: PyTorch's own sync debug mode, and ``synchronize``, which that misses.

        The mode is one for the process: another thread that waits just when it ends may still show PyTorch's warning.
        """
        show, original = warnings.showwarning, torch.cuda.synchronize
        thread, mode = threading.get_ident(), torch.cuda.get_sync_debug_mode()

        def notice(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            if _SYNC_WARNING not in str(message):
                show(message, *args, **kwargs)
            elif threading.get_ident() == thread:
                on_call(Cause.HOST_SYNC, "synchronizing CUDA operation")

        def synchronize(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == thread:
                on_call(Cause.HOST_SYNC, "torch.cuda.synchronize")
            original(*args, **kwargs)

        with warnings.catch_warnings(), patch.object(torch.cuda, "synchronize", synchronize):
            warnings.filterwarnings("always", message=f".*{_SYNC_WARNING}")
            warnings.filterwarnings("ignore", message=".*Synchronization debug mode is a prototype")
            warnings.showwarning = notice
            try:
                torch.cuda.set_sync_debug_mode("warn")
                yield
            finally:
                torch.cuda.set_sync_debug_mode(mode)

    def get_random_state(self) -> Tensor:
        """The state of the default CUDA generator."""
        return torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: Tensor) -> None:
        """Sets the state of the default CUDA generator."""
        torch.cuda.set_rng_state(state, self.device)

    def synchronize(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize(self.device)

    def weak_ref_tensor(self, tensor: Tensor) -> Tensor:
        """A tensor without ownership, of the same dtype and strides."""
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
            # the generator state that the first capture makes must not be an inference tensor: all later replays write it
            with torch.inference_mode(False):
                graph.capture_begin(pool=self._pool, capture_error_mode=capture_error_mode)
            began = True
            output = function()
            with torch.inference_mode(False), warnings.catch_warnings():
                # a submodule that only passes its inputs on makes an empty graph, and that is fine
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                graph.capture_end()
        except BaseException as error:
            self._recover(graph, caller, began, error)
            if not isinstance(error, Exception):
                raise
            raise as_capture_error(error) from error
        torch.cuda.set_stream(caller)
        return graph, output

    def _recover(
        self,
        graph: torch.cuda.CUDAGraph,
        caller: torch.cuda.Stream,
        began: bool,
        error: BaseException,
    ) -> None:
        """Takes back what a failed capture leaves behind (each of it seen in torch 2.11); bounded, and never raises."""
        pool, self._pool = self._pool, None
        if began and torch.cuda.is_current_stream_capturing():
            with contextlib.suppress(
                Exception
            ):  # it reports the error that is already being raised
                graph.capture_end()
        torch.cuda.set_stream(caller)
        with contextlib.suppress(
            Exception
        ):  # only a capture that PyTorch did not end itself still allocates to the pool
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
        generator = torch.cuda.default_generators[self.device.index]
        with contextlib.suppress(Exception), torch.inference_mode(False):
            generator.graphsafe_set_state(generator.clone_state())
        with contextlib.suppress(
            Exception
        ):  # an asynchronous error of the capture is delivered here, once
            torch.cuda.synchronize(self.device)
        if "cusolver" in str(
            error
        ):  # its handle refuses the next call (2.11), which may as well be this one
            with contextlib.suppress(Exception):
                torch.linalg.svd(torch.eye(2, device=self.device))
        self._anchor = None  # not before: while a stream captures no graph can be destroyed


def make_graphed_callable(module: nn.Module, sample: Tensor) -> Callable[[Tensor], Tensor]:
    """PyTorch's own way to graph a module of one input shape; the benchmark compares with it."""
    graphed: Any = torch.cuda.make_graphed_callables(module, (sample,))
    return lambda x: graphed(x)


def reserved_bytes() -> int:
    """What PyTorch's allocator holds of the device, in bytes."""
    return torch.cuda.memory_reserved() if is_available() else 0


def device_name() -> str:
    """What the device is called."""
    return torch.cuda.get_device_name()


@functools.cache
def cuda_backend(device: torch.device) -> CUDABackend:
    """The backend of one device: its stream and its pool are shared by all who capture there."""
    return CUDABackend(device)
