"""Updates of metrics that no graph can hold run after each replay: every value is eager's."""

from __future__ import annotations

import collections
import contextlib
import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.text import CharErrorRate

from tests.harness import Harness, assert_same, loader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CLASSES = 4


def data(number: int = 44, batch_size: int = 4) -> Any:
    generator = torch.Generator().manual_seed(7)
    return loader(
        torch.randn(number, 8, generator=generator),
        torch.randint(0, CLASSES, (number,), generator=generator),
        batch_size=batch_size,
    )


class Keeps(Metric):
    """Waits for the device, and keeps its arguments and Python values."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.count = 0

    def update(self, *values: Any, **others: Any) -> None:
        if float(values[0].sum()) > 1e9:
            raise ValueError("too large")
        self.kept.append((values, others))
        self.count += 1

    def compute(self) -> Tensor:
        return torch.tensor(float(self.count))


class Sum(CatMetric):
    """Keeps all values, and computes their sum."""

    def compute(self) -> Tensor:
        return torch.cat([value.cpu() for value in self.value]).sum()


class Step(LightningModule):
    """A net, a metric that is late, and one that is part of the graph."""

    def __init__(self, metric: nn.Module | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(8, CLASSES)
        self.metric = metric or MeanMetric()
        self.accuracy = MulticlassAccuracy(CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, label = batch
        scores = self.net(x)
        self.accuracy.update(scores, label)
        output = self.measure(x, label, scores)
        self.log("accuracy", self.accuracy)
        return output

    def measure(self, x: Tensor, label: Tensor, scores: Tensor) -> Any:
        raise NotImplementedError


class Reads(Callback):
    """Keeps all states and attributes of all metrics after each batch, and their values."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_) -> None:
        for metric in (child for child in pl_module.modules() if isinstance(child, Metric)):
            states = {name: copy.deepcopy(getattr(metric, name)) for name in metric._defaults}
            self.seen.append((states, metric._update_count, metric._forward_cache))
            if isinstance(metric, Keeps):
                self.seen.append((list(metric.kept), metric.count))
        if batch_idx % 4 == 3:
            self.seen.append(pl_module.metric.compute())


def run(harness: Harness, model: LightningModule, batches: Any = None, **settings: Any) -> Any:
    """Validate twice with and without the callback, and compare everything."""
    batches = batches or data()

    def job(trainer, module):
        found = [trainer.validate(module, batches, verbose=False) for _ in range(2)]
        reads = next(each for each in trainer.callbacks if isinstance(each, Reads))
        return found, reads.seen

    callback = harness.callback(**{"warmup_steps": 1, **settings})
    harness.compare(model, job, callback, others=lambda: [Reads()])
    return callback


def assert_is_full(callback: Any) -> None:
    assert callback.stats.steps["FULL"] >= 15, callback.summary()


def assert_is_lower(callback: Any, words: str) -> None:
    assert callback.stats.steps["FULL"] == 0, callback.summary()
    reasons = [str(record.reason) for record in callback.stats.reasons]
    assert any(words in text for text in reasons), reasons


class Updates(Step):
    def measure(self, x, label, scores):
        self.metric.update(scores.softmax(1).flatten())
        return {"scores": scores, "label": label}


class ForwardDropped(Step):
    def measure(self, x, label, scores):
        self.metric(scores.flatten())
        return scores


class ForwardStored(Step):
    def measure(self, x, label, scores):
        value = self.metric(scores.flatten())  # noqa: F841
        return scores


class TwoUpdates(Step):
    def measure(self, x, label, scores):
        self.metric.update(scores.flatten())
        more = scores.relu()
        self.metric.update(more.flatten(), weight=x[:, :CLASSES].abs().flatten())
        return more


class Logged(Step):
    def measure(self, x, label, scores):
        self.metric.update(scores.flatten())
        self.log("metric", self.metric)
        return scores


