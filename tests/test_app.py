"""The command line, run from another folder as a user runs it."""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from cg_lightning import CUDAGraphCallback
from cg_lightning.bench import report
from tests.processes import run_python

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SCRIPT = Path(sysconfig.get_path("scripts")) / "cg-lightning"
LINEAR = ("task=validate", "model._target_=torch.nn.Linear")
_BORING = "lightning.pytorch.demos.boring_classes"
BORING = (
    f"model._target_={_BORING}.BoringModel",
    "data=custom",
    f"data._target_={_BORING}.BoringDataModule",
)
IDENTICAL = "without graphs gives identical metrics and predictions"


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}


def start(
    folder: Path, *arguments: str, command: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``cg-lightning``. A given command is a new process, which imports everything anew."""
    if command is None:
        given = ("-m", "cg_lightning", *arguments)
        return run_python(*given, folder=folder, environment=ENVIRONMENT)
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def run(
    folder: Path, *arguments: str, command: list[str] | None = None, fails: bool = False
) -> str:
    done = start(folder, *arguments, command=command)
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.mark.gpu_if_there
def test_the_default_run(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    if not SCRIPT.exists():
        pytest.skip("the package is not installed, so there is no script")
    done = start(tmp_path, command=[str(SCRIPT)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deprecated" not in done.stderr  # of Lightning's own code
    printed = done.stdout
    assert "validate: " in printed
    assert "steps FULL" in printed
    assert (
        printed.strip()
        .splitlines()[-1]
        .startswith(f"The same fit {IDENTICAL}: 4 metrics and 38 predicted batches")
    )
    assert len(printed.splitlines()) <= 40
    assert "INFO" not in printed
    steps = [int(number) for number in re.findall(r"(\d+) steps FULL", printed)]
    # on a GPU, 8 steps of a stage may run eagerly to compare times
    assert sum(steps) >= 0.7 * (2 * 38 + 38 + 38)
    for name in ("val_loss", "val_accuracy", "test_loss", "test_accuracy"):
        (with_graphs, eager) = re.findall(rf"^{name} +(\S+) +(\S+) *$", printed, re.MULTILINE)[0]
        assert with_graphs == eager
    assert ("microseconds a batch, predict" in printed) == torch.cuda.is_available()


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


@pytest.mark.gpu_if_there
def test_multirun(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    same = ("task=predict", "cuda_graph.min_saving=0")  # no step is eager to compare times
    printed = run(tmp_path, "--multirun", "cuda_graph=off,piecewise", *same)
    assert printed.count(f"The same predict {IDENTICAL}") == 2
    assert "mode=NONE" in printed
    head, *rows = printed[printed.index("All jobs cuda_graph.min_saving=0") :].splitlines()[1:]
    assert head.split() == ["job", "overrides", "us", "a", "batch", "steps", "result"]
    rows = [row.split() for row in rows if "cuda_graph=" in row]
    assert [row[:2] for row in rows] == [["0", "cuda_graph=off"], ["1", "cuda_graph=piecewise"]]
    assert " ".join(rows[0][4:]) == "38 eager ok"
    assert " ".join(rows[1][4:]) == "4 eager, 34 PIECEWISE ok"
    assert all(float(row[2]) > 0 and row[3] == "predict" for row in rows)


def test_a_multirun_shows_metrics_and_ends_with_1_if_a_job_has_failed(tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    from cg_lightning.app.jobs import MergedTable

    def job(number: int, **record: Any) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        record = {"job": number, "failed": "", "microseconds": {}, "metrics": {}, **record}
        (folder / "cg_lightning.json").write_text(json.dumps({"steps": {}, **record}))

    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    table = MergedTable()
    job(0, overrides=["task=test", "a=1"], metrics={"loss": 0.25}, microseconds={"test": 12.3})
    job(10, overrides=["task=test", "a=3"], failed="It differs.", metrics={"loss": 0.5})
    job(2, overrides=["task=test", "a=2"], metrics={"accuracy": 1.0})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="1 of 3 jobs failed"):
        table.on_multirun_end(config)
    lines = [" ".join(line.split()) for line in printed.getvalue().splitlines()]
    assert lines[1] == "All jobs task=test"
    assert lines[2] == "job overrides us a batch loss accuracy steps result"
    assert lines[-3:] == [
        "0 a=1 12 test 0.25 - - ok",
        "2 a=2 - - 1 - ok",
        "10 a=3 - 0.5 - - It differs.",
    ]
    table.on_multirun_start(config)
    printed.truncate(0)
    with contextlib.redirect_stdout(printed):
        table.on_multirun_end(config)  # the jobs of the benchmark leave no results
    assert printed.getvalue().strip("\0") == ""


def test_a_multirun_goes_on_after_jobs_that_raise(tmp_path):
    """A mistake, and an error of the user's code."""
    text = MINE.replace("self.net = ", "assert width < 9, 'mine'; self.net = ", 1)
    (tmp_path / "my.py").write_text(text)
    mine = ("model._target_=my.Model", "data=custom", "data._target_=my.DataModule")
    done = start(
        tmp_path,
        *("--multirun", "task=validate", *mine, "compare=false"),
        "+model.width=9,8",
        "cuda_graph.mode=FULL,FUL",
    )
    assert done.returncode == 1
    assert "All jobs " in done.stdout
    records = [json.loads(file.read_text()) for file in tmp_path.rglob("cg_lightning.json")]
    failed = {record["job"]: record["failed"] for record in records}
    refused = "mode='FUL' is not a CUDAGraphMode; choose one of "
    assert [failed[0], failed[2]] == ["AssertionError: mine", ""]
    assert failed[1].startswith(refused)
    assert failed[3].startswith(refused)
    assert done.stderr.count("assert width < 9, 'mine'") == 1  # with a traceback
    assert "3 of 4 jobs failed." in done.stderr


def test_strict_names_the_line_without_a_traceback(tmp_path):
    step = "predict_step = lambda self, batch: batch.sum().item()\n\n    def configure"
    text = MINE.replace("def configure", step)
    (tmp_path / "my.py").write_text(text)
    mine = ("model._target_=my.Model", "data=custom", "data._target_=my.DataModule")
    strict = ("cuda_graph=debug", "cuda_graph.mode=FULL", "task=predict")
    printed = run(tmp_path, *mine, *strict, fails=True)
    assert "Traceback" not in printed
    assert "Error executing job" not in printed
    assert re.search(r"mode=FULL asks for: host sync: aten::item \(\S*my.py:\d+\)\.", printed)


def test_sentences_end_lines_between_words_on_a_terminal(monkeypatch, capsys):
    from cg_lightning.app.tables import print_sentence

    monkeypatch.setenv("COLUMNS", "9")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_sentence("one two-three four")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    print_sentence("one two-three four")
    assert capsys.readouterr().out == "one\ntwo-three\nfour\none two-three four\n"


def test_tables_without_rich(monkeypatch, capsys):
    from cg_lightning.app.tables import print_table

    monkeypatch.setitem(sys.modules, "rich", None)
    print_table("Numbers", ["", "one"], [["loss", "0.5"], ["accuracy", "1"]])
    assert capsys.readouterr().out == "\nNumbers\n          one\nloss      0.5\naccuracy  1\n"


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


def test_the_zoo(tmp_path):
    few = ("bench.backend=recorder", "bench.batches=2", "bench.warmup=2", "bench.rounds=1")
    names = ("torch_attention_lstm", "torch_rnn")
    for name in names:
        printed = run(tmp_path, "task=zoo", f"zoo=[{name}]", f"bench.output={name}.jsonl", *few)
        assert printed.count(f"| {name} |") == 2
        assert "2 runs: 2 FULL, 0 PIECEWISE, 0 NONE; 0 differ from eager" in printed
    page = tmp_path / "zoo.md"
    report.main([*(str(tmp_path / f"{name}.jsonl") for name in names), "--zoo", str(page)])
    assert "4 runs: 4 FULL, 0 PIECEWISE, 0 NONE; 0 differ from eager" in page.read_text()
    assert [page.read_text().count(f"| {name} |") for name in names] == [2, 2]


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
        data = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(data, batch_size=4)

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
    done = run_python("-c", as_script, *arguments, folder=tmp_path, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.count("No test after fit: Model has no test_step.") == 1
    assert printed.count("No predict after fit: Model has neither predict_step nor forward.") == 1
    assert f"The same fit {IDENTICAL}: 1 metric, compared" in printed


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("argument", ["trainer=gpu", "cuda_graph.backend=cuda"])
def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path, argument):
    done = start(tmp_path, argument)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "LeafSpec" not in line]
    assert line.startswith(f"{argument} needs a CUDA device, and there is none. ")


