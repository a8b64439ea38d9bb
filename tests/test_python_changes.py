"""Changes in Python that a step makes and a replay makes again: what it keeps, counts and sets."""

from __future__ import annotations

import collections
import copy
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.harness import Harness, assert_same, images


def plain(value: Any) -> Any:
    """Return what a value holds, in a form that can be compared; tensors are copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [type(value).__name__, *map(plain, value)]
    return plain(vars(value)) if isinstance(value, Store) else value


class Store:
    """A plain object that a module holds."""

    def __init__(self) -> None:
        self.total = 0
        self.items: list[Any] = []
        self.last: Any = None


class Classifier(LightningModule):
    """Keeps in ``history`` what the step left behind at the end of each epoch."""

    watched: tuple[str, ...] = ("kept",)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.kept: Any = []
        self.history: list[Any] = []
        self.epochs = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return self.keep(x, y, logits, cross_entropy(logits, y))

    def on_validation_epoch_end(self) -> None:
        self.history.append({name: plain(getattr(self, name, "none")) for name in self.watched})
        self.epochs += 1
        self.between()

    def between(self) -> None:
        """Do something to what the step keeps, between epochs."""


def run(harness: Harness, model: Classifier, number: int = 24, **settings: Any) -> Any:
    """Validate three times, with and without the callback; compare outputs and all that is kept."""
    callback = harness.callback(**{"warmup_steps": 1, **settings})

    def job(trainer, module):
        loader = images(number)
        return [trainer.validate(module, loader, verbose=False) for _ in range(3)], module.history

    harness.compare(model, job, callback)
    return callback.stats


class Outputs(Classifier):
    """What Lightning's documentation tells people to write."""

    def keep(self, x, y, logits, loss):
        self.kept.append(loss)
        return loss

    def between(self) -> None:
        assert len({id(out) for out in self.kept}) == len({out.data_ptr() for out in self.kept})
        assert len({out.data_ptr() for out in self.kept}) == len(self.kept) == 6
        self.log("mean", torch.stack(self.kept).mean())
        self.kept.clear()


class NestedOutputs(Classifier):
    def keep(self, x, y, logits, loss):
        self.kept.append({"loss": loss, "pairs": [(logits.argmax(1), y)], "size": len(y)})


class SameAsOutput(Classifier):
    def keep(self, x, y, logits, loss):
        out = {"loss": loss, "logits": logits}
        self.kept.append(out)
        self.kept.append(logits)
        return out

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert self.kept[-2] is outputs
        assert self.kept[-1] is outputs["logits"]
        outputs["late"] = batch_idx


class OwnBatch(Classifier):
    def keep(self, x, y, logits, loss):
        self.kept.append(y)

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert self.kept[-1] is batch[1]


class PerKey(Classifier):
    watched = ("kept", "by_name", "recent")

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"loss": [], "more": [[], []]}
        self.by_name = collections.defaultdict(list)
        self.recent = collections.deque(maxlen=4)

    def keep(self, x, y, logits, loss):
        self.kept["loss"].append(loss)
        self.kept["more"][1].append(logits.sum())
        self.by_name["a"].append(loss * 2)
        self.recent.append(loss)

    def between(self) -> None:
        self.by_name.clear()


class Counts(Classifier):
    watched = ("total", "half", "sums", "text", "store")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.half = 0.1
        self.sums = {"n": 0, "loss": 0.0}
        self.text = ""
        self.store = Store()

    def keep(self, x, y, logits, loss):
        self.total += 1
        self.half += 0.1
        self.half += 0.7
        self.sums["n"] += len(y)
        self.sums["loss"] += loss
        self.text += "."
        self.store.total += loss
        self.store.items.append(loss)
        self.store.last = logits
        return loss

    def between(self) -> None:
        self.sums = {"n": 0, "loss": 0.0}


class TotalsOfTensors(Classifier):
    """The total is a number at first and a tensor later; the operand changes after it was added."""

    watched = ("total", "items")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.items: list[Any] = []

    def keep(self, x, y, logits, loss):
        self.total += loss
        added = [loss]
        self.items += added
        added.append(logits)
        loss.mul_(2)
        return loss

    def between(self) -> None:
        self.total = 0


class Last(Classifier):
    watched = ("last", "shape", "pair", "flag", "new")

    def __init__(self) -> None:
        super().__init__()
        self.last = None
        self.flag = False

    def keep(self, x, y, logits, loss):
        self.last = logits
        self.shape = tuple(x.shape)
        self.pair = [loss, {"y": y}]
        self.flag = True
        self.new = self.last * 2
        return self.new

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert self.new is outputs
        assert self.pair[1]["y"] is batch[1]
        assert self.flag
        self.flag = False


