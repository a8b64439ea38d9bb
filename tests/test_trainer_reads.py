"""Steps that read plain values of the Trainer: these are guarded, by what comes out of comparisons
where there is a comparison with a constant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn

from cg_lightning import diagnose
from cg_lightning.core.causes import Cause
from tests.harness import features, predict
from tests.models import Body, Predictor
from tests.test_batch_index import MODES

EPOCH = 1


class Fits(Predictor):
    """Logs what its step computes, in the validation inside fit."""

    step: Any = None

    def __init__(self) -> None:
        super().__init__(Body())
        self.limit = 1

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = type(self).step(self, self.net(batch[0]))
        self.log("mean", output.float().mean())
        return output


def epoch_above(self, x):
    return x * 2 if self.current_epoch > 1 else x


def epoch_below(self, x):
    return x * 2 if 2 > self.current_epoch else x  # noqa: SIM300


def epoch_value(self, x):
    return x * (1 + self.current_epoch)


def epoch_of_trainer(self, x):
    return x * (1 + self.trainer.current_epoch)


def epoch_of_an_attribute(self, x):
    return x * 2 if self.current_epoch > self.limit else x


def every_other_epoch(self, x):
    return x + 1 if self.current_epoch % 2 == 0 and self.trainer.current_epoch != 2 else x


def epoch_in_a_list(self, x):
    return x + 1 if self.current_epoch in [1, 3] else x


def epoch_kept(self, x):
    epoch = self.current_epoch
    return x + epoch


def epoch_by_getattr(self, x):
    return x + getattr(self, "current_epoch")  # noqa: B009


def epoch_by_super(self, x):
    return x + super(Fits, self).current_epoch


def epoch_in_a_comprehension(self, x):
    return x + sum([self.current_epoch for _ in range(2)])


def truth_of_epoch(self, x):
    return x + 1 if not self.current_epoch else x


def steps(self, x):
    return x * 2 if self.global_step >= 5 else x


def step_value(self, x):
    return x + self.trainer.global_step


def sanity(self, x):
    return x if self.trainer.sanity_checking else x * 2


def last(self, x):
    return x if self.trainer.is_last_batch else x * 2


def number_of_batches(self, x):
    return x * self.trainer.num_val_batches[0]


def ranks(self, x):
    return x * 2 if self.trainer.is_global_zero and self.global_rank == 0 else x


def states(self, x):
    state = self.trainer.state.fn == "fit" and self.trainer.state.stage.value == "validate"
    return x * 2 if state and self.trainer.validating and not self.trainer.training else x


def no_logger(self, x):
    return x * 2 if self.logger is None else x


def logger_of_trainer(self, x):
    return x * 2 if self.trainer.logger is not None else x


def type_of_logger(self, x):
    return x * 2 if isinstance(self.logger, CSVLogger) else x


def if_logger(self, x):
    if self.logger and self.current_epoch > 100:
        self.logger.log_metrics({"x": 1.0})
    return x


def trainer_is_there(self, x):
    return x * 2 if self.trainer is not None else x


def two_lines(self, x):
    return (
        x * 2
        if self.trainer.
        sanity_checking
        else x
    )  # fmt: skip


GRAPHS = [
    *(epoch_above, epoch_below, epoch_value, epoch_of_trainer, epoch_of_an_attribute),
    *(every_other_epoch, epoch_in_a_list, epoch_kept, epoch_by_getattr, epoch_by_super),
    *(epoch_in_a_comprehension, truth_of_epoch, steps, step_value, sanity, last),
    *(number_of_batches, ranks, states, no_logger, logger_of_trainer, type_of_logger, if_logger),
    *(trainer_is_there, two_lines),
]


def the_trainer_by_name(self, x):
    trainer = self.trainer
    return x * (1 + trainer.current_epoch)


def an_optimizer(self, x):
    return x * (1 + len(self.trainer.optimizers))


def callback_metrics(self, x):
    return x * (2 if self.trainer.callback_metrics else 1)


def private(self, x):
    return x * (1 + self._trainer.current_epoch)


def the_loop(self, x):
    return x * (1 + self.trainer.fit_loop.epoch_progress.current.ready)


def sets(self, x):
    self.trainer.should_stop = False
    return x


def the_trainer_by_getattr(self, x):
    return x * (1 + getattr(self, "trainer").current_epoch)  # noqa: B009


OTHERS = [
    *(the_trainer_by_name, an_optimizer, callback_metrics, private, the_loop, sets),
    the_trainer_by_getattr,
]


def fit(trainer, module):
    trainer.fit(module, features(8), features(48))
    return trainer.validate(module, features(40), verbose=False)


def module_with(step: Any) -> Fits:
    return type("Steps", (Fits,), {"step": step})()


def run(harness, step, mode="FULL_AND_PIECEWISE", verify=2, **settings):
    callback = harness.callback(mode=mode, verify_replays=verify, warmup_steps=1)
    return harness.compare(module_with(step), fit, callback, max_epochs=4, **settings)


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("step", GRAPHS, ids=lambda step: step.__name__)
@pytest.mark.parametrize(("mode", "verify"), MODES)
def test_plain_values_are_guarded(harness, step, mode, verify):
    """Hazard 7."""
    callback = run(harness, step, mode, verify)
    if mode != "PIECEWISE":
        assert callback.stats.steps["FULL"] >= 30, callback.summary()


@pytest.mark.parametrize("step", OTHERS, ids=lambda step: step.__name__)
def test_the_rest_of_the_trainer_is_no_value(harness, step):
    callback = run(harness, step)
    assert callback.stats.steps["FULL"] == 0, callback.summary()
    assert {record.reason.kind for record in callback.stats.reasons} & {Cause.TRAINER_READ}


def test_comparisons_with_constants_need_no_graph_an_epoch(harness):
    """Two graphs, one for each outcome; the value itself would need one for each epoch."""
    callback = harness.callback(warmup_steps=1)
    fit = lambda trainer, module: trainer.fit(module, features(8), features(48))
    harness.compare(module_with(epoch_above), fit, callback, max_epochs=6)
    assert callback.stats.captures == 2, callback.summary()
    assert callback.stats.steps["FULL"] >= 66


def test_an_image_in_every_other_epoch(harness, tmp_path):
    """The branch that logs is eager; the other one is a graph."""

    class Images(Predictor):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x = self.net(batch[0])
            if batch_idx == 0 and self.current_epoch % 2 == 0 and self.logger is not None:
                self.logger.log_metrics({"image": x.sum().item()})
            self.log("mean", x.mean())

    fit = lambda trainer, module: trainer.fit(module, features(4), features(40))
    for logger in (CSVLogger(tmp_path), False):
        callback = harness.callback(warmup_steps=1)
        harness.compare(Images(Body()), fit, callback, max_epochs=4, logger=logger)
        assert callback.stats.steps["FULL"] >= 34, callback.summary()


class Sized(CSVLogger):
    """Its truth may be another one each time."""

    def __len__(self) -> int:
        return 1


def test_the_truth_of_a_logger_of_ones_own(harness, tmp_path):
    callback = run(harness, if_logger, logger=Sized(tmp_path))
    assert callback.stats.steps["FULL"] == 0, callback.summary()


class Anything:
    """Stands in for a Trainer; its answer changes."""

    asked = 0

    def __init__(self, trainer: Any) -> None:
        self._real = trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    @property
    def sanity_checking(self) -> bool:
        Anything.asked += 1
        return Anything.asked % 2 == 0


def test_a_trainer_of_ones_own(harness):
    """A property that the user's class defines anew gives anything: no value of the Trainer."""

    class Own(Fits):
        step = sanity

        @property
        def trainer(self):
            return Anything(self._trainer)

        @trainer.setter
        def trainer(self, trainer):
            LightningModule.trainer.fset(self, trainer)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return type(self).step(self, self.net(batch[0]))

    def job(trainer, module):
        Anything.asked = 0
        trainer.validate(module, features(40), verbose=False)

    callback = harness.compare(Own(), job)
    assert callback.stats.steps["FULL"] == 0, callback.summary()


