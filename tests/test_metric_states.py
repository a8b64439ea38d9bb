"""States of metrics as users hold and see them: aliases, lists, inference tensors, compositions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics as tm
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import classification as c

from tests.harness import Job, loader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CLASSES = 4
Step = Callable[[Any, Tensor, Tensor], Any]


def data() -> Any:
    generator = torch.Generator().manual_seed(7)
    return loader(
        torch.randn(40, 8, generator=generator),
        torch.randint(0, CLASSES, (40,), generator=generator),
    )


def two_epochs(trainer: Any, module: LightningModule) -> Any:
    seen = [trainer.validate(module, data(), verbose=False) for _ in range(2)]
    return seen, _states(module), _counts(module)


def _states(module: nn.Module) -> list[Any]:
    """Return all states, and whether they are inference tensors."""
    states = [
        getattr(metric, name)
        for metric in module.modules()
        if isinstance(metric, tm.Metric)
        for name in metric._defaults
    ]
    return [
        (state, state.is_inference() if isinstance(state, Tensor) else len(state))
        for state in states
    ]


def _counts(module: nn.Module) -> list[int]:
    return [metric._update_count for metric in module.modules() if isinstance(metric, tm.Metric)]


class Measured(LightningModule):
    def __init__(self, step: Step, **metrics: nn.Module) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)
        self.step = step
        for name, metric in metrics.items():
            setattr(self, name, metric)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, self.net(batch[0]), batch[1])


class Looks(Callback):
    """Looks at a metric after each batch, and keeps what it has seen."""

    def __init__(self, look: Callable[[Any, int], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_) -> None:
        self.seen.append(self.look(pl_module, batch_idx))


def compare(
    harness: Any,
    model: LightningModule,
    look: Callable[[Any, int], Any] = lambda module, index: None,
    **settings: Any,
) -> dict[str, int]:
    """Compare two epochs with eager, and with what a callback has kept. Return steps by mode."""
    trainer_settings = {"precision": settings.pop("precision", "32-true")}
    seen = Looks(look)

    def job(trainer: Any, module: LightningModule) -> Any:
        found = two_epochs(trainer, module)
        return found, next(cb.seen for cb in trainer.callbacks if isinstance(cb, Looks))

    work: Job = job
    callback = harness.callback(**settings)
    harness.compare(model, work, callback, others=lambda: [Looks(seen.look)], **trainer_settings)
    return callback.stats.steps


def counted(module: Any, x: Tensor, label: Tensor) -> None:
    module.metric.update(x[:, :CLASSES], label)


def reset_first(module: Any, x: Tensor, label: Tensor) -> Any:
    module.metric.reset()
    module.metric.update(x[:, :CLASSES], label)
    return module.metric.compute()


def forwarded(module: Any, x: Tensor, label: Tensor) -> Any:
    return module.metric(x[:, :CLASSES], label)


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("step", [counted, reset_first, forwarded])
@pytest.mark.parametrize("make", [c.MulticlassAccuracy, c.MulticlassConfusionMatrix])
def test_a_state_is_an_inference_tensor_where_eagers_is(
    harness, make, step, inference_mode, verify_replays
):
    model = Measured(step, metric=make(CLASSES))
    callback = harness.callback(mode="FULL", verify_replays=verify_replays)
    harness.compare(model, two_epochs, callback, inference_mode=inference_mode)
    assert callback.stats.steps["FULL"] == 14, callback.summary()


def keep_states(module: Any, index: int) -> Any:
    return module.metric.confmat if index in (2, 6) else None


def keep_views(module: Any, index: int) -> Any:
    return [m.confmat for m in module.metric._modules.values()] if index in (2, 7) else None


def read_members(module: Any, index: int) -> Any:
    return module.metric["a"].compute() if index == 5 else keep_views(module, index)


def read_items(module: Any, index: int) -> Any:
    return [m.compute() for m in module.metric.values()] if index % 3 == 2 else None


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_a_state_that_a_callback_keeps_changes_as_in_eager(harness, mode, verify_replays):
    model = Measured(counted, metric=c.MulticlassConfusionMatrix(CLASSES))
    steps = compare(harness, model, keep_states, mode=mode, verify_replays=verify_replays)
    assert steps["FULL"] == 14


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("look", [keep_views, read_members, read_items])
def test_a_compute_group_is_read_between_batches(harness, look, verify_replays):
    """Torchmetrics shares states in a group, until somebody reads a member, and then again."""
    metric = tm.MetricCollection(
        {"a": c.MulticlassConfusionMatrix(CLASSES), "b": c.MulticlassCohenKappa(CLASSES)}
    )
    steps = compare(harness, Measured(counted, metric=metric), look, verify_replays=verify_replays)
    assert steps["FULL"] == 14


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_a_step_that_updates_one_member_of_a_group(harness, verify_replays):
    metric = tm.MetricCollection(
        {"a": c.MulticlassPrecision(CLASSES), "b": c.MulticlassRecall(CLASSES)},
        compute_groups=[["a", "b"]],
    )

    def step(module: Any, x: Tensor, label: Tensor) -> Any:
        module.metric["a"].update(x[:, :CLASSES], label)
        return module.metric["a"].compute()

    def look(module: Any, index: int) -> Any:
        return module.metric.compute() if index % 3 == 2 else module.metric._modules["b"].tp

    steps = compare(harness, Measured(step, metric=metric), look, verify_replays=verify_replays)
    assert steps["FULL"] == 14


def test_a_state_that_nobody_keeps_stays_with_the_graph(harness):
    """A copy for each replay would be the price of keeping it."""
    model = Measured(counted, metric=c.MulticlassConfusionMatrix(CLASSES))
    is_attribute = lambda module, index: "confmat" in vars(module.metric)
    callback = harness.callback(mode="FULL", verify_replays=0)
    looks = Looks(is_attribute)
    harness.trainer(callback, looks).validate(model, data(), verbose=False)
    assert looks.seen == [True] * 3 + [False] * 7


HANDED_OUT: dict[str, Step] = {
    "returned": lambda module, x, label: (module.metric(x.sum()), module.metric.sum_value),
    "a view": lambda module, x, label: (module.metric(x.sum()), module.metric.sum_value[None]),
    "kept": lambda module, x, label: module.kept.append(module.metric.sum_value),
}


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("how", list(HANDED_OUT))
def test_a_step_hands_out_a_state_that_it_changes_in_place(harness, how, verify_replays):
    def step(module: Any, x: Tensor, label: Tensor) -> Any:
        module.metric.update(x.mean())
        return HANDED_OUT[how](module, x, label)

    model = Measured(step, metric=tm.SumMetric())
    model.kept = []
    look = lambda module, index: module.kept if index == 9 else None
    compare(harness, model, look, verify_replays=verify_replays)


class Last(tm.Metric):
    """Keeps the tensors of the last update."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", [], "cat")

    def update(self, x: Tensor) -> None:
        self.kept = [x]

    def compute(self) -> Tensor:
        return torch.cat(self.kept) if isinstance(self.kept, list) else self.kept


