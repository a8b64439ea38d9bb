"""Runs the code cells of a notebook without Jupyter, and prints what they show.

``python tests/notebook_cells.py NOTEBOOK [TIMES]`` runs each cell ``TIMES`` times (1) before the
next one. It is for machines that have no nbclient. A cell is a file of its own, so that
:func:`inspect.getsource` finds its functions, as in IPython.
"""

from __future__ import annotations

import ast
import io
import json
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

MODULE = "__main__"  # of a notebook's own classes


def run(path: Path, times: int = 1) -> None:
    """Run all code cells in one namespace, as a kernel does."""
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    with tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(cells):
            file = Path(folder) / f"{path.stem}_cell_{number}.py"
            file.write_text("".join(cell["source"]))
            for time in range(times):
                print(f"--- cell {number}, time {time}")
                run_cell(file, vars(module))


def run_cell(file: Path, namespace: dict[str, Any]) -> None:
    """Run one cell. If its last statement is an expression, show the value."""
    body = ast.parse(file.read_text(), str(file)).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), str(file), "exec"), namespace)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), str(file), "eval"), namespace)
        show(value)
    if "matplotlib.pyplot" in sys.modules:
        pyplot = sys.modules["matplotlib.pyplot"]
        for number in pyplot.get_fignums():
            show(pyplot.figure(number))
        pyplot.close("all")


def show(value: Any) -> None:
    """Print a value as text, and as what else a notebook would show."""
    if value is None:
        return
    print(repr(value))
    html = value._repr_html_() if hasattr(value, "_repr_html_") else None
    if html is not None:
        print(f"text/html: {html}")
    if hasattr(value, "savefig"):
        picture = io.BytesIO()
        value.savefig(picture, format="png")
        print(f"image/png: {len(picture.getvalue())} bytes")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*is non-interactive.*")  # pyplot.show()
    run(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
