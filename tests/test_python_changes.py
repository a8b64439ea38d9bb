"""Changes in Python that a step makes and a replay makes again: what it keeps, counts and sets."""

from __future__ import annotations

import collections
import copy
import functools
import inspect
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import CatMetric

from cg_lightning.diagnosis.accumulators import accumulates
from tests.harness import Harness, assert_same, images


def plain(value: Any) -> Any:
    """Return what a value holds, in a form that can be compared; tensors are copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [type(value).__name__, *map(plain, value)]
    if isinstance(value, (Store, AverageMeter)):
        return plain(vars(value))
    return type(value).__name__ if callable(value) else value  # a module, or a function


class AverageMeter:
    """As in the examples of PyTorch for ImageNet, and in many copies of it."""

    def __init__(self, name: str = "", fmt: str = ":f") -> None:
        self.name = name
        self.fmt = fmt
        self.reset()

    def reset(self) -> None:
        self.val = 0
        self.avg = 0
        self.sum = 0
        self.count = 0

    def update(self, val: Any, n: int = 1) -> None:
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


class MoreOrLess:
    """Methods that only accumulate, and methods that may do more."""

    def adds(self, value: Any, n: int = 1) -> Any:
        if isinstance(value, (float, torch.Tensor)):
            value = -value if n else value / 2
        elif isinstance(value, int):
            pass
        self.sums["all"] = [value, (n, None)]
        self.sums.append(self.count(value))
        self.total += value * n
        return self.total

    def count(self, value: Any) -> Any:
        return value.detach().sum()

    def calls_a_global(self, value: Any) -> None:
        self.total += plain(value)

    def calls_a_method_in_place(self, value: Any) -> None:
        value.add_(1)

    def gives_a_keyword(self, value: Any) -> None:
        self.total += value.sum(dim=0)

    def takes_all(self, *values: Any) -> None:
        self.total += values[0]

    def deletes(self, value: Any) -> None:
        del self.total

    def reads_a_global(self, value: Any) -> None:
        self.total += __name__

    def sets_what_is_added_to(self, value: Any) -> None:
        self.total = value
        self.total += 1

    def sets_another_object(self, value: Any) -> None:
        value.total = 1


def test_which_methods_only_accumulate():
    methods = [name for name in vars(MoreOrLess) if name[0] != "_"]
    found = [name for name in methods if accumulates(MoreOrLess, name)]
    assert found == ["adds", "count"]


class OtherMeters(AverageMeter):
    """Methods that do more than accumulate, or that cannot be read."""

    weight = 2.0

    def __init__(self, owner: Any = None) -> None:
        super().__init__()
        self.owner = owner
        self.values: list[Any] = []
        self.smooth: Any = None

    def branches(self, val: Any) -> None:
        """Keep all, and the first one of each three as it is."""
        if isinstance(val, Tensor) and self.count % 3 == 0:
            self.smooth = val.detach() * 1.0
        else:
            self.smooth = 0.9 * self.smooth + 0.1 * val
        self.values.append(val)
        self._count(self.weight)

    def _count(self, n: float) -> None:
        self.count += n

    def changes_the_argument(self, val: Any) -> None:
        self.sum = val
        self.sum += 1

    def in_place(self, val: Any) -> None:
        val.add_(1)
        self.count += 1

    def tells_its_owner(self, val: Any) -> None:
        self.count += 1
        self.owner.scale = self.count

    def changes_a_global(self, val: Any) -> None:
        self.count += 1
        SHARED.append(val)

    @torch.no_grad()
    def decorated(self, val: Any) -> None:
        self.count += 1


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


class Features(Classifier):
    """What a hook keeps is read again in the same step, by a constant and by a variable."""

    watched = ("features", "store")

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Any] = {}
        self.store = Store()
        self.net[0].register_forward_hook(self.keep_first)
        self.net[1].register_forward_hook(self.keep_second)

    def keep_first(self, module, args, output) -> None:
        self.features["layer0"] = output

    def keep_second(self, module, args, output) -> None:
        key = "layer1"
        self.features[key] = output

    def keep(self, x, y, logits, loss):
        name = "layer0"
        self.store.last = [self.features["layer1"].mean()]
        self.store.last[0].add_(1)
        self.features["both"] = {"a": self.features[name] + 1}
        return self.features["both"]["a"].sum() + self.store.last[0], self.features["layer1"]

    def between(self) -> None:
        if self.epochs == 2:
            self.features.clear()


class Meters(Classifier):
    watched = ("losses", "meters")

    def __init__(self) -> None:
        super().__init__()
        self.losses = AverageMeter("loss")
        self.meters = {"top1": AverageMeter(), "size": AverageMeter()}

    def keep(self, x, y, logits, loss):
        self.losses.update(loss, x.size(0))
        for name in ("top1",):
            self.meters[name].update((logits.argmax(1) == y).float().mean(), n=len(y))
        self.meters["size"].update(len(x))
        return loss

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert self.losses.val is outputs

    def between(self) -> None:
        self.losses.reset()
        self.meters["top1"] = AverageMeter()


class Branches(Classifier):
    watched = ("meter",)

    def __init__(self) -> None:
        super().__init__()
        self.meter: Any = OtherMeters()

    def keep(self, x, y, logits, loss):
        self.meter.branches(loss)
        return loss

    def between(self) -> None:
        if self.epochs == 2:  # for which no graph was made
            self.meter.update = lambda val: None
            self.meter.owner = self


class Methods(Classifier):
    """Containers that are filled by their methods, also in hooks."""

    watched = ("kept", "recent", "features", "values")

    def __init__(self) -> None:
        super().__init__()
        self.recent: Any = collections.deque(maxlen=4)
        self.features: dict[str, Any] = {}
        self.values: dict[str, Any] = {"old": 1}
        self.net[0].register_forward_hook(functools.partial(self.keep_layer, "layer0"))
        self.net[1].register_forward_hook(functools.partial(self.keep_layer, "layer1"))

    def keep_layer(self, name, module, args, output) -> None:
        self.features.__setitem__(name, output)

    def keep_between(self, loss):
        yield loss + 1
        self.kept.append(loss + 2)
        yield loss + 3

    def keep(self, x, y, logits, loss):
        self.kept.extend(logits)
        self.kept.extend([loss, {"y": y}])
        self.kept.extend(logits[:1] for _ in range(2))
        self.kept.extend(self.keep_between(loss))
        self.recent.appendleft(loss)
        self.recent.extend((y, loss * 2))
        (lambda value: self.recent.append(value))(loss)
        self.values.update(loss=loss, y=y)
        self.values.update({"size": len(y), "old": logits})
        return self.features["layer0"].sum() + self.features["layer1"].mean()

    def between(self) -> None:
        self.kept.clear()


FULL = [
    *(Outputs, NestedOutputs, SameAsOutput, OwnBatch, PerKey, Counts, TotalsOfTensors, Last),
    *(Swapped, Inside, Features, Meters, Branches, Methods),
]


@pytest.mark.in_turn("verify")
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


class StaleEntry(Classifier):
    """Reads what a step before has set, and then sets it."""

    watched = ("entries",)

    def __init__(self) -> None:
        super().__init__()
        self.entries = {"a": torch.zeros(()), "b": torch.zeros(())}

    def keep(self, x, y, logits, loss):
        self.entries["b"] = loss
        loss = loss + self.entries["a"]
        self.entries["a"] = loss * 0.5
        return loss + self.entries["a"]


class OtherEntry(Classifier):
    """An entry that was set in another dict, and the last item of a list."""

    watched = ("entries", "lists")

    def __init__(self) -> None:
        super().__init__()
        self.entries = {0: torch.zeros(()), 1: torch.zeros(())}
        self.lists: list[Any] = [0.0]

    def keep(self, x, y, logits, loss):
        for key in self.entries:
            self.entries[key] = loss + key
        self.lists[-1] = loss
        self.lists.append(loss + 1)
        return self.lists[-1]


class UpdatedEntry(Classifier):
    """An entry that was set, and set again by ``update``."""

    watched = ("entries",)

    def __init__(self) -> None:
        super().__init__()
        self.entries = {"a": torch.zeros(())}

    def keep(self, x, y, logits, loss):
        self.entries["a"] = loss
        self.entries.update(a=loss + 1)
        return self.entries["a"] * 2


class SharedEntry(Classifier):
    """An entry that was set, and set again under another name of the same object."""

    watched = ("store", "other")

    def __init__(self) -> None:
        super().__init__()
        self.store = self.other = Store()

    def keep(self, x, y, logits, loss):
        self.store.last = loss
        self.other.last = loss + 1
        return self.store.last * 2


class Meter(Classifier):
    """Calls a method of a meter."""

    watched = ("meter",)
    method = "update"

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1
        self.meter = OtherMeters()

    def between(self) -> None:
        self.meter.count = 0


class MeterIsRead(Meter):
    def keep(self, x, y, logits, loss):
        self.meter.update(loss, 2)
        return loss * self.meter.count


class ArgumentIsChanged(Meter):
    def keep(self, x, y, logits, loss):
        self.meter.update(loss, 2)
        loss.mul_(2)
        return loss


class ArgumentIsChangedByTheMeter(Meter):
    def keep(self, x, y, logits, loss):
        self.meter.changes_the_argument(loss)
        return loss * 2


class ArgumentIsChangedInPlace(Meter):
    def keep(self, x, y, logits, loss):
        self.meter.in_place(loss)
        return loss * 2


class OwnerIsTold(Meter):
    def __init__(self) -> None:
        super().__init__()
        self.meter.owner = self

    def keep(self, x, y, logits, loss):
        self.meter.tells_its_owner(loss)
        return loss * self.scale


class GlobalIsChanged(Meter):
    def keep(self, x, y, logits, loss):
        self.meter.changes_a_global(loss)
        return loss * len(SHARED)

    def between(self) -> None:
        SHARED.clear()


class Decorated(Meter):
    def keep(self, x, y, logits, loss):
        self.meter.decorated(loss)
        return loss


class ErrorIsHandled(Meter):
    def keep(self, x, y, logits, loss):
        try:
            self.meter.update(loss, 0)
        except RuntimeError:
            return loss * 2
        return loss


class ResultIsUsed(Meter):
    def keep(self, x, y, logits, loss):
        done = self.meter.update(loss)
        return loss if done is None else done


NOT_READ = [Property, SetByName, EverySecond, OtherKey, Views, Tuples]
"""What is FULL all the same."""


class OwnMethods(Classifier):
    """An object has methods that are named as those of containers."""

    class Fills(Store):
        def extend(self, values) -> None:
            self.items.extend(values)
            self.total = len(self.items)

        def __setitem__(self, key, value) -> None:
            self.total = len(self.items)

    watched = ("store",)

    def __init__(self) -> None:
        super().__init__()
        self.store = self.Fills()

    def keep(self, x, y, logits, loss):
        self.store.extend([loss])
        self.store.__setitem__("total", loss)
        return loss


class KeepsAnAttribute(Classifier):
    """What is kept has an attribute, which no copy has."""

    def keep(self, x, y, logits, loss):
        loss.size_of_batch = len(x)
        self.kept.append(loss)
        copy = logits.cpu()
        copy.size_of_batch = len(x)
        self.kept.append(copy)
        return logits * 2

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert [each.size_of_batch for each in self.kept[-2:]] == [len(batch[0])] * 2


class WhatIsUpdatedIsRead(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.kept = {}

    def keep(self, x, y, logits, loss):
        before = self.kept.get("loss", 0)
        self.kept.update(loss=loss)
        return loss + before


OTHERS = [
    *(Length, LastItem, Alias, LocalName, BoundMethod, CountIsRead, ReadBeforeSet, AskedFor),
    *(ThroughVars, Lasting, WholeBatch, OwnSetattr, OneListInTwoModules, GlobalList),
    *(KeepsAnObject, Removes, SharedInside, *NOT_READ),
    *(UpdatedEntry, SharedEntry, StaleEntry, OtherEntry),
    *(MeterIsRead, ArgumentIsChanged, ArgumentIsChangedByTheMeter),
    *(ArgumentIsChangedInPlace, OwnerIsTold, GlobalIsChanged, Decorated, ErrorIsHandled),
    *(ResultIsUsed, OwnMethods, WhatIsUpdatedIsRead, KeepsAnAttribute),
]


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize(
    ("mode", "verify"),
    [("FULL", 0), ("FULL_AND_PIECEWISE", 2), ("FULL_AND_PIECEWISE", 0), ("FULL", 2)],
)
@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_what_is_read_is_not_frozen(harness, kind, verify, mode) -> None:
    stats = run(harness, kind(), mode=mode, verify_replays=verify)
    assert (stats.steps["FULL"] > 0) is (kind in NOT_READ), stats.reasons


def test_the_reason_names_the_line_that_reads_or_changes(harness) -> None:
    for kind in (Length, MeterIsRead):
        (record,) = [each for each in run(harness, kind()).reasons if each.mode == "PIECEWISE"]
        file, line = record.reason.location.split(":")
        code = kind.keep.__code__
        assert file == code.co_filename
        assert int(line) - code.co_firstlineno in (1, 2)
    (record,) = [each for each in run(harness, Decorated()).reasons if each.mode == "PIECEWISE"]
    method = inspect.unwrap(OtherMeters.decorated).__code__
    assert record.reason.location == f"{method.co_filename}:{method.co_firstlineno + 2}"


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


class WithHostValue(Classifier):
    """What is added depends on a value that the batch decides."""

    watched = ("kept", "count")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def keep(self, x, y, logits, loss):
        has_three = bool((y == 3).any())
        self.kept.append({"loss": loss, "y": y, "three": has_three})
        self.count += int(has_three)
        if has_three:
            self.kept.append(loss * 3)
        return loss


class WithLateUpdate(Classifier):
    """A metric that no graph can hold is updated after each replay."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = CatMetric()

    def keep(self, x, y, logits, loss):
        self.mean.update(loss)
        self.kept.append(loss)
        return loss


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("kind", [WithHostValue, WithLateUpdate], ids=lambda kind: kind.__name__)
def test_changes_with_what_else_a_graph_may_have(harness, kind, verify) -> None:
    stats = run(harness, kind(), number=48, verify_replays=verify)
    assert stats.steps["FULL"] > 0, stats.reasons
