"""Classes that are rare: without a hash, equal to others, in a file that is called as Python's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.harness import Harness, predict
from tests.models import Predictor
from tests.test_changes_in_mid_stage import Changes, Runs
from tests.test_held_namespaces import SETTINGS, Holder, compare

NAME = "scale"


class WithoutHash(type):
    __hash__ = None  # type: ignore[assignment]


class EqualToAll(type):
    def __hash__(cls) -> int:
        return 1

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, EqualToAll)


class Config(metaclass=WithoutHash):
    scale = 1.0


class First(metaclass=EqualToAll):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Second(metaclass=EqualToAll):
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, by: Any) -> Tensor:
        return self.linear(x) * by.scale


SCALES = Scales()


def of_class(part: Any, is_on: bool) -> None:
    Config.scale = 3.0 if is_on else 1.0


def of_object(part: Any, is_on: bool) -> None:
    part.held.held.scale = 3.0 if is_on else 1.0


def of_second(part: Any, is_on: bool) -> None:
    part.held[1].factor = 3.0 if is_on else 1.0


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Any]] = {
    "attribute": (lambda: Config, lambda self, x: x * self.held.scale, of_class),
    "list": (lambda: [Config], lambda self, x: x * self.held[0].scale, of_class),
    "computed": (lambda: Config, lambda self, x: x * getattr(self.held, NAME), of_class),
    "object": (
        lambda: Holder(Config()),
        lambda self, x: x * self.held.held.scale,
        of_object,
    ),
    "argument": (
        lambda: Holder(Config()),
        lambda self, x: SCALES(x, self.held.held),
        of_object,
    ),
    "equal": (
        lambda: [First(), Second()],
        lambda self, x: x * self.held[0].scale * self.held[1].factor,
        of_second,
    ),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("name", list(CASES))
def test_classes_that_cannot_be_told_apart_by_hash(harness, name, settings):
    """Hazard 39."""
    if harness.backend == "cuda":
        SCALES.cuda()
    compare(harness, *CASES[name], **settings)


class Key:
    def __init__(self) -> None:
        self.scale = 1.0


KEY = Key()


class ReadsKey(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, given: dict[Any, Tensor]) -> Tensor:
        (key,) = given
        return self.linear(given[key]) * key.scale


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
def test_an_object_is_a_key_of_the_batch(harness: Harness, settings) -> None:
    def change(_: Any, is_on: bool) -> None:
        KEY.scale = 3.0 if is_on else 1.0

    class Steps(Predictor):
        part = None

        def predict_step(self, batch: Any) -> Tensor:
            return self.net(batch)

    callback = harness.callback(warmup_steps=1, **settings)
    loader = DataLoader([{KEY: torch.randn(4, 8)} for _ in range(12)], batch_size=None)
    seen = []
    module = Steps(ReadsKey())
    for extra in ([callback], []):
        change(None, False)
        seen.append(predict(loader)(harness.trainer(*extra, Changes(change)), module))
    assert all(map(torch.equal, *seen))
    if "mode" not in settings:
        assert "an object as a key" in callback.summary()


class Items(dict[str, Tensor]):
    """A batch that may have attributes as well."""


OF_USERS = """
import torch

def scaled(batch):
    return batch["x"] * getattr(batch, "scale", 1.0)

class Kept:
    def __init__(self):
        self.lock = torch.Generator()
        self.scale = 1.0
"""


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("name", ["queue", "code", "mine"])
def test_a_file_of_the_users_is_called_like_one_of_pythons(harness, tmp_path, name, settings):
    """What counts is where the file is."""
    file = Path(tmp_path) / f"{name}.py"
    file.write_text(OF_USERS)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    users = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(users)

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.kept = users.Kept()

        def forward(self, batch: Any) -> Tensor:
            return self.linear(users.scaled(batch)) * self.kept.scale

    class Steps(Runs):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.part(batch)

    class Marks(Changes):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
            super().on_predict_batch_start(trainer, pl_module, batch, batch_idx)
            if batch_idx > 3:
                batch.scale = 2.0

    def change(part: Any, is_on: bool) -> None:
        part.kept.scale = 3.0 if is_on else 1.0

    loader = DataLoader([Items(x=torch.randn(4, 8)) for _ in range(12)], batch_size=None)
    callback = harness.callback(warmup_steps=1, **settings)
    module, seen = Steps(Part()), []
    for extra in ([callback], []):
        change(module.part, False)
        for batch in loader.dataset:
            vars(batch).clear()
        seen.append(predict(loader)(harness.trainer(*extra, Marks(change)), module))
    assert all(map(torch.equal, *seen))


class OwnTensor(Tensor):
    """A class of tensors of the user's."""


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("is_in_list", [False, True])
def test_a_tensor_of_the_users_class_gets_other_memory(harness, is_in_list, settings) -> None:
    def get(part: Any) -> Tensor:
        return part.held[0] if is_in_list else part.held

    def change(part: Any, is_on: bool) -> None:
        get(part).data = torch.full_like(get(part), 3.0 if is_on else 1.0)

    def use(part: Any, x: Tensor) -> Tensor:
        return (x * get(part)).as_subclass(Tensor)

    own = torch.ones(8, device="cuda" if harness.backend == "cuda" else "cpu")
    own = own.as_subclass(OwnTensor)
    compare(harness, lambda: [own] if is_in_list else own, use, change, **settings)


def sets_gradient(part: Any, is_on: bool) -> None:
    part.held[0].grad = torch.ones_like(part.held[0]) if is_on else None


def adds_hook(part: Any, is_on: bool) -> None:
    if is_on:
        part.held[0].register_hook(lambda gradient: gradient)
    elif part.held[0]._backward_hooks:
        part.held[0]._backward_hooks.clear()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize(
    ("use", "change"),
    [
        (lambda self, x: x * (1.0 + (self.held[0].grad is not None)), sets_gradient),
        (lambda self, x: x * (1.0 + bool(self.held[0]._backward_hooks)), adds_hook),
    ],
    ids=["gradient", "hooks"],
)
def test_what_belongs_to_a_tensor_in_an_attribute(harness, use, change, settings):
    held = [torch.ones(4, requires_grad=True)]
    compare(harness, lambda: held, use, change, **settings)
