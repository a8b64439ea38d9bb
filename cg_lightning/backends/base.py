"""The protocol of a backend."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from cg_lightning.backends.host_reads import OnCall
from cg_lightning.core.settings import BackendName


class CapturedGraph(Protocol):
    """Captured work that can be replayed on the same memory."""

    num_bytes: int
    """Bytes of graph memory that the capture reserved."""

    def replay(self) -> None:
        """Run the captured work on the current stream."""


class BatchCopies(Protocol):
    """Copies batches to the device while the device computes."""

    def is_device_busy(self) -> bool:
        """Return True if the device has work left on the current stream. It does not wait."""

    def run(self, copy: Callable[[], Any]) -> Any:
        """Run ``copy`` concurrently with the work that is queued on the current stream.

        Args:
            copy: Called once. It copies a batch to the device, and it does nothing else there.

        Returns:
            What ``copy`` returned. Later work on the current stream may use it.
        """


class LateCopies(Protocol):
    """Copies tensors to the host while the host goes on."""

    def can_copy(self, tensor: Tensor) -> bool:
        """Return True if :meth:`start` can copy a tensor."""

    def start(self, tensor: Tensor) -> Tensor:
        """Return a tensor like ``tensor.cpu()``, which has its values after :meth:`finish`."""

    def finish(self) -> None:
        """Wait for all copies that have been started."""


class Stopwatch(Protocol):
    """Takes the time of a step, and never waits for the device."""

    def stop(self) -> None:
        """End the step. Call it once."""

    def seconds(self) -> float | None:
        """Return the time of the step, in seconds. None: the device has not finished it."""


class GraphBackend(Protocol):
    """Captures and replays work on one device."""

    name: BackendName
    device: torch.device
    event_types: tuple[type[Any], ...]
    """The classes of events by which streams of the device wait for each other."""

    @property
    def why_no_captures(self) -> str:
        """Why nothing can be captured in this process; empty if something can."""

    def is_capturing(self) -> bool:
        """Return True if this thread is inside a capture."""

    def capture(
        self, function: Callable[[], Any], *, collect_garbage: bool, capture_error_mode: str
    ) -> tuple[CapturedGraph, Any]:
        """Capture ``function``. Return the graph and the return value of ``function``.

        The tensors in the return value are undefined until the first replay. Only one capture runs
        at a time in a process. During a capture, Python's garbage collector is paused, the autocast
        cache is off, and code of others that asks whether a capture is under way hears *no*.

        Args:
            function: Called once, with no arguments.
            collect_garbage: Collect garbage before the capture.
            capture_error_mode: As in ``torch.cuda.graph``.

        Raises:
            CaptureError: The work could not be captured. The backend can still be used.
        """

    def noticing_host_syncs(self, on_call: OnCall) -> AbstractContextManager[None]:
        """Call ``on_call`` for host syncs of an eager step that the dispatcher does not show.

        The call may come later, when the function that Python called returns.
        """

    def ignoring_host_syncs(self) -> AbstractContextManager[None]:
        """Ignore host syncs of the work inside, also those that are reported later."""

    def can_follow(self, generator: torch.Generator) -> bool:
        """Return True if captures can draw from a generator that is not the default one."""

    def follow(self, generator: torch.Generator) -> None:
        """Let later captures draw from a generator. Its state is part of the random state."""

    def get_random_state(self) -> Tensor:
        """Return the states of the device's default random generator and of followed ones."""

    def set_random_state(self, state: Tensor) -> None:
        """Set these states."""

    def batch_copies(self) -> BatchCopies | None:
        """Return an object that copies batches during the computation. None: without streams."""

    def late_copies(self) -> LateCopies | None:
        """Return an object that copies to the host later. None: there are no queues of work."""

    def stopwatch(self, began: float) -> Stopwatch | None:
        """Begin to take the time of a step.

        Args:
            began: The value of ``time.perf_counter()`` when the host began the step.

        Returns:
            A stopwatch. None: times of this backend do not show if graphs pay.
        """

    def current_stream(self) -> Hashable:
        """Return what tells the current stream from others."""

    def capture_stream(self) -> AbstractContextManager[None]:
        """Run the eager work inside on the stream of captures, in order with the work around it."""

    def range(self, name: str) -> AbstractContextManager[None]:
        """Mark the work inside, for traces of the device."""

    def synchronize(self) -> None:
        """Wait for all work on the device; needed before a graph that may run is dropped."""

    def weak_ref_tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the same memory that does not own it: later captures may reuse it."""
