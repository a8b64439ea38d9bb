"""Values that a step reads from attributes of any kind, changed between two batches."""

from __future__ import annotations

import array
import collections
import dataclasses
import random
from collections.abc import Callable as Function
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from torch import Tensor, nn

from cg_lightning.guards.values import FrozenValues
from tests.harness import Harness, features, predict
from tests.models import Body, Predictor


@dataclasses.dataclass(slots=True)
class Slotted:
    factor: float = 1.0
    tensor: Any = None


class Plain:
    def __init__(self) -> None:
        self.factor = 1.0
        self.inner = [Slotted()]
        self.tensor = torch.ones(8)


class Scales:
    """A callable object with state."""

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


def set_to(name: str, value: Any) -> Function[[Any], None]:
    def change(kept: Any) -> None:
        setattr(kept, name, value)

    return change


def move(tensor: Tensor) -> None:
    tensor.data = tensor * 3


Case = tuple[Function[[], Any], Function[[Tensor, Any], Tensor], Function[[Any], None]]
"""Functions to make, use and change a value that the module stores."""
CASES: dict[str, Case] = {
    "slots": (Slotted, lambda x, kept: x * kept.factor, set_to("factor", 3.0)),
    "tensor in slots": (
        lambda: Slotted(tensor=torch.ones(8)),
        lambda x, kept: x * kept.tensor,
        lambda kept: move(kept.tensor),
    ),
    "object": (Plain, lambda x, kept: x * kept.factor, set_to("factor", 3.0)),
    "object in an object": (
        Plain,
        lambda x, kept: x * kept.inner[0].factor,
        lambda kept: set_to("factor", 3.0)(kept.inner[0]),
    ),
    "tensor in an object": (Plain, lambda x, kept: x * kept.tensor, lambda kept: move(kept.tensor)),
    "callable object": (Scales, lambda x, kept: kept(x), set_to("factor", 3.0)),
    "OmegaConf": (
        lambda: OmegaConf.create({"a": {"factor": 1.0}}),
        lambda x, kept: x * kept.a.factor,
        lambda kept: set_to("factor", 3.0)(kept.a),
    ),
    "set": (lambda: {1.0}, lambda x, kept: x * sum(kept), lambda kept: kept.add(2.0)),
    "deque": (
        lambda: collections.deque([1.0]),
        lambda x, kept: x * kept[0],
        lambda kept: kept.appendleft(3.0),
    ),
    "bytearray": (
        lambda: bytearray(b"\x01"),
        lambda x, kept: x * kept[0],
        lambda kept: kept.__setitem__(0, 3),
    ),
    "array": (
        lambda: array.array("d", [1.0]),
        lambda x, kept: x * kept[0],
        lambda kept: kept.__setitem__(0, 3.0),
    ),
    "NumPy": (
        lambda: np.ones((1, 1)),
        lambda x, kept: x * float(kept[0, 0]),
        lambda kept: kept.__setitem__((0, 0), 3.0),
    ),
    "tensor": (lambda: torch.ones(8), lambda x, kept: x * kept, move),
    "tensor in a list": (
        lambda: [{"a": torch.ones(8)}],
        lambda x, kept: x * kept[0]["a"],
        lambda kept: move(kept[0]["a"]),
    ),
    "weight of a module in a list": (
        lambda: [nn.Linear(8, 8)],
        lambda x, kept: kept[0](x),
        lambda kept: set_to("weight", nn.Parameter(torch.ones(8, 8, device=kept[0].weight.device)))(
            kept[0]
        ),
    ),
    "mode of a module in a list": (
        lambda: [nn.RReLU(-1, -1).eval()],
        lambda x, kept: kept[0](x),
        lambda kept: kept[0].train(),
    ),
}


def on(kept: Any, device: torch.device) -> Any:
    """Moves values that a LightningModule does not move."""
    if isinstance(kept, Tensor):
        return kept.to(device)
    if isinstance(kept, list):
        return [on(item, device) for item in kept]
    if isinstance(kept, dict):
        return {name: on(item, device) for name, item in kept.items()}
    if isinstance(kept, nn.Module):
        return kept.to(device)
    if getattr(kept, "tensor", None) is not None:
        kept.tensor = kept.tensor.to(device)
    return kept


