"""The notebooks run, each cell can be run again, and none carries outputs."""

import copy
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
PRINTED = {
    "modes_and_speed": [
        *("34 PIECEWISE", "34 FULL", "all modes are equal in every bit", "image/png"),
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
        "7 steps FULL",
        "are equal in every bit",
    ],
}
"""What each notebook shows."""


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all notebooks, which imports the libraries once."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    manager.start_kernel(env={**os.environ, "PYTHONPATH": paths})
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.gpu_if_there
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, kernel):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra bench)")
    notebook = nbformat.read(path, as_version=4)
    # each cell runs twice: whoever edits a cell runs it again
    notebook.cells = [copy.deepcopy(cell) for cell in notebook.cells for _ in range(2)]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"run-{number}"
    forget = nbformat.v4.new_code_cell("%reset -f")  # names of the notebook before
    notebook.cells.insert(0, forget)
    nbclient.NotebookClient(notebook, timeout=120, km=kernel).execute()
    for number in (1, 2):
        printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells[number::2]])
        for text in PRINTED[path.stem]:
            assert text in printed, (text, number)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_carries_no_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_these_are_the_notebooks():
    assert set(PRINTED) == {path.stem for path in NOTEBOOKS}