class LoggedOnStep(Step):
    def measure(self, x, label, scores):
        self.metric(scores.flatten())
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        self.log("loss", scores.sum(), on_step=True, on_epoch=True)


class GivenTheBatch(Step):
    """The batch's own tensors, and views of them."""

    def measure(self, x, label, scores):
        self.metric.update(x, label, x[1:], scores, view=scores.T, nest=[{"x": x[0]}, (label,)])
        return {"x": x, "scores": scores}


class InSubmodule(Step):
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.metric = MeanMetric()

        def forward(self, x: Tensor) -> Tensor:
            self.metric.update(x.flatten())
            return x * 2

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Part()
        self.metric = self.part.metric

    def measure(self, x, label, scores):
        return self.part(scores)


class Loop(Step):
    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([MeanMetric(), CatMetric()])

    def measure(self, x, label, scores):
        for metric in (self.metric, *self.others):
            metric.update(scores.flatten())
        return scores


class Collection(Step):
    def __init__(self) -> None:
        super().__init__(MetricCollection([MeanMetric(), CatMetric()]))

    def measure(self, x, label, scores):
        self.metric.update(scores.flatten())
        return scores


class LoggedCollection(Step):
    """Two metrics share their states, and one has states of its own."""

    def __init__(self) -> None:
        super().__init__(
            MetricCollection(
                {
                    "precision": MulticlassPrecision(CLASSES, ignore_index=0),
                    "recall": MulticlassRecall(CLASSES, ignore_index=0),
                    "auroc": MulticlassAUROC(CLASSES, thresholds=5, ignore_index=0),
                },
                prefix="val_",
            )
        )

    def measure(self, x, label, scores):
        self.metric.update(scores, label)
        self.log_dict(self.metric)
        return scores


class LoggedCollectionOfValues(LoggedCollection):
    def measure(self, x, label, scores):
        self.metric(scores, label)
        self.log_dict(self.metric, on_step=True, on_epoch=True)
        return scores


class Shared(Step):
    """Two wrappers around one metric are one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.ModuleList(
            [MetricCollection({"a": self.metric}), MetricCollection({"b": self.metric})]
        )

    def measure(self, x, label, scores):
        for metric in self.both:
            metric.update(scores.flatten())
        return scores


class Strings(Step):
    def __init__(self) -> None:
        super().__init__(CharErrorRate())

    def measure(self, x, label, scores):
        self.metric.update(["a text", "another"], ["a test", "other"])
        return scores


class InContainers(Step):
    """Metrics that are no submodules. One is replaced by another at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        scores = MetricCollection([MulticlassPrecision(CLASSES), MulticlassRecall(CLASSES)])
        self.parts: dict[str, Any] = {"val": scores, "others": [Keeps(), Sum()]}

    def on_validation_epoch_start(self) -> None:
        for metric in (self.parts["val"], *self.parts["others"]):
            metric.to(self.device)  # Lightning does not move them

    def measure(self, x, label, scores):
        self.parts["val"].update(scores, label)
        for metric in self.parts["others"]:
            metric.update(scores.flatten())
        return scores

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.parts["val"].compute())
        self.parts["val"].reset()
        keeps, values = self.parts["others"]
        self.log("kept", keeps.compute() + keeps._update_count)
        self.log("sum", values.compute())
        self.parts["others"] = [keeps, Sum()]


class Tracker:
    """A plain object that keeps metrics, and updates them."""

    def __init__(self) -> None:
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.others = collections.OrderedDict(values=Sum())
        self.used = "values"

    def update(self, scores: Tensor, label: Tensor) -> None:
        self.accuracy.update(scores, label)
        self.others[self.used].update(scores.flatten())

    def all(self) -> list[Metric]:
        return [self.accuracy, *self.others.values()]