one_more = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
"""A mistake of the kind of another one."""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("task=train",),
            "task=train is unknown; choose from bench, diagnose, fit, predict, shapes, test, "
            "validate, zoo.\n",
        ),
        (("--multirun", "task=fit,Fit"), "task=Fit is unknown; choose from bench, diagnose, "),
        (("model=mpl",), "model=mpl is unknown; choose from convnet, mlp.\n"),
        one_more(("cuda_graph=fast",), "cuda_graph=fast is unknown; choose from debug, full, "),
        (("validate",), "validate is a task: write task=validate."),
        (
            ("task=diagnose", "stage=fit"),
            "stage=fit is unknown; choose from predict, test, validate.",
        ),
        (("task=zoo", "zoo=[mpl*]"), "zoo=['mpl*']: 'mpl*' matches none of torch_attention_lstm, "),
        one_more(("task=bench", "bench.cases=[mpl]"), "'mpl' is unknown; choose from mlp, "),
        (("model=mlp", "data=custom"), "Missing mandatory value: data._target_."),
        (
            ("task=validate", "ckpt_path=nothere.ckpt"),
            "ckpt_path=nothere.ckpt: there is no such file.",
        ),
        (
            (*LINEAR, "+model.in_features=3", "+model.out_features=4"),
            "model._target_=torch.nn.Linear makes a Linear, which is no lightning.pytorch.",
        ),
        (
            ("task=diagnose", "data._target_=torch.nn.Linear"),
            "argument 'batch_size', which data=digits gives. Add data=custom, and name your",
        ),
        (LINEAR, "Error in call to target 'torch.nn.modules.linear.Linear': "),
        (("model._target_=nowhere.Model",), "No module named 'nowhere'"),
        one_more(("cuda_graph.mode=FAST",), "mode='FAST' is not a CUDAGraphMode; choose one of "),
        (
            (*BORING, "task=validate", "cuda_graph.targets=[nothing]"),
            "targets=['nothing']: 'nothing' matches no submodule of BoringModel.",
        ),
        ((*BORING, "task=validate", "trainer.accelerator=tpus"), "accelerator"),
    ],
)
def test_mistakes_without_a_traceback(tmp_path, arguments, sentence):
    printed = run(tmp_path, *arguments, fails=True)
    assert sentence in printed
    assert "Traceback" not in printed
    noises = ("full_key", "object_type", "HYDRA_FULL_ERROR", "search path", "Error executing job")
    for noise in noises:
        assert noise not in printed


