"""The configuration: each file composes and agrees with the code."""

import dataclasses
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cg_lightning import CUDAGraphCallback, CUDAGraphMode, CUDAGraphOptions
from cg_lightning.app.config import (
    CUDAGraphConfig,
    OptionsConfig,
    config_dir,
    library_config_dir,
    register_configs,
)
from cg_lightning.core.settings import Settings
from tests.processes import run_python

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
APP_CONF = ROOT / "cg_lightning" / "app" / "conf"
FILES = [*CONF.rglob("*.yaml"), *APP_CONF.rglob("*.yaml")]
OPTIONS = sorted({f"{path.parent.name}={path.stem}" for path in FILES if path.stem != "config"})


@pytest.fixture(autouse=True)
def hydra():
    register_configs()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        yield


def test_the_folders_are_found():
    assert Path(config_dir()) == APP_CONF
    assert Path(library_config_dir()) == CONF


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_builds(option):
    config = compose("config", [option])
    group = option.split("=")[0]
    if option == "data=custom":
        assert OmegaConf.is_missing(config.data, "_target_")
    elif option == "trainer=gpu":
        assert config.trainer.accelerator == "gpu"
    elif group == "callbacks":
        for node in config.callbacks.values():
            assert isinstance(instantiate(node, _convert_="all"), CUDAGraphCallback)
    else:
        instantiate(config[group], _convert_="all")


def test_graph_options_reach_the_callback_as_plain_values():
    config = compose(
        "config",
        ["cuda_graph.mode=PIECEWISE", "cuda_graph.warmup_steps=1", "cuda_graph.targets=[net.*]"],
    )
    callback = instantiate(config.callbacks.cuda_graph, _convert_="all")
    assert callback._settings.mode is CUDAGraphMode.PIECEWISE
    assert callback._settings.warmup_steps == 1
    assert callback._settings.targets == ("net.*",)
    assert type(callback._settings.options) is CUDAGraphOptions


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("cuda_graph.warmup=1", ["warmup", "CUDAGraphConfig"]),
        ("cuda_graph.warmup_steps=many", ["many", "warmup_steps"]),
        ("cuda_graph.options.gc=true", ["gc", "OptionsConfig"]),
        ("task=train", ["train", "diagnose", "predict"]),
        ("seeds=1", ["seeds"]),
        ("cuda_graph=quick", ["quick", "piecewise"]),
        ("data.batch_sise=3", ["batch_sise"]),
    ],
)
def test_a_misspelt_key_or_wrong_type_fails_at_compose_time(override, parts):
    with pytest.raises((ConfigCompositionException, HydraException)) as caught:
        compose("config", [override])
    message = f"{caught.value} {caught.value.__cause__}"
    for part in parts:
        assert part in message


def plain(value):
    """A default as YAML and README write it."""
    return list(value) if isinstance(value, tuple) else value


def defaults_of_yaml(path: Path) -> dict:
    config = OmegaConf.to_container(OmegaConf.load(path))
    return {
        name: value
        for name, value in config.items()
        if name not in ("defaults", "_target_", "_convert_")
    }


def defaults_of_schema(schema: type) -> dict:
    config = OmegaConf.to_container(OmegaConf.structured(schema))
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize(
    ("constructor", "dataclass", "schema"),
    [
        (CUDAGraphCallback, Settings, CUDAGraphConfig),
        (CUDAGraphOptions, CUDAGraphOptions, OptionsConfig),
    ],
)
def test_constructor_settings_and_schema_agree(constructor, dataclass, schema):
    parameters = inspect.signature(constructor).parameters
    fields = {field.name: field for field in dataclasses.fields(dataclass)}
    assert list(parameters) == list(fields) == list(defaults_of_schema(schema))
    for name, parameter in parameters.items():
        assert parameter.default == fields[name].default, name
        assert parameter.annotation == fields[name].type, name
        if name != "options":
            assert plain(parameter.default) == defaults_of_schema(schema)[name], name


def test_the_yaml_says_what_the_schema_says():
    written = defaults_of_yaml(CONF / "cuda_graph" / "full_and_piecewise.yaml")
    written["options"].pop("_target_")
    schema = defaults_of_schema(CUDAGraphConfig)
    schema["options"] = defaults_of_schema(OptionsConfig)
    assert written == schema
    assert list(written) == list(schema)


def test_every_key_is_commented():
    for path in FILES:
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), path
        for before, line in itertools.pairwise(lines):
            name = line.strip().split(":")[0]
            if (
                ":" in line
                and not line.strip().startswith(("#", "-"))
                and name not in ("defaults", "_target_", "options")
            ):
                assert before.strip().startswith("#"), f"{path}: {line}"


def test_there_are_few_files():
    assert len(FILES) <= 20


