"""README and docs agree with the code."""

import ast
import os
import re
from pathlib import Path

import pytest

from cg_lightning.core.causes import Cause
from cg_lightning.core.reasons import WARM_UP, Status
from cg_lightning.report.records import StepsRecord
from cg_lightning.runtime.dispatcher import MOST_UNREPEATED
from cg_lightning.runtime.ledger import CAPTURE_COST, CREDIT, FIRST_WAIT, WATCH_COST
from tests.processes import run_python
from tests.test_imports import PACKAGE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
REASONS = (ROOT / "docs" / "reasons.md").read_text()
OPTIONS = (ROOT / "docs" / "options.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

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


HARD = "backends/cuda backends/recorder capture/entry guards/guard_set modules/interception"


@pytest.mark.parametrize("file", HARD.split())
def test_five_files_begin_with_what_is_hard_in_them(file):
    opening = ast.get_docstring(ast.parse((PACKAGE / f"{file}.py").read_text()))
    assert 10 <= len(opening.splitlines()) <= 30


def test_the_map_names_each_folder():
    named = set(re.findall(r"`([\w/]+)/`", ARCHITECTURE.split("\n## ")[0]))
    assert named == {str(folder.relative_to(PACKAGE)) for folder in PACKAGES}


def test_causes_and_remedies():
    for cause in Cause:
        assert f"| {cause.value} | {cause.remedy} |" in REASONS


def test_statuses_and_remedies():
    rows = {row.split(" | ")[0]: row for row in re.findall(r"^\| (.* \|)$", REASONS, re.MULTILINE)}
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
    table = OPTIONS.split("| argument | default | meaning |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(parameters)
    in_words = {"stages": "the first three"}
    for name, written in rows:
        default = parameters[name].default
        shown = f'`"{default}"`' if isinstance(default, str) else f"`{default}`"
        assert written == in_words.get(name, shown), name


def test_the_options_that_graphed_does_not_take():
    import inspect

    from cg_lightning import CUDAGraphCallback, graphed

    page = (ROOT / "docs" / "without-a-trainer.md").read_text()
    listed = page.split("that only a Trainer has (")[1].split(")")[0]
    options = inspect.signature(CUDAGraphCallback).parameters
    taken = inspect.signature(graphed).parameters
    assert set(re.findall(r"`(\w+)`", listed)) == set(options) - set(taken)
    described = re.findall(r"^        (\w+): ", graphed.__doc__.split("Args:")[1], re.MULTILINE)
    assert described[: len(taken)] == list(taken)


def _without_figures(text: str) -> str:
    """Replace times, which differ from run to run, and what depends on them."""
    text = re.sub(r"\((?:recorder: means nothing|factor [\d.]+)\)", "(FACTOR)", text)
    text = re.sub(r" +us \(eager\)", " us (eager)", text)
    text = re.sub(r" +\d+ \(\d+\)", " US", text)
    return re.sub(r" +\d+\.\d+", " TIME", text)


@pytest.mark.slow
def test_the_example_of_the_readme_prints_what_the_readme_shows(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    code = README.split("```python\n")[1].split("```")[0]
    shown = README.split("<!-- output: summary -->\n```\n")[1].split("```")[0]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = run_python("-c", code, folder=tmp_path, environment={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    printed = done.stdout[done.stdout.index(shown.splitlines()[0]) :]
    assert _without_figures(printed).startswith(_without_figures(shown)), printed
    assert max(map(len, shown.splitlines())) <= 80


def test_the_readme_is_short_and_begins_with_a_figure_and_a_picture():
    text = [line for line in README.splitlines() if not line.startswith("|")]
    assert len(" ".join(text).split()) <= 750
    first_screen = "".join(README.splitlines(keepends=True)[:10])
    assert re.search(r"bench: speed -->[\d.]+ to [\d.]+ times faster<", first_screen)
    (picture,) = re.findall(r"!\[[^\]]+\]\((.+?)\)", first_screen)
    assert (ROOT / picture).is_file()
    first_table = next(i for i, line in enumerate(README.splitlines()) if line.startswith("|"))
    assert first_table <= 80  # two screens


def test_the_figures_are_those_of_the_records():
    from cg_lightning.bench.tables import fill_page

    for page in PAGES:
        text = page.read_text()
        assert fill_page(text, ROOT / "notebooks" / "benchmark_h200.jsonl") == text, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    anchor_of = lambda title: re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(anchor_of, titles), target


def test_the_readme_links_each_page():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", README))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_running_text_names_no_commit(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    running = [line for line in text.splitlines() if not line.startswith("|")]
    assert not re.findall(r"`[0-9a-f]{7,40}(?:-dirty)?`", "\n".join(running))
