"""Fixtures: every behaviour test runs on every backend of the machine."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors import callback_connector
from torch import nn
from torchmetrics import Metric, MetricCollection

from cg_lightning import is_forward_context_available
from cg_lightning.backends import cuda
from cg_lightning.modules import interception
from tests.harness import Harness
from tests.turns import takes_its_turn

BACKENDS = [pytest.param("recorder", id="recorder")]
if cuda.is_available():
    BACKENDS.append(pytest.param("cuda", id="cuda", marks=pytest.mark.gpu))


if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


# a Trainer looks through all installed packages for callbacks of theirs: a third of a small test
callback_connector._load_external_callbacks = functools.cache(
    callback_connector._load_external_callbacks
)

# what the libraries hold: the collector's walks through it were a quarter of the tests' time
gc.collect()
gc.freeze()


def pytest_report_header() -> list[str]:
    left_out = "no CUDA device: tests run on the recorder only, and those of CUDA are left out"
    return [] if cuda.is_available() else [left_out]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if cuda.is_available():
            if item.get_closest_marker("gpu_if_there"):
                item.add_marker(pytest.mark.gpu)
            continue
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if not takes_its_turn(item):
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    return torch.device("cuda", 0) if backend == "cuda" else torch.device("cpu")


@pytest.fixture
def no_autocast(monkeypatch) -> None:
    """No device but the real ones has autocast, and PyTorch raises if it is asked."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.fixture
def harness(backend: str, tmp_path) -> Harness:
    return Harness(backend, tmp_path)


@pytest.fixture
def fit(harness: Harness):
    """Trains a model with the callback, and a copy of it without."""
    from tests.test_training import Fit  # a module of tests, which needs this file before

    return Fit(harness)


PATCHABLE = (
    *("__call__", "__getattribute__", "__setattr__", "__getattr__"),
    *("__reduce_ex__", "__getstate__", "__deepcopy__", "__copy__"),
    *("log", "log_dict", "print", "validation_step", "test_step", "predict_step"),
)
CLASSES = (nn.Module, nn.Linear, nn.Sequential, LightningModule, Strategy, Metric, MetricCollection)


def attributes_of_classes() -> dict[str, object]:
    return {
        f"{cls.__name__}.{name}": vars(cls).get(name, "absent")
        for cls in CLASSES
        for name in PATCHABLE
    }


ORIGINALS = attributes_of_classes()


def classes_with_a_trace() -> list[str]:
    """Return methods of classes that have changed since the start, or are functions of ours."""
    changed = [name for name, now in attributes_of_classes().items() if now is not ORIGINALS[name]]
    ours = [
        f"{cls.__name__}.{name}"
        for (cls, name), patch in interception._patches.items()
        if vars(cls).get(name) is patch._function
    ]
    return list(dict.fromkeys([*changed, *ours]))


def modules_with_a_trace() -> list[str]:
    """Return modules that are still intercepted."""
    tables = [patch.table for patch in interception._patches.values()]
    entries = [entry for table in tables for found in table.values() for entry in found]
    modules = {id(entry.module): entry.module for entry in entries}
    return [type(module).__name__ for module in modules.values()]


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)  # a Trainer sets it for the process
    # the first call of compiled code turns these checks off for the process
    torch.distributions.Distribution.set_default_validate_args(True)
    yield
    assert not is_forward_context_available(), "a forward context is left"
    assert torch.is_grad_enabled(), "grad mode is changed"
    assert not torch.is_inference_mode_enabled(), "inference mode is changed"
    assert torch.is_autocast_cache_enabled(), "the autocast cache is off"
    assert gc.isenabled(), "the garbage collector is off"
    assert modules_with_a_trace() == [], "a module is still intercepted"
    assert classes_with_a_trace() == [], "a class is still patched"
