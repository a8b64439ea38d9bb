"""The user's mistakes are reported before the first batch, with the given value and choices."""

import pytest
import torch

from cg_lightning import CUDAGraphCallback, CUDAGraphOptions
from tests.harness import Harness, features
from tests.models import Body, Predictor


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"mode": "fast"}, ["mode='fast'", "NONE, PIECEWISE, FULL, FULL_AND_PIECEWISE"]),
        ({"stages": ["validation"]}, ["stages=['validation']", "validate, test, predict"]),
        ({"stages": "fit"}, ["stages='fit'", "validate, test, predict"]),
        ({"backend": "rocm"}, ["backend='rocm'", "auto, cuda, recorder"]),
        ({"warmup_steps": -1}, ["warmup_steps=-1", "at least 0"]),
        ({"warmup_steps": 1.5}, ["warmup_steps=1.5", "whole number"]),
        ({"max_graphs": 0}, ["max_graphs=0", "at least 1"]),
        ({"max_graph_bytes": 0}, ["max_graph_bytes=0", "at least 1"]),
        ({"max_graph_bytes": "2 GB"}, ["max_graph_bytes='2 GB'", "whole number"]),
        ({"min_saving": 1}, ["min_saving=1 ", "at least 0", "less than 1"]),
        ({"min_saving": -0.1}, ["min_saving=-0.1", "at least 0"]),
        ({"min_saving": "3 %"}, ["min_saving='3 %'", "a number"]),
        ({"min_saving": None}, ["min_saving=None", "a number"]),
        ({"targets": [3]}, ["targets=[3]", "names"]),
        ({"targets": []}, ["targets=[]", "expected names"]),
        ({"targets": ["net"], "mode": "FULL"}, ["targets=['net']", "mode='FULL'", "PIECEWISE"]),
        ({"targets": ["net"], "stages": ["train"]}, ["targets=['net']", "validate, test, predict"]),
        ({"targets": ["net"], "mode": "NONE"}, ["targets=['net']", "mode='NONE'", "PIECEWISE"]),
        ({"stages": []}, ["stages=[]", "validate, test, predict"]),
        ({"stages": None}, ["stages=None", "validate, test, predict"]),
        ({"strict": "yes"}, ["strict='yes'", "True or False"]),
        ({"report": 1}, ["report=1", "True or False"]),
        ({"verify_tolerance": "loose"}, ["verify_tolerance='loose'", "exact, close"]),
        ({"verify_tolerance": ["exact"]}, ["verify_tolerance=['exact']", "exact, close"]),
        (
            {"options": {"check_addresses": True}},
            ["options={'check_addresses': True}", "CUDAGraphOptions(...)", "not a dict"],
        ),
    ],
)
def test_of_the_constructor(settings, parts):
    with pytest.raises(ValueError, match="=") as caught:
        CUDAGraphCallback(**settings)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"gc_disable": "no"}, ["CUDAGraphOptions.gc_disable='no'", "True or False"]),
        ({"check_addresses": 1}, ["CUDAGraphOptions.check_addresses=1", "True, False or None"]),
        (
            {"capture_error_mode": "strict"},
            ["capture_error_mode='strict'", "global, thread_local, relaxed"],
        ),
    ],
)
def test_of_the_options(options, parts):
    with pytest.raises(ValueError, match="CUDAGraphOptions") as caught:
        CUDAGraphOptions(**options)
    for part in parts:
        assert part in str(caught.value)


def run(tmp_path, callback, module=None):
    module = Predictor(Body()) if module is None else module
    Harness("recorder", tmp_path).trainer(callback).predict(module, features())
    return module


class NoBatches(Predictor):
    def predict_step(self, batch, batch_idx):
        raise AssertionError("a batch was run")


def test_a_target_that_matches_nothing(tmp_path):
    callback = CUDAGraphCallback(backend="recorder", targets=["net.0", "encoder.*"])
    with pytest.raises(
        ValueError, match=r"'encoder\.\*' matches no submodule of NoBatches"
    ) as caught:
        run(tmp_path, callback, NoBatches(Body()))
    assert "net, net.0, net.1, net.2" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(tmp_path):
    with pytest.raises(
        ValueError, match=r"backend='cuda' needs a CUDA device.*'recorder' or 'auto'"
    ):
        run(tmp_path, CUDAGraphCallback(backend="cuda"), NoBatches(Body()))


@pytest.mark.gpu
def test_cuda_under_a_cpu_trainer(tmp_path):
    with pytest.raises(ValueError, match="the work runs on cpu"):
        run(tmp_path, CUDAGraphCallback(backend="cuda"), NoBatches(Body()))


def test_auto_without_cuda_is_eager_and_says_so_once(tmp_path, caplog):
    callback = CUDAGraphCallback()
    with caplog.at_level("INFO"):
        module = run(tmp_path, callback)
    assert len([record for record in caplog.records if "backend='recorder'" in record.message]) == 1
    assert callback.stats.eager == 5
    assert callback.stats.replays == 0
    (reason,) = callback.stats.eager_reasons
    assert "no CUDA device" in reason
    assert type(module) is Predictor


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_module_that_is_graphed_already(tmp_path, mode):
    compiled = torch.compile(NoBatches(Body()), mode=mode)
    with pytest.raises(
        ValueError, match=r"NoBatches was compiled by torch\.compile with CUDA graphs of its own"
    ):
        run(tmp_path, CUDAGraphCallback(backend="recorder"), compiled)
