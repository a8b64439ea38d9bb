"""Fixtures: every behaviour test runs on every backend that the machine has."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from cg_lightning import is_forward_context_available
from cg_lightning.backends import cuda
from tests.harness import Harness

BACKENDS = [
    pytest.param("recorder", id="recorder"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    return torch.device("cuda", 0) if backend == "cuda" else torch.device("cpu")


@pytest.fixture
def harness(backend: str, tmp_path) -> Harness:
    return Harness(backend, tmp_path)


def classes_with_a_trace() -> list[type]:
    """Classes of ours that a module may have; there are none where nothing is intercepted, and looking takes no time."""
    found: set[type] = set()
    pending: list[type] = [nn.Module]
    while pending:
        cls = pending.pop()
        if cls not in found:
            found.add(cls)
            pending += type.__subclasses__(cls)
    return [cls for cls in found if "_cg_lightning_interception" in cls.__dict__]


def modules_with_a_trace() -> list[str]:
    """Living modules that still carry something of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when their type is asked for
        living = [obj for obj in gc.get_objects() if issubclass(type(obj), nn.Module)]
    return [
        type(module).__name__
        for module in living
        if any("_cg_lightning_interception" in cls.__dict__ for cls in type(module).__mro__)
        or "CompiledCallInterception"
        in getattr(vars(module).get("_compiled_call_impl"), "__qualname__", "")
    ]


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)  # a Trainer sets it for the process
    yield
    assert not is_forward_context_available(), "a forward context is left"
    assert torch.is_grad_enabled(), "grad mode is changed"
    assert not torch.is_inference_mode_enabled(), "inference mode is changed"
    assert torch.is_autocast_cache_enabled(), "the autocast cache is off"
    assert gc.isenabled(), "the garbage collector is off"
    assert not (classes_with_a_trace() and modules_with_a_trace()), "a module is still intercepted"