class InObject(Step):
    """Metrics in an object. In each epoch another metric comes, and the object updates that."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = Tracker()

    def on_validation_epoch_start(self) -> None:
        for metric in self.tracker.all():
            metric.to(self.device)  # Lightning does not move them

    def measure(self, x, label, scores):
        self.tracker.update(scores, label)
        return scores

    def on_validation_epoch_end(self) -> None:
        for number, metric in enumerate(self.tracker.all()):
            if metric._update_count:
                self.log(f"metric {number}", metric.compute() + metric._update_count)
        self.tracker.accuracy.reset()
        self.tracker.used = f"values {len(self.tracker.others)}"
        self.tracker.others[self.tracker.used] = Sum()


class InSlots(InObject):
    """The object has slots; its metric is replaced by another one between two batches."""

    class Slots:
        __slots__ = ("metric",)

    def __init__(self) -> None:
        super().__init__()
        self.slots = self.Slots()
        self.slots.metric = Sum()

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 6:
            self.log_dict({"sum": self.slots.metric.compute()}, on_epoch=True)
            self.slots.metric = Sum()

    def measure(self, x, label, scores):
        self.slots.metric.update(scores.flatten())
        return scores

    def on_validation_epoch_end(self) -> None:
        self.log("rest", self.slots.metric.compute())


class UsedInObject(InObject):
    def measure(self, x, label, scores):
        return scores + self.tracker.others["values"](scores.flatten()).sum()


class CountedInObject(InObject):
    def measure(self, x, label, scores):
        self.tracker.update(scores, label)
        return scores + self.tracker.accuracy._update_count


class UsedInContainer(InContainers):
    def measure(self, x, label, scores):
        return scores + self.parts["others"][1](scores.flatten()).sum()


class SetInContainer(InContainers):
    def measure(self, x, label, scores):
        self.parts["others"][1].update(scores.flatten())
        self.parts["others"][1].last = scores.sum()
        return scores

    def on_validation_epoch_end(self) -> None:
        self.log("last", self.parts["others"][1].last)


class OwnAutocast(Step):
    """The update multiplies under autocast, and the rest of the step does not."""

    class Gram(CatMetric):
        def update(self, x: Tensor) -> None:
            super().update(x @ x.T)

    def __init__(self) -> None:
        super().__init__(self.Gram())

    @torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)
    def update(self, x: Tensor) -> None:
        self.metric.update(x)

    def measure(self, x, label, scores):
        self.update(scores)
        return scores


FULL = {
    "update": lambda: Updates(),
    "update, keeps all": lambda: GivenTheBatch(Keeps()),
    "update, CatMetric": lambda: Updates(CatMetric()),
    "forward, value dropped": lambda: ForwardDropped(),
    "forward, value stored and never read": lambda: ForwardStored(),
    "two updates": lambda: TwoUpdates(),
    "logged": lambda: Logged(),
    "logged on_step": lambda: LoggedOnStep(),
    "in a submodule": lambda: InSubmodule(),
    "in a loop": lambda: Loop(),
    "a collection": lambda: Collection(),
    "a collection, logged": lambda: LoggedCollection(),
    "a collection, logged on_step": lambda: LoggedCollectionOfValues(),
    "shared by two": lambda: Shared(),
    "strings": lambda: Strings(),
    "under autocast": lambda: OwnAutocast(),
    "in containers": lambda: InContainers(),
    "in an object": lambda: InObject(),
    "in slots": lambda: InSlots(),
}


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", list(FULL))
def test_late_updates_are_eagers(harness, name, verify_replays):
    callback = run(harness, FULL[name](), verify_replays=verify_replays)
    assert_is_full(callback)


TOTAL = Sum()


class InGlobal(Step):
    def on_validation_start(self) -> None:
        TOTAL.reset()

    def measure(self, x, label, scores):
        TOTAL.update(scores.flatten())
        return scores

    def on_validation_epoch_end(self) -> None:
        self.log("total", TOTAL.compute())


def test_a_metric_in_a_global_says_where_to_put_it(harness):
    callback = run(harness, InGlobal())
    assert_is_lower(callback, "metric updated: a metric that is no submodule (")
    assert "remedy: make it an attribute of the module" in callback.summary()


class Trains(LightningModule):
    """A tracker that is updated in training, in each epoch another one of its metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, CLASSES)
        self.tracker = Tracker()

    def on_train_epoch_start(self) -> None:
        for metric in self.tracker.all():
            metric.to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label = batch
        scores = self.net(x)
        self.tracker.update(scores.detach(), label)
        return nn.functional.cross_entropy(scores, label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_epoch_end(self) -> None:
        for number, metric in enumerate(self.tracker.all()):
            if metric._update_count:
                self.log(f"metric {number}", metric.compute() + metric._update_count)
        self.tracker.used = f"values {len(self.tracker.others)}"
        self.tracker.others[self.tracker.used] = Sum()


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_metrics_in_an_object_in_training(harness, verify_replays):
    def job(trainer, module):
        trainer.fit(module, data())
        return dict(trainer.callback_metrics)

    callback = harness.callback(stages=["train"], warmup_steps=1, verify_replays=verify_replays)
    harness.compare(Trains(), job, callback, max_epochs=3)
    assert callback.stats.steps["FULL"] >= 27, callback.summary()


class Boxes(Step):
    def measure(self, x, label, scores):
        corner = scores[:, :2].abs() * 4
        boxes = torch.cat([corner, corner + scores[:, 1:3].abs() * 8 + 1], 1)
        rows = [slice(row, row + 1) for row in range(len(x))]
        found = [{"boxes": boxes[r], "scores": x[r, 0].abs(), "labels": label[r]} for r in rows]
        truth = [{"boxes": boxes[r] + 1, "labels": label[r]} for r in rows]
        self.metric.update(found, truth)
        return scores

    def on_validation_epoch_end(self) -> None:
        self.log("map", self.metric.compute()["map"])
        self.metric.reset()


def test_mean_average_precision(harness):
    pytest.importorskip("torchvision")
    pytest.importorskip("pycocotools")
    from torchmetrics.detection.mean_ap import MeanAveragePrecision

    def job(trainer, module):
        return [trainer.validate(module, data(), verbose=False) for _ in range(2)]

    callback = harness.callback(warmup_steps=1)
    harness.compare(Boxes(MeanAveragePrecision()), job, callback)
    assert_is_full(callback)


@pytest.mark.parametrize("name", ["update", "logged on_step", "in a submodule"])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "NONE"])
def test_late_updates_in_each_mode(harness, name, mode):
    run(harness, FULL[name](), mode=mode)


