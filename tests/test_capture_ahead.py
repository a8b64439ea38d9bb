"""Captures ahead: what users see is what eager gives, and later batches run from graphs at once."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from cg_lightning import CUDAGraphCallback
from cg_lightning.core.causes import Cause
from cg_lightning.core.reasons import Status
from cg_lightning.report.timeline import Ran
from tests.harness import features, images, loader, predict, validate
from tests.models import Body, ConvNetClassifier, Predictor


def steps(callback: CUDAGraphCallback) -> dict[str, int]:
    return {mode: number for mode, number in callback.stats.steps.items() if number}


def eager_batches(callback: CUDAGraphCallback) -> list[int]:
    """Return the numbers of the batches that ran no graph, in the order of all batches."""
    ran = [batch.how for batch in callback.stats.timeline.batches]
    return [number for number, how in enumerate(ran) if how in (Ran.WARM_UP, Ran.EAGER)]


def batches(*sizes: int, seed: int = 3) -> list[list[Tensor]]:
    """Return batches as a loader gives them: lists of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(size, 8, generator=generator)] for size in sizes]


def ragged(*sizes: int) -> DataLoader:
    return DataLoader(batches(*sizes, seed=4), batch_size=None)


class Validates(Predictor):
    """Logs the mean of each batch, so that batch sizes are weights, and updates a metric."""

    def __init__(self) -> None:
        super().__init__(Body())
        self.mean = MeanMetric(nan_strategy="disable")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.net(batch[0])
        self.mean.update(x.sum(1))
        self.log("mean", self.mean)
        self.log("value", x.mean(), on_step=True, on_epoch=True)
        return x


@pytest.fixture
def given(harness):
    """A callback with batches to capture ahead."""

    def make(*shapes: Any, **settings: Any) -> CUDAGraphCallback:
        return Gives(list(shapes), **{"backend": harness.backend, "report": False, **settings})

    return make


class Gives(CUDAGraphCallback):
    """Gives its batches to the run that begins."""

    def __init__(self, shapes: list[Any], **settings: Any) -> None:
        super().__init__(**settings)
        self.shapes = shapes

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.capture(trainer, pl_module, self.shapes)
        super().setup(trainer, pl_module, stage)


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_all_batches_but_the_first_run_from_graphs(harness, mode, verify_replays):
    callback = harness.callback(mode=mode, capture_ahead=True, verify_replays=verify_replays)
    harness.compare(ConvNetClassifier(4), validate(images(43)), callback)
    assert steps(callback) == {"NONE": 1, "FULL": 10}
    assert [entry.shapes for entry in callback.stats.entries] == ["4x1x8x8, 4", "3x1x8x8, 3"]
    assert callback.stats.captures == 2


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_sizes_are_the_weights_of_logged_values(harness, given, verify_replays):
    callback = given(*batches(2, 7, 4), verify_replays=verify_replays)
    harness.compare(Validates(), validate(ragged(5, 2, 7, 4, 2, 5, 7, 7)), callback)
    assert steps(callback) == {"NONE": 2, "FULL": 6}  # of the first shape, only the first two
    order = [entry.shapes for entry in callback.stats.entries]
    assert order == ["7x8", "4x8", "2x8"]


