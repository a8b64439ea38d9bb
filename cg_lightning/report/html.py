"""HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def html_paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def html_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a row of headers."""

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{row(headers, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
