"""The command line, run from another folder as a user runs it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.test_config import run_project

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SCRIPT = Path(sysconfig.get_path("scripts")) / "cg-lightning"
IDENTICAL = "without graphs gives identical metrics and predictions"


def run(
    folder: Path, *arguments: str, command: list[str] | None = None, fails: bool = False
) -> str:
    command = command or [sys.executable, "-m", "cg_lightning"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    arguments = (*arguments, "trainer.enable_progress_bar=false")
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def test_the_default_run(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    if not SCRIPT.exists():
        pytest.skip("the package is not installed, so there is no script")
    printed = run(tmp_path, command=[str(SCRIPT)])
    assert "validate: " in printed
    assert "steps FULL" in printed
    assert (
        printed.strip()
        .splitlines()[-1]
        .startswith(f"The same fit {IDENTICAL}: 4 metrics and 5 predicted batches")
    )
    assert " 0 graph replays" not in printed


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_other_tasks_and_overrides(tmp_path, task):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    arguments = (
        f"task={task}",
        "cuda_graph.mode=FULL_AND_PIECEWISE",
        "cuda_graph.warmup_steps=1",
        "data.batch_size=32",
    )
    printed = run(tmp_path, *arguments, "model=mlp")
    assert f"The same {task} {IDENTICAL}" in printed
    assert "32x1x8x8" in printed


def test_multirun(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    printed = run(tmp_path, "--multirun", "cuda_graph=off,piecewise", "task=predict")
    assert printed.count(f"The same predict {IDENTICAL}") == 2
    assert "mode=NONE" in printed


def test_the_benchmark_once_and_in_a_multirun(tmp_path):
    few = (
        "bench.backend=recorder",
        "bench.cases=[mlp]",
        "bench.contestants=[loop,eager]",
        "bench.stages=[validate]",
    )
    arguments = ("task=bench", *few, "bench.warmup=1", "bench.rounds=1", "bench.costs=false")
    assert "validate, mlp" in run(tmp_path, *arguments, "bench.batches=2")
    run(tmp_path, "--multirun", *arguments, "bench.batches=2,3")
    assert (tmp_path / "bench.jsonl").exists()
    # no job overwrites the file of another
    assert len(list(tmp_path.glob("multirun/*/*/*/bench.jsonl"))) == 2


def test_any_model_and_data(tmp_path):
    boring = "lightning.pytorch.demos.boring_classes"
    arguments = (
        f"model._target_={boring}.BoringModel",
        "data=custom",
        f"data._target_={boring}.BoringDataModule",
    )
    assert f"The same test {IDENTICAL}" in run(tmp_path, *arguments, "task=test")


MINE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

class Model(LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.net = torch.nn.Linear(8, width)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class DataModule(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""
"""A user's file, with a model that can only be fitted and validated."""


def test_a_model_from_the_users_folder_without_predict_step(tmp_path):
    (tmp_path / "my.py").write_text(MINE)
    # like the installed script, whose first path is its own folder
    as_script = "import sys; sys.path.pop(0); from cg_lightning.app.main import main; main()"
    arguments = (
        "model._target_=my.Model",
        "+model.width=4",
        "data=custom",
        "data._target_=my.DataModule",
    )
    printed = run(tmp_path, *arguments, command=[sys.executable, "-c", as_script])
    assert printed.count("No test after fit: Model has no test_step.") == 1
    assert printed.count("No predict after fit: Model has neither predict_step nor forward.") == 1
    assert f"The same fit {IDENTICAL}: 1 metrics and 0 predicted batches" in printed


def test_what_may_follow_fit():
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    from cg_lightning.app.run import why_skipped

    class OnlySteps(LightningModule):
        def predict_step(self, batch, batch_idx):
            return batch

    data = BoringDataModule()
    assert why_skipped("test", BoringModel(), data) == ""
    assert why_skipped("predict", BoringModel(), data) == ""  # by its forward
    assert why_skipped("predict", OnlySteps(), data) == ""
    assert why_skipped("test", OnlySteps(), data) == "OnlySteps has no test_step"
    assert why_skipped("predict", OnlySteps(), LightningDataModule()) == (
        "LightningDataModule has no predict_dataloader"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_without_a_gpu_names_the_key(tmp_path):
    printed = run(tmp_path, "task=bench", fails=True)
    assert "bench.backend=recorder" in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1


def test_no_report(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    printed = run(tmp_path, "task=predict", "cuda_graph.report=false")
    assert "CUDA graphs (backend" not in printed
    assert IDENTICAL in printed


def test_the_reports_of_a_fit_are_one(tmp_path):
    (tmp_path / "my.py").write_text(MINE)
    arguments = ("model._target_=my.Model", "data=custom", "data._target_=my.DataModule")
    assert run(tmp_path, *arguments, "compare=false").count("CUDA graphs (backend") == 1


def test_a_misspelt_key_is_named(tmp_path):
    assert "Key 'warmup' not in 'CUDAGraphConfig'" in run(
        tmp_path, "cuda_graph.warmup=1", fails=True
    )


def test_a_difference_fails_the_run():
    from cg_lightning.app.compare import describe_difference
    from cg_lightning.app.run import Results

    one = Results({"loss": torch.tensor(1.0)}, [torch.tensor([float("nan"), 1.0])])
    assert describe_difference(one, Results(dict(one.metrics), [one.predictions[0].clone()])) == ""
    other = Results({"loss": torch.tensor(1.0).nextafter(torch.tensor(2.0))}, one.predictions)
    assert describe_difference(one, other).startswith("metrics['loss'] is ")
    other = Results(one.metrics, [torch.tensor([float("nan"), 2.0])])
    assert describe_difference(one, other).startswith("predictions[0] is ")
    assert describe_difference(one, Results({}, None)) == "metrics is built differently"


def test_a_wheel_carries_the_configuration(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", ".venv", ".*_cache", "tests"),
    )
    try:
        subprocess.run(
            [*pip, "wheel", "--no-deps", "-w", tmp_path, source],
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        if "No matching distribution" in error.stderr or "Could not find" in error.stderr:
            pytest.skip("there is no package index to take setuptools from")
        raise AssertionError(error.stderr) from error
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
    shutil.rmtree(source)
    done = subprocess.run(
        [sys.executable, "-m", "cg_lightning", "task=predict", "hydra.run.dir=out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert IDENTICAL in done.stdout, done.stdout + done.stderr
    assert (installed / "cg_lightning/app/conf/config.yaml").exists()
    project = tmp_path / "project"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = run_project(
        project,
        "callbacks.cuda_graph.mode=FULL",
        search_path="pkg://cg_lightning.conf",
        environment=environment,
    )
    assert "CUDAGraphCallback(mode='FULL'" in done.stdout, done.stderr
