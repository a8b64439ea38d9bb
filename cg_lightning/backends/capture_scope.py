"""What holds around every capture, whatever the backend."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import torch

from cg_lightning.core.errors import CaptureError, OutOfGraphMemoryError, RecompileNeededError

CAPTURE_LOCK = threading.RLock()
"""Held during a capture: one at a time in a process."""


@contextlib.contextmanager
def garbage_collection_paused(collect_first: bool) -> Iterator[None]:
    """Keeps the collector out: it may destroy another graph in the middle of a capture (pytorch#161037)."""
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
    """Makes casts of weights part of the graph; one cast before it would go stale with the next optimizer step."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(was_enabled)


def as_capture_error(error: Exception) -> CaptureError:
    """Return the error that tells why a capture stopped; the caller raises it ``from error``."""
    text = f"The capture failed: {type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfGraphMemoryError(text)
    # torch has no type of its own for what set_stance("fail_on_recompile") raises (2.8 to 2.13)
    if "fail_on_recompile" in str(error):
        return RecompileNeededError(text)
    return CaptureError(text)
