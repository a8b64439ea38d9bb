"""Values that are another one in each batch, and that a step only passes on: file names, ids.

Behaviour against eager, on the same batches; see ``capture/passed_on.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.text import CharErrorRate

from cg_lightning.core.reasons import Status
from tests.harness import Harness, predict, validate

BATCHES = 14
FIRST = 6
"""Three batches with keys of their own, then a watched one, and two of warm-up."""


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"y": self.net(batch["x"]), "name": batch["name"]}


class Batches:
    """Hands out the same objects in each epoch, as a list of batches does."""

    def __init__(self, *, number: int = BATCHES, **columns: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        self._x = torch.randn(number, 4, 3, generator=generator)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        return {"x": self._x[index], **{k: make(index) for k, make in self._columns.items()}}


def batches(number: int = BATCHES, **columns: Any) -> DataLoader:
    columns = columns or {"name": lambda index: [f"{index}-{row}.png" for row in range(4)]}
    return DataLoader(Batches(number=number, **columns), batch_size=None)  # type: ignore[arg-type]


def names(index: int) -> list[str]:
    return [f"{index}-{row}.png" for row in range(4)]


def steps(callback: Any) -> dict[str, int]:
    return {mode: number for mode, number in callback.stats.steps.items() if number}


def test_predictions_have_the_names_of_their_batches(harness: Harness):
    callback = harness.compare(Net(), predict(batches()))
    assert steps(callback) == {"NONE": FIRST, "FULL": BATCHES - FIRST}


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("verify", [0, 2])
def test_two_epochs(harness: Harness, mode: str, verify: int):
    def job(trainer, module):
        found = [trainer.predict(module, batches()) for _ in range(2)]
        return [*found, trainer.predict(module, batches(6, name=names))]

    callback = harness.callback(mode=mode, verify_replays=verify)
    harness.compare(Net(), job, callback)
    assert callback.stats.steps["FULL"] == 2 * (BATCHES - FIRST)  # each predict starts anew


class Pair(NamedTuple):
    x: torch.Tensor
    name: Any


class ReturnsAll(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch, self.net(batch["x"]), [batch["name"], (batch["name"][0], batch["x"])]


class Regroups(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        pairs = []
        for row, name in zip(y, batch["name"], strict=True):
            pairs.append(Pair(row, name))  # the step itself must name the class
        return pairs


class Ignores(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"])


class Swaps(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        first, *rest = batch["name"]
        return self.net(batch["x"]), [*rest[::-1], first], {"deep": {"names": tuple(rest)}}


class IntoTheModel(Net):
    def forward(self, x: torch.Tensor, name: Any) -> Any:
        return self.net(x), name

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch["x"], batch["name"][1])


class Keeps(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        self.kept.append({"name": batch["name"][0], "y": y})
        return y

    def on_predict_epoch_end(self) -> None:
        self.all_kept = list(self.kept)
        self.kept.clear()


class AsksForNone(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        name = batch["name"][0]
        return self.net(batch["x"]) if name is not None else batch["x"]


class ReturnsBatch(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.net(batch["x"])
        return batch


@pytest.mark.parametrize(
    "kind", [ReturnsBatch, ReturnsAll, Regroups, Ignores, Swaps, IntoTheModel, AsksForNone]
)
def test_steps_that_pass_names_on(harness: Harness, kind: type[Net]):
    callback = harness.compare(kind(), predict(batches()))
    assert steps(callback) == {"NONE": FIRST, "FULL": BATCHES - FIRST}, callback.summary()


def test_names_that_are_kept(harness: Harness):
    def job(trainer, module):
        trainer.predict(module, batches())
        return module.all_kept

    callback = harness.compare(Keeps(), job)
    assert steps(callback) == {"NONE": FIRST, "FULL": BATCHES - FIRST}


class Length(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]) * len(batch["name"][0])


class Equal(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        return y * 2 if batch["name"][0] == "7-0.png" else y


class Contains(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        return -y if "7-" in batch["name"][0] else y


class Formats(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]), f"run/{batch['name'][0]}"


class Method(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]), batch["name"][0].removesuffix(".png")


class Key(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {batch["name"][0]: self.net(batch["x"])}


class Joins(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]), "/".join(batch["name"])


class OfString(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        return y if isinstance(batch["name"][0], str) else -y


class OfType(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        return y if type(batch["name"][0]) is str else -y


class OfCallable(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        return -y if callable(batch["name"][0]) else y


class Number(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]) * int(batch["name"][0].split("-")[0])


class Sorted(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]), sorted(batch["name"], reverse=True)


class Catches(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        try:
            is_seven = batch["name"][0] in "7-0.png, 8-0.png"
        except TypeError:
            is_seven = True
        return -y if is_seven else y


class CatchesAll(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        try:
            return y * len(batch["name"][0])
        except Exception:
            return y


class Percent(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]), "%s!" % batch["name"][0]  # noqa: UP031


class Logs(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log(f"loss/{batch['name'][0][-5]}", self.net(batch["x"]).mean())


READERS = [
    *(Length, Equal, Contains, Formats, Method, Key, Joins, OfString, OfType, Number, Sorted),
    *(OfCallable, Catches, CatchesAll, Percent),
]


@pytest.mark.in_turn("verify")
@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("kind", READERS)
def test_steps_that_read_names(harness: Harness, kind: type[Net], verify: int):
    callback = harness.callback(verify_replays=verify)
    harness.compare(kind(), predict(batches(24, name=names)), callback)
    assert not callback.stats.steps.get("FULL")
    reasons = {record.reason.kind for record in callback.stats.reasons}
    assert reasons & {Status.VALUE_READ, Status.UNPROFITABLE}


def test_a_name_in_the_name_of_a_log(harness: Harness):
    harness.compare(Logs(), validate(batches(20, name=names)))


class Task(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        return (y if batch["task"] == "a" else -y), batch["name"]


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize(
    ("tasks", "least"), [("a", 17), ("ab", 12), ("aaaaab", 12), ("abcdefg", 0), (None, 0)]
)
def test_a_text_that_is_read_beside_one_that_is_passed_on(
    harness: Harness, tasks: str | None, least: int, verify: int
):
    def task(index: int) -> str:
        return f"a{index}" if tasks is None else tasks[index % len(tasks)]

    given = batches(64 if tasks is None else 32, name=names, task=task)
    callback = harness.callback(verify_replays=verify)
    harness.compare(Task(), predict(given), callback)
    assert callback.stats.steps["FULL"] >= least, callback.summary()
    if tasks is None:
        (record,) = [each for each in callback.stats.reasons if each.mode == "PIECEWISE"][-1:]
        assert record.reason.text.startswith("another value in each batch: ")
        assert callback.stats.steps["PIECEWISE"] > 4


class ReadsSome(Net):
    """A task that comes again belongs to the key, as it did before."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        return y if batch["task"] in ("a", "c") else -y


