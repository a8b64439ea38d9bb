"""Stages in which most batches have a shape of their own: what runs eagerly costs little."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cg_lightning.diagnosis.watcher import StepWatcher
from cg_lightning.guards.module_guard import ModuleGuard
from cg_lightning.runtime.dispatcher import MOST_UNREPEATED, CUDAGraphDispatcher
from cg_lightning.runtime.plans import NEW_KEY
from cg_lightning.trainer.batch_transfer import OverlappedTransfer
from cg_lightning.trainer.stage_length import TrainerStageLength
from tests.harness import Batches, assert_same, predict, validate

pytestmark = pytest.mark.filterwarnings("ignore:CUDAGraphCallback. .* shapes, so most ran eagerly")

OWN = 200
"""Number of batches of which each has a shape of its own."""


class Encoder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).mean(0)

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss


def own(number: int, first: int = 10) -> list[Tensor]:
    return [torch.randn(first + index, 8) for index in range(number)]


def loader(batches: Sequence[Any]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often some of our methods were called. They do what they always do."""
    counted: Counter[str] = Counter()
    for owner, name in (
        (StepWatcher, "watch"),
        (ModuleGuard, "check"),
        (CUDAGraphDispatcher, "plan"),
        (TrainerStageLength, "steps_left"),
    ):
        monkeypatch.setattr(owner, name, counting(counted, getattr(owner, name)))
    return counted


def counting(counted: Counter[str], method: Callable[..., Any]) -> Callable[..., Any]:
    def count(*args: Any, **kwargs: Any) -> Any:
        counted[method.__name__] += 1
        return method(*args, **kwargs)

    return count


@pytest.mark.parametrize("job", [predict, validate])
@pytest.mark.parametrize("min_saving", [0, 0.03])
def test_a_step_of_a_new_shape_is_the_users_own(harness, calls, job, min_saving):
    """Hazard 45: nothing is watched, planned or compared for it, and each step is counted."""
    callback = harness.callback(min_saving=min_saving)
    harness.compare(Encoder(), job(loader(own(OWN))), callback)
    # where times are compared, some keys are planned that are not watched
    are_compared = harness.backend == "cuda" and min_saving > 0
    few = (5 if are_compared else 2) * MOST_UNREPEATED + 2
    assert calls["watch"] <= MOST_UNREPEATED
    assert calls["watch"] == MOST_UNREPEATED or are_compared
    assert 0 < calls["plan"] <= few
    assert 0 < calls["check"] <= few
    assert calls["steps_left"] <= few
    assert callback.stats.steps["NONE"] == OWN
    reasons = callback.stats.eager_reasons
    assert reasons[str(NEW_KEY)] > 0.9 * OWN, reasons


@pytest.mark.parametrize("own_between", [0, 3])
def test_shapes_that_begin_to_repeat_have_graphs_again(harness, calls, own_between):
    """Hazard 45: each shape that comes again is watched then, and runs from a graph soon."""
    repeated = own(5, first=50)  # of shapes that were only counted
    batches = own(OWN)
    for turn in range(8):
        batches += [torch.randn_like(batch) for batch in repeated]
        batches += own(own_between, first=1000 + 100 * turn)
    callback = harness.callback(warmup_steps=2, verify_replays=1)
    harness.compare(Encoder(), predict(loader(batches)), callback)
    assert callback.stats.captures == 5, callback.summary()
    assert callback.stats.steps["FULL"] == 5 * 7, callback.summary()
    assert sum(callback.stats.steps.values()) == len(batches)
    assert calls["watch"] == MOST_UNREPEATED + 5


def test_a_graph_is_found_among_own_shapes(harness):
    """A shape with a graph is replayed each time it comes."""
    batches: list[Tensor] = [torch.randn(4, 8) for _ in range(6)]
    for batch in own(OWN):
        batches += [batch, torch.randn(4, 8)]
    callback = harness.callback()
    harness.compare(Encoder(), predict(loader(batches)), callback)
    assert callback.stats.steps["FULL"] == 6 - 3 + OWN, callback.summary()


class Trained(Encoder):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_one_fit_has_one_hint_for_all_its_validations(harness):
    """Each validation sees further shapes, so each hint would have other numbers."""
    batches = iter(own(4 * 30))

    data = loader(Batches(lambda index: next(batches), 30))
    trainer = harness.trainer(harness.callback(), max_epochs=4, num_sanity_val_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Trained(), loader(own(2)), data)
    said = [str(each.message) for each in caught if "ran eagerly" in str(each.message)]
    assert len(said) == 1, said
    assert "30 batches of stage 'validate' had 30 shapes" in said[0]


class Changes(Callback):
    """Changes the module in a batch of a new shape, in one of several ways."""

    def __init__(self, change: Callable[[Any], None], at: int) -> None:
        self.change = change
        self.at = at

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx == self.at:
            self.change(pl_module)


