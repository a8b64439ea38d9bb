"""The lock and the settings around every capture, for all backends."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import traceback
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch.cuda import is_current_stream_capturing

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
def autocast_cache_off() -> Iterator[None]:
    """Make casts of weights part of the graph.

    A cast from before the capture would keep its values after the next optimizer step.
    """
    was_enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(was_enabled)


is_stream_capturing = is_current_stream_capturing
"""The question as PyTorch answers it: others hear another answer while we capture."""
_TOLD = ("torch", "triton", "cg_lightning")
"""Packages that have to know: SyncBatchNorm, for instance, would wait for the device otherwise."""


@contextlib.contextmanager
def capture_looks_eager() -> Iterator[None]:
    """Answer *no* to others who ask whether a capture is under way, in this thread.

    Libraries compute something else if it is: another mask, and with it another kernel. The watched
    step heard *no*, so *no* is what makes the captured way the watched one. PyTorch's code in C++
    asks otherwise, and so do we: by the function that was imported before.
    """
    thread = threading.get_ident()

    def answer() -> bool:
        if threading.get_ident() != thread:
            return is_stream_capturing()
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return caller.split(".")[0] in _TOLD and is_stream_capturing()

    with contextlib.ExitStack() as stack:
        # also ``from torch.cuda import is_current_stream_capturing as ...``
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == _TOLD[-1]:
                continue
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is is_stream_capturing:
                    stack.enter_context(patch.object(module, name, answer))
        yield


def as_capture_error(error: Exception) -> CaptureError:
    """Return the error that tells why a capture stopped; the caller raises it ``from error``."""
    text = f"The capture failed: {type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfGraphMemoryError(text)
    # torch has no type of its own for what set_stance("fail_on_recompile") raises (2.8 to 2.13)
    if "fail_on_recompile" in str(error):
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
