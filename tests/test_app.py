"""The command line, run from another folder as a user runs it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

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


def test_a_misspelt_key_is_named(tmp_path):
    assert "Key 'warmup' not in 'CUDAGraphConfig'" in run(
        tmp_path, "cuda_graph.warmup=1", fails=True
    )


def test_a_difference_fails_the_run():
    import torch

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
    assert (installed / "cg_lightning/conf/config.yaml").exists()