def test_what_the_page_says_runs(harness):
    page = (Path(__file__).parent.parent / "docs" / "capture-ahead.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    generator = torch.Generator().manual_seed(5)
    items = [(torch.randn(8, generator=generator),) for _ in range(200)]
    for example, number in ((first, 2), (second, 3)):
        known: dict[str, Any] = {
            "CUDAGraphCallback": harness.callback,
            "Trainer": lambda callbacks: harness.trainer(*callbacks),
            "collate": torch.utils.data.default_collate,
            "items": items,
            "model": Predictor(Body()),
            "loader": DataLoader(items[:70], batch_size=16),
        }
        exec(example, known)
        if number == 2:
            trainer = harness.trainer(known["callback"])
            trainer.validate(known["model"], known["loader"], verbose=False)
        assert known["callback"].stats.captures == number, known["callback"].summary()
        assert steps(known["callback"])["NONE"] <= 2


def test_within_fit_over_epochs(harness):
    callback = harness.callback(capture_ahead=True, verify_replays=0)
    harness.compare(
        ConvNetClassifier(4), lambda t, m: t.fit(m, images(), images(19)), callback, max_epochs=3
    )
    assert steps(callback) == {"NONE": 1, "FULL": 14}
    assert eager_batches(callback) == [0]


def test_three_stages_and_two_runs(harness):
    def job(trainer, module):
        first = [trainer.validate(module, images(19), verbose=False)]
        first += [trainer.test(module, images(10), verbose=False)]
        return [*first, trainer.validate(module, images(18), verbose=False)]

    callback = harness.callback(capture_ahead=True)
    harness.compare(ConvNetClassifier(4), job, callback)
    assert steps(callback) == {"NONE": 3, "FULL": 10}
    assert eager_batches(callback) == [0, 5, 8]


def test_each_dataloader_has_its_own(harness):
    class Two(Validates):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().validation_step(batch, batch_idx) * (dataloader_idx + 1)

    callback = harness.callback(capture_ahead=True, verify_replays=0)
    data = [features(18), features(27, 5), features(8)]
    harness.compare(Two(), validate(data), callback)
    first = itertools.accumulate([len(each) for each in data[:2]], initial=0)
    assert eager_batches(callback) == list(first), callback.summary()


@pytest.mark.parametrize("inference_mode", [True, False])
def test_random_numbers_are_not_used_up(harness, inference_mode):
    class Draws(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            return x + torch.rand_like(x)

    class Seen(Callback):
        def on_predict_batch_end(self, *_: Any) -> None:
            drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))

    class Noisy(Dataset):
        def __len__(self) -> int:
            return 22

        def __getitem__(self, index: int) -> Any:
            return (torch.rand(8) + random.random() + np.random.rand(),)

    drawn: list[Any] = []

    def job(trainer, module):
        random.seed(1)
        np.random.seed(1)
        return trainer.predict(module, DataLoader(Noisy(), batch_size=4))

    callback = harness.callback(capture_ahead=True)
    harness.compare(Draws(Body()), job, callback, lambda: [Seen()], inference_mode=inference_mode)
    assert drawn[:6] == drawn[6:]
    assert steps(callback) == {"NONE": 1, "FULL": 5}


