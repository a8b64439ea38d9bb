"""Audit events of Python: one hook for all who listen, because hooks cannot be removed."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

from cg_lightning.modules.kinds import lightning_class

listeners: dict[int, Callable[[str], None]] = {}
"""The function that receives the events of a thread; empty if no step is watched."""
_SETS = "object.__setattr__"
_PARTS = ("__code__", "__defaults__", "__kwdefaults__", "__bases__")
"""The attributes that decide what a function or a class does."""
_rewritten: list[str] = []
"""The functions and classes that were rewritten, in their order."""


def _is_rewritten(holder: Any, name: str) -> bool:
    """Return whether something gets other code that steps may have used before."""
    if name == "__class__":  # of other modules, written settings are recorded
        return lightning_class(type(holder), "LightningModule") is not None
    if name not in _PARTS:
        return False
    before = getattr(holder, name, None)
    # it was made just now: ``NamedTuple`` sets the bases of its classes
    return not (before is None or before == (tuple,))


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event == _SETS:
        holder, name = arguments[:2]
        if _is_rewritten(holder, name):
            owner = getattr(holder, "__qualname__", type(holder).__name__)
            _rewritten.append(f"{owner}.{name}")
    elif listeners:
        listener = listeners.get(threading.get_ident())
        if listener is not None:
            listener(event)


listen = functools.cache(lambda: sys.addaudithook(_on_event))
"""Listen from now on, in all threads."""


def rewritten() -> list[str]:
    """Return all names like ``helper.__code__`` and ``Net.__bases__`` that were set so far.

    To set them changes a function, a class or a LightningModule in place, and no comparison of
    objects shows it. ``RecordedSetters`` adds settings of kernels.
    """
    return _rewritten