PROJECT = {
    "train.py": """
import hydra
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config):
    callbacks = [instantiate(node, _convert_="all") for node in config.callbacks.values()]
    print([type(callback).__name__ for callback in callbacks], callbacks[-1])
    print(callbacks[-1]._settings)
    if config.get("only_build"):
        return
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator=config.trainer.accelerator, callbacks=callbacks, **settings)
    trainer.predict(BoringModel(), BoringDataModule())

main()
""",
    "conf/train.yaml": """
defaults:
  - callbacks: [default, cuda_graph]
  - trainer: default
  - _self_
hydra:
  searchpath: ['SEARCHPATH']
""",
    "conf/callbacks/default.yaml": "mine:\n  _target_: lightning.pytorch.callbacks.Timer\n",
    "conf/trainer/default.yaml": "accelerator: cpu\n",
}
"""An application of the lightning-hydra-template kind."""


def run_project(
    folder: Path,
    *overrides: str,
    search_path: str = f"file://{CONF}",
    environment: dict[str, str] | None = None,
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    for name, text in PROJECT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("SEARCHPATH", search_path))
    if environment is None:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths}
    elif python == sys.executable:  # an installation beside our packages: a fork has the checkout
        command = [python, "train.py", *overrides]
        settings: dict[str, Any] = {"cwd": folder, "env": environment}
        return subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    return run_python("train.py", *overrides, folder=folder, environment=environment, python=python)


@pytest.mark.slow
def test_another_project_selects_the_callback_from_its_search_path(tmp_path):
    done = run_project(
        tmp_path,
        "callbacks.cuda_graph.mode=FULL",
        "callbacks.cuda_graph.backend=recorder",
        "callbacks.cuda_graph.options.gc_disable=true",
    )
    assert "['Timer', 'CUDAGraphCallback'] CUDAGraphCallback(mode='FULL'" in done.stdout, (
        done.stderr
    )
    assert "predict: " in done.stdout
    assert "CUDA graphs (backend: recorder)" in done.stdout


def another_value(field: dataclasses.Field, hint: Any) -> tuple[str, Any]:
    """A value of an option other than its default, as an override, and as the callback keeps it."""
    default = field.default
    if isinstance(default, bool):
        return str(not default).lower(), not default
    if isinstance(default, int):
        return str(default + 1), default + 1
    if isinstance(default, float):
        return str(default / 2), default / 2
    literal = next((arm for arm in (hint, *get_args(hint)) if get_origin(arm) is Literal), None)
    if literal is not None and not isinstance(default, tuple):
        choice = next(value for value in get_args(literal) if value not in (default, "cuda"))
        return choice, choice
    if isinstance(default, tuple):
        return f"[{default[-1]}]", default[-1:]
    if int in get_args(hint):
        return "4", 4
    if any(get_origin(arm) is Mapping for arm in get_args(hint)):
        return "{x:{1:{sizes:pow2,value:0}}}", {"x": {1: {"sizes": "pow2", "value": 0}}}
    sequence = next(arm for arm in get_args(hint) if get_origin(arm) is Sequence)
    item = {str: "layer", int: 4}[get_args(sequence)[0]]
    return f"[{item}]", (item,)


def assert_each_option_is_set(folder: Path, **project: Any) -> None:
    """Override every option in a project, and look at what its callback keeps."""
    hints = get_type_hints(Settings)
    given = {
        field.name: another_value(field, hints[field.name])
        for field in dataclasses.fields(Settings)
        # targets need PIECEWISE, and capture_ahead FULL: so the mode is the default
        if field.name not in ("options", "mode", "backend")
    }
    given["backend"] = ("recorder", "recorder")
    overrides = [f"callbacks.cuda_graph.{name}={text}" for name, (text, _) in given.items()]
    overrides += ["callbacks.cuda_graph.options.gc_disable=true", "+only_build=true"]
    done = run_project(folder, *overrides, **project)
    assert done.returncode == 0, done.stderr
    settings = next(line for line in done.stdout.splitlines() if line.startswith("Settings("))
    for name, (_, kept) in given.items():
        assert f"{name}={kept!r}" in settings, settings
    assert "gc_disable=True" in settings


@pytest.mark.slow
def test_another_project_sets_each_option(tmp_path):
    assert_each_option_is_set(tmp_path)


@pytest.mark.slow
def test_another_project_without_a_report_prints_nothing_of_ours(tmp_path):
    overrides = ["cuda_graph=piecewise", "callbacks.cuda_graph.report=false"]
    done = run_project(tmp_path, *overrides, "callbacks.cuda_graph.backend=recorder")
    assert done.returncode == 0, done.stderr
    line, settings = done.stdout.splitlines()
    assert "mode='PIECEWISE'" in line
    assert "report=False" in settings
    assert "CUDA graph" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("callbacks.cuda_graph.warmup=1", ["callbacks.cuda_graph.warmup", "not in struct"]),
        ("callbacks.cuda_graph.mode=fast", ["mode='fast'", "FULL_AND_PIECEWISE"]),
        ("cuda_graph=quick", ["cuda_graph/quick", "full_and_piecewise"]),
        ("trainer=gpu", ["Could not find 'trainer/gpu'"]),
        ("callbacks=none", ["Could not find 'callbacks/none'"]),
    ],
)
def test_mistakes_and_groups_of_the_command_in_another_project(tmp_path, override, parts):
    done = run_project(tmp_path, override)
    assert done.returncode != 0, done.stdout
    for part in parts:
        assert part in done.stderr