def other_layer(module: Encoder) -> None:
    module.net[0] = nn.Linear(8, 8, device=module.device)


def other_weight(module: Encoder) -> None:
    module.net[0].weight = nn.Parameter(torch.randn(8, 8, device=module.device))


def other_memory(module: Encoder) -> None:
    module.net[0].weight.data = torch.randn(8, 8, device=module.device)


def hook(module: Encoder) -> None:
    module.net[0].register_forward_hook(lambda _, args, output: output * 2)


def other_setting(module: Encoder) -> None:
    module.net[1] = nn.Threshold(0.5, 0.0)


@pytest.mark.parametrize("change", [other_layer, other_weight, other_memory, hook, other_setting])
def test_a_change_before_a_step_that_is_only_counted_is_seen(harness, change):
    """The module is compared before the next step that may run from a graph."""
    small = [torch.randn(4, 8) for _ in range(6)]
    batches = [*small, *own(30), *[torch.randn(4, 8) for _ in range(6)]]

    def others() -> list[Callback]:
        torch.manual_seed(3)
        return [Changes(change, at=20)]

    callback = harness.callback()
    harness.compare(Encoder(), predict(loader(batches)), callback, others)
    assert callback.stats.steps["FULL"] >= 3 + 2, callback.summary()


def factor(x: Tensor) -> Tensor:
    return x * 2


def other_factor(x: Tensor) -> Tensor:
    return x * 3


class RewritesInOneShape(Encoder):
    """Rewrites a function in a step of one shape only."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if len(batch) == 25:
            factor.__code__ = other_factor.__code__
        return factor(self.net(batch))


def test_a_function_that_a_counted_step_rewrites_ends_older_graphs(harness):
    code = factor.__code__
    batches = [*[torch.randn(4, 8) for _ in range(6)], *own(30), torch.randn(4, 8)]
    results = []
    try:
        for module, callbacks in ((Encoder(), [harness.callback()]), (None, [])):
            factor.__code__ = code
            torch.manual_seed(0)
            module = RewritesInOneShape()
            results.append(harness.trainer(*callbacks).predict(module, loader(batches)))
    finally:
        factor.__code__ = code
    assert_same(*results)


def test_a_shape_with_other_flags_than_at_first_is_watched(harness):
    """Of a step that is only counted, the flags of kernels and modules are not stored."""

    class Switches(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
            torch.backends.cuda.enable_flash_sdp(batch_idx < OWN)

        def on_predict_end(self, *_: Any) -> None:
            torch.backends.cuda.enable_flash_sdp(True)

    batches = [*own(OWN), *[torch.randn(10 + 50, 8) for _ in range(5)]]
    callback = harness.callback(warmup_steps=1, verify_replays=0)
    harness.compare(Encoder(), predict(loader(batches)), callback, lambda: [Switches()])
    assert callback.stats.steps["FULL"] == 4, callback.summary()


def test_unusual_batches_have_their_reasons_among_own_shapes(harness, device):
    """A batch without a key does not count as a new shape."""

    class Sums(LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return sum(each.to_dense().sum() for each in batch)

    batches: list[Any] = [[batch] for batch in own(40)]
    batches += [[batch.to_sparse()] for batch in own(10, first=500)]
    shared = torch.randn(1000, 8, device=device)  # a transfer would copy each view
    batches += [[shared[: 20 + index], shared[10:]] for index in range(10)]
    callback = harness.callback()
    harness.compare(Sums(), predict(loader(batches)), callback)
    reasons = callback.stats.eager_reasons
    counted = sum(number for text, number in reasons.items() if text == str(NEW_KEY))
    assert counted == 40 - MOST_UNREPEATED, reasons
    assert sum(number for text, number in reasons.items() if "batch[0] is" in text) == 20, reasons


class Device:
    """Counts the batches that are copied beside its work."""

    def __init__(self) -> None:
        self.is_busy = False
        self.copied = 0

    def is_device_busy(self) -> bool:
        return self.is_busy

    def run(self, copy_batch: Callable[[], Any]) -> Any:
        self.copied += 1
        return copy_batch()


def test_a_device_without_work_leaves_copies_to_lightning(harness):
    """A copy that overlaps with nothing would only cost the host its events and streams."""
    trainer = harness.trainer(accelerator="cpu")
    callback = harness.callback(backend="recorder")
    trainer.predict(Encoder(), loader(own(1)))
    device, batch = Device(), torch.randn(300_000)
    transfer = OverlappedTransfer(trainer.strategy, device, callback.stats)
    for index in range(6):
        device.is_busy = index % 3 == 0
        moved = transfer._batch_to_device(copy.copy(batch))
        assert_same(moved.cpu(), batch)
    assert device.copied == callback.stats.overlapped_copies == 2
