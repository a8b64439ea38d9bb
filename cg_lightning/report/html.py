"""HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def html_paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def html_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None
) -> str:
    """Return a table with a row of headers.

    Args:
        headers: The name of each column.
        rows: The cells of each row.
        numbers_from: Columns from here on have numbers. Others are aligned to the left, because
            Jupyter aligns cells to the right. None: there are no numbers.
    """

    def cell(text: str, column: int, tag: str) -> str:
        is_number = numbers_from is not None and column >= numbers_from
        style = "" if is_number else ' style="text-align: left"'
        return f"<{tag}{style}>{html.escape(text)}</{tag}>"

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(cell(text, i, tag) for i, text in enumerate(cells))}</tr>"

    return f"<table>{row(headers, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