class Used(Step):
    def measure(self, x, label, scores):
        return scores + self.metric(scores.flatten())


class UsedLater(Step):
    def measure(self, x, label, scores):
        value = self.metric(scores.flatten())
        return scores, value


class LoggedValue(Step):
    def measure(self, x, label, scores):
        self.log("value", self.metric(scores.flatten()))


class Computes(Step):
    def measure(self, x, label, scores):
        self.metric.update(scores.flatten())
        return self.metric.compute()


class ReadsItems(Step):
    def measure(self, x, label, scores):
        for _, metric in self.metric.items():
            metric.update(scores.flatten())
        return scores


class ReadsState(Step):
    def measure(self, x, label, scores):
        self.metric.update(scores.flatten())
        return self.metric.weight


class Resets(Step):
    def measure(self, x, label, scores):
        self.metric.reset()
        self.metric.update(scores.flatten())
        return scores


class ChangesArgument(Step):
    def measure(self, x, label, scores):
        self.metric.update(scores)
        scores.mul_(2)
        return scores


class ChangesViewOfArgument(Step):
    def measure(self, x, label, scores):
        self.metric.update(scores[1:])
        scores[1].zero_()
        return scores


class ArgumentIsChanged(Step):
    class Normalizes(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.tensor(0.0), "sum")

        def update(self, x: Tensor) -> None:
            x.sub_(float(x.min()))
            self.total += x.sum()

        def compute(self) -> Tensor:
            return self.total

    def __init__(self) -> None:
        super().__init__(self.Normalizes())

    def measure(self, x, label, scores):
        self.metric.update(scores)
        return scores * 2


