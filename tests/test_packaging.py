"""The package as shipped: built, checked, installed into an empty environment, run elsewhere."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest
import yaml

import cg_lightning
from tests.test_app import IDENTICAL
from tests.test_config import assert_each_option_is_set, run_project

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NO_INDEX = ("No matching distribution", "Could not find a version")


class NoIndexError(Exception):
    """There is no package index."""


def shell(*command: object, **settings: object) -> str:
    """Run a command, and return what it prints."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **settings
    )
    if any(sign in done.stderr + done.stdout for sign in NO_INDEX):
        raise NoIndexError(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(*first: object) -> dict[str, str]:
    """The variables of this process, without the checkout on the path."""
    paths = [*map(str, first), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    kept = [path for path in paths if path and Path(path).resolve() != ROOT]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(kept), "PIP_RETRIES": "1"}


class Built(NamedTuple):
    """What was built."""

    sdist: Path
    wheel: Path
    has_index: bool


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it: in isolation, if there is an index."""
    pytest.importorskip("build", reason="build is not installed (extra test)")
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", ".venv", ".*_cache")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    build = (sys.executable, "-m", "build", "--outdir", folder, folder / "source")
    has_index = True
    try:
        shell(*build, cwd=folder, env=environment())
    except NoIndexError:
        has_index = False
        shell(*build, "--no-isolation", cwd=folder, env=environment())
    shutil.rmtree(folder / "source")
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Built(sdist, wheel, has_index)


class Installed(NamedTuple):
    """Where the wheel was installed."""

    folder: Path
    python: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An empty environment into which the wheel was installed by its name.

    If there is no index, or no pip for it, a folder beside the packages of this environment.
    """
    folder = tmp_path_factory.mktemp("installed")
    # torch has thousands of modules, and few are imported
    install = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-compile")
    python = folder / "bin" / "python"
    alone = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    # Debian has ensurepip in a package of its own
    if not built.has_index or importlib.util.find_spec("ensurepip") is None:
        shell(sys.executable, *install, "--no-index", "--no-deps", "--target", folder, built.wheel)
        return Installed(folder, Path(sys.executable), environment(folder))
    venv.create(folder, with_pip=True)
    shell(
        python, *install, "-c", ROOT / "constraints.txt",
        "--find-links", built.wheel.parent, "cg-lightning[demo]", env=alone,
    )  # fmt: skip
    return Installed(folder, python, alone)


@pytest.mark.slow
@pytest.mark.wheel
def test_sdist_and_wheel_are_well_formed(built):
    pytest.importorskip("twine", reason="twine is not installed (extra test)")
    shell(sys.executable, "-m", "twine", "check", "--strict", built.sdist, built.wheel)
    with ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
        (file,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        described = Parser().parsestr(wheel.read(file).decode())
    assert described["Version"] == cg_lightning.__version__
    assert "all" in described.get_all("Provides-Extra")
    assert "Typing :: Typed" in described.get_all("Classifier")
    assert described["Keywords"]
    assert len(described.get_all("Project-URL")) == len(PROJECT["urls"])
    for file in ("py.typed", "app/conf/config.yaml", "conf/cuda_graph/full_and_piecewise.yaml"):
        assert f"cg_lightning/{file}" in names
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "cg_lightning").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests", "notebooks"))]


@pytest.mark.slow
@pytest.mark.wheel
@pytest.mark.timeout(600)
def test_the_command_and_a_hydra_application_of_an_installation(installed, tmp_path):
    around = {"cwd": tmp_path, "env": installed.environment}
    version = "import cg_lightning; print(cg_lightning.__version__, cg_lightning.__file__)"
    printed = shell(installed.python, "-c", version, **around).split()
    assert printed[0] == cg_lightning.__version__
    assert Path(printed[1]).is_relative_to(installed.folder)
    command = installed.folder / "bin" / "cg-lightning"
    assert IDENTICAL in shell(command, "task=predict", **around)
    project = {
        "search_path": "pkg://cg_lightning.conf",
        "environment": installed.environment,
        "python": str(installed.python),
    }
    done = run_project(
        tmp_path / "project", "--multirun", "cuda_graph=full,piecewise",
        "callbacks.cuda_graph.backend=recorder", **project,
    )  # fmt: skip
    assert "CUDAGraphCallback(mode='FULL'" in done.stdout, done.stderr
    assert "CUDAGraphCallback(mode='PIECEWISE'" in done.stdout
    done = run_project(tmp_path / "project", "callbacks.cuda_graph.warmup_step=1", **project)
    assert done.returncode != 0
    assert "warmup_step" in done.stderr
    assert_each_option_is_set(tmp_path / "project", **project)


def test_one_version():
    """The version stands in pyproject.toml. If this fails after a release: ``pip install -e .``."""
    assert "dynamic" not in PROJECT
    assert cg_lightning.__version__ == PROJECT["version"]
    assert "__version__" in dir(cg_lightning)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cg_lightning.__version__
    assert f"## [{cg_lightning.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["cg-lightning", "not-installed"])
def test_the_version_is_that_of_the_metadata_or_else_of_the_checkout(monkeypatch, name):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda _: version(name))
    monkeypatch.delattr(cg_lightning, "__version__", raising=False)
    try:
        expected = version(name)
    except metadata.PackageNotFoundError:
        expected = PROJECT["version"]
    assert cg_lightning.__version__ == expected


def test_the_extra_all_has_what_users_may_install():
    extras = PROJECT["optional-dependencies"]
    (ours,) = [each for each in extras["all"] if each.startswith("cg-lightning")]
    assert set(re.findall(r"[\w-]+", ours.split("[")[1])) == set(extras) - {"all", "test", "dev"}


def test_the_readme_and_the_constraints_agree_with_the_lowest_versions():
    lowest = dict(re.findall(r"([\w-]+)>=([\d.]+)", " ".join(PROJECT["dependencies"])))
    lowest["Python"] = PROJECT["requires-python"].removeprefix(">=")
    readme = (ROOT / "README.md").read_text()
    (supported,) = re.findall(r"^- Supported: (.*), or newer", readme, re.MULTILINE)
    named = dict(each.split() for each in supported.split(", "))
    assert named == {name: lowest[name] for name in lowest if name != "typing-extensions"}
    numbers = lambda version: [int(part) for part in version.split(".")]
    constraints = (ROOT / "constraints.txt").read_text()
    for name, pinned in re.findall(r"^([\w-]+)==([\d.]+)$", constraints, re.MULTILINE):
        assert numbers(pinned) >= numbers(lowest.get(name, "0"))


def test_pre_commit_runs_the_pinned_tools():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    tools = {hook["entry"].split()[0] for hook in hooks}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert tools == {"ruff", "mypy"} <= set(pinned)
    named = {re.split("[>=]", each)[0] for each in PROJECT["optional-dependencies"]["dev"]}
    assert {*tools, "pre-commit"} <= named


def test_mypy_sees_each_public_name_as_users_do():
    used = re.findall(r"\w+", (ROOT / "tests" / "types_of_users.py").read_text().split(")\n", 1)[1])
    assert set(cg_lightning.__all__) <= set(used)


@pytest.mark.slow
@pytest.mark.exhaustive  # mypy itself checks the same file, as a part of this project
def test_types_help_a_user_of_mypy(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed (extra dev)")
    shutil.copy(ROOT / "tests" / "types_of_users.py", tmp_path)
    check = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull]
    # as if it were installed: an editable install is a hook that mypy does not follow, and MYPYPATH
    # makes the package a part of the user's code, whose errors count under the user's settings
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shell(*check, "types_of_users.py", cwd=tmp_path, env=environment)
