"""README and docs agree with the code."""

import ast
import re
from pathlib import Path

import pytest

from cg_lightning.core.causes import Cause
from cg_lightning.core.reasons import WARM_UP, Status
from cg_lightning.report.stats import StepsRecord
from cg_lightning.runtime.dispatcher import (
    CAPTURE_COST,
    CREDIT,
    FIRST_WAIT,
    MOST_UNREPEATED,
    WATCH_COST,
)
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


def test_statuses_and_remedies():
    rows = {row.split(" | ")[0]: row for row in re.findall(r"^\| (.* \|)$", README, re.MULTILINE)}
    for status in Status:
        assert rows[status.value].endswith(f"| {status.remedy} |" if status.remedy else " |")


def test_the_fields_of_a_reason():
    fields = ", ".join(StepsRecord("", "", "", WARM_UP).to_dict())
    for document in ("docs/diagnosis.md", "CHANGELOG.md"):
        assert f"{{{fields}}}" in (ROOT / document).read_text()


def test_the_numbers_of_the_ledger():
    waits = f"{FIRST_WAIT} steps, then may spend once; the next waits are {2 * FIRST_WAIT}"
    assert waits in ARCHITECTURE
    assert f"| watched step | -{WATCH_COST} |" in ARCHITECTURE
    assert f"| capture | -{CAPTURE_COST}, " in ARCHITECTURE
    assert f"| start | {CREDIT} |" in ARCHITECTURE
    assert f"After {MOST_UNREPEATED} watched keys" in ARCHITECTURE


def test_every_argument_of_the_callback_with_its_default():
    import inspect

    from cg_lightning import CUDAGraphCallback

    parameters = inspect.signature(CUDAGraphCallback).parameters
    table = README.split("| argument | default | meaning |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(parameters)
    in_words = {"stages": "all three"}
    for name, written in rows:
        default = parameters[name].default
        shown = f'`"{default}"`' if isinstance(default, str) else f"`{default}`"
        assert written == in_words.get(name, shown), name


def test_the_summary_of_the_readme_is_what_is_printed_today():
    from cg_lightning.report.summary import _HEADERS

    shown = README.split("<!-- output: summary -->")[1].split("```")[1]
    assert "  ".join(_HEADERS) in re.sub(r" {2,}", "  ", shown)
    assert "CUDA graphs (backend: recorder)\n\nvalidate: " in shown
    assert max(map(len, shown.splitlines())) <= 80
