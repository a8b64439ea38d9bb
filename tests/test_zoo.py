"""The zoo: models of other libraries, with and without graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cg_lightning import is_forward_context_available
from cg_lightning.backends import resolve_backend
from cg_lightning.bench import zoo
from cg_lightning.bench.measure import Settings
from cg_lightning.bench.zoo_models import MODELS, ZooModel
from cg_lightning.core.settings import BackendName

FEW = Settings(batches=2, warmup=2, rounds=1)


def visit(backend: BackendName, name: str = "torch_attention_lstm") -> list[zoo.ZooResult]:
    found = resolve_backend(backend)
    assert found is not None
    return list(zoo.visit([name], FEW, found))


def test_a_model_is_compared_and_timed(backend):
    validate, predict = visit(backend)
    for result in (validate, predict):
        assert (result.mode, result.difference, result.reason) == ("FULL", "", "")
        assert result.eager > 0 < result.graphs
    table = zoo.zoo_table([validate, predict])
    assert "| torch_attention_lstm | validate | FULL | yes |" in table
    assert "2 runs: 2 FULL, 0 PIECEWISE, 0 NONE; 0 differ from eager" in table


class Noisy(torch.nn.Linear):
    """Does not repeat itself: each call adds its number."""

    calls = 0

    def forward(self, x):
        Noisy.calls += 1
        return super().forward(x) + Noisy.calls


class Asks(torch.nn.Linear):
    """Gives other values under the callback."""

    def forward(self, x):
        return super().forward(x) + is_forward_context_available()


def test_what_does_not_repeat_itself_is_no_difference(backend, monkeypatch):
    model = ZooModel("torch", lambda: Noisy(4, 4), lambda seed: {"x": torch.randn(2, 4)})
    monkeypatch.setitem(MODELS, "noisy", model)
    results = visit(backend, "noisy")
    assert not any(result.is_wrong for result in results)
    assert "| eager does not repeat itself |" in zoo.zoo_table(results)
    assert "0 differ from eager" in zoo.zoo_table(results)


def test_a_difference_is_seen(backend, monkeypatch):
    model = ZooModel("torch", lambda: Asks(4, 4), lambda seed: {"x": torch.ones(2, 4)})
    monkeypatch.setitem(MODELS, "noisy", model)
    results = visit(backend, "noisy")
    assert [result.difference for result in results] == ["batch 0, leaf 0"] * 2
    assert "| **no**: batch 0, leaf 0 |" in zoo.zoo_table(results)
    assert "2 differ from eager" in zoo.zoo_table(results)


def test_what_cannot_be_run_is_named(backend, monkeypatch):
    model = MODELS["torch_attention_lstm"]
    missing = dataclasses.replace(model, library="no_such_library")
    monkeypatch.setitem(MODELS, "missing", missing)
    (result,) = visit(backend, "missing")
    assert result.reason == "no_such_library is not installed"
    assert "1 models without a run: missing." in zoo.zoo_table([result])
    fails = dataclasses.replace(model, inputs=lambda seed: {"x": torch.randn(1)})
    monkeypatch.setitem(MODELS, "fails", fails)
    results = visit(backend, "fails")
    assert all(result.reason.startswith("eager raises") for result in results)
    assert "0 runs: 0 FULL" in zoo.zoo_table(results)


def test_there_are_fifty_models_without_transformers():
    of_others = [name for name, model in MODELS.items() if model.library != "transformers"]
    assert len(of_others) >= 50


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*differ.*")  # atomic additions: eager differs from itself
def test_no_model_differs(name):
    for result in visit("cuda", name):
        assert not result.is_wrong, result
        if not result.mode:
            pytest.skip(result.reason)


def test_rows_are_plain_markdown():
    result = zoo.ZooResult("a", "predict", "NONE", reason="a | b\n(/x/site-packages/y/z.py:3)")
    result.eager, result.graphs = 20.0, 10.0
    expected = r"| a | predict | NONE | yes | 20 | 10 | 2.00 | a \| b (y/z.py:3) |"
    assert zoo.row(result) == expected
