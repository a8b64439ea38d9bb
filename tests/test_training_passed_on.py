"""Texts, numbers and objects of the batch in training: passed on, or read in many ways."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from tests.test_training import Classifier, replayed

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*deterministic",
)


class Record:
    """An object of the user's."""

    def __init__(self, index):
        self.factor = 1.0 + index
        self.x = torch.full((4, 8), float(index))

    def __eq__(self, other):
        return isinstance(other, Record) and self.factor == other.factor

    __hash__ = None


class Rows:
    def __init__(self, make, number=12):
        generator = torch.Generator().manual_seed(3)
        self._x = torch.randn(number, 4, 8, generator=generator)
        self._y = torch.randint(0, 4, (number, 4), generator=generator)
        self._make = make

    def __len__(self):
        return len(self._x)

    def __getitem__(self, index):
        return {"x": self._x[index], "y": self._y[index], "more": self._make(index)}


MORE = {
    "texts": lambda index: [f"{index}-{row}.png" for row in range(4)],
    "number": lambda index: index,
    "object": Record,
    "text or none": lambda index: [f"{index}" if index % 2 else None, f"{index}"],
    "text and flag": lambda index: [f"{index}", index % 2 == 0],
}


def rows(kind):
    return DataLoader(Rows(MORE[kind]), batch_size=None, collate_fn=lambda row: row, shuffle=True)


class Net(Classifier):
    def step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class Returned(Net):
    def training_step(self, batch, batch_idx):
        return {"loss": self.step(batch, batch_idx), "more": batch["more"], "batch": [batch]}


class Nested(Net):
    def training_step(self, batch, batch_idx):
        extra = {"all": (batch["more"], [batch["more"], {"deep": batch["more"]}])}
        return {"loss": self.step(batch, batch_idx), **extra}


class Unused(Net):
    def training_step(self, batch, batch_idx):
        return self.step(batch, batch_idx)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(Returned, "texts"), (Nested, "texts"), (Unused, "texts"), (Nested, "object")],
)
@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
def test_passed_on(fit, make, kind, verify_replays):
    callback = fit(make(), train=rows(kind), settings={"verify_replays": verify_replays})
    assert replayed(callback) > 5, callback.summary()


class ReadsText(Net):
    def training_step(self, batch, batch_idx):
        return self.step(batch, batch_idx) * (2 if "1" in str(batch["more"]) else 1)


class ReadsLength(Net):
    def training_step(self, batch, batch_idx):
        return self.step(batch, batch_idx) * len(str(batch["more"]))


class ReadsInTry(Net):
    def training_step(self, batch, batch_idx):
        try:
            factor = int(batch["more"][0].split("-")[0])
        except Exception:
            factor = 5
        return self.step(batch, batch_idx) * (1 + factor)


class ReadsType(Net):
    def training_step(self, batch, batch_idx):
        factor = 2 if type(batch["more"][0]) is str else 1
        return self.step(batch, batch_idx) * factor


class Multiplies(Net):
    def training_step(self, batch, batch_idx):
        more = batch["more"]
        return self.step(batch, batch_idx) * (more[0] if isinstance(more, list) else more)


class ReadsObject(Net):
    def training_step(self, batch, batch_idx):
        more = batch["more"]
        x = batch["x"] + more.x.to(batch["x"].device)  # Lightning moves no such object
        return self.step({**batch, "x": x}, batch_idx) * more.factor


class LogsName(Net):
    def training_step(self, batch, batch_idx):
        loss = self.step(batch, batch_idx)
        self.log(f"loss of {str(batch['more'])[:2]}", loss, on_step=True)
        return loss


class Keeps(Net):
    def __init__(self):
        super().__init__()
        self.kept = []
        self.last = None

    def training_step(self, batch, batch_idx):
        self.kept.append(batch["more"])
        self.last = batch["more"]
        return self.step(batch, batch_idx)

    def on_train_epoch_end(self):
        number = sum(len(str(each)) for each in self.kept) + len(str(self.last))
        self.log("kept", float(number))
        self.kept.clear()


READS = [
    *[(make, "texts") for make in (ReadsText, ReadsLength, ReadsInTry, ReadsType, LogsName, Keeps)],
    *[(make, "number") for make in (ReadsText, ReadsLength, Multiplies, Keeps, Returned)],
    *[(make, "text or none") for make in (ReadsText, ReadsType, Keeps)],
    (ReadsObject, "object"),
    (Returned, "text and flag"),
]


@pytest.mark.parametrize(("make", "kind"), READS)
@pytest.mark.parametrize("verify_replays", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_read(fit, make, kind, verify_replays):
    """Weights, losses and logs are those of eager; which steps are graphs does not matter."""
    settings = {"verify_replays": verify_replays}
    fit(make(), train=rows(kind), settings=settings, max_epochs=4)


class FreezesInTurn(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net[0].requires_grad_(trainer.global_step % 3 != 1)


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. all graphs of max_graphs=3 are in use")
@pytest.mark.parametrize("verify_replays", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_what_the_closure_depends_on_is_never_left_out(fit, verify_replays):
    """Which weights are frozen, and the number of micro-batches, change with the texts."""
    callback = fit(
        Returned(),
        train=rows("texts"),
        others=lambda: [FreezesInTurn(), GradientAccumulationScheduler({0: 1, 2: 2, 4: 3, 5: 1})],
        settings={"verify_replays": verify_replays, "max_graphs": 3},
        max_epochs=7,
    )
    assert replayed(callback) > 5, callback.summary()
