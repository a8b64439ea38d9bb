"""Tables of the command: by rich where it is installed, otherwise aligned text."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

_WIDTH = 120  # of output that is no terminal


def print_sentence(text: str) -> None:
    """Print a sentence. On a terminal, its lines end between words."""
    if sys.stdout.isatty():
        text = textwrap.fill(text, shutil.get_terminal_size().columns, break_on_hyphens=False)
    print(text)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table.

    Args:
        title: Printed above the table.
        header: The name of each column.
        rows: The cells of each row.
    """
    print(f"\n{title}")
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print(aligned([header, *rows]))
        return
    words = [max(map(len, " ".join(column).split())) for column in zip(header, *rows, strict=True)]
    least = sum(words) + 2 * len(words)
    console = Console(width=None if sys.stdout.isatty() else max(_WIDTH, least), markup=False)
    if least > console.width:  # a column would break its words
        console.print(_in_lines(header, rows), soft_wrap=True, highlight=False, end="")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, width in zip(header, words, strict=True):
        table.add_column(name, overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _in_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a line for each cell, with an empty line between rows."""
    return "\n".join(
        "".join(f"{name} {cell}".strip() + "\n" for name, cell in zip(header, row, strict=True))
        for row in rows
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of text whose columns begin at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
