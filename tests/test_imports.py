"""That importing stays cheap, and that the core knows neither Lightning nor Hydra."""

import ast
import graphlib
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cg_lightning"


HEAVY = ("torch", "lightning", "torchmetrics", "numpy")


def imported(statement: str, *watched: str) -> list[str]:
    """Which of the packages a statement has loaded in a process of its own."""
    code = f"{statement}\nimport sys\nprint([m for m in {watched} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])


HELP = """
import contextlib, sys
sys.argv = ["cg-lightning", {!r}]
from cg_lightning.app.main import main
with contextlib.suppress(SystemExit):
    main()
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import cg_lightning as cg; dir(cg); cg.CUDAGraphOptions(); cg.CUDAGraphMode.FULL",
        "import cg_lightning.app.config as config; config.register_configs()",
        HELP.format("--help"),
        HELP.format("--shell-completion=query=bash"),
    ],
    ids=["package", "schema", "help", "completion"],
)
def test_help_and_completion_load_no_torch(statement):
    assert imported(statement, *HEAVY) == []


@pytest.mark.slow
def test_importing_loads_no_hydra_and_initialises_no_cuda():
    statement = (
        # the function stays the function if a module of the same package is imported before
        "import cg_lightning.offline, cg_lightning\n"
        "from cg_lightning import diagnose\n"
        "assert callable(diagnose) and callable(cg_lightning.diagnose)\n"
        "import torch\n"
        "for name in cg_lightning.__all__: getattr(cg_lightning, name)\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert imported(statement, "hydra", "omegaconf", "torch") == ["torch"]


def test_that_this_check_can_fail():
    assert imported("import cg_lightning.app.config", "hydra", "omegaconf") == [
        "hydra",
        "omegaconf",
    ]


def test_every_public_name_is_there():
    import cg_lightning

    assert set(cg_lightning._MODULES) == set(cg_lightning.__all__) <= set(dir(cg_lightning))
    typed = {
        alias.name
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cg_lightning.")
        for alias in node.names
    }
    assert typed == set(cg_lightning.__all__)
    modules = {file.stem for file in PACKAGE.glob("*.py")} | {
        file.name for file in PACKAGE.iterdir() if file.is_dir()
    }
    assert not modules & set(cg_lightning.__all__), "importing the module would hide the name"
    with pytest.raises(AttributeError, match="no attribute 'CudaGraphCallback'"):
        cg_lightning.CudaGraphCallback  # noqa: B018


def test_public_names_can_be_pickled():
    import cg_lightning

    for name in cg_lightning.__all__:
        value = getattr(cg_lightning, name)
        if name != "compilation_counter":
            assert pickle.loads(pickle.dumps(value)) is value
    callback = pickle.loads(pickle.dumps(cg_lightning.CUDAGraphCallback(mode="FULL")))
    assert callback._settings.mode is cg_lightning.CUDAGraphMode.FULL


def test_every_package_is_shipped():
    setuptools = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    there = {
        ".".join(file.parent.relative_to(PACKAGE.parent).parts)
        for file in PACKAGE.rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == there | {"cg_lightning.conf"}


LAYERS = ("app", "bench", "callback", "offline", "plain_loop", "trainer", "runtime",
          "padding", "diagnosis", "capture", "effects", "metrics", "guards", "host_values",
          "modules", "backends", "report", "core")  # fmt: skip
"""From top to bottom: each imports only from those below it."""
MAY_IMPORT = {
    "lightning": {"app", "bench", "callback", "trainer"},
    "hydra": {"app"},
    "omegaconf": {"app"},
    "torchmetrics": {"app", "bench", "trainer", "diagnosis", "effects", "metrics", "modules"},
}
"""The layers that may import a third-party package.

``modules`` imports torchmetrics, because ``is_metric`` is one ``isinstance``; torchmetrics is a
dependency, and Lightning imports it anyway.
"""
FILES = [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.stem in LAYERS]


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_by(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the layer"
            names.add(node.module)
            # ``from cg_lightning import runtime``
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def arrows(layer: str, source: str) -> set[tuple[str, str]]:
    """The layers of ours that a source imports, other than its own."""
    ours = {name.split(".")[1] for name in imported_by(source) if name.startswith("cg_lightning.")}
    return {(layer, other) for other in ours & set(LAYERS) - {layer}}


def pointing_upwards(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(layer, other) for layer, other in found if LAYERS.index(other) <= LAYERS.index(layer)}


def test_arrows_point_downwards():
    found = set().union(*[arrows(layer_of(file), file.read_text()) for file in FILES])
    assert pointing_upwards(found) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from cg_lightning.runtime.session import Session",
        "from cg_lightning.runtime import session",
        "from cg_lightning import runtime",
        "import cg_lightning.runtime.session as session",
    ],
)
def test_that_an_arrow_that_points_upwards_is_seen(source):
    assert pointing_upwards(arrows("core", source)) == {("core", "runtime")}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


IMPORTS = {
    module_of(file): imported_by(file.read_text())
    for file in PACKAGE.rglob("*.py")
    if file.name != "__init__.py"
}
"""Which modules each of ours imports, in functions and for types as well."""


def circle_of(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other; empty if there are none."""
    try:
        graphlib.TopologicalSorter(
            {name: names & set(imports) for name, names in imports.items()}
        ).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other():
    assert circle_of(IMPORTS) == []


def test_a_circle_is_found():
    counts, summary = "cg_lightning.report.counts", "cg_lightning.report.summary"
    circle = circle_of({**IMPORTS, counts: IMPORTS[counts] | {summary}})
    assert set(circle) == {counts, summary}


@pytest.mark.parametrize("name", list(MAY_IMPORT))
def test_who_may_import_what(name):
    importing = {
        layer_of(file)
        for file in FILES
        if name in {each.split(".")[0] for each in imported_by(file.read_text())}
    }
    assert importing <= MAY_IMPORT[name]


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
