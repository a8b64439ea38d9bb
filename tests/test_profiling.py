"""What profilers show of us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from tests.harness import features, predict
from tests.models import Body, Predictor


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


@pytest.mark.gpu
def test_ranges_are_nvtx_ranges(harness, monkeypatch):
    if harness.backend == "recorder":
        pytest.skip("the CPU has no NVTX ranges")
    nvtx = torch.cuda.nvtx
    push, pop = nvtx.range_push, nvtx.range_pop
    noted: list[str] = []
    monkeypatch.setattr(nvtx, "range_push", lambda name: noted.append(name) or push(name))
    monkeypatch.setattr(nvtx, "range_pop", lambda: noted.append("end") or pop())
    trainer = harness.trainer(harness.callback(), profiler="simple")
    trainer.predict(Predictor(Body()), features(40))
    ours = [name for name in noted if name.startswith("cuda_graph/")]
    assert set(ours) == {f"cuda_graph/{name}" for name in ("watch", "capture", "verify", "replay")}
    assert noted.count("end") == len(noted) - noted.count("end")


def test_without_a_profiler_nothing_is_entered(harness, monkeypatch):
    from cg_lightning.runtime.profiling import Ranges

    entered: list[str] = []
    original = Ranges.range
    monkeypatch.setattr(
        Ranges, "range", lambda self, name: entered.append(name) or original(self, name)
    )
    harness.compare(Predictor(Body()), predict(features(40)), harness.callback())
    assert "replay" not in entered