class Keeps(Predictor):
    def __init__(self, case: Case, device: torch.device, batch: int) -> None:
        super().__init__(Body())
        make, self.use, self.change = case
        self.batch = batch
        self.__dict__["kept"] = on(make(), device)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.use(self.net(batch[0]), self.kept)

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == self.batch:
            self.change(self.kept)


@pytest.mark.parametrize("name", CASES)
def test_changed_between_two_batches(harness: Harness, device, name):
    """Hazards 4 and 7: guards find it before each replay, verification is off."""
    torch.manual_seed(2)
    callback = harness.callback(warmup_steps=1, verify_replays=0)
    harness.compare(Keeps(CASES[name], device, 4), predict(features(32)), callback)
    assert callback.stats.steps["NONE"] < 4, callback.summary()


@pytest.mark.parametrize("name", CASES)
def test_without_a_change_nothing_is_captured_anew(harness: Harness, device, name):
    callback = harness.callback(warmup_steps=1, mode="FULL")
    harness.compare(Keeps(CASES[name], device, 99), predict(features(32)), callback)
    assert callback.stats.captures == 1


class Nested:
    def __init__(self) -> None:
        self.inner = Slotted()


def bump(kept: Any) -> float:
    kept.inner.factor += 1
    return kept.inner.factor


def bump_first(kept: Any) -> float:
    kept[0][0] += 1
    return float(kept[0][0])


def keep_last(kept: Any) -> float:
    kept.append(kept[-1] + 1)  # of a fixed length
    return kept[0]


CHANGED_BY_THE_STEP: dict[str, tuple[Function[[], Any], Function[[Any], float]]] = {
    "object in an object": (Nested, bump),
    "list in a list": (lambda: [[0.0]], bump_first),
    "NumPy array": (lambda: np.zeros((1, 1)), bump_first),
    "deque": (lambda: collections.deque([1.0, 2.0], maxlen=2), keep_last),
    "random.Random": (lambda: random.Random(3), lambda kept: kept.random()),
    "NumPy generator": (lambda: np.random.default_rng(3), lambda kept: float(kept.random())),
}


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", CHANGED_BY_THE_STEP)
def test_changed_by_the_step_itself(harness: Harness, name, verify_replays):
    """Hazards 6 and 9: the step is not captured, and nothing is counted or drawn twice."""
    make, change = CHANGED_BY_THE_STEP[name]

    class Changes(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.kept = make()

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) * change(self.kept)

    callback = harness.callback(warmup_steps=1, verify_replays=verify_replays)
    harness.compare(Changes(), predict(features(32)), callback)
    assert callback.stats.steps["PIECEWISE"] == 7, callback.summary()


def replaced(value: list[Any]) -> None:
    value[0] = {"a": [1, 3]}


CHANGES_OF_ITEMS: dict[str, tuple[Function[[], Any], Function[[Any], object], bool]] = {
    # what is held, what changes, whether the values are other ones then
    "from one list to the next": (
        lambda: [[1, 2], [3]],
        lambda value: value[1].insert(0, value[0].pop()),
        True,
    ),
    "item of an inner list": (lambda: ([1, [2]],), lambda value: value[0][1].append(3), True),
    "value of an inner dictionary": (lambda: [{"a": 1}], lambda value: value[0].update(a=2), True),
    "key": (lambda: [{"a": 1}], lambda value: value[0].update(b=value[0].pop("a")), True),
    "0.0 and -0.0": (lambda: [0.0], lambda value: value.__setitem__(0, -0.0), True),
    "1 and True": (lambda: [1], lambda value: value.__setitem__(0, True), True),
    "deque": (lambda: collections.deque([1, 2]), lambda value: value.rotate(), True),
    "ordered": (
        lambda: collections.OrderedDict(a=1, b=2),
        lambda value: value.move_to_end("a"),
        True,
    ),
    "equal number": (lambda: [1000.5], lambda value: value.__setitem__(0, float("1000.5")), False),
    "equal dictionary": (
        lambda: [{"a": [1, 2]}],
        lambda value: value.insert(0, dict(value.pop())),
        False,
    ),
    "inside an equal dictionary": (lambda: [{"a": [1, 2]}], replaced, True),
    "dictionary of a class of its own": (
        lambda: OmegaConf.to_object(OmegaConf.create({"a": 1})),
        lambda value: value.update(a=2),
        True,
    ),
}