def test_a_question_in_a_value_stays_as_it_is():
    from cg_lightning.app.mistakes import sentence_of

    assert sentence_of(ValueError("name='a?.b' is unknown")) == "name='a?.b' is unknown."
    assert sentence_of(ValueError("task=tets is unknown; did you mean test?")).endswith("test?")


def test_a_mistake_has_its_traceback_if_hydra_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "HYDRA_FULL_ERROR", "1")
    printed = run(tmp_path, "task=nope", fails=True)
    assert "Traceback" in printed
    assert "Could not find 'task/nope'" in printed


@pytest.mark.in_turn("where")
@pytest.mark.parametrize("error", ["ValueError", "TypeError", "FileNotFoundError"])
@pytest.mark.parametrize("where", ["self.net = ", "return self.net(batch).square()"])
def test_errors_of_the_users_code_keep_their_traceback(tmp_path, error, where):
    raises = f"raise {error}('mine')"
    text = MINE.replace(where, f"{raises}; {where}", 1)
    (tmp_path / "my.py").write_text(text)
    mine = ("model._target_=my.Model", "data=custom", "data._target_=my.DataModule")
    printed = run(tmp_path, *mine, fails=True)
    assert "Traceback" in printed
    assert "my.py" in printed
    assert raises in printed
    assert f"{error}: mine" in printed or f"{error}('mine')" in printed


