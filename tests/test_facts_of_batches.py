"""What a step can ask of its batch besides its values: attributes, classes, places in memory."""

from __future__ import annotations

import collections
import dataclasses
import sysconfig
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.harness import Batches, Harness, predict
from tests.models import Body, Predictor

X = torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(3))


class Scaled(dict):
    """A dictionary with attributes."""


class ScaledByClass(dict):
    scale = 1.0


class Listed(list):
    pass


class Named(collections.namedtuple("Named", "x")):
    pass


@dataclasses.dataclass
class Record:
    x: Tensor


def given(batch: Any, number: int, always: bool = True) -> Any:
    """Give a batch an attribute of another value in every fourth step."""
    if always or number % 3:
        batch.scale = 1.0 + number // 4
    return batch


def asks(batch: Any) -> float:
    return 2.0 if hasattr(batch, "scale") else 1.0


def with_gradient(number: int) -> Tensor:
    x = X[number].clone()
    x.grad = torch.ones(2, 8) if number % 2 else None
    return x


def inside(number: int) -> Tensor:
    """Return a part of a larger tensor in every second step."""
    x = X[number]
    return torch.cat([x, x, x])[2:4] if number % 2 else x.clone()


def shared(number: int) -> Tensor:
    x = X[number].clone()
    return x.share_memory_() if number % 2 else x


def parameter(number: int) -> Tensor:
    x = X[number].clone()
    return nn.Parameter(x, requires_grad=False) if number % 2 else x


