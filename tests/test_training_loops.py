"""Trainings that Lightning runs in another way: finders, several loaders, no or two optimizers."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader

from tests.harness import assert_same, loader
from tests.test_training import KeepAll, RecordingLogger, replayed
from tests.test_training_hunt import Step

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*deterministic",
    "ignore:.*configure_optimizers. returned .None.",
    "ignore:Using `LRScheduler",
)


def rows(number=34, batch_size=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 8, generator=generator)
    labels = torch.randint(0, 4, (number,), generator=generator)
    return loader(x, labels, batch_size=batch_size, shuffle=True)


class Tuned(Step):
    """A finder sets its rate, or the size of its batches."""

    rate = 0.1
    batch_size = 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)

    def train_dataloader(self):
        return rows(40, self.batch_size)

    def val_dataloader(self):
        return rows(12)


class FindsInEachEpoch(LearningRateFinder):
    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            self.lr_find(trainer, pl_module)


def find_rate(trainer, model):
    found = Tuner(trainer).lr_find(model, num_training=20, attr_name="rate")
    trainer.fit(model)
    return found.results["loss"], found.suggestion()


def find_size(trainer, model):
    found = Tuner(trainer).scale_batch_size(model, max_trials=3, steps_per_trial=4)
    trainer.fit(model)
    return found


def fit_only(trainer, model):
    trainer.fit(model)


def _with_rate(make):
    return lambda: [make(num_training_steps=20, attr_name="rate")]


FINDERS = {
    "a rate, before": (find_rate, list),
    "a rate, as a callback": (fit_only, _with_rate(LearningRateFinder)),
    "a rate, in each epoch": (fit_only, _with_rate(FindsInEachEpoch)),
    "a size, before": (find_size, list),
    "a size, as a callback": (fit_only, lambda: [BatchSizeFinder(max_trials=3, steps_per_trial=4)]),
}


class Several(Step):
    def training_step(self, batch, batch_idx):
        given = [each for each in batch.values() if each is not None]
        loss = sum(self.loss(*each) * (1 + place) for place, each in enumerate(given))
        self.log("loss", loss)
        return loss


class ManyLoaders(Several):
    mode = "max_size_cycle"

    def train_dataloader(self):
        return CombinedLoader({"a": rows(), "b": rows(18, 2, 5)}, self.mode)


class Shortest(ManyLoaders):
    mode = "min_size"


class Longest(ManyLoaders):
    mode = "max_size"


class NewLoaders(Step):
    """The number, size and values of batches are those of the epoch."""

    def train_dataloader(self):
        epoch = self.current_epoch
        return rows(6 * (4 + epoch), 4 + epoch, epoch)


class NoOptimizer(Step):
    def configure_optimizers(self):
        return None

    def train_dataloader(self):
        return rows()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.sub_(parameter.grad, alpha=0.01)
                parameter.grad = None


class TwoPlayers(NoOptimizer):
    """Lightning asks for manual optimization."""

    def configure_optimizers(self):
        return [torch.optim.SGD(each.parameters(), 0.1) for each in (self.net[0], self.net[4])]


class Seen(KeepAll):
    def on_train_batch_end(self, trainer, *arguments):
        if trainer.optimizers:
            super().on_train_batch_end(trainer, *arguments)


def _compare(harness, make, job, others=list, is_first=True, **settings):
    """Compare the runs, and their errors; return the callback and the error."""
    callback = harness.callback(stages=["train", "validate"], verify_replays=0, warmup_steps=1)
    start, seen = make(), []
    for ours in ([callback], []):
        torch.manual_seed(1)
        model, kept, logger = copy.deepcopy(start), Seen(), RecordingLogger()
        callbacks = [*ours, *others()] if is_first else [*others(), *ours]
        settings = {"enable_checkpointing": True, "max_epochs": 4, **settings}
        trainer = harness.trainer(*callbacks, kept, logger=logger, **settings)
        result, error = None, ""
        try:
            result = job(trainer, model)
        except RuntimeError as raised:
            error = str(raised)
        seen.append(
            (
                *(result, error, kept.outputs, kept.metrics, kept.weights, kept.rates),
                *(logger.calls, dict(trainer.callback_metrics), dict(model.state_dict())),
                *([p.grad for p in model.parameters()], trainer.global_step),
                *(
                    torch.get_rng_state(),
                    getattr(model, "rate", 0),
                    getattr(model, "batch_size", 0),
                ),
            )
        )
    assert_same(*seen)
    return callback, error


@pytest.mark.parametrize("is_first", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", FINDERS)
def test_finders(harness, name, is_first):
    job, others = FINDERS[name]
    callback, _ = _compare(harness, Tuned, job, others, is_first)
    assert replayed(callback) > 5, callback.summary()


@pytest.mark.parametrize("make", [ManyLoaders, Shortest, Longest])
def test_several_loaders(harness, make):
    callback, _ = _compare(harness, make, fit_only)
    assert replayed(callback) > 5, callback.summary()


def test_new_loaders_in_each_epoch(harness):
    callback, _ = _compare(harness, NewLoaders, fit_only, reload_dataloaders_every_n_epochs=1)
    assert replayed(callback) > 5, callback.summary()


def test_no_optimizer(harness):
    callback, _ = _compare(harness, NoOptimizer, fit_only)
    assert replayed(callback) > 15, callback.summary()


def test_two_optimizers(harness):
    _, error = _compare(harness, TwoPlayers, fit_only)
    assert "manual optimization" in error
