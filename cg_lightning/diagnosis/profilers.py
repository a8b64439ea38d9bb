"""Other profilers of the thread. It can have only one, and the watched step needs it."""

from __future__ import annotations

import contextlib
import cProfile
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def paused_profiler() -> Iterator[str | None]:
    """Pause the profiler of this thread, if there is one, and let it go on afterwards.

    Yields:
        None, or the kind of a profiler that could not be paused. That of ``torch.profiler`` with
        stacks is one: nothing in Python can start it again.
    """
    profiler = sys.getprofile()
    if profiler is None:
        yield None
    elif isinstance(profiler, cProfile.Profile):  # before Python 3.12, which has a place for it
        profiler.disable()
        try:
            yield None
        finally:
            profiler.enable()
    elif isinstance(profiler, types.FunctionType | types.MethodType):
        sys.setprofile(None)
        try:
            yield None
        finally:
            sys.setprofile(profiler)
    else:
        yield type(profiler).__name__
