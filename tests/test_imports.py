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
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
def test_importing_loads_no_hydra_and_initialises_no_cuda():
    assert imports("import cg_lightning") == "[]|False"


@pytest.mark.slow
def test_that_this_check_can_fail():
    assert imports("import cg_lightning.app.config") == "['hydra', 'omegaconf']|False"


def test_every_package_is_shipped():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    setuptools = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    there = {
        ".".join(file.parent.relative_to(PACKAGE.parent).parts)
        for file in PACKAGE.rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == there | {"cg_lightning.conf"}


LAYERS = ("app", "bench", "callback", "diagnose", "graphed", "trainer", "runtime", "diagnosis", "capture", "effects", "metrics",
          "guards", "modules", "backends", "report", "core")  # fmt: skip
"""From top to bottom: each imports only from those below it."""
TO_COME: set[tuple[str, str]] = set()
"""Arrows that point upwards still, as long as the house is being rebuilt."""
MAY_IMPORT = {
    "lightning": {"app", "bench", "callback", "diagnose", "trainer"},
    "hydra": {"app"},
    "omegaconf": {"app"},
    "torchmetrics": {"app", "bench", "trainer", "diagnosis", "effects", "metrics", "modules"},
}
"""Which layers may import which packages of others."""
FILES = [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.stem in LAYERS]


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_by(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def arrows(layer: str, source: str) -> set[tuple[str, str]]:
    """The layers of ours that a source imports, other than its own."""
    ours = {name.split(".")[1] for name in imported_by(source) if name.startswith("cg_lightning.")}
    return {(layer, other) for other in ours - {layer}}


def pointing_upwards(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(layer, other) for layer, other in found if LAYERS.index(other) <= LAYERS.index(layer)}


def test_arrows_point_downwards():
    found = set().union(*[arrows(layer_of(file), file.read_text()) for file in FILES])
    assert pointing_upwards(found) <= TO_COME


def test_that_an_arrow_that_points_upwards_is_seen():
    assert pointing_upwards(arrows("core", "from cg_lightning.runtime.session import Session")) == {
        ("core", "runtime")
    }


@pytest.mark.parametrize("name", list(MAY_IMPORT))
def test_who_may_import_what(name):
    importing = {
        layer_of(file)
        for file in FILES
        if name in {each.split(".")[0] for each in imported_by(file.read_text())}
    }
    assert importing <= MAY_IMPORT[name] | {"runtime"}


def test_only_the_cuda_backend_touches_torch_cuda():
    for file in PACKAGE.rglob("*.py"):
        uses = [
            node
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute)
            and node.attr == "cuda"
            and getattr(node.value, "id", "") == "torch"
        ]
        assert not uses or file.name == "cuda.py", file
