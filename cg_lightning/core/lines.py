"""Lines of the user's as users read them: ``file:line``, in a notebook ``Cell In[3]:line``.

What happens at no line of the user's has a place of another type, which reads as words.
"""

from __future__ import annotations

import enum
import linecache
import sys


class Elsewhere(enum.StrEnum):
    """A place that is no line of the user's. Its value is what users read."""

    AT_THE_END = "between the start and end of the step"
    """Where a change happens that only a comparison after the step shows."""
    NOT_YOURS = "not in your code"
    """Where a tool works around the user's code."""
    UNKNOWN = "unknown"
    """Where something happens while no frame of the user's is on the stack."""


_cells: dict[str, str] = {}
"""What IPython calls its cells, by the files that it makes of them."""


def learn_cells() -> None:
    """Ask IPython for the names of its cells, before a step is watched.

    A watched step must not ask: what IPython reads would count as read by the step.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    name_of = getattr(getattr(shell, "compile", None), "format_code_name", None)
    if name_of is None:  # no IPython, or an old one
        return
    for file in list(linecache.cache):
        if (words := name_of(file)) is not None:
            _cells[file] = " ".join(words)


def file_and_line(file: str, line: int) -> str:
    """Return a line as ``file:line``."""
    return f"{_cells.get(file, file)}:{line}"


def line_of(place: str) -> str:
    """Return a place if it is a line of the user's; otherwise an empty text."""
    return "" if isinstance(place, Elsewhere) else place
