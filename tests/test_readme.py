"""That the README says what is there."""

import re
from pathlib import Path

from cg_lightning.core.legality import Cause
from tests.test_imports import PACKAGE

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_one_line_per_module():
    named = set(re.findall(r"`(?:cg_lightning/(?:\w+/)?)?(\w+\.py)`", README))
    there = {file.name for file in PACKAGE.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == there


def test_causes_and_remedies():
    for cause in Cause:
        assert f"| {cause.value} | {cause.remedy} |" in README


def test_every_argument_of_the_callback():
    import inspect

    from cg_lightning import CUDAGraphCallback

    for name in inspect.signature(CUDAGraphCallback).parameters:
        assert f"| `{name}` |" in README
