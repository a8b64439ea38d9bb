"""LightningCLI: the callback from arguments and from a YAML file, and its help."""

from __future__ import annotations

import dataclasses
import os
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from cg_lightning.core.settings import CUDAGraphOptions, Settings
from tests.processes import run_python

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

NAME = "cg_lightning.CUDAGraphCallback"
SCRIPT = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
LightningCLI(BoringModel, BoringDataModule)
"""
CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_val_batches: 10
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: cg_lightning.CUDAGraphCallback
      init_args:
        mode: FULL
        stages: [validate]
        backend: recorder
        warmup_steps: 2
        capture_ahead: true
        options:
          gc_disable: true
          capture_error_mode: relaxed
"""


def cli(*arguments: str) -> None:
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(BoringModel, BoringDataModule, args=list(arguments), save_config_callback=None)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli(*arguments)
    assert caught.value.code in (0, None)
    return capsys.readouterr().out


def shown_default(default: object) -> str:
    return "null" if default is None else str(default)


def test_the_help_has_every_option_with_its_default(capsys):
    text = " ".join(printed(capsys, "predict", f"--trainer.callbacks.help={NAME}").split())
    text = text.split("Help for")[1]
    for field in dataclasses.fields(Settings):
        start = text.index(f"--trainer.callbacks.{field.name} ")
        end = text.find(" --trainer.callbacks.", text.index("(type:", start))
        described = text[start : end if end > 0 else None]
        assert f"default: {shown_default(field.default)})" in described, described
        assert len(described.split("(type:")[0].split()) > 4, "no words say what it means"
    for choices in (
        "Literal['NONE', 'PIECEWISE', 'FULL', 'FULL_AND_PIECEWISE']",
        "Literal['validate', 'test', 'predict', 'train']",
        "{exact,close}",
        "{auto,cuda,recorder}",
        "{true,false}",
    ):
        assert choices in text


def test_a_yaml_file(capsys):
    Path("run.yaml").write_text(CONFIG)
    cli("fit", "--config=run.yaml")
    assert "validate: 9 steps FULL, 1 step eager" in capsys.readouterr().out
    config = printed(capsys, "fit", "--config=run.yaml", "--print_config")
    for line in ("mode: FULL", "capture_ahead: true", "gc_disable: true", "max_graphs: 64"):
        assert line in config


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("warmup_steps: 2", "warmup: 2", "warmup"),
        ("gc_disable: true", "gc: true", "gc"),
        ("mode: FULL", "mode: FAST", "FAST"),
        ("stages: [validate]", "stages: [fit]", "fit"),
        ("backend: recorder", "verify_tolerance: loose", "loose"),
    ],
)
def test_mistakes_in_a_yaml_file_name_what_was_given(capsys, old, new, part):
    Path("run.yaml").write_text(CONFIG.replace(old, new))
    with pytest.raises(SystemExit) as caught:
        cli("fit", "--config=run.yaml")
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("warmup_steps: 2", "warmup_steps: -1", "warmup_steps=-1 must be a whole number"),
        ("mode: FULL", "mode: PIECEWISE", "capture_ahead=True captures whole steps"),
    ],
)
def test_values_that_the_callback_refuses(old, new, part):
    Path("run.yaml").write_text(CONFIG.replace(old, new))
    with pytest.raises(ValueError, match=part):
        cli("fit", "--config=run.yaml")


def test_options_of_captures_on_the_command_line(capsys):
    options = ["--trainer.callbacks.targets=null", "--trainer.callbacks.stages=[predict]"]
    options += ["--trainer.callbacks.options.capture_error_mode=relaxed"]
    config = printed(capsys, "predict", f"--trainer.callbacks+={NAME}", *options, "--print_config")
    assert "capture_error_mode: relaxed" in config
    assert all(f"{field.name}:" in config for field in dataclasses.fields(CUDAGraphOptions))


@pytest.mark.slow
def test_started_from_a_shell(tmp_path):
    Path("cli.py").write_text(SCRIPT)
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = run_python(
        *("cli.py", "predict"),
        f"--trainer.callbacks+={NAME}",
        "--trainer.callbacks.mode=FULL",
        "--trainer.callbacks.backend=recorder",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        folder=tmp_path,
        environment={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert "predict: " in done.stdout, done.stderr
    assert " FULL" in done.stdout


# docs/command-line.md


PAGE = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text()


def snippet(language: str, section: str) -> str:
    return PAGE.split(f"## {section}")[1].split(f"```{language}\n")[1].split("```")[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["bash", "yaml"])
def test_what_the_page_says_of_lightning_cli_runs(capsys, monkeypatch, form):
    section = "With LightningCLI"
    Path("cli.py").write_text(snippet("python", section))
    if form == "yaml":
        text = snippet("yaml", section)
        Path("run.yaml").write_text(text.replace("FULL\n", "FULL\n        backend: recorder\n"))
        arguments = ["cli.py", "validate", "--config=run.yaml"]
    else:
        arguments = shlex.split(snippet("bash", section))[1:]
        arguments.append("--trainer.callbacks.backend=recorder")
    small = ["accelerator=cpu", "logger=false", "limit_val_batches=16"]
    monkeypatch.setattr(sys, "argv", [*arguments, *(f"--trainer.{each}" for each in small)])
    runpy.run_path("cli.py", run_name="__main__")
    assert " steps FULL" in capsys.readouterr().out


def test_the_entry_point_of_the_page_reaches_every_trainer(tmp_path, monkeypatch):
    from lightning.pytorch import Trainer
    from lightning.pytorch.trainer.connectors import callback_connector

    from cg_lightning import CUDAGraphCallback

    section = "In every Trainer of an environment"
    Path("my_callbacks.py").write_text(snippet("python", section))
    points = tomllib.loads(snippet("toml", section))["project"]["entry-points"]
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in of_group.items())
        for group, of_group in points.items()
    ]
    (info / "entry_points.txt").write_text("".join(lines))
    # conftest.py caches it
    load = callback_connector._load_external_callbacks.__wrapped__
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", load)
    names = lambda: [type(each) for each in Trainer(accelerator="cpu", logger=False).callbacks]
    assert CUDAGraphCallback not in names()
    monkeypatch.syspath_prepend(tmp_path)
    assert CUDAGraphCallback in names()