def tensor_of(batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    return (
        batch.x
        if isinstance(batch, Record | Named)
        else batch[0 if isinstance(batch, list) else "x"]
    )


def of_a_library(code: str) -> Any:
    """Return the function ``ask``, as if a library had defined it."""
    found: dict[str, Any] = {"__name__": "asks"}
    exec(compile(code, f"{sysconfig.get_path('purelib')}/asks.py", "exec"), found)
    return found["ask"]


asks_in_library = of_a_library("def ask(batch): return getattr(batch, 'scale', 1.0)")


FACTS: dict[str, tuple[Callable[[int], Any], Callable[[Any], float]]] = {
    "of a dictionary": (lambda i: given(Scaled(x=X[i]), i), lambda batch: batch.scale),
    "of a class as well": (
        lambda i: given(ScaledByClass(x=X[i]), i, always=False),
        lambda batch: batch.scale,
    ),
    "of a list": (lambda i: given(Listed([X[i]]), i), lambda batch: batch.scale),
    "of a named tuple": (lambda i: given(Named(X[i]), i), lambda batch: batch.scale),
    "of a dataclass": (lambda i: given(Record(X[i]), i), lambda batch: batch.scale),
    "sometimes": (lambda i: given(Scaled(x=X[i]), i, always=False), asks),
    "sometimes of a tensor": (lambda i: given(X[i].clone(), i, always=False), asks),
    "sometimes, a library asks": (
        lambda i: given(Scaled(x=X[i]), i, always=False),
        asks_in_library,
    ),
    "sometimes of a tensor, a library asks": (
        lambda i: given(X[i].clone(), i, always=False),
        asks_in_library,
    ),
    "sometimes by vars": (
        lambda i: given(Scaled(x=X[i]), i, always=False),
        lambda batch: vars(batch).get("scale", 1.0),
    ),
    "by vars of a tensor": (
        lambda i: given(X[i].clone(), i),
        lambda batch: vars(batch)["scale"],
    ),
    "sometimes by the dictionary of a tensor": (
        lambda i: given(X[i].clone(), i, always=False),
        lambda batch: batch.__dict__.get("scale", 1.0),
    ),
    "of a tensor": (lambda i: given(X[i].clone(), i), lambda batch: batch.scale),
    "gradient": (with_gradient, lambda batch: 1.0 + (batch.grad is not None)),
    "offset": (inside, lambda batch: 1.0 + batch.storage_offset()),
    "size of its memory": (inside, lambda batch: float(batch.untyped_storage().nbytes())),
    "shared memory": (shared, lambda batch: 1.0 + batch.is_shared()),
    "view": (inside, lambda batch: 1.0 + batch._is_view()),
    "base": (inside, lambda batch: 1.0 + (batch._base is not None)),
    "class": (parameter, lambda batch: 1.0 + (type(batch) is nn.Parameter)),
    "always a parameter": (
        lambda i: nn.Parameter(X[i].clone(), requires_grad=False),
        lambda batch: 1.0 + isinstance(batch, nn.Parameter),
    ),
    "requires_grad": (
        lambda i: X[i].clone().requires_grad_(),
        lambda batch: 1.0 + batch.requires_grad,
    ),
}


class Uses(Predictor):
    def __init__(self, use: Callable[[Any], float]) -> None:
        super().__init__(Body())
        self.use = use

    def transfer_batch_to_device(self, batch: Any, device: torch.device, _: int) -> Any:
        return batch  # or else Lightning makes other containers

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(tensor_of(batch)) * self.use(batch)


@pytest.fixture
def batches(harness: Harness) -> Callable[[Callable[[int], Any]], DataLoader]:
    if harness.backend == "cuda":
        pytest.skip("these batches are on the host")
    # made before: in inference mode, no tensor is a view
    return lambda make: DataLoader(
        Batches([make(i) for i in range(12)].__getitem__, 12),
        batch_size=None,
        collate_fn=lambda batch: batch,
    )


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL", "PIECEWISE"])
@pytest.mark.parametrize("name", FACTS)
def test_what_a_step_asks_of_its_batch(harness: Harness, batches, name: str, mode: str) -> None:
    make, use = FACTS[name]
    callback = harness.callback(mode=mode, verify_replays=0)
    harness.compare(Uses(use), predict(batches(make)), callback)


BY_VARS = {name: FACTS[name] for name in FACTS if "vars" in name or "the dictionary" in name}


@pytest.mark.parametrize("name", BY_VARS)
def test_the_line_that_reads_all_attributes_is_named(harness: Harness, batches, name: str) -> None:
    make, use = BY_VARS[name]
    callback = harness.callback()
    harness.compare(Uses(use), predict(batches(make)), callback)
    (reason,) = {str(record.reason) for record in callback.stats.reasons if record.reason.location}
    assert f"({__file__}:{use.__code__.co_firstlineno})" in reason, reason
    assert "vars(), an attribute of a" in reason


@pytest.mark.parametrize("make", [lambda i: given(Scaled(x=X[i]), i), lambda i: Record(X[i])])
def test_attributes_that_nobody_reads_cost_no_graph(harness: Harness, batches, make: Any) -> None:
    callback = harness.callback()
    harness.compare(Uses(lambda _: 2.0), predict(batches(make)), callback)
    assert callback.stats.steps["FULL"] == 9, callback.summary()


@pytest.mark.parametrize("make", [parameter, lambda i: X[i].clone().requires_grad_()])
def test_classes_and_gradients_have_graphs(harness: Harness, batches, make: Any) -> None:
    callback = harness.callback(warmup_steps=1)
    harness.compare(Uses(lambda batch: 1.0 + batch.requires_grad), predict(batches(make)), callback)
    assert callback.stats.steps["FULL"] >= 10, callback.summary()


@pytest.mark.parametrize("make", [lambda i: Scaled(x=X[i]), lambda i: Record(X[i])])
def test_an_attribute_that_is_missing_raises_as_in_eager(harness: Harness, batches, make) -> None:
    for extra in ([harness.callback()], []):
        with pytest.raises(AttributeError, match="object has no attribute 'scale'"):
            predict(batches(make))(harness.trainer(*extra), Uses(lambda batch: batch.scale))


class Passes(nn.Module):
    """Gives a submodule a parameter and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.inner = Looks()

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.cat([x, x + 1], dim=1).chunk(2, dim=1)
        return self.inner(first, self.weight) + self.inner(second, self.weight)


class Looks(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        offset = x.storage_offset()
        is_trained = weight.requires_grad and type(weight) is nn.Parameter
        return x * weight * (2.0 + offset) * (3.0 if is_trained else 1.0)


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_arguments_of_submodules(harness: Harness, batches, verify_replays: int) -> None:
    callback = harness.callback(mode="PIECEWISE", verify_replays=verify_replays)
    model = Uses(lambda _: 1.0)
    model.net = Passes()
    harness.compare(model, predict(batches(lambda i: X[i].clone())), callback)