def test_buffers_and_held_tensors_are_put_back(harness, given):
    class Totals(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.register_buffer("total", torch.zeros(()))
            self.held = [torch.zeros(())]
            self.seldom = {"a": torch.zeros(())}

        def on_predict_start(self) -> None:
            self.held = [value.to(self.device) for value in self.held]
            self.seldom = {key: value.to(self.device) for key, value in self.seldom.items()}

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            self.total += x.sum()
            self.held[0].add_(x.sum())
            if x.shape[0] == 3:
                self.seldom["a"].add_(1)  # not in the first step
            return x, self.total.clone(), self.held[0].clone(), self.seldom["a"].clone()

    callback = given(*batches(3, 4))
    harness.compare(Totals(), predict(ragged(4, 4, 3, 4, 3, 3, 4)), callback)
    assert steps(callback) == {"NONE": 1, "FULL": 6}


def test_metrics_that_share_states_and_keep_lists(harness, given):
    class Collects(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.all = MetricCollection([MulticlassAccuracy(8), MulticlassF1Score(8)])

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            self.all.update(x, x.argmax(1))
            self.log_dict(self.all)
            return x

    callback = given(*batches(3, 4), warmup_steps=1)
    harness.compare(Collects(), validate(ragged(4, 4, 4, 3, 4, 3, 3, 4)), callback)
    assert callback.stats.steps["FULL"] >= 5, callback.summary()


class Tally(Metric):
    """Keeps what it counts in Python, so it is updated after each replay."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.counts: dict[int, int] = {}
        self.nested = {"seen": [0]}

    def update(self, x: Tensor) -> None:
        key = int(x.sum().item() * 10) % 3
        self.counts[key] = self.counts.get(key, 0) + 1
        self.nested["seen"][0] += 1
        self.total = self.total + key

    def compute(self) -> Tensor:
        return self.total


@pytest.mark.parametrize("least", [0, 4], ids=["in each step", "in an example"])
@pytest.mark.parametrize("verify_replays", [0, 2])
def test_metrics_that_count_in_python_are_put_back(harness, given, verify_replays, least):
    class Tallies(Validates):
        def __init__(self) -> None:
            super().__init__()
            self.tally = Tally()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().validation_step(batch, batch_idx)
            if output.shape[0] > least:
                self.tally.update(output)
            return output

    def job(trainer, module):
        result = trainer.validate(module, ragged(4, 5, 3, 4, 5, 3, 5, 5, 4), verbose=False)
        return result, module.tally.counts, module.tally.nested, module.tally.compute()

    callback = given(*batches(3, 5, 4), verify_replays=verify_replays, warmup_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which batches are captured ahead is not what this tests
        harness.compare(Tallies(), job, callback)


class Counts(Predictor):
    """Counts its steps in an attribute, so it is no graph."""

    def __init__(self) -> None:
        super().__init__(Body())
        self.count = 0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        return super().predict_step(batch, batch_idx) + self.count


def test_a_step_that_is_no_graph_runs_no_extra_time(harness):
    callback = harness.callback(capture_ahead=True)
    with pytest.warns(UserWarning, match="nothing was captured ahead.*stage 'predict'"):
        harness.compare(Counts(), predict(features(22)), callback)
    assert callback.stats.steps["FULL"] == 0


class CountsSome(Counts):
    """Counts batches of three, so that only those are no graphs."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if batch[0].shape[0] != 3:
            return self.net(batch[0])
        return super().predict_step(batch, batch_idx)


def test_a_batch_that_is_no_graph_is_named_and_undone(harness, given):
    callback = given(*batches(3, 5))
    with pytest.warns(UserWarning, match="shapes 3x8 was not captured ahead: module state"):
        harness.compare(CountsSome(), predict(ragged(4, 5, 3, 5, 3, 4, 3, 3, 3)), callback)
    assert {entry.shapes for entry in callback.stats.entries if entry.mode == "FULL"} == {"5x8"}


def prints(module: Any) -> None:
    print("three")


def writes(module: Any) -> None:
    sys.stdout.write("three")


def opens(module: Any) -> None:
    with module.path.open("a") as file:
        file.write("three")


def goes_on(module: Any) -> None:
    next(module.numbers)


def draws(module: Any) -> None:
    module.rng.normal()


def catches(module: Any) -> None:
    with contextlib.suppress(Exception):
        next(module.numbers)


class DoesForSome(Predictor):
    """Does something for batches of three, so that only those are no graphs."""

    def __init__(self, do: Any, path: Path) -> None:
        super().__init__(Body())
        self.do, self.path = do, path
        self.numbers, self.rng = itertools.count(), np.random.default_rng(1)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        if batch[0].shape[0] == 3:
            self.do(self)
        return output


@pytest.mark.parametrize("do", [prints, writes, opens, goes_on, draws, catches])
def test_what_cannot_be_undone_is_not_done(harness, given, tmp_path, capsys, do):
    def job(trainer, module):
        module.path = tmp_path / ("graphs" if trainer.callbacks[0] is callback else "eager")
        module.path.touch()
        capsys.readouterr()
        result = predict(ragged(4, 5, 3, 5, 3, 4, 3))(trainer, module)
        printed = capsys.readouterr().out.count("three")
        state = module.rng.bit_generator.state
        return result, printed, module.path.read_text(), next(module.numbers), state

    callback = given(*batches(3, 5))
    with pytest.warns(UserWarning, match="shapes 3x8 was not captured ahead"):
        harness.compare(DoesForSome(do, tmp_path), job, callback)
    assert {entry.shapes for entry in callback.stats.entries if entry.mode == "FULL"} == {"5x8"}


def test_attributes_of_tensors_are_put_back(harness, given):
    class Marks(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.register_buffer("mark", torch.ones(()))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch[0].shape[0] == 5:
                self.mark.count = getattr(self.mark, "count", 0) + 1
            return self.net(batch[0])

        def on_predict_end(self) -> None:
            counts.append(getattr(self.mark, "count", None))

    counts: list[Any] = []
    with pytest.warns(UserWarning, match="5x8 was not captured ahead"):
        harness.compare(Marks(), predict(ragged(4, 5, 4, 5, 4)), given(*batches(5)))
    assert counts[0] == counts[1] == 2


@pytest.mark.parametrize("sizes", [(4, 5), (4, 4)], ids=["in an example", "in each step"])
def test_hooks_that_the_step_registers_are_put_back(harness, given, sizes):
    class Hooks(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch[0].shape[0] == sizes[1]:
                self.net[0].register_forward_hook(lambda module, args, output: output * 2)
            return self.net(batch[0])

    callback = given(*batches(sizes[1]))
    with warnings.catch_warnings():  # what is said differs, and is not what this is about
        warnings.simplefilter("ignore")
        harness.compare(Hooks(Body()), predict(ragged(4, *sizes, 4, *sizes)), callback)


def test_a_cache_by_shape_is_built_by_a_real_batch(harness, given):
    class Masks(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.masks: dict[int, Tensor] = {}

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            if x.shape[0] not in self.masks:
                self.masks[x.shape[0]] = torch.ones_like(x).triu()
            return x * self.masks[x.shape[0]]

    callback = given(*batches(5))
    with pytest.warns(UserWarning, match="shapes 5x8 was not captured ahead"):
        harness.compare(Masks(), predict(ragged(4, 4, 4, 4, *[5] * 8)), callback)
    assert callback.stats.steps["FULL"] == 6, callback.summary()


class Chooses(Predictor):
    """Another path for each value of an attribute, which a hook sets."""

    scale = 1.0

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.scale = float(batch_idx % 3 == 1)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        x = super().predict_step(batch, batch_idx)
        return x * 2 if self.scale else x


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_attributes_that_hooks_set_are_guarded(harness, given, verify_replays):
    callback = given(*batches(4, 5), warmup_steps=1, verify_replays=verify_replays)
    harness.compare(Chooses(Body()), predict(ragged(*[4, 5] * 10)), callback)
    assert callback.stats.steps["FULL"] > 0


def test_values_in_the_batch_are_part_of_the_key(harness, given):
    class Scales(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"]) * batch["scale"]

    data = [{"x": x, "scale": 1 + index % 3} for index, (x,) in enumerate(batches(*[4] * 12))]
    examples = [{"x": torch.randn(4, 8), "scale": scale} for scale in (3, 2)]
    callback = given(*examples, verify_replays=0)
    harness.compare(Scales(Body()), predict(DataLoader(data, batch_size=None)), callback)
    assert steps(callback) == {"NONE": 3, "FULL": 9}


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_host_values_of_the_batch_decide_which_graph_runs(harness, given, verify_replays):
    class Masks(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch["x"])
            return x if batch["mask"].all() else x * batch["mask"].float().mean()

    def make(padded: list[bool], seed: int) -> list[Any]:
        xs = [x for (x,) in batches(*[4] * len(padded), seed=seed)]
        masks = [torch.arange(4) < (3 if is_padded else 4) for is_padded in padded]
        return [{"x": x, "mask": mask} for x, mask in zip(xs, masks, strict=True)]

    data = make([False, True, False, True, True, False, False, True, True, False], 4)
    callback = given(*make([True, False], 3), verify_replays=verify_replays)
    harness.compare(Masks(Body()), predict(DataLoader(data, batch_size=None)), callback)


def test_steps_that_compare_batch_idx(harness, given):
    class Compares(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = self.net(batch[0])
            return x * 2 if batch_idx < 2 else x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that such a batch is not captured ahead is tested below
        callback = given(*batches(5), warmup_steps=1, verify_replays=0)
        harness.compare(Compares(Body()), predict(ragged(4, 5, 5, 4, 5, 4, 5, 5)), callback)
    changed = [r.reason for r in callback.stats.reasons if r.reason.kind is Status.CHANGED]
    assert "changed: batch_idx < 2: now False, before True" in map(str, changed)
    assert {reason.remedy for reason in changed} == {Cause.BATCH_INDEX_USED.remedy}
    with pytest.warns(UserWarning, match="5x8 was not captured ahead: it compares batch_idx"):
        harness.trainer(given(*batches(5))).predict(Compares(Body()), ragged(4))


def test_the_batch_is_transferred_as_in_the_loop(harness, given):
    class Moves(Predictor):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"x": batch[0] + torch.rand_like(batch[0])}

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"])

    callback = given(*batches(3))
    harness.compare(Moves(Body()), predict(ragged(4, 3, 3, 4, 3)), callback)
    assert steps(callback) == {"NONE": 2, "FULL": 3}


def test_the_hooks_of_a_data_module(harness, given):
    class Data(LightningDataModule):
        def predict_dataloader(self) -> DataLoader:
            return ragged(4, 3, 3, 3)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [torch.cat([batch[0], batch[0]])]

    callback = given(*batches(3))
    harness.compare(Predictor(Body()), lambda t, m: t.predict(m, datamodule=Data()), callback)
    assert [entry.shapes for entry in callback.stats.entries] == ["6x8"]


@pytest.mark.parametrize("error", [KeyError("mine"), RuntimeError("sizes differ")])
def test_a_batch_that_the_step_cannot_run(harness, given, error):
    class Fails(Validates):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().validation_step(batch, batch_idx)
            if batch[0].shape[0] == 3:
                raise error
            return output

    callback = given(*batches(3, 5))
    with pytest.warns(UserWarning, match=f"3x8 was not captured.*raised {type(error).__name__}"):
        harness.compare(Fails(), validate(ragged(4, 5, 4, 5, 5)), callback)
    assert steps(callback) == {"NONE": 2, "FULL": 3}


def test_a_hook_of_the_transfer_that_fails(harness, given):
    class Fails(Predictor):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if batch[0].shape[0] == 3:
                raise KeyError("mine")
            return batch

    callback = given(*batches(3, 5))
    with pytest.warns(UserWarning, match="3x8 was not captured ahead.*raised KeyError"):
        harness.compare(Fails(Body()), predict(ragged(4, 5, 4, 5)), callback)
    assert callback.stats.captures == 1


def test_a_dataset_that_only_workers_can_read(harness):
    class Reads(Dataset):
        seen = 0

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            Reads.seen += 1
            if Reads.seen == 5:  # the first item that is read ahead
                raise OSError("no such file")
            return (torch.full((8,), float(index)),)

    callback = harness.callback(capture_ahead=True)
    trainer = harness.trainer(callback)
    with pytest.warns(UserWarning, match="could not make a batch.*OSError: no such file.*Instead"):
        trainer.predict(Predictor(Body()), DataLoader(Reads(), batch_size=4))
    assert callback.stats.steps["FULL"] == 2


def test_an_interrupt_leaves_nothing(harness, given):
    class Stops(Validates):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().validation_step(batch, batch_idx)
            if batch[0].shape[0] == 3:
                raise SystemExit
            return output

    module = Stops()
    with pytest.raises(SystemExit):
        harness.trainer(given(*batches(3))).validate(module, ragged(4, 4), verbose=False)
    assert module.mean.update_count == 1  # of the batch that ran
    assert "validation_step" not in vars(module)


def test_with_strict_an_error_of_the_step_comes_through(harness, given):
    class Fails(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch[0].shape[0] == 3:
                raise KeyError("mine")
            return super().predict_step(batch, batch_idx)

    callback = given(*batches(3), strict=True)
    with pytest.raises(KeyError, match="mine"):
        harness.trainer(callback).predict(Fails(Body()), ragged(4, 4))


def test_a_value_that_only_some_batches_log(harness, given):
    class Logs(Validates):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().validation_step(batch, batch_idx)
            if batch[0].shape[0] == 3:
                self.log("three", output.sum())
            return output

    callback = given(*batches(3, 5))
    with pytest.warns(UserWarning, match="3x8 was not captured ahead"):
        harness.compare(Logs(), validate(ragged(4, 5, 4, 5, 5, *[3] * 7)), callback)
    assert callback.stats.steps["FULL"] >= 6, callback.summary()


def test_more_batches_than_graphs(harness, given):
    callback = given(*batches(3, 5, 6), max_graphs=2)
    with pytest.warns(UserWarning, match=r"3x8 was not captured.*max_graphs=2.*raise max_graphs"):
        harness.compare(Predictor(Body()), predict(ragged(4, 5, 6, 5, 6)), callback)
    assert steps(callback) == {"NONE": 1, "FULL": 4}


def test_a_batch_without_a_key(harness, given):
    callback = given([batches(3)[0][0], object()])
    with pytest.warns(UserWarning, match=r"not captured ahead: batch\[1\] is a value of type"):
        harness.compare(Predictor(Body()), predict(features(20)), callback)


def test_shapes_that_come_twice_are_captured_once(harness, given):
    callback = given(*batches(5, 5, 4, 4, 4), capture_ahead=True)
    harness.compare(Predictor(Body()), predict(features(20)), callback)
    assert callback.stats.captures == 2
    assert steps(callback) == {"NONE": 1, "FULL": 4}


@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_statistics_count_what_the_user_ran(harness, given, warmup_steps):
    callback = given(*batches(5, 6), warmup_steps=warmup_steps, verify_replays=0)
    harness.compare(Predictor(Body()), predict(ragged(5, 6, 5, 6)), callback)
    assert steps(callback) == {"NONE": 1, "FULL": 3}
    assert callback.stats.eager_reasons == {"warm-up": 1}
    assert len(callback.stats.timeline.batches) == 4
    assert [entry.replays for entry in callback.stats.entries] == [2, 1]


def test_both_times_of_graphs_that_were_captured_ahead_are_shown(harness, given):
    callback = given(*batches(5, 6))
    harness.compare(Predictor(Body()), predict(ragged(*[5, 6] * 4)), callback)
    assert steps(callback) == {"NONE": 1, "FULL": 7}
    assert "not timed" not in callback.summary()
    assert "host time a step: eager " in callback.summary()


def test_batches_of_another_module_and_forgotten_ones(harness):
    callback = harness.callback()
    trainer = harness.trainer(callback)
    one, other = Predictor(Body()), Predictor(Body())
    callback.capture(trainer, one, batches(5))
    trainer.predict(other, features(4))
    assert callback.stats.captures == 0
    trainer.predict(one, features(4))
    assert callback.stats.captures == 1
    callback.capture(trainer, one, [])
    trainer.predict(one, features(4))
    assert callback.stats.captures == 1


def test_from_a_hook_and_for_one_stage(harness):
    class Asks(Callback):
        def on_predict_start(self, trainer, pl_module) -> None:
            callback.capture(trainer, pl_module, batches(5), stage="predict")

    callback = harness.callback()
    trainer = harness.trainer(callback, Asks())
    module = Validates()
    trainer.predict(module, features(4))
    assert callback.stats.captures == 1
    trainer.validate(module, features(4), verbose=False)
    assert callback.stats.captures == 1


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(batches(*[4] * 6))


class Pairs(torch.utils.data.Sampler):
    """A batch sampler of its own kind."""

    drop_last = False

    def __init__(self, sampler: Any = None, batch_size: int = 2, drop_last: bool = False) -> None:
        pass

    def __iter__(self) -> Any:
        return iter([[0, 1], [2, 3, 4], [5, 6]])


class Batches:
    def __iter__(self) -> Any:
        return iter(batches(4, 4, 4))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: DataLoader(Stream(), batch_size=None), ["IterableDataset would take batches"]),
        (
            lambda: DataLoader(features(20).dataset, batch_sampler=Pairs()),
            ["batch_sampler, a Pairs, has no batch_size"],
        ),
        (Batches, ["it is a Batches, not a DataLoader"]),
    ],
)
def test_loaders_that_cannot_be_read_ahead(harness, make, parts):
    callback = harness.callback(capture_ahead=True)
    with pytest.warns(UserWarning, match="capture_ahead=True makes no batch") as caught:
        harness.compare(Validates(), lambda t, m: t.validate(m, make(), verbose=False), callback)
    (warning,) = [str(each.message) for each in caught if "capture_ahead" in str(each.message)]
    for part in [*parts, "callback.capture(trainer, model, batches)"]:
        assert part in warning


def test_a_loader_without_batches_of_its_own(harness):
    callback = harness.callback(capture_ahead=True)
    data = lambda: DataLoader([(torch.ones(3, 8),)] * 6, batch_size=None)
    harness.compare(Predictor(Body()), lambda t, m: t.predict(m, data()), callback)
    assert steps(callback) == {"NONE": 1, "FULL": 5}


def test_without_the_last_batch(harness):
    callback = harness.callback(capture_ahead=True)
    data = loader(torch.randn(22, 8), drop_last=True)
    harness.compare(Validates(), validate(data), callback)
    assert callback.stats.captures == 1


def test_a_last_batch_that_does_not_run_is_not_captured(harness):
    class Two(Validates):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().validation_step(batch, batch_idx)

    callback = harness.callback(capture_ahead=True)
    data = [features(18), features(10)]
    trainer = harness.trainer(callback, limit_val_batches=3)
    trainer.validate(Two(), data, verbose=False)
    shapes = [entry.shapes for entry in callback.stats.entries]
    assert shapes == ["4x8", "4x8", "2x8"]  # all three batches of the second dataloader run


# bars


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
@pytest.mark.parametrize("number", [3, 4])
def test_a_bar_for_more_than_three(harness, given, capsys, monkeypatch, bar, number):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then shows what happens on the way
    callback = given(*batches(*range(5, 5 + number)))
    trainer = harness.trainer(callback, bar(), enable_progress_bar=True)
    trainer.predict(Predictor(Body()), ragged(4, 5, 4))
    shown = capsys.readouterr()
    assert ("Capturing" in shown.out + shown.err) is (number > 3)
    assert callback.stats.captures == number


def test_without_a_bar_there_is_none(harness, given, capsys):
    callback = given(*batches(*range(5, 12)))
    harness.trainer(callback).predict(Predictor(Body()), ragged(4, 5, 4))
    assert callback.stats.captures == 7
    shown = capsys.readouterr()
    assert "Capturing" not in shown.out + shown.err


# what users give


@pytest.mark.parametrize(
    ("settings", "arguments", "parts"),
    [
        ({"mode": "PIECEWISE"}, {}, ["mode='PIECEWISE' has none", "'FULL_AND_PIECEWISE'"]),
        ({"mode": "NONE"}, {}, ["mode='NONE' has none"]),
        ({}, {"batches": torch.ones(3)}, ["expected a list of batches, not a Tensor", "[batch]"]),
        ({}, {"batches": {"x": 1}}, ["not a dict"]),
        ({}, {"stage": "fit"}, ["stage='fit'", "validate, test, predict"]),
        ({"stages": ["test"]}, {"stage": "predict"}, ["stage='predict'", "choose from test"]),
        ({}, {"trainer": "other"}, ["does not have this callback", "callbacks=[callback]"]),
    ],
)
def test_mistakes(harness, settings, arguments, parts):
    callback = harness.callback(**settings)
    given = {"batches": batches(3), "trainer": harness.trainer(callback), **arguments}
    if given["trainer"] == "other":
        given["trainer"] = harness.trainer()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        callback.capture(given.pop("trainer"), Predictor(Body()), **given)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("mode", ["PIECEWISE", "NONE"])
def test_the_option_without_whole_steps(mode):
    with pytest.raises(ValueError, match=f"capture_ahead=True captures whole.*mode='{mode}'"):
        CUDAGraphCallback(mode=mode, capture_ahead=True)
    with pytest.raises(ValueError, match="capture_ahead=1 must be True or False"):
        CUDAGraphCallback(capture_ahead=1)


def test_captures_for_no_trainer_are_refused(harness):
    with pytest.raises(ValueError, match=r"does not have this callback; make it with Trainer"):
        harness.callback().capture(None, Predictor(Body()), [])
