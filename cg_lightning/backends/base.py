"""What a backend has to offer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from cg_lightning.backends.host_reads import OnCall


class CapturedGraph(Protocol):
    """Work that was captured once and can be replayed on the same memory."""

    num_bytes: int
    """Bytes of graph memory that the capture took."""

    def replay(self) -> None:
        """Runs the captured work on the current stream."""


class GraphBackend(Protocol):
    """A way to capture and replay work on one device."""

    name: str
    device: torch.device

    def is_capturing(self) -> bool:
        """Whether this thread is inside a capture."""

    def capture(
        self, function: Callable[[], Any], *, collect_garbage: bool, capture_error_mode: str
    ) -> tuple[CapturedGraph, Any]:
        """Captures ``function``; gives the graph and what ``function`` returned, whose values a replay computes.

        Captures happen one at a time in a process, with Python's garbage collector kept out and the autocast cache off.

        Args:
            function: Called once, with no arguments.
            collect_garbage: Collect garbage before the capture.
            capture_error_mode: As in ``torch.cuda.graph``.

        Raises:
            CaptureError: The work could not be captured; the backend is as usable as before.
        """

    def noticing_host_syncs(self, on_call: OnCall) -> AbstractContextManager[None]:
        """Calls ``on_call`` for what the dispatcher does not show, while a step runs eagerly."""

    def get_random_state(self) -> Tensor:
        """The state of the device's default random generator."""

    def set_random_state(self, state: Tensor) -> None:
        """Sets the state of the device's default random generator."""

    def synchronize(self) -> None:
        """Waits for all work on the device: before a graph that may still be running is dropped."""

    def weak_ref_tensor(self, tensor: Tensor) -> Tensor:
        """Gives a tensor on the same memory that does not keep it: later captures may use that memory."""
