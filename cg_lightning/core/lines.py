"""Lines of the user's as users read them: ``file:line``, in a notebook ``Cell In[3]:line``."""

from __future__ import annotations

import linecache
import sys

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