@pytest.mark.parametrize("name", CHANGES_OF_ITEMS)
def test_items_of_containers(name):
    make, change, differs = CHANGES_OF_ITEMS[name]
    value = make()
    frozen = FrozenValues([value], ["self.kept"])
    assert frozen.hold()
    change(value)
    assert frozen.hold() is not differs
    assert bool(frozen.explain()) is differs


@pytest.mark.parametrize("items", [3, 1000])
def test_large_ones_are_for_close_looks(items):
    for make, change in (
        (lambda: list(range(items)), lambda kept: kept.append(1)),
        (lambda: np.zeros(items), lambda kept: kept.__setitem__(0, 1)),
        (lambda: set(range(items)), lambda kept: kept.add(-1)),
    ):
        kept: Any = make()
        values = FrozenValues([kept])
        assert values.hold()
        assert values.large_ones_hold()
        change(kept)
        assert values.hold() == (items == 1000)
        assert values.large_ones_hold() == (items == 3)


def test_what_refers_to_itself():
    kept = Plain()
    kept.inner.append(kept)
    values = FrozenValues([kept])
    assert values.hold()
    kept.factor = 2.0
    assert not values.hold()


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.factor = 1.0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class CountsInScript(Scripted):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class ChangesScript(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 4:
            pl_module.net.factor = 3.0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("kind", [Scripted, CountsInScript])
def test_attributes_of_scripted_modules(harness: Harness, kind, verify_replays):
    """Hazards 6 and 7, in a module that stores its attributes outside Python."""
    torch.manual_seed(2)
    net = kind()
    seen = []
    callback = harness.callback(warmup_steps=1, verify_replays=verify_replays)
    for extra in ([callback], []):
        torch.manual_seed(3)
        module = Predictor(torch.jit.script(net))
        seen.append(harness.trainer(*extra, ChangesScript()).predict(module, features(32)))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    # the step is watched once, and once more after the change
    assert callback.stats.steps["FULL"] == (6 if kind is Scripted else 0), callback.summary()


class ReadsItsClass(Predictor):
    factor = 1.0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * type(self).factor * self.__class__.factor


class ReadsItsDictionary(Predictor):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.factor = 1.0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * vars(self)["factor"] * self.__dict__["factor"]


@pytest.mark.parametrize("kind", [ReadsItsClass, ReadsItsDictionary])
def test_attributes_that_nobody_sees_being_read(harness: Harness, kind):
    """Hazard 7."""

    class Changes(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            owner = kind if kind is ReadsItsClass else pl_module
            owner.factor = 3.0 if batch_idx >= 4 else 1.0

        def on_predict_end(self, *_: Any) -> None:
            ReadsItsClass.factor = 1.0

    callback = harness.callback(warmup_steps=1, verify_replays=0)
    harness.compare(kind(Body()), predict(features(32)), callback, lambda: [Changes()])
    assert callback.stats.steps["FULL"] == 6  # watched once, and once more after the change


class Ensemble(Predictor):
    """Runs three networks at once with ``torch.func``."""

    def __init__(self) -> None:
        super().__init__(Body())
        weights = {
            name: torch.stack([value, 2 * value, 3 * value])
            for name, value in self.net.named_parameters()
        }
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): value.detach() for name, value in weights.items()}
        )

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        weights = {name.replace("/", "."): value for name, value in self.weights.items()}
        run = lambda weights, x: torch.func.functional_call(self.net, weights, (x,))
        return torch.vmap(run, (0, None))(weights, batch[0])


class Derives(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.inference_mode(False):
            return torch.func.jvp(
                nn.functional.relu, (batch[0].clone(),), (torch.ones_like(batch[0]),)
            )


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("kind", [Ensemble, lambda: Derives(Body())])
def test_transforms_of_torch_func(harness: Harness, kind, mode):
    """Batched tensors have no own memory, so only the whole step can be a graph."""
    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(kind(), predict(features(32)), callback)
    if kind is Ensemble and mode == "PIECEWISE":
        assert any(
            "inside a transform of torch.func" in reason for reason in callback.stats.eager_reasons
        )
