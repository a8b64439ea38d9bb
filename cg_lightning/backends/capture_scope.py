"""The lock and the settings around every capture, for all backends."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from unittest.mock import patch

import torch
from torch.cuda import graphs, is_current_stream_capturing

from cg_lightning.backends.imported_functions import replaced_where_imported
from cg_lightning.backends.texts_of_pytorch import needs_compilation
from cg_lightning.core.errors import CaptureError, OutOfGraphMemoryError, RecompileNeededError

CAPTURE_LOCK = threading.RLock()
"""Locked during a capture, so that only one runs at a time in a process."""


@contextlib.contextmanager
def garbage_collection_paused(collect_first: bool) -> Iterator[None]:
    """Pause the collector, which may destroy another graph during a capture (pytorch#161037)."""
    if collect_first:
        gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def autocast_cache_emptied() -> Iterator[None]:
    """Make casts of weights part of the graph.

    A cast from before the capture would keep its values after the next optimizer step, and a cast
    in graph memory must not be used outside of the graph. Within the capture the cache stays on as
    in eager: the gradients of a weight that is used twice are added in the precision of its cast.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


STREAMS_OF_NODES = {
    # public functions that set them, and private ones that return them
    "set_override_stale_capture_stream": "_override_stale_capture_stream",  # since torch 2.13
    "set_warn_on_accumulate_grad_stream_mismatch": "_warn_on_accumulate_grad_stream_mismatch",
}
"""Settings of PyTorch for nodes of autograd that were made on another stream than a backward's."""
_OVERRIDE, _WARN = STREAMS_OF_NODES


class _SettingOfStreams:
    """Changes one of these settings while a thread is inside, if this version of PyTorch has it.

    It belongs to the process, so the last thread that leaves restores it.

    Args:
        name: The public function that sets it.
        value: The value inside.
    """

    def __init__(self, name: str, value: bool) -> None:
        self._set = getattr(torch.autograd.graph, name, None)
        self._get = getattr(torch._C, STREAMS_OF_NODES[name], None)
        self._value = value
        self._before = value
        self._number_inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if self._set is None or self._get is None:
            return
        with self._lock:
            if not self._number_inside:
                self._before = self._get()
                self._set(self._value)
            self._number_inside += 1

    def __exit__(self, *_: object) -> None:
        if self._set is None or self._get is None:
            return
        with self._lock:
            self._number_inside -= 1
            if not self._number_inside:
                self._set(self._before)


nodes_of_other_streams_allowed = _SettingOfStreams(_OVERRIDE, True)
"""Lets a backward in a capture meet nodes of other streams.

A parameter has one node that takes its gradient. If the user keeps a tensor with an autograd graph
from outside of training steps, the node is one of the default stream, which no capture may use.
PyTorch runs it on the stream of the capture instead; before 2.13, the capture fails.
"""
no_warning_of_other_streams = _SettingOfStreams(_WARN, False)
"""Runs steps on a stream of ours without the warning that their nodes are of another one."""


_INFORMED = ("torch", "triton", "cg_lightning")
"""Packages that get the true answer. Otherwise SyncBatchNorm, for one, waits for the device."""
_ASKED = "_cuda_isCurrentStreamCapturing"
"""Private: what ``torch.cuda.is_current_stream_capturing`` asks (torch 2.8 to 2.13)."""


@contextlib.contextmanager
def capture_looks_eager() -> Iterator[None]:
    """Answer *no* to others who ask whether a capture is under way, in this thread.

    If the answer is yes, libraries compute something else: another mask, and so another kernel. The
    watched step got *no*, so with *no* the captured step takes the same way. PyTorch's code in C++
    asks otherwise.
    """
    thread = threading.get_ident()
    ask: Callable[[], bool] = getattr(graphs, _ASKED, is_current_stream_capturing)

    def answer() -> bool:
        if threading.get_ident() != thread:
            return ask()
        caller: FrameType | None = sys._getframe(1)
        if caller is not None and caller.f_code is is_current_stream_capturing.__code__:
            caller = caller.f_back
        asking = "" if caller is None else caller.f_globals.get("__name__", "")
        return asking.split(".")[0] in _INFORMED and ask()

    replaced: AbstractContextManager[object]
    if hasattr(graphs, _ASKED):  # however the public function was imported
        replaced = patch.object(graphs, _ASKED, answer)
    else:
        replaced = replaced_where_imported(
            {"is_current_stream_capturing": (is_current_stream_capturing, answer)}
        )
    with replaced:
        yield


def as_capture_error(error: Exception) -> CaptureError:
    """Return the error that tells why a capture stopped; the caller raises it ``from error``."""
    kind = "" if isinstance(error, CaptureError) else f"{type(error).__name__}: "
    text = f"The capture failed: {kind}{error}"
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfGraphMemoryError(text)
    if needs_compilation(error):
        return RecompileNeededError(text)
    return CaptureError(text)


def release_frames(error: BaseException) -> None:
    """Release the local variables of the frames that ``error`` came through.

    ``str(tensor)`` keeps a guard of PyTorch's dispatcher in a local variable. If it raises, the
    traceback keeps the guard. The guard would restore the dispatcher's state when the traceback is
    released, and that state is wrong after inference mode has ended: gradients stay off for good
    (torch 2.13).
    """
    traceback.clear_frames(error.__traceback__)