class Handled(Step):
    def measure(self, x, label, scores):
        with contextlib.suppress(ValueError):
            self.metric.update(scores.flatten())
        try:
            self.metric.update(scores.flatten())
        except ValueError:
            return None
        return scores


class OtherSettings(Step):
    def measure(self, x, label, scores):
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        self.metric.update(x @ x.T)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        return scores


class DrawsAfter(Step):
    """The update draws random numbers, and so does the step, later."""

    class Sampled(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.tensor(0.0), "sum")

        def update(self, x: Tensor) -> None:
            if float(x.sum()) > -1e9:
                self.total += (x * torch.rand_like(x)).sum()

        def compute(self) -> Tensor:
            return self.total

    def __init__(self) -> None:
        super().__init__(self.Sampled())

    def measure(self, x, label, scores):
        self.metric.update(scores)
        return scores + torch.rand_like(scores)


class DrawsBefore(DrawsAfter):
    def measure(self, x, label, scores):
        noise = torch.rand_like(scores)
        self.metric.update(scores)
        return scores + noise


class UsesAnother(Step):
    """A metric that updates another one, which is part of the graph."""

    class Outer(Metric):
        def __init__(self, other: Metric) -> None:
            super().__init__()
            object.__setattr__(self, "other", [other])

        def update(self, x: Tensor, label: Tensor) -> None:
            if float(x.sum()) > -1e9:
                self.other[0].update(x, label)

        def compute(self) -> Tensor:
            return self.other[0].compute()

    def __init__(self) -> None:
        super().__init__()
        self.metric = self.Outer(self.accuracy)

    def measure(self, x, label, scores):
        self.metric.update(scores, label)
        return scores


class Kind:
    """A plain object."""


KIND = Kind()


class GivenObject(Step):
    def measure(self, x, label, scores):
        self.metric.update(scores, KIND)
        return scores


class LoggedBefore(Step):
    def measure(self, x, label, scores):
        self.log("metric", self.metric)
        self.metric(scores.flatten())
        return scores


LOWER = {
    "given an object": (lambda: GivenObject(Keeps()), "that is given a Kind"),
    "logged, then updated": (LoggedBefore, "that is logged before it is updated"),
    "value used": (Used, "whose value is used"),
    "value returned": (UsedLater, "whose value is used"),
    "value logged": (LoggedValue, "whose value is used"),
    "compute": (Computes, "that the step reads"),
    "items read": (
        lambda: ReadsItems(MetricCollection([MeanMetric(), CatMetric()])),
        "that the step",
    ),
    "state read": (ReadsState, "that the step reads"),
    "reset": (Resets, "that the step reads"),
    "argument changed": (lambda: ChangesArgument(Keeps()), "whose argument the step changes later"),
    "view of argument changed": (
        lambda: ChangesViewOfArgument(Keeps()),
        "whose argument the step changes later",
    ),
    "update changes its argument": (ArgumentIsChanged, "that changes a tensor of the step"),
    "inside try and with": (Handled, "that is updated inside try or with"),
    "other settings": (OtherSettings, "that is updated under settings of its own"),
    "draws after it": (DrawsAfter, "the step draws a random number"),
    "uses another metric": (UsesAnother, "metric"),
    "in a container, value used": (UsedInContainer, "whose value is used"),
    "in an object, value used": (UsedInObject, "whose value is used"),
    "in an object, state read": (CountedInObject, "that the step reads"),
    "in a container, attribute set": (SetInContainer, "that the step changes"),
}


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", list(LOWER))
def test_what_the_step_sees_is_not_late(harness, name, verify_replays):
    make, words = LOWER[name]
    callback = run(harness, make(), verify_replays=verify_replays)
    assert_is_lower(callback, words)


