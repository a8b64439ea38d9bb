"""What profilers show of us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from torch.profiler import ProfilerActivity

from cg_lightning import graphed
from cg_lightning.backends import resolve_backend
from cg_lightning.runtime.profiling import NSYS, NVTX
from tests.harness import assert_same, features, images, predict
from tests.models import Body, ConvNetClassifier, Predictor


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_the_simple_profiler_shows_what_we_do(harness, mode, tmp_path):
    profiler = SimpleProfiler(dirpath=tmp_path, filename="profile")
    callback = harness.callback(mode=mode)
    harness.trainer(callback, profiler=profiler).predict(Predictor(Body()), features(40))
    counts = {name: len(times) for name, times in profiler.recorded_durations.items()}
    shown = {name: number for name, number in counts.items() if name.startswith("cuda_graph/")}
    expected = {"watch": 1, "capture": 1, "verify": 1, "replay": 5}
    assert shown == {f"cuda_graph/{name}": number for name, number in expected.items()}


def test_captures_ahead_are_shown(harness, tmp_path):
    profiler = SimpleProfiler(dirpath=tmp_path, filename="profile")
    callback = harness.callback(capture_ahead=True)
    harness.trainer(callback, profiler=profiler).predict(Predictor(Body()), features(42))
    counts = {name: len(times) for name, times in profiler.recorded_durations.items()}
    assert counts["cuda_graph/capture"] == callback.stats.captures == 2
    assert counts["cuda_graph/watch"] == 2  # the first batch, and the partial one


def test_captures_of_padded_shapes_are_shown(harness, tmp_path):
    """Such a shape is captured while its own capture is under way."""
    profiler = SimpleProfiler(dirpath=tmp_path, filename="profile")
    callback = harness.callback(capture_sizes=[8], verify_tolerance="close")
    harness.trainer(callback, profiler=profiler).predict(Predictor(Body()), features(52, 6))
    assert callback.stats.captures == 1, callback.summary()
    assert len(profiler.recorded_durations["cuda_graph/capture"]) >= 1


def test_the_advanced_profiler_shows_what_we_do(harness, tmp_path):
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="profile")
    trainer = harness.trainer(harness.callback(), profiler=profiler)
    trainer.predict(Predictor(Body()), features(40))
    written = "".join(file.read_text() for file in tmp_path.glob("*.txt"))
    for name in ("watch", "capture", "verify", "replay"):
        assert f"Profile stats for: cuda_graph/{name}" in written


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11 warns its own users
def test_the_pytorch_profiler_shows_what_we_do(harness, tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="profile", record_module_names=False)
    trainer = harness.trainer(harness.callback(), profiler=profiler)
    trainer.predict(Predictor(Body()), features(40))
    names = {event.key for event in profiler.function_events.key_averages()}
    # of ten steps it records the third to the fifth
    assert any("cuda_graph/capture" in name for name in names), names


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("stage", ["predict", "validate"])
def test_the_profiler_of_the_page_shows_all_ranges(harness, stage, tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "diagnosis.md").read_text()
    (line,) = [each for each in page.splitlines() if each.startswith("profiler = PyTorchProfiler")]
    known: dict[str, Any] = {"PyTorchProfiler": PyTorchProfiler}
    exec(line, known)
    # for Lightning, dirpath says where the traces go
    known["profiler"].dirpath = tmp_path
    trainer = harness.trainer(harness.callback(), profiler=known["profiler"])
    getattr(trainer, stage)(Predictor(Body()), features(60))
    names = {event.key for event in known["profiler"].function_events.key_averages()}
    for name in ("watch", "capture", "verify", "replay"):
        assert any(f"cuda_graph/{name}" in each for each in names), names


OURS = {f"cuda_graph/{name}" for name in ("watch", "capture", "verify", "replay")}
NOBODY_SHOWS: dict[str, str] = {}


@pytest.fixture(autouse=True)
def no_tool_around(monkeypatch):
    """The tests themselves may run under nsys."""
    for name in (NSYS, NVTX):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("settings", "environment"),
    [({"profiler": "simple"}, {}), ({}, {NSYS: "7"}), ({}, {NVTX: "1"})],
    ids=["a profiler", "nsys", "asked for"],
)
def test_ranges_are_nvtx_ranges(harness, monkeypatch, settings, environment):
    if harness.backend == "recorder":
        pytest.skip("the CPU has no NVTX ranges")
    nvtx = torch.cuda.nvtx
    push, pop = nvtx.range_push, nvtx.range_pop
    noted: list[str] = []
    monkeypatch.setattr(nvtx, "range_push", lambda name: noted.append(name) or push(name))
    monkeypatch.setattr(nvtx, "range_pop", lambda: noted.append("end") or pop())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = harness.trainer(harness.callback(), **settings)
    trainer.predict(Predictor(Body()), features(40))
    assert {name for name in noted if name.startswith("cuda_graph/")} == OURS
    assert noted.count("end") == len(noted) - noted.count("end")


@pytest.mark.gpu
def test_under_emit_nvtx_ranges_are_on(harness):
    """PyTorch itself makes NVTX ranges of them then, which Python does not see."""
    if harness.backend == "recorder":
        pytest.skip("emit_nvtx needs a CUDA device")
    callback, seen = harness.callback(), []

    class Look(Callback):
        def on_predict_batch_end(self, *_: Any) -> None:
            installation = callback._installation  # None in the run without the callback
            seen.append(installation is not None and installation.session.ranges.is_on)

    with torch.autograd.profiler.emit_nvtx():
        harness.compare(Predictor(Body()), predict(features(40)), callback, lambda: [Look()])
    assert callback.stats.steps["FULL"] == 7, callback.summary()
    assert seen[:10] == [True] * 10


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({NSYS: "7"}, OURS),
        ({NVTX: "1"}, OURS),
        ({NVTX: "0"}, set()),
        ({NVTX: ""}, set()),
        (NOBODY_SHOWS, set()),
    ],
)
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_ranges_of_the_device_without_a_profiler(
    harness, device, monkeypatch, environment, shown, mode
):
    backend = type(resolve_backend(harness.backend, device))
    marked: list[str] = []
    original = backend.range
    monkeypatch.setattr(
        backend, "range", lambda self, name: marked.append(name) or original(self, name)
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    harness.compare(Predictor(Body()), predict(features(40)), harness.callback(mode=mode))
    assert set(marked) == shown


def test_ranges_of_training_and_of_pieces_that_are_padded(harness, device, monkeypatch):
    backend = type(resolve_backend(harness.backend, device))
    marked: list[str] = []
    original = backend.range
    monkeypatch.setattr(
        backend, "range", lambda self, name: marked.append(name) or original(self, name)
    )
    monkeypatch.setenv(NSYS, "7")
    callback = harness.callback(stages=["train"])
    harness.trainer(callback, max_epochs=1).fit(ConvNetClassifier(4), images(40), images())
    assert set(marked) == OURS
    marked.clear()
    callback = harness.callback(capture_sizes=[8], verify_tolerance="close")
    harness.trainer(callback).validate(ConvNetClassifier(4), images(60, 6), verbose=False)
    assert callback.stats.padding, callback.summary()
    assert marked.count("cuda_graph/replay") > 0


def test_an_environment_that_changes_counts_from_the_next_stage_on(harness, monkeypatch):
    callback = harness.callback()
    trainer = harness.trainer(callback)
    ranges = []

    class Look(Callback):
        def on_predict_batch_end(self, trainer: Any, *_: Any) -> None:
            monkeypatch.setenv(NSYS, "7")
            ranges.append(callback._installation.session.ranges.is_on)

    trainer.callbacks.append(Look())
    for _ in range(2):
        trainer.predict(Predictor(Body()), features(8))
    assert ranges == [False, False, True, True]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_the_profiler_of_pytorch_around_a_stage_shows_what_we_do(harness):
    # one of the GPU may count a range twice
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
        harness.compare(Predictor(Body()), predict(features(40)))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert {name: counts.get(name) for name in OURS} == {
        **dict.fromkeys(OURS, 1),
        "cuda_graph/replay": 5,
    }


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_a_profiler_that_waits_at_the_start_of_the_stage_shows_ranges_if_asked(
    harness, monkeypatch
):
    monkeypatch.setenv(NVTX, "1")
    schedule = torch.profiler.schedule(wait=5, warmup=1, active=100, repeat=1)

    class Steps(Callback):
        def on_predict_batch_end(self, *_: Any) -> None:
            profile.step()

    with torch.profiler.profile(schedule=schedule) as profile:
        trainer = harness.trainer(harness.callback(), Steps())
        trainer.predict(Predictor(Body()), features(40))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["cuda_graph/replay"] == 4  # the seventh step to the tenth one


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_the_profiler_of_pytorch_around_a_plain_loop_shows_what_we_do(harness, device):
    net = Body().to(device)
    batches = [torch.randn(4, 8, device=device) for _ in range(8)]
    with torch.profiler.profile() as profile, torch.inference_mode():
        with graphed(net, backend=harness.backend, min_saving=0) as run:
            outputs = [run(batch) for batch in batches]
        expected = [net(batch) for batch in batches]
    assert_same(outputs, expected)
    assert {event.key for event in profile.key_averages()} >= OURS


def test_without_a_profiler_nothing_is_entered(harness, monkeypatch):
    from cg_lightning.runtime.profiling import Ranges

    entered: list[str] = []
    original = Ranges.range
    monkeypatch.setattr(
        Ranges, "range", lambda self, name: entered.append(name) or original(self, name)
    )
    harness.compare(Predictor(Body()), predict(features(40)), harness.callback())
    assert "replay" not in entered
