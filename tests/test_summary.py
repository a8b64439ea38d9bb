"""The summary where people look: in a terminal, in a file, in a notebook."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch

from cg_lightning import BatchDescriptor, CUDAGraphCallback, graphed
from cg_lightning.core.causes import Cause
from cg_lightning.core.reasons import Changed, Reason, Status
from cg_lightning.report.records import HostTime
from cg_lightning.report.stats import CUDAGraphStats
from cg_lightning.report.summary import Summary, print_summary, render_summary
from tests.harness import Harness, assert_same, features, images, predict
from tests.models import Body, ConvNetClassifier, Predictor
from tests.processes import run_python


@pytest.fixture
def callback(harness: Harness) -> CUDAGraphCallback:
    """A callback after a run with graphs of two shapes and a partial batch."""
    made = harness.callback()
    harness.trainer(made).validate(ConvNetClassifier(4), images(43), verbose=False)
    assert made.stats.steps["FULL"] > 0
    return made


def rendered(summary: Summary, width: int) -> str:
    console = pytest.importorskip("rich.console")
    file = io.StringIO()
    console.Console(file=file, width=width, force_terminal=True, color_system=None).print(summary)
    return file.getvalue()


def test_the_summary_is_text(callback):
    summary = callback.summary()
    assert isinstance(summary, str)
    assert repr(summary) == str(summary)
    assert "validation_step" in summary
    assert max(map(len, summary.splitlines())) <= 80
    for other in (pickle.loads(pickle.dumps(summary)), copy.deepcopy(summary)):
        assert other == summary
        assert other._repr_html_() == summary._repr_html_()


LAYER = "encoder_of_something_with_long_name.layer_{}.attention.output.dense"


@pytest.mark.parametrize("target", ["net.{}", "bert.encoder.layer.{}", LAYER, "{}" + "x" * 90])
@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("by_rich", [True, False])
def test_long_targets_cost_no_number_and_stay_apart(target, width, by_rich):
    stats = CUDAGraphStats()
    shapes = torch.ones(16, 128, 768)
    key = BatchDescriptor.from_batch([shapes, shapes.clone(), shapes.clone()], stage="predict")
    stats.ran("predict", "PIECEWISE", key.shapes(), Reason(Status.CHANGED, "a word"))
    for number in range(2):
        entry = stats.entry("PIECEWISE", target.format(number), key)
        entry.captured(0.1, 123_456_789, "")
        entry.replays, entry.timed, entry.host_seconds = 98765 + number, 9, 0.0123456
        entry.saving, entry.eager_seconds = 0.37, 1.0
    summary = render_summary(stats, "cuda", ["predict"])
    shown = rendered(summary, width) if by_rich else summary.as_text(width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    for number in ("98765", "98766", "1372", "117.7", "37%"):
        assert number in shown, shown
    starts = [number for number, line in enumerate(lines) if line.startswith("  PIECEWISE")]
    first, second = (" ".join(lines[start:][: starts[1] - starts[0]]) for start in starts)
    cut = lambda row: row.split("98765")[0].split("98766")[0]
    assert cut(first) != cut(second), shown
    assert len(lines) <= 20 or width < 80


@pytest.mark.parametrize("targets", [1, 6, 9, 200])
@pytest.mark.parametrize("target", ["net.{}", LAYER, "{}" + "x" * 90, "y" * 500 + "{}"])
@pytest.mark.parametrize("tensors", [1, 40])
@pytest.mark.parametrize("text", ["short", "long " * 90, "x" * 400])
def test_a_stage_never_has_more_than_20_lines(targets, target, tensors, text):
    stats = CUDAGraphStats()
    key = BatchDescriptor.from_batch([torch.ones(16, 128) for _ in range(tensors)], stage="predict")
    for number in range(targets):
        entry = stats.entry("PIECEWISE", target.format(number), key)
        subject = f"self.{text}.{number}"
        entry.captured(0.1, 123_456, Changed(subject, f"{subject}: now 2.0, before 1.0"))
        entry.replays, entry.timed, entry.host_seconds = 10 + number, 9, 0.0123456
        entry.within_spread = True
        record = stats.padded(target.format(number), key)
        record.ran(100, 200)
        record.reason = Reason(Status.NO_KEY, f"{text} {number}")
    for number in range(9):
        reason = Reason(Cause.HOST_SYNC, f"{text} {number}", f"my.py:{number}")
        stats.ran("predict", "NONE", key.shapes(), reason)
    summary = render_summary(stats, "cuda", ["predict"])
    _, blank, *lines = summary.splitlines()
    assert blank == ""
    assert 3 < len(lines) <= 20, summary
    (stage,) = summary.stages
    assert sum(int(row[4]) for row in stage.rows) == sum(range(10, 10 + targets))
    steps = [int(words.split()[0]) for words in (*[r.text for r in stage.reasons], stage.rest)]
    assert sum(steps) == 9


@pytest.mark.parametrize("steps", [1, 3])
def test_one_eager_step_is_a_time_everywhere(harness, steps):
    callback = harness.callback()
    harness.trainer(callback).predict(Predictor(Body()), features(40))
    stats = callback.stats
    assert stats._times["predict", "NONE", "4x8"].steps >= 1
    stats._times["predict", "NONE", "4x8"] = HostTime(steps, 0.002 * steps, 0.002)
    assert "(2000)" in callback.summary()
    assert "eager 2.000 ms" in callback.summary()
    assert stats.host_times("predict").eager == pytest.approx(0.002)


def test_of_a_default_validation_both_times_are_shown(callback):
    entries = [entry for entry in callback.stats.entries if entry.timed]
    assert entries
    for entry in entries:
        assert None not in callback.stats.times_of([entry])
    assert "(-)" not in callback.summary()


def test_of_a_submodule_the_times_are_those_of_a_call(harness):
    callback = harness.callback(mode="PIECEWISE")
    harness.compare(Predictor(Body()), predict(features(40)), callback)
    stats = callback.stats
    (entry,) = stats.entries
    assert entry.timed == entry.replays - 2 == 5  # without the capture and the comparison
    assert None not in stats.times_of([entry])
    # the call is inside the step
    assert 0 < entry.host_seconds < stats._times["predict", "PIECEWISE", "4x8"].seconds
    assert 0 < entry.fastest_call < stats._times["predict", "NONE", "4x8"].fastest
    assert stats.host_times("predict").graph == stats.comparison("predict", "PIECEWISE").graph
    assert "not timed" not in callback.summary()


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_what_was_not_timed_says_so(harness, device, mode):
    """With one warm-up step, all steps of a shape are watched, captured or compared."""
    net = Body().to(device)
    run = graphed(
        lambda x: net(x), module=net, mode=mode, warmup_steps=1, backend=harness.backend,
        min_saving=0,
    )  # fmt: skip
    batches = [torch.randn(size, 8, device=device) for size in (4, 4, 4, 6, 6, 6)]
    with torch.inference_mode(), run:
        outputs = [run(batch) for batch in batches]
        expected = [net(batch) for batch in batches]
    assert_same(outputs, expected)
    assert [(entry.replays, entry.timed) for entry in run.stats.entries] == [(2, 0), (2, 0)]
    assert run.summary().count("not timed  ") == 2, run.summary()
    with torch.inference_mode(), run:
        for batch in batches[:5]:
            run(batch)
        run(batches[0])
    assert "(not timed)" in run.summary()  # a replay was timed, and no eager call


def test_graphs_that_differ_by_a_plain_value_say_so(harness, device):
    run = graphed(
        lambda x, *, name, scale, flag: x * scale,
        module=torch.nn.Linear(2, 2, device=device),
        backend=harness.backend,
        min_saving=0,
    )
    with torch.inference_mode(), run:
        for scale in (2.0, 3.0, -0.0):
            for _ in range(6):
                run(torch.ones(4, 2, device=device), name="a", scale=scale, flag=True)
    for value in ("4x2 with 2.0 ", "4x2 with 3.0 ", "4x2 with -0.0 "):
        assert value in run.summary()
    assert "True" not in run.summary()


@pytest.mark.parametrize("width", [80, 200])
def test_by_rich_it_says_the_same_in_as_many_lines(callback, width):
    shown = rendered(callback.summary(), width)
    for word in "\n".join(callback.summary().splitlines()).split():
        assert word in shown, shown
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= len(callback.summary().splitlines())


def test_brackets_are_no_markup():
    stats = CUDAGraphStats()
    for _ in range(3):
        stats.ran("predict", "NONE", "2x8", Reason(Status.CHANGED, "self.table['[bold]'] is new"))
    summary = render_summary(stats, "cuda", ["predict"])
    assert "self.table['[bold]'] is new" in rendered(summary, 100)
    assert "<b>" not in render_summary(stats, "<b>", ["predict"])._repr_html_()


def test_a_notebook_shows_tables(callback):
    for shown in (callback.summary()._repr_html_(), callback.stats._repr_html_()):
        assert shown.count("<table>") == shown.count("</table>") == 2
        assert "<th>us (eager)</th>" in shown
        assert '<td style="text-align: left">validation_step</td>' in shown
        assert "remedy" not in shown  # a warm-up needs none
        assert "validate: " in shown


def test_statistics_print_as_the_summary(callback):
    """They do not know the backend, so they say nothing of a speed-up."""
    note = re.compile(r" \((factor|recorder).*\)")
    assert note.search(callback.summary())
    shown = str(callback.stats).splitlines()
    assert shown[1:] == note.sub("", callback.summary()).splitlines()[1:]


def test_a_file_gets_plain_text(callback, capsys):
    print_summary(callback.summary())
    assert capsys.readouterr().out == f"{callback.summary()}\n"


def test_a_terminal_gets_colours(callback, capsys, monkeypatch):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(force_terminal=True, color_system="standard")
    monkeypatch.setattr("rich._console", console)
    print_summary(callback.summary())
    assert "\x1b[" in capsys.readouterr().out


def test_without_rich_it_is_plain_text(callback, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    print_summary(callback.summary())
    assert capsys.readouterr().out == f"{callback.summary()}\n"


@pytest.mark.slow
@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_a_progress_bar_does_not_tear_it(bar):
    code = f"""
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import {bar}
from cg_lightning import CUDAGraphCallback
from tests.harness import features
from tests.models import Body, Predictor
callback = CUDAGraphCallback(backend="recorder")
trainer = Trainer(callbacks=[callback, {bar}()], accelerator="cpu", logger=False)
trainer.predict(Predictor(Body()), features(40))
print("STATS", repr(str(callback.summary())))
"""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = run_python("-c", code, folder=Path(__file__).parent.parent, environment=environment)
    assert done.returncode == 0, done.stderr
    shown, said = done.stdout.split("STATS ")
    summary = eval(said)
    assert summary in shown, shown


def test_the_statistics_of_nothing(harness):
    callback = harness.callback()
    assert callback.summary() == f"CUDA graphs (backend: {harness.backend})"
    assert callback.stats._repr_html_() == "<p>CUDA graphs</p>"
    harness.trainer(callback).predict(Predictor(Body()), features(4))
    assert "1 step eager" in callback.summary()
