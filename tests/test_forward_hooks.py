"""Forward hooks in whole steps: their code is code of the step, seen like all other code."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from tests.harness import Harness, features, predict, validate

SETTINGS = [
    {"verify_replays": 0},
    {"verify_replays": 2},
    pytest.param({"mode": "FULL"}, marks=pytest.mark.exhaustive),
    {"mode": "PIECEWISE"},
]
BATCHES = 10


class Net(LightningModule):
    """Has a hook on its first layer; ``make`` returns it."""

    def __init__(self, make: Callable[[Any], Any], kind: str = "register_forward_hook") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.scale = 2.0
        self.kept: list[Any] = []
        self.last: Any = None
        self.count = 0
        self._make, self._kind = make, kind

    def on_predict_start(self) -> None:  # copies of a module share no closures then
        hook = self._make(self)
        self.handle = getattr(self.net[0], self._kind)(hook)

    on_validation_start = on_predict_start

    def on_predict_end(self) -> None:
        self.handle.remove()

    on_validation_end = on_predict_end

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch[0])
        self.log("mean", y.mean())
        return y

    def keep(self, module: Any, args: Any, output: Tensor) -> None:
        self.kept.append(output)

    def remember(self, module: Any, args: Any, output: Tensor) -> Tensor:
        return output * self.scale


class Changes(Callback):
    def __init__(self, change: Callable[[Any, int], Any]) -> None:
        self.change = change

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx > 5:
            self.change(pl_module, batch_idx)


class Sees(Callback):
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_predict_batch_end(self, trainer, pl_module, *_: Any) -> None:
        self.seen.append((list(pl_module.kept), pl_module.last, pl_module.count))


def compare(harness: Harness, make: Any, change: Any = lambda *_: None, **settings: Any) -> Any:
    kind = settings.pop("kind", "register_forward_hook")
    seen: list[Any] = []
    callback = harness.callback(**settings)
    harness.compare(
        Net(make, kind),
        predict(features(4 * BATCHES)),
        callback,
        others=lambda: [Changes(change), Sees(seen)],
    )
    for one, other in zip(seen[:BATCHES], seen[BATCHES:], strict=True):
        for value, expected in zip([*one[0], *one[1:]], [*other[0], *other[1:]], strict=True):
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, expected, rtol=0, atol=0)
            else:
                assert value == expected
    return callback


def doubles(module: Any) -> Any:
    return lambda layer, args, output: output * 2


def scales(module: Any) -> Any:
    return lambda layer, args, output: output * module.scale


def scales_by_list(module: Any) -> Any:
    module.scales = scales = [2.0]
    return lambda layer, args, output: output * scales[0]


def scales_by_keyword(module: Any) -> Any:
    def hook(layer: Any, args: Any, output: Tensor, scale: float) -> Tensor:
        return output * scale

    module.hook = functools.partial(hook, scale=2.0)
    return module.hook


def keeps(module: Any) -> Any:
    return lambda layer, args, output: module.kept.append(output)


def sets(module: Any) -> Any:
    def hook(layer: Any, args: Any, output: Tensor) -> None:
        module.last = output

    return hook


def in_place(module: Any) -> Any:
    return lambda layer, args, output: output.mul_(3)


def bound(module: Any) -> Any:
    return module.remember


def on_the_device(module: Any) -> Any:
    return lambda layer, args, output: output + torch.rand_like(output) * 0


def changes_nothing(module: Any) -> Any:
    return lambda layer, args, output: None


def defaults(module: Any) -> Any:
    return lambda layer, args, output, by=(1.0, 2.0): output * by[1]


def keeps_by_method(module: Any) -> Any:
    return module.keep


FULL = [
    doubles,
    scales,
    scales_by_list,
    keeps_by_method,
    sets,
    in_place,
    bound,
    changes_nothing,
    defaults,
]


def counts(module: Any) -> Any:
    def hook(layer: Any, args: Any, output: Tensor) -> Tensor:
        module.count += 1
        return output * module.count

    return hook


def counts_in_closure(module: Any) -> Any:
    number = 0

    def hook(layer: Any, args: Any, output: Tensor) -> Tensor:
        nonlocal number
        number += 1
        return output * number

    return hook


def counts_in_list(module: Any) -> Any:
    fired: list[int] = []

    def hook(layer: Any, args: Any, output: Tensor) -> Tensor:
        fired.append(1)
        return output * len(fired)

    return hook


def counts_in_attribute(module: Any) -> Any:
    def hook(layer: Any, args: Any, output: Tensor) -> Tensor:
        hook.number += 1  # type: ignore[attr-defined]
        return output * hook.number  # type: ignore[attr-defined]

    hook.number = 0  # type: ignore[attr-defined]
    return hook


class Counter:
    number = 0

    def __call__(self, layer: Any, args: Any, output: Tensor) -> Tensor:
        self.number += 1
        return output * self.number

    def hook(self, layer: Any, args: Any, output: Tensor) -> Tensor:
        return self(layer, args, output)


def objects(module: Any) -> Any:
    return Counter()


def of_object(module: Any) -> Any:
    return Counter().hook


def partial(module: Any) -> Any:
    return functools.partial(
        lambda scale, layer, args, output: output * scale.pop(), [3.0, 2.0] * 9
    )


def branches(module: Any) -> Any:
    return lambda layer, args, output: output * 2 if output.sum() > 0 else None


def draws(module: Any) -> Any:
    return lambda layer, args, output: output * random.random()


def asks_for_time(module: Any) -> Any:
    return lambda layer, args, output: output * float(time.time() > 0)


def reads_last(module: Any) -> Any:
    def hook(layer: Any, args: Any, output: Tensor) -> Tensor:
        before, module.last = module.last, output
        return output if before is None else output + before

    return hook


def iterates(module: Any) -> Any:
    numbers = iter(range(100))
    return lambda layer, args, output: output * next(numbers)


def of_layer(module: Any) -> Any:
    def hook(layer: Any, args: Any, output: Tensor) -> Tensor:
        layer.calls = getattr(layer, "calls", 0) + 1
        return output * layer.calls

    return hook


NOT_FULL = [
    *(counts, counts_in_closure, counts_in_list, counts_in_attribute, objects, of_object, partial),
    *(branches, draws, asks_for_time, reads_last, iterates, of_layer),
]


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", FULL)
def test_hooks_whose_code_can_be_part_of_a_graph(harness: Harness, make: Any, settings: Any):
    random.seed(1)
    callback = compare(harness, make, **settings)
    assert bool(callback.stats.steps["FULL"]) is (settings != {"mode": "PIECEWISE"})


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", NOT_FULL)
def test_hooks_whose_code_cannot_be_part_of_a_graph(harness: Harness, make: Any, settings: Any):
    class Seeds(Callback):
        def on_predict_start(self, *_: Any) -> None:
            random.seed(1)

    callback = harness.callback(**settings)
    job = predict(features(4 * BATCHES))
    harness.compare(Net(make), job, callback, others=lambda: [Seeds()])
    assert not callback.stats.steps["FULL"], callback.summary()


def scales_by_layer(module: Any) -> Any:
    module.net[0].scale = 2.0
    return lambda layer, args, output: output * layer.scale


CHANGES = {
    "an attribute of the layer": (
        scales_by_layer,
        lambda module, index: setattr(module.net[0], "scale", index / 4),
    ),
    "an attribute": (scales, lambda module, index: setattr(module, "scale", index / 4)),
    "a list of a closure": (
        scales_by_list,
        lambda module, index: module.scales.__setitem__(0, index / 4),
    ),
    "a keyword of a partial function": (
        scales_by_keyword,
        lambda module, index: module.hook.keywords.__setitem__("scale", index / 4),
    ),
    "an attribute behind a method": (bound, lambda module, index: setattr(module, "scale", 7.0)),
    "removed": (doubles, lambda module, index: module.handle.remove()),
    "another": (
        doubles,
        lambda module, index: module.net[2].register_forward_hook(lambda m, a, y: y - 1),
    ),
    "a list that is full": (keeps_by_method, lambda module, index: module.kept.clear()),
}


@pytest.mark.parametrize("verify", [0, 2])
def test_a_function_that_fills_a_list_of_the_module(harness: Harness, verify: int):
    compare(harness, keeps, verify_replays=verify)


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_hook_reads_is_guarded(harness: Harness, name: str, verify: int):
    make, change = CHANGES[name]
    compare(harness, make, change, verify_replays=verify)


@pytest.mark.parametrize("verify", [0, 2])
def test_hooks_before_the_call(harness: Harness, verify: int):
    def make(module: Any) -> Any:
        return lambda layer, args: (args[0] * module.scale,)

    kind = "register_forward_pre_hook"
    callback = compare(harness, make, verify_replays=verify, kind=kind)
    assert callback.stats.steps["FULL"]


def test_features_of_one_step(harness: Harness):
    class Extracts(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            found: dict[str, Tensor] = {}

            def keep(layer: Any, args: Any, output: Tensor) -> None:
                found["layer"] = output

            handle = self.net[1].register_forward_hook(keep)
            y = self.net(batch[0])
            handle.remove()
            return y, found["layer"].mean(), found

    callback = harness.compare(Extracts(changes_nothing), predict(features(4 * BATCHES)))
    assert callback.stats.steps["FULL"] + callback.stats.steps["PIECEWISE"]


def test_features_kept_by_the_module_until_the_next_step(harness: Harness):
    class Extracts(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            self.kept.clear()
            y = self.net(batch[0])
            return y, [feature.mean() for feature in self.kept]

    harness.compare(Extracts(keeps), predict(features(4 * BATCHES)))


def test_a_hook_that_logs(harness: Harness):
    def make(module: Any) -> Any:
        return lambda layer, args, output: module.log("inside", output.mean())

    harness.compare(Net(make), validate(features(4 * BATCHES)))


def test_a_global_hook_keeps_the_step_eager(harness: Harness):
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        callback = harness.compare(Net(changes_nothing), predict(features(4 * BATCHES)))
    finally:
        handle.remove()
    assert not callback.stats.steps["FULL"]
