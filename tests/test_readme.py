"""That README and docs say what is there."""

import ast
import re
from pathlib import Path

import pytest

from cg_lightning.core.causes import Cause
from tests.test_imports import PACKAGE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


PACKAGES = sorted(file.parent for file in PACKAGE.rglob("__init__.py") if file.parent != PACKAGE)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_one_line_per_module(package):
    named = set(
        re.findall(
            r"^- ``(\w+\.py)``: \S",
            ast.get_docstring(ast.parse((package / "__init__.py").read_text())),
            re.MULTILINE,
        )
    )
    assert named == {file.name for file in package.glob("*.py")} - {"__init__.py"}


def test_the_map_names_each_folder():
    named = set(re.findall(r"`([\w/]+)/`", ARCHITECTURE.split("\n## ")[0]))
    assert named == {str(folder.relative_to(PACKAGE)) for folder in PACKAGES}


def test_causes_and_remedies():
    for cause in Cause:
        assert f"| {cause.value} | {cause.remedy} |" in README


def test_every_argument_of_the_callback():
    import inspect

    from cg_lightning import CUDAGraphCallback

    for name in inspect.signature(CUDAGraphCallback).parameters:
        assert f"| `{name}` |" in README