class Window(Last):
    """Keeps the tensors of the last updates."""

    def update(self, x: Tensor) -> None:
        self.kept.append(x)
        if len(self.kept) > 3:
            self.kept.pop(0)


class Grows(Last):
    def update(self, x: Tensor) -> None:
        self.kept += [x]


class Extends(Last):
    def update(self, x: Tensor) -> None:
        self.kept.extend([x, x + 1])


def cat() -> nn.Module:
    return tm.CatMetric(nan_strategy="disable")


LISTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Any], bool]] = {
    "appended": (cat, lambda m, x: m.update(x), True),
    "value of the batch": (cat, lambda m, x: m(x), True),
    "length": (cat, lambda m, x: (m.update(x), len(m.value))[1], False),
    "items": (cat, lambda m, x: (m.update(x), torch.cat(m.value).mean())[1], False),
    "all states": (cat, lambda m, x: (m.update(x), len(m.metric_state["value"]))[1], False),
    "compute": (cat, lambda m, x: (m.update(x), m.compute().mean())[1], False),
    "compute after forward": (cat, lambda m, x: (m(x), m.compute().mean())[1], False),
    "reset": (cat, lambda m, x: (m.reset(), m.update(x))[1], False),
    "reset at the end": (cat, lambda m, x: (m.update(x), m.reset())[1], False),
    "set": (cat, lambda m, x: setattr(m, "value", [x]), False),
    "set in update": (Last, lambda m, x: m.update(x), True),
    "set in forward": (Last, lambda m, x: m(x), False),
    "window": (Window, lambda m, x: m.update(x), True),
    "added in update": (Grows, lambda m, x: m.update(x), True),
    "added in forward": (Grows, lambda m, x: m(x), False),
    "extended": (Extends, lambda m, x: m.update(x), True),
    "extended in forward": (Extends, lambda m, x: m(x), True),
}


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", list(LISTS))
def test_what_a_step_does_with_a_list_state(harness, name, verify_replays):
    """A graph appends. A step that sees what was in the list before is no graph."""
    make, use, is_full = LISTS[name]
    model = Measured(lambda module, x, label: use(module.metric, x[:, 0]), metric=make())

    def look(module: Any, index: int) -> Any:
        return module.metric.compute() if index % 3 == 2 and "reset" not in name else None

    steps = compare(harness, model, look, mode="FULL", verify_replays=verify_replays)
    assert steps["FULL"] == (14 if is_full else 0)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true"])
@pytest.mark.parametrize("how", ["update", "forward", "parts"])
def test_composed_metrics(harness, how, precision):
    """``states_of`` asked for the children, which reads states that a capture has removed."""
    one, other = c.MulticlassAccuracy(CLASSES), c.MulticlassRecall(CLASSES)

    def step(module: Any, x: Tensor, label: Tensor) -> Any:
        value = None
        if how == "parts":
            module.one.update(x[:, :CLASSES], label)
            module.other.update(x[:, CLASSES:], label)
        else:
            value = getattr(module.metric, how)(x[:, :CLASSES], label)
        module.log("both", module.metric)
        return value

    model = Measured(step, one=one, other=other, metric=one + 2 * other)
    steps = compare(harness, model, precision=precision)
    assert steps["FULL"] == 14
