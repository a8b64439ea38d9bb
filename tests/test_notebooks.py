"""The notebooks run, each cell can be run again, and none carries outputs."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run_python

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
PRINTED = {
    "modes_and_speed": [
        *("all modes are equal in every bit", "image/png"),
        *("'FULL': 11", "the weights of both trainings are equal in every bit"),
    ],
    "quickstart": [
        "predicted batches are equal in every bit",
        "batches of a loop without a Trainer are equal in every bit",
        "batches of Fabric are equal in every bit",
        "host sync: aten::",
    ],
    "why_not_one_graph": [
        "host sync",
        "data-dependent shape",
        "module state rebound",
        "randomness drawn on the host",
        "Nothing stands in the way of one graph",
        "are equal in every bit",
    ],
}
"""What each notebook shows."""
COUNTS = {
    "modes_and_speed": ["34 PIECEWISE", "34 FULL"],
    "why_not_one_graph": ["7 steps FULL"],
}
"""The steps by mode that each notebook shows, also on a GPU: no time decides them."""


WITHOUT_MATPLOTLIB = """
import importlib.metadata, importlib.util, sys
find_spec, distribution = importlib.util.find_spec, importlib.metadata.distribution
class Hides:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def get_distribution(name):
    if name == "matplotlib":
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)
sys.meta_path.insert(0, Hides())
importlib.metadata.distribution = get_distribution
importlib.util.find_spec = lambda name, *p: None if "matplotlib" in name else find_spec(name, *p)
"""
"""For a module that Python imports at its start. torchmetrics asks in each of these ways."""


def shown_by_jupyter(path: Path) -> list[str]:
    """Run each cell twice in a kernel. Return what the first runs show, and the second ones."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    # each cell runs twice: whoever edits a cell runs it again
    notebook.cells = [copy.deepcopy(cell) for cell in notebook.cells for _ in range(2)]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"run-{number}"
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return [
        json.dumps([cell.get("outputs", []) for cell in notebook.cells[number::2]])
        for number in range(2)
    ]


def shown_without_jupyter(path: Path) -> list[str]:
    """The same in a plain Python."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "notebook_cells.py", path, "2"],
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"^--- cell \d+, time (\d)$", done.stdout, flags=re.MULTILINE)[1:]
    times, shown = parts[::2], parts[1::2]
    return ["".join(shown[i] for i, each in enumerate(times) if each == time) for time in "01"]


@pytest.mark.notebook
@pytest.mark.slow
def test_without_matplotlib_a_notebook_says_so_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_MATPLOTLIB)
    paths = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    for printed in shown_without_jupyter(ROOT / "notebooks" / "modes_and_speed.ipynb"):
        assert "No plot: matplotlib is not installed. pip install 'cg-lightning[bench]'" in printed
        assert 'which is not installed: pip install "cg-lightning[plot]"' in printed
        assert "the weights of both trainings are equal in every bit" in printed


CELLS = [
    """import torch
from lightning.pytorch import LightningModule
from cg_lightning import diagnose
class Model(LightningModule):
    def predict_step(self, batch, batch_idx):
        total = float(batch.sum())
        return clipped(batch, f"{batch_idx}")
""",
    """SEEN = []
def clipped(batch, name):
    SEEN.append(name)
    return batch[batch > 0]
""",
    "print([finding.location for finding in diagnose(Model(), torch.ones(2)).findings])",
]


def test_lines_of_cells_are_named_as_in_tracebacks(tmp_path):
    """As IPython names them, which makes the files of its cells itself."""
    pytest.importorskip("IPython", reason="IPython is not installed (extra test)")
    script = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in {CELLS!r}:
    shell.run_cell(cell, store_history=True).raise_error()
shell.run_cell("1 / 0")
"""
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = run_python("-c", script, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    printed = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
    lines = ["Cell In[1]:7", "Cell In[1]:6", "Cell In[2]:4", "Cell In[2]:3"]
    assert f"{lines}\n" in printed
    assert "Cell In[4], line 1" in printed, "IPython has another name for its cells"


def test_lines_of_files_are_named_by_their_file(tmp_path):
    """Beside an IPython that does not tell, as 8.0 and older ones."""
    old = "import sys, types\nsys.modules['IPython'] = types.ModuleType('IPython')\n"
    (tmp_path / "cells.py").write_text(old + "".join(CELLS))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_python("cells.py", folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "cells.py:13'" in done.stdout
    assert "Cell" not in done.stdout


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.gpu_if_there
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra bench)")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    )
    jupyter = ("nbclient", "nbformat", "ipykernel")
    has_jupyter = all(importlib.util.find_spec(name) for name in jupyter)
    for printed in shown_by_jupyter(path) if has_jupyter else shown_without_jupyter(path):
        for text in PRINTED[path.stem] + COUNTS.get(path.stem, []):
            assert text in printed, text


def test_cells_run_without_jupyter(tmp_path):
    """As on a machine that has only what the package needs."""
    cells = [
        "import inspect\nfrom matplotlib import pyplot\ndef one():\n    return 1",
        "print('printed', inspect.getsource(one).count('\\n'))\n{'last': one()}",
        "class Own: pass\nimport pickle\ntype(pickle.loads(pickle.dumps(Own()))) is Own",
        "pyplot.figure()\npyplot.show()",
        "class Html:\n    _repr_html_ = lambda self: '<b>'\nHtml()",
        "None",
    ]
    path = tmp_path / "small.ipynb"
    text = [{"cell_type": "markdown", "source": ["raise SystemExit"]}]
    code = [{"cell_type": "code", "source": each.splitlines(keepends=True)} for each in cells]
    path.write_text(json.dumps({"cells": text + code}))
    for printed in shown_without_jupyter(path):
        for part in ("printed 2\n{'last': 1}\n", "True\n", "image/png: ", "text/html: <b>\n"):
            assert printed.count(part) == 1, (part, printed)
        assert "None" not in printed
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["1 / 0"]}]}))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        shown_without_jupyter(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_carries_no_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_these_are_the_notebooks():
    assert set(PRINTED) == {path.stem for path in NOTEBOOKS}