def test_numbers_drawn_before_an_update_that_draws(harness):
    assert_is_full(run(harness, DrawsBefore()))


class GivenNumbers(Step):
    """Python values that change from batch to batch."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.net(batch[0])
        self.metric.update(scores, batch_idx, weight=2.0 if batch_idx % 2 else 0.5)
        self.accuracy.update(scores, batch[1])
        return scores


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_an_argument_that_is_another_number_in_each_batch(harness, verify_replays):
    run(harness, GivenNumbers(Keeps()), verify_replays=verify_replays)


class GivenTexts(LightningModule):
    """Texts of the batch, another one in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, CLASSES)
        self.metric = CharErrorRate()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.metric.update(batch["text"], ["a text"] * len(batch["text"]))
        self.log("rate", self.metric)
        return {"scores": self.net(batch["x"]), "name": batch["name"]}


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_texts_of_the_batch(harness, verify_replays):
    """Whatever is part of the key, the update gets the texts of its own batch."""
    x = torch.randn(48, 8)
    rows = [{"x": x[i], "text": "a t" + "e" * (i % 5), "name": f"{i}.txt"} for i in range(len(x))]
    batches = torch.utils.data.DataLoader(rows, batch_size=4)
    run(harness, GivenTexts(), batches, verify_replays=verify_replays)


class ReadsBatch(Step):
    """The step reads a value of its batch on the host, and the update one of the network."""

    def measure(self, x, label, scores):
        if bool((label > 0).all()):
            scores = scores * 2
        self.metric.update(scores.flatten())
        return scores


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_a_step_that_reads_its_batch_on_the_host(harness, verify_replays):
    x, label = torch.randn(80, 8), torch.ones(80, dtype=torch.long)
    label[::8] = 0
    callback = run(harness, ReadsBatch(), loader(x, label), verify_replays=verify_replays)
    assert_is_full(callback)


class Raises(Step):
    def __init__(self) -> None:
        super().__init__(Keeps())

    def measure(self, x, label, scores):
        self.metric.update(scores, x)
        return scores


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("number", [2, 3, 4, 9])
def test_an_update_that_raises(harness, number, verify_replays):
    """The error is eager's, in the same batch, and the metric is as eager leaves it."""
    x, label = torch.randn(40, 8), torch.randint(0, CLASSES, (40,))
    x[number * 4 : number * 4 + 4] = 1e9
    batches = loader(x, label)

    def job(trainer, module):
        module.net.weight.data.fill_(1)
        with pytest.raises(ValueError, match="too large"):
            trainer.validate(module, batches, verbose=False)
        reads = next(each for each in trainer.callbacks if isinstance(each, Reads))
        return reads.seen, module.metric.kept, module.metric.count, module.metric._update_count

    callback = harness.callback(warmup_steps=1, verify_replays=verify_replays)
    harness.compare(Raises(), job, callback, others=lambda: [Reads()])


