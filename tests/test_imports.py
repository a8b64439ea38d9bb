"""That importing stays cheap, and that the core knows neither Lightning nor Hydra."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cg_lightning"


def imports(statement: str) -> str:
    """What importing leaves behind: which of the watched modules were loaded, and whether CUDA was initialised."""
    code = (
        f"{statement}\nimport sys, torch\n"
        "print([m for m in ('hydra', 'omegaconf') if m in sys.modules], torch.cuda.is_initialized(), sep='|')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_importing_loads_no_hydra_and_initialises_no_cuda():
    assert imports("import cg_lightning") == "[]|False"


@pytest.mark.slow
def test_that_this_check_can_fail():
    assert imports("import cg_lightning.app.config") == "['hydra', 'omegaconf']|False"


def test_every_package_is_shipped():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    setuptools = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {".".join(file.parent.relative_to(PACKAGE.parent).parts) for file in PACKAGE.rglob("__init__.py")}
    assert set(setuptools["packages"]) == there | {"cg_lightning.conf"}


FORBIDDEN = {
    "core": ("lightning", "hydra", "omegaconf", "torchmetrics"),
    "backends": ("lightning", "hydra", "omegaconf", "torchmetrics"),
    "stage": ("hydra", "omegaconf"),
    "metrics": ("hydra", "omegaconf"),
    "callback.py": ("hydra", "omegaconf"),
}


def imported_by(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("part", list(FORBIDDEN))
def test_who_may_import_what(part):
    path = PACKAGE / part
    for file in [path] if path.is_file() else path.glob("*.py"):
        assert not imported_by(file) & set(FORBIDDEN[part]), file


def test_only_the_cuda_backend_touches_torch_cuda():
    for file in PACKAGE.rglob("*.py"):
        uses = [
            node
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == "cuda" and getattr(node.value, "id", "") == "torch"
        ]
        assert not uses or file.name == "cuda.py", file