class Child(LightningModule):
    """A LightningModule inside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) * (1 + self.current_epoch)


class Writes(Child):
    def forward(self, x):
        if self.logger is not None:
            self.logger.log_metrics({"x": 1.0})
        return self.linear(x)


class Counts(Logger):
    """Counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    name, version = "counts", "0"

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.count += "x" in metrics

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_a_lightning_module_inside_another_one(harness, mode):
    callback = harness.callback(mode=mode, verify_replays=0)
    harness.compare(Predictor(Child()), fit, callback, max_epochs=4)


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_the_logger_of_a_lightning_module_inside_another_one(harness, mode):
    counts = []
    for extra in ([harness.callback(mode=mode, verify_replays=0)], []):
        logger = Counts()
        harness.trainer(*extra, logger=logger).validate(
            Predictor(Writes()), features(40), verbose=False
        )
        counts.append(logger.count)
    assert counts == [10, 10]


def test_offline():
    class Reads(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) * (2 if self.current_epoch > 3 else 1 + self.global_step)

    assert diagnose(Reads(Body()), (torch.randn(2, 8),)).capturable()


def test_predict(harness):
    class Reads(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            is_last = batch_idx == self.trainer.num_predict_batches[0] - 1
            return x * 2 if is_last else x

    callback = harness.compare(Reads(Body()), predict(features(60)))
    assert callback.stats.steps["FULL"] >= 10, callback.summary()