class ChangesOutputs(Callback):
    """Changes the output of the step, and the batch, in place."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_: Any) -> None:
        outputs["scores"].add_(1)
        batch[0].mul_(2)


@pytest.mark.parametrize("copy_outputs", [True, False])
def test_what_an_update_keeps_shares_memory_with_outputs_as_in_eager(harness, copy_outputs):
    def job(trainer, module):
        trainer.validate(module, data(), verbose=False)
        return module.metric.kept

    callback = harness.callback(warmup_steps=1, verify_replays=0, copy_outputs=copy_outputs)
    reference, model = GivenTheBatch(Keeps()), GivenTheBatch(Keeps())
    model.load_state_dict(reference.state_dict())
    found = [
        job(harness.trainer(*others, ChangesOutputs()), module)
        for others, module in (((callback,), model), ((), reference))
    ]
    assert_same(*found)
    assert callback.stats.steps["FULL"] >= 8, callback.summary()


class Stages(Logged):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.net(batch[0])
        self.metric(scores.flatten())
        return scores

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.net(batch[0])
        self.metric.update(scores.flatten())
        return scores

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE", "PIECEWISE"])
def test_late_updates_in_all_stages(harness, mode):
    def job(trainer, module):
        trainer.fit(module, data(8), data(24))
        found = [trainer.test(module, data(), verbose=False), module.metric.compute()]
        found.append(trainer.predict(module, data()))
        found += [module.metric.compute(), trainer.validate(module, data(), verbose=False)]
        module.metric = Sum()
        return [*found, trainer.validate(module, data(), verbose=False)]

    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(Stages(Sum()), job, callback)
    assert (callback.stats.steps["FULL"] > 30) is (mode != "PIECEWISE"), callback.summary()


class Sometimes(Step):
    """The update waits for the device only where a value is large."""

    class Clips(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.tensor(0.0), "sum")
            self.limit: float | None = None

        def update(self, x: Tensor) -> None:
            if self.limit is not None:
                x = x if float(x.sum()) > self.limit else -x
            self.total = self.total + x.sum()

        def compute(self) -> Tensor:
            return self.total

    def __init__(self) -> None:
        super().__init__(self.Clips())

    def measure(self, x, label, scores):
        self.metric.update(scores)
        return scores


class Switches(Callback):
    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        pl_module.metric.limit = None if pl_module.metric.limit else 0.1


def test_a_metric_that_is_late_in_one_epoch_and_in_the_graph_in_another(harness):
    def job(trainer, module):
        found = [trainer.validate(module, data(), verbose=False) for _ in range(4)]
        reads = next(each for each in trainer.callbacks if isinstance(each, Reads))
        return found, reads.seen, module.metric.total

    callback = harness.callback(warmup_steps=1)
    harness.compare(Sometimes(), job, callback, others=lambda: [Reads(), Switches()])


class OnHost(Step):
    """Moves what it keeps to the host, and is logged."""

    def __init__(self) -> None:
        super().__init__(Sum(compute_on_cpu=True))

    def measure(self, x, label, scores):
        self.metric.update(scores.flatten())
        self.log("metric", self.metric)
        return scores


class FullUpdate(Step):
    """``forward`` updates twice, and puts the state back in between."""

    class Counted(Keeps):
        full_state_update = True

    def __init__(self) -> None:
        super().__init__(self.Counted())

    def measure(self, x, label, scores):
        self.metric(scores, label)
        return scores


def test_a_metric_that_moves_its_states_to_the_host(harness):
    assert_is_full(run(harness, OnHost()))


def test_a_metric_whose_forward_updates_twice(harness):
    assert_is_full(run(harness, FullUpdate()))


def test_verification_sees_a_wrong_argument(harness):
    """What is handed out is compared with eager's: here a value that no guard compares."""

    class Frozen(Step):
        def measure(self, x, label, scores):
            self.metric.update((scores * hidden.value).flatten())
            return label

    class Hidden:
        __slots__ = ("value",)

    hidden = Hidden()
    hidden.value = 1.0

    class Moves(Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            hidden.value += 1

    def job(trainer, module):
        hidden.value = 1.0
        return trainer.validate(module, data(), verbose=False), module.metric.compute()

    callback = harness.callback(warmup_steps=1, verify_replays=20)
    harness.compare(Frozen(), job, callback, others=lambda: [Moves()])


def test_a_diagnosis_knows_late_updates(backend):
    from cg_lightning import diagnose

    batch = (torch.randn(4, 8), torch.randint(0, CLASSES, (4,)))
    assert diagnose(Updates(), batch, stage="validate", backend="recorder").capturable()
    assert not diagnose(Used(), batch, stage="validate", backend="recorder").capturable()