class OtherKind(list):
    def append(self, item) -> None:
        super().append(item)
        super().append("twice")


class Swapped(Classifier):
    """The list is replaced by another, by a subclass, and by a list again."""

    def keep(self, x, y, logits, loss):
        self.kept.append(loss)

    def between(self) -> None:
        self.kept = [[], OtherKind(), []][self.epochs % 3]


class Inside(Classifier):
    """A submodule keeps its input."""

    watched = ("kept",)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)
            self.seen: list[Tensor] = []
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.latest = x.mean()
            self.seen.append(self.layer(x))
            return self.layer(x)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), Inside.Block())

    def keep(self, x, y, logits, loss):
        self.net[1].seen.append(loss)
        return loss

    def between(self) -> None:
        block = self.net[1]
        self.history.append([plain(block.seen), block.calls, plain(block.latest)])
        block.seen.clear()


FULL = [
    *(Outputs, NestedOutputs, SameAsOutput, OwnBatch, PerKey, Counts, TotalsOfTensors, Last),
    *(Swapped, Inside),
]


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("kind", FULL, ids=lambda kind: kind.__name__)
def test_changes_are_repeated(harness, kind, verify, mode) -> None:
    stats = run(harness, kind(), mode=mode, verify_replays=verify)
    assert mode == "PIECEWISE" or stats.steps["FULL"] >= 8, stats.reasons


@pytest.mark.parametrize("kind", FULL, ids=lambda kind: kind.__name__)
def test_changes_are_repeated_with_partial_batches(harness, kind) -> None:
    if kind is not Outputs:
        run(harness, kind(), number=22, copy_outputs=False)


SHARED: list[Any] = []


class Length(Classifier):
    def keep(self, x, y, logits, loss):
        self.kept.append(loss)
        return loss * len(self.kept)


class LastItem(Classifier):
    def keep(self, x, y, logits, loss):
        self.kept.append(loss)
        return loss + self.kept[0]