def test_without_the_callback_metrics_are_printed(tmp_path):
    arguments = ("task=validate", "callbacks=none")
    (tmp_path / "my.py").write_text(MINE)
    mine = ("model._target_=my.Model", "data=custom", "data._target_=my.DataModule")
    printed = run(tmp_path, *arguments, *mine)
    assert re.search(r"^val_loss +\d", printed, re.MULTILINE)
    assert "The validate ran without CUDAGraphCallback, so there is nothing to compare" in printed


def test_equal_findings_are_one_row():
    from cg_lightning import diagnose

    class Net(torch.nn.Module):
        def forward(self, x):
            for _ in range(3):
                x = x * x.sum().item()
            return x

    found = diagnose(Net(), torch.ones(2, 3))
    assert str(found).count("host sync") == found._repr_html_().count("host sync") == 1


def test_a_diagnosis_in_a_narrow_terminal_breaks_no_word():
    from cg_lightning import diagnose
    from cg_lightning.app.diagnose import fitted

    class Net(torch.nn.Module):
        def forward(self, x):
            return x * x.sum().item()

    found = diagnose(Net(), torch.ones(2, 3))
    assert fitted(found, 0) == str(found)
    shown = fitted(found, 60)
    assert "host sync: aten::item" in shown
    assert found.findings[0].remedy in " ".join(shown.split())
    assert set(shown.split()) >= set(str(found.findings[0]).split())
    assert shown.splitlines()[-1].startswith("Largest capturable submodules: ")
    assert fitted(diagnose(torch.nn.Linear(3, 2), torch.ones(1, 3)), 20).startswith("Nothing")


@pytest.mark.parametrize("columns", [40, 80])
def test_a_table_breaks_no_word(capsys, monkeypatch, columns):
    from cg_lightning.app.tables import print_table

    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    row = ["0", "task=predict cuda_graph=off", "123456 predict", "0.693147", "38 eager", "ok"]
    print_table("All jobs", ["job", "overrides", "us a batch", "loss", "steps", "result"], [row])
    words = capsys.readouterr().out.split()
    assert set(" ".join(row).split()) <= set(words)


def test_enums_are_written_as_on_the_command_line():
    from cg_lightning.app.config import DiagnosedStage, Task

    assert [str(each) for each in (*Task, *DiagnosedStage)] == [
        each.value for each in (*Task, *DiagnosedStage)
    ]


