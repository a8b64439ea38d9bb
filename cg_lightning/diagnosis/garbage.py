"""No old garbage is collected while a step is watched.

A watched step notes so much that Python would look through all objects of the process, which takes
as long as some steps: torch and a library of models have a million of them. Garbage that is young
is collected as ever.
"""

from __future__ import annotations

import gc

_NEVER = 1_000_000
NAMES_OF_COLLECTOR = frozenset({"get_threshold", "set_threshold"})
"""The functions of C by which a step would notice it."""


class YoungGarbageOnly:
    """While this is entered, Python collects only the youngest garbage, until :meth:`end`."""

    def __init__(self) -> None:
        self._before: tuple[int, int, int] | None = None

    def __enter__(self) -> None:
        self._before = gc.get_threshold()
        gc.set_threshold(self._before[0], _NEVER, _NEVER)

    def end(self) -> None:
        """Collect as before from now on."""
        if self._before is not None:
            gc.set_threshold(*self._before)
            self._before = None

    def __exit__(self, *_: object) -> None:
        self.end()