class Alias(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.other = self.kept

    def keep(self, x, y, logits, loss):
        self.kept.append(loss)
        return loss + sum(self.other)


class LocalName(Classifier):
    def keep(self, x, y, logits, loss):
        kept = self.kept
        kept.append(loss)
        return loss * len(kept)


class BoundMethod(Classifier):
    def on_validation_epoch_start(self) -> None:
        self.add = self.kept.append

    def keep(self, x, y, logits, loss):
        self.add(loss)
        return loss


class CountIsRead(Classifier):
    watched = ("total",)
    total = 0

    def keep(self, x, y, logits, loss):
        self.total += 1
        return loss * self.total


class ReadBeforeSet(Classifier):
    watched = ("last",)

    def __init__(self) -> None:
        super().__init__()
        self.last = 0

    def keep(self, x, y, logits, loss):
        loss = loss + self.last
        self.last = loss
        return loss


class AskedFor(Classifier):
    def keep(self, x, y, logits, loss):
        if not hasattr(self, "made"):
            self.made = loss
            return loss * 3
        self.made = loss
        return loss


class ThroughVars(Classifier):
    def keep(self, x, y, logits, loss):
        self.kept.append(loss)
        return loss * len(vars(self)["kept"])


class Lasting(Classifier):
    """What it appends lives longer than the step, and changes later."""

    def __init__(self) -> None:
        super().__init__()
        self.meta = {"epoch": 0}
        self.table = torch.ones(2)

    def keep(self, x, y, logits, loss):
        self.kept.append(self.meta)
        self.kept.append(self.table)
        return loss

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.table += 1

    def between(self) -> None:
        self.meta["epoch"] += 1


class WholeBatch(Classifier):
    def validation_step(self, batch, batch_idx):
        self.kept.append(batch)
        return self(batch[0])

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert self.kept[-1] is batch
        batch.append(batch_idx)


class Property(Classifier):
    watched = ("_hidden", "sets")
    sets = 0

    @property
    def last(self) -> Any:
        return self._hidden

    @last.setter
    def last(self, value: Any) -> None:
        self._hidden = value
        self.sets += 1

    def keep(self, x, y, logits, loss):
        self.last = loss
        return loss


class OwnSetattr(Classifier):
    watched = ("last", "sets")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "last":
            super().__setattr__("sets", getattr(self, "sets", 0) + 1)
        super().__setattr__(name, value)

    def keep(self, x, y, logits, loss):
        self.last = loss
        return loss


class SetByName(Classifier):
    watched = ("last", "first", "kept")

    def keep(self, x, y, logits, loss):
        setattr(self, "last", loss)  # noqa: B010
        self.first = self.kept = [loss]
        return loss


class EverySecond(Classifier):
    watched = ("kept", "count", "every")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.every = 2

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        if batch_idx % self.every == 0:
            self.kept.append(logits)
            self.count += 1
        return logits

    def between(self) -> None:
        self.every = 3 - self.every


class OneListInTwoModules(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[1].kept = self.kept

    def keep(self, x, y, logits, loss):
        self.kept.append(loss)
        return loss * len(self.net[1].kept)


class OtherKey(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.kept = {"a": 0, "b": 0, "lists": {"a": [], "b": []}}
        self.split = "a"

    def keep(self, x, y, logits, loss):
        self.kept[self.split] += len(y)
        self.kept["lists"][self.split].append(loss)
        self.kept[f"{self.split} last"] = loss

    def between(self) -> None:
        self.split = "ab"[self.epochs % 2]
        if self.epochs == 2:
            del self.kept["lists"]["a"][:]


class GlobalList(Classifier):
    def keep(self, x, y, logits, loss):
        SHARED.append(loss)
        return loss * len(SHARED)

    def between(self) -> None:
        SHARED.clear()


class KeepsAnObject(Classifier):
    def keep(self, x, y, logits, loss):
        store = Store()
        store.last = loss
        self.kept.append(store)
        return loss


class Removes(Classifier):
    def keep(self, x, y, logits, loss):
        self.kept.append(loss)
        if len(self.kept) > 3:
            self.kept.pop(0)
        return torch.stack(self.kept).mean()


class SharedInside(Classifier):
    def keep(self, x, y, logits, loss):
        out = {"loss": loss}
        self.kept.append({"out": out})
        return out

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        outputs["late"] = batch_idx


class Fails(Classifier):
    """The epoch ends with an error in the middle; what was kept is there."""

    def keep(self, x, y, logits, loss):
        self.kept.append(loss)
        return loss

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        if self.epochs == 1 and batch_idx == 4:
            self.epochs += 1
            self.history.append(plain(self.kept))
            raise KeyError("in a hook")


class Views(Classifier):
    """Views of the batch, of a parameter and of one tensor; a tensor that is changed afterwards."""

    def keep(self, x, y, logits, loss):
        halves = logits.chunk(2, 1)
        self.kept.append([x[:1], self.net[1].bias[:2], *halves])
        logits.mul_(2)

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        item = self.kept[-1]
        assert item[0].data_ptr() == batch[0].data_ptr()
        assert item[2].untyped_storage().data_ptr() == item[3].untyped_storage().data_ptr()


class Totals(NamedTuple):
    number: int
    loss: Tensor


class Tuples(Classifier):
    watched = ("kept", "last")

    def keep(self, x, y, logits, loss):
        self.kept.append(Totals(len(y), loss))
        self.last = Totals(3, logits)
        self.kept.append(None)
        self.kept.append("text")


NOT_READ = [Property, SetByName, EverySecond, OtherKey, Views, Tuples]
"""What is FULL all the same."""
OTHERS = [
    *(Length, LastItem, Alias, LocalName, BoundMethod, CountIsRead, ReadBeforeSet, AskedFor),
    *(ThroughVars, Lasting, WholeBatch, OwnSetattr, OneListInTwoModules, GlobalList),
    *(KeepsAnObject, Removes, SharedInside, *NOT_READ),
]


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_what_is_read_is_not_frozen(harness, kind, verify, mode) -> None:
    stats = run(harness, kind(), mode=mode, verify_replays=verify)
    assert (stats.steps["FULL"] > 0) is (kind in NOT_READ), stats.reasons


def test_error_in_a_hook(harness) -> None:
    model = Fails()
    reference = copy.deepcopy(model)
    for module, callbacks in ((model, [harness.callback(warmup_steps=1)]), (reference, [])):
        torch.manual_seed(1)
        trainer = harness.trainer(*callbacks)
        trainer.validate(module, images(24), verbose=False)
        with pytest.raises(KeyError):
            trainer.validate(module, images(24), verbose=False)
        trainer.validate(module, images(24), verbose=False)
    assert_same(model.history, reference.history)