def test_texts_that_are_read_and_come_again_have_graphs_of_their_own(harness: Harness):
    given = batches(64, task=lambda index: "abcd"[index % 4] if index > 3 else "efgh"[index])
    callback = harness.compare(ReadsSome(), predict(given))
    assert callback.stats.steps["FULL"] > 16


class Scores(Net):
    def __init__(self) -> None:
        super().__init__()
        self.errors = CharErrorRate()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.errors.update(batch["name"], batch["truth"])
        self.log("errors", self.errors)
        self.log("mean", self.net(batch["x"]).mean())


def test_texts_for_a_metric_that_is_updated_late(harness: Harness):
    given = batches(name=names, truth=lambda index: [f"{index * 7}.png"] * 4)
    callback = harness.compare(Scores(), validate(given))
    assert steps(callback) == {"NONE": FIRST, "FULL": BATCHES - FIRST}


def test_numbers_of_the_batch_that_are_passed_on(harness: Harness):
    class Index(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"]), batch["id"], batch["time"]

    given = batches(30, id=lambda index: index, time=lambda index: index / 7)
    callback = harness.compare(Index(), predict(given))
    assert steps(callback) == {"NONE": 19, "FULL": 11}


def test_numbers_of_the_batch_that_are_read(harness: Harness):
    class Scale(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"]) * batch["scale"]

    callback = harness.compare(Scale(), predict(batches(30, scale=float)))
    assert not callback.stats.steps.get("FULL")


class Meta:
    """Equal only to itself, as most objects are."""

    def __init__(self, index: int) -> None:
        self.index = index


@pytest.mark.parametrize(
    "make",
    [Meta, lambda i: [Meta(i), {"at": Meta(-i)}], lambda i: Path(f"{i}.png"), lambda i: {i, "a"}],
)
def test_objects_that_are_passed_on(harness: Harness, make: Any):
    callback = harness.compare(Net(), predict(batches(name=Once(make))))
    assert steps(callback) == {"NONE": 3, "FULL": BATCHES - 3}


class Once:
    """Makes each value once, so that two Trainers get the very same objects."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self._made: dict[int, Any] = {}

    def __call__(self, index: int) -> Any:
        return self._made.setdefault(index, self._make(index))


class ReadsObject(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"]) * batch["name"].index


class ChangesObject(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        batch["name"].y = y.sum()
        return y, batch["name"]


class AsksObject(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        y = self.net(batch["x"])
        return y * 2 if getattr(batch["name"], "index", 0) > 7 else y


class AsksIfObject(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch["x"]) if batch["name"] else batch["x"]), batch["name"]


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("kind", [ReadsObject, ChangesObject, AsksObject, AsksIfObject])
def test_objects_that_are_read(harness: Harness, kind: type[Net], verify: int):
    callback = harness.callback(verify_replays=verify)
    harness.compare(kind(), predict(batches(20, name=Once(Meta))), callback)
    assert set(steps(callback)) == {"NONE", "PIECEWISE"}


def test_objects_of_changing_types(harness: Harness):
    class OnlySome(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            y = self.net(batch["x"])
            return y if batch["name"] is None else y + 1

    given = batches(24, name=lambda index: Meta(index) if index % 3 else None)
    callback = harness.compare(OnlySome(), predict(given))
    assert steps(callback)["FULL"] > 12


class Writer(Callback):
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, *_: Any) -> None:
        self.seen.append((outputs["name"] is batch["name"], list(batch["name"])))


def test_a_callback_gets_the_very_list_of_the_batch(harness: Harness):
    seen: list[Any] = []
    harness.compare(Net(), predict(batches()), others=lambda: [Writer(seen)])
    assert len(seen) == 2 * BATCHES
    assert seen[:BATCHES] == seen[BATCHES:]
    assert all(is_same for is_same, _ in seen)


def test_an_epoch_after_texts_were_read(harness: Harness):
    class Switches(Net):
        reads = False

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            y = self.net(batch["x"])
            return (y * len(batch["name"]), None) if self.reads else (y, batch["name"])

    def one(index: int) -> str:
        return "n" * (index + 1)

    def job(trainer, module):
        found = []
        for reads in (False, True, False):
            module.reads = reads
            found.append(trainer.predict(module, batches(name=one)))
        return found

    harness.compare(Switches(), job)


class Unfreezes(Callback):
    """Other weights are frozen in each iteration."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        for number, parameter in enumerate(pl_module.net.parameters()):
            parameter.requires_grad_(bool((batch_idx + 1) >> number & 1) or number == 5)


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize(
    ("others", "name"),
    [(list, names), (lambda: [Unfreezes()], names), (lambda: [Unfreezes()], lambda index: "same")],
)
def test_training_with_names_and_frozen_weights(
    harness: Harness, others: Any, name: Any, verify: int
):
    class Trains(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
            self.net[0].register_forward_hook(lambda layer, args, output: output * 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.net(batch["x"]).square().mean(), "names": batch["name"]}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def job(trainer, module):
        trainer.fit(module, batches(40, name=name))
        return [parameter.detach().clone() for parameter in module.parameters()]

    callback = harness.callback(stages=["train"], verify_replays=verify)
    harness.compare(Trains(), job, callback, others, max_epochs=1)