def test_the_benchmark_without_matplotlib(tmp_path):
    hide = "import sys; sys.modules['matplotlib'] = None; "
    script = f"{hide}from cg_lightning.app.main import main; main()"
    few = ("bench.contestants=[loop,eager]", "bench.stages=[validate]", "bench.costs=false")
    once = ("bench.batches=2", "bench.warmup=1", "bench.rounds=1", "bench.cases=[mlp]")
    arguments = ("task=bench", "bench.backend=recorder", *few, *once)
    done = run_python("-c", script, *arguments, folder=tmp_path, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == "No chart: matplotlib is not installed. pip install 'cg-lightning[bench]'"
    assert (tmp_path / "bench.jsonl").exists()


def test_a_missing_extra_is_one_sentence(tmp_path):
    hide = "import sys; sys.modules['sklearn'] = sys.modules['sklearn.datasets'] = None; "
    script = f"{hide}from cg_lightning.app.main import main; main()"
    done = run_python("-c", script, "task=predict", folder=tmp_path, environment=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "The handwritten digits are part of scikit-learn, which is not installed: "
        "pip install 'cg-lightning[demo]'"
    )
    assert "Traceback" not in done.stderr


def test_diagnose_says_why_and_exits_with_1(tmp_path):
    (tmp_path / "my.py").write_text(
        MINE.replace("square().mean())", "square().mean().item() + 1)").replace('"val_loss"', '"v"')
    )
    mine = ("model._target_=my.Model", "data=custom", "data._target_=my.DataModule")
    done = start(tmp_path, "task=diagnose", *mine)
    assert done.returncode == 1
    assert re.search(r"host sync +aten::item +- +\S*my.py:15", done.stdout), done.stdout
    assert "Model.validation_step is not one graph." in done.stderr
    assert "Traceback" not in done.stderr
    done = start(tmp_path, "task=diagnose", "stage=predict", *mine)
    assert done.returncode == 1
    sentence = "There is no step to diagnose: Model has neither predict_step nor forward."
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_diagnose_exits_with_0_if_the_step_is_one_graph(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    for stage in ("validate", "test", "predict"):
        printed = run(tmp_path, "task=diagnose", f"stage={stage}")
        assert printed == "Nothing stands in the way of one graph.\n"


def test_the_shapes_of_docstrings(tmp_path):
    """The histogram has all batches, and the settings can be pasted."""
    printed = run(tmp_path, "task=shapes", "stage=predict", "data=docstrings")
    first, histogram = printed.split("\n", maxsplit=1)
    batches = int(first.split(" batches of ")[0])
    assert int(first.split(" batches of ")[1].split()[0]) > 10
    of_lengths = histogram.split("dimension 1 of 'input_ids', dimension 1 of 'attention_mask'\n")[1]
    bars = re.findall(r"^ +(\d+)-\d+ +(\d+) #+$", of_lengths, re.MULTILINE)
    assert sum(int(number) for _, number in bars) == batches
    assert re.search(
        r"^9 graphs, and \d\.\d% of all elements would be padding:$", printed, re.MULTILINE
    )
    (settings,) = re.findall(r"^CUDAGraphCallback\((.*)\)$", printed, re.MULTILINE)
    CUDAGraphCallback(**eval(f"dict({settings})"))


def test_help_is_ours(tmp_path):
    from cg_lightning.app.config import Task

    printed = run(tmp_path, "--help")
    assert printed.startswith("cg-lightning runs a LightningModule with CUDA graphs")
    for task in Task:
        assert re.search(rf"^  {task.value} ", printed, re.MULTILINE)
    examples = printed[printed.index("Examples\n") : printed.index("Groups")]
    assert examples.count("\n  cg-lightning") == 5
    groups = re.findall(r"^(\w+): ", printed[printed.index("Groups") :], re.MULTILINE)
    files = [*ROOT.glob("cg_lightning/app/conf/*/*.yaml"), *ROOT.glob("conf/*/*.yaml")]
    assert groups == sorted({"stage", "task", *(file.parent.name for file in files)})
    assert "cuda_graph: debug, full, full_and_piecewise, off, piecewise" in printed
    assert len(printed.splitlines()) <= 50
    assert max(map(len, printed.splitlines())) <= 79


def test_the_options_of_the_examples_compose():
    from hydra import compose, initialize_config_dir

    from cg_lightning.app.config import config_dir, register_configs
    from cg_lightning.app.help import HELP

    register_configs()
    examples = re.findall(r"^  cg-lightning(.*)$", HELP, re.MULTILINE)
    with initialize_config_dir(config_dir(), version_base="1.3"):
        for example in examples:
            given = [each.split(",")[0] for each in example.split() if "=" in each]
            compose("config", [each + "]" * each.count("[") for each in given])


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion_in_bash(tmp_path):
    from cg_lightning.app.config import Task

    command = tmp_path / "cg-lightning"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m cg_lightning "$@"\n')
    command.chmod(0o755)
    script = """
        PATH="$PWD:$PATH"
        eval "$(cg-lightning --shell-completion install=bash)"
        complete_line() {
            COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=($1)
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
            hydra_bash_completion
            echo "${COMPREPLY[@]}"
        }
        complete_line "cg-lightning cuda_graph="
        complete_line "cg-lightning cuda_graph.verify_re"
        complete_line "cg-lightning task=diagnose trainer.acc"
        complete_line "cg-lightning task="
        complete_line "cg-lightning tas"
        complete_line "cg-lightning task=va"
        complete_line "cg-lightning --multirun seed=1 task=b"
        complete_line "cg-lightning task=shapes stage="
        complete_line "cg-lightning cuda_gr"
    """
    done = start(tmp_path, command=["bash", "-c", script])
    lines = done.stdout.splitlines()
    assert len(lines) == 9, done.stdout + done.stderr
    assert "full_and_piecewise" in lines[0]
    assert "verify_replays=" in lines[1]
    assert "accelerator=" in lines[2]
    assert lines[3].split() == [f"task={name}" for name in sorted(Task.__members__)]
    assert lines[4:7] == ["task=", "task=validate", "task=bench"]
    assert lines[7].split() == ["stage=predict", "stage=test", "stage=validate"]
    assert set(lines[8].split()) == {"cuda_graph=", "cuda_graph."}


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
    printed = run(tmp_path, "cuda_graph.warmup=1", fails=True)
    assert printed == "cuda_graph.warmup is unknown; did you mean cuda_graph.warmup_steps?\n"
    printed = run(tmp_path, "cuda_graph.options.nothing=1", fails=True)
    assert printed.startswith(
        "cuda_graph.options.nothing is unknown; choose from debug_log_enable, gc_disable, "
    )
    assert "Key 'nothing' is not in struct" in run(tmp_path, "trainer.nothing=1", fails=True)
    printed = run(tmp_path, "task=validate", "cuda_graph.mode=FAST", fails=True)
    assert printed.startswith("mode='FAST' is not a CUDAGraphMode; choose one of NONE, ")


def test_a_difference_fails_the_run():
    from cg_lightning.app.compare import describe_difference
    from cg_lightning.app.run import Results
    from cg_lightning.core.equality import close_leaf

    one = Results({"loss": torch.tensor(1.0)}, [torch.tensor([float("nan"), 1.0])])
    assert describe_difference(one, Results(dict(one.metrics), [one.predictions[0].clone()])) == ""
    other = Results({"loss": torch.tensor(1.0).nextafter(torch.tensor(2.0))}, one.predictions)
    assert describe_difference(one, other).startswith("metrics['loss'] is ")
    other = Results(one.metrics, [torch.tensor([float("nan"), 2.0])])
    assert describe_difference(one, other).startswith("predictions[0] is ")
    assert describe_difference(one, Results({}, None)) == "metrics is built differently"
    near = Results({"loss": torch.tensor(1.0).nextafter(torch.tensor(2.0))}, one.predictions)
    assert describe_difference(one, near, close_leaf) == ""
    far = Results({"loss": torch.tensor(1.1)}, one.predictions)
    assert describe_difference(one, far, close_leaf).startswith("metrics['loss'] is ")
    assert close_leaf("a", "a")
    assert not close_leaf("a", "b")
    assert not close_leaf("a", torch.ones(1))


@pytest.mark.filterwarnings("ignore")
def test_a_tolerance_that_is_asked_for_is_that_of_the_comparison(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    printed = run(tmp_path, "task=validate", "cuda_graph.verify_tolerance=close")
    assert "The same validate without graphs gives close metrics and predictions" in printed
    assert "compared within rounding" in printed
