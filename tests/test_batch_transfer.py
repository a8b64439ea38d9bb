"""Batches are copied beside the computation, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cg_lightning import CUDAGraphCallback
from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.trainer import batch_transfer
from tests.harness import assert_same

# values: above the size from which copies overlap, which they do on a GPU only
LARGE = 400_000 if torch.cuda.is_available() else 4_000
CYCLES = 20_000_000  # about ten milliseconds on the device


class Slow(LightningModule):
    """The device is still busy with a step when the host copies the next batches."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["x"]
        if x.is_cuda:
            torch.cuda._sleep(CYCLES)
        loss = (x * self.scale).sum() + batch["y"].sum()
        self.log("loss", loss)
        return x * self.scale

    predict_step = validation_step

    def log(self, *args: Any, **kwargs: Any) -> None:
        if not self.trainer.predicting:
            super().log(*args, **kwargs)


class KeepsAll(Callback):
    """Keeps each batch and each output, and reads the batch as soon as it is there."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.outputs: list[Any] = []
        self.at_start: list[Tensor] = []

    def on_validation_batch_start(self, trainer, pl_module, batch, *_: Any) -> None:
        self.at_start.append(batch["x"].clone())
        self.batches.append(batch)

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
        self.outputs.append(outputs)


def batches(number: int, pinned: bool = False, shapes: int = 3) -> list[dict[str, Any]]:
    made = []
    for index in range(number):
        size = LARGE * (1 + index % shapes)
        batch = {"x": torch.randn(size), "y": torch.arange(8) + index, "name": f"b{index}"}
        if pinned:
            batch = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
        made.append(batch)
    return made


def loader(items: list[Any]) -> DataLoader:
    return DataLoader(items, batch_size=None)


def assert_overlaps(harness, callback: CUDAGraphCallback, number: int) -> None:
    """Most copies overlap: the device has no work before the first step, and after few others."""
    copies = callback.stats.overlapped_copies
    if harness.backend == "cuda":
        assert number // 4 <= copies < number, callback.summary()
    else:
        assert copies == 0


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("shapes", [1, 5])
def test_batches_and_results_are_those_of_eager(harness, shapes, pinned):
    if pinned and harness.backend != "cuda":
        pytest.skip("memory is pinned for a GPU only")
    items = batches(40, pinned, shapes)
    runs = []
    for callback in (None, harness.callback(mode="FULL")):
        keeps = KeepsAll()
        trainer = harness.trainer(*filter(None, (callback, keeps)))
        trainer.validate(Slow(), loader(items), verbose=False)
        runs.append((keeps, trainer.callback_metrics))
    (one, metrics), (other, other_metrics) = runs
    for name in ("batches", "at_start", "outputs"):
        assert_same(getattr(one, name), getattr(other, name))
    assert_same([batch["x"].cpu() for batch in other.batches], [item["x"] for item in items])
    assert_same(metrics, other_metrics)
    said = f"{callback.stats.overlapped_copies} batches copied ahead" in callback.summary()
    assert said is (harness.backend == "cuda")
    assert_overlaps(harness, callback, 40)


def test_memory_of_many_queued_batches_is_bounded(harness):
    if harness.backend != "cuda":
        pytest.skip("the recorder has no streams")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    items = batches(60, shapes=1)
    callback = harness.callback(mode="FULL")
    trainer = harness.trainer(callback)
    trainer.validate(Slow(), loader(items), verbose=False)
    assert_overlaps(harness, callback, 60)
    # copies, static input, outputs of three steps; without a bound there are sixty batches
    assert torch.cuda.max_memory_allocated() - before < 20 * items[0]["x"].nbytes


class CopiesAtOnce:
    """The copies of a device without streams."""

    def is_device_busy(self) -> bool:
        return True

    def run(self, copy_batch: Any) -> Any:
        return copy_batch()


class Trains(Slow):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch["x"].is_cuda:
            torch.cuda._sleep(CYCLES)
        return (batch["x"] * self.scale).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("stages", [["train"], ["validate"], ["train", "validate"]])
def test_batches_of_each_stage_of_ours_are_copied_ahead(harness, monkeypatch, stages):
    if harness.backend != "cuda":
        monkeypatch.setattr(RecorderBackend, "batch_copies", lambda _: CopiesAtOnce())
        monkeypatch.setattr(batch_transfer, "_LEAST_BYTES", 0)
    items, weights = batches(12), []
    callback = harness.callback(stages=stages)
    for callbacks in ([], [callback]):
        module = Trains()
        trainer = harness.trainer(*callbacks, max_epochs=2, num_sanity_val_steps=0)
        trainer.fit(module, loader(items), loader(items[:9]))
        weights.append(module.state_dict())
    assert_same(*weights)
    number = 2 * (12 * ("train" in stages) + 9 * ("validate" in stages))
    copied = callback.stats.overlapped_copies
    if harness.backend == "cuda":  # only while the device is busy, which a host may wait for
        assert number / 4 < copied <= number
    else:
        assert copied == number
    assert f"{copied} batches copied ahead" in callback.summary()


class OwnTransfer(Slow):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        assert batch["x"].device.type == "cpu"
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class OwnTransferInData(LightningDataModule):
    def __init__(self, items: list[Any]) -> None:
        super().__init__()
        self.items = items

    def val_dataloader(self):
        return loader(self.items)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        assert batch["x"].device.type == "cpu"
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class AfterTransfer(Slow):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert batch["x"].device == self.device
        return {**batch, "x": batch["x"] + 1}


class BeforeTransfer(Slow):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        assert batch["x"].device.type == "cpu"
        return {**batch, "x": batch["x"] + 1}


@pytest.mark.parametrize(
    ("model", "overlaps"), [(OwnTransfer, False), (AfterTransfer, True), (BeforeTransfer, True)]
)
def test_hooks_of_the_module_see_what_they_see_in_eager(harness, model, overlaps):
    items, results = batches(8), []
    for callback in (None, harness.callback(mode="FULL")):
        keeps = KeepsAll()
        trainer = harness.trainer(*filter(None, (callback, keeps)))
        trainer.validate(model(), loader(items), verbose=False)
        results.append((keeps.batches, keeps.outputs))
    assert_same(*results)
    if overlaps:
        assert_overlaps(harness, callback, 8)
    else:
        assert callback.stats.overlapped_copies == 0


def test_a_transfer_of_the_datamodule_stays(harness):
    callback = harness.callback(mode="FULL")
    data = OwnTransferInData(batches(8))
    harness.trainer(callback).validate(Slow(), datamodule=data, verbose=False)
    assert callback.stats.overlapped_copies == 0


class OwnStrategy(SingleDeviceStrategy):
    """Moves batches in a way of its own."""

    def batch_to_device(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        assert batch["x"].device.type == "cpu"
        return {**super().batch_to_device(batch, *args, **kwargs), "mine": True}


def test_a_transfer_of_the_strategy_stays(harness, device, monkeypatch):
    if harness.backend != "cuda":
        monkeypatch.setattr(RecorderBackend, "batch_copies", lambda _: CopiesAtOnce())
        monkeypatch.setattr(batch_transfer, "_LEAST_BYTES", 0)
    callback, keeps = harness.callback(), KeepsAll()
    strategy = OwnStrategy(device=device)
    harness.trainer(callback, keeps, strategy=strategy).validate(
        Slow(), loader(batches(8)), verbose=False
    )
    assert all(batch["mine"] for batch in keeps.batches)
    assert callback.stats.overlapped_copies == 0
    assert "batch_to_device" not in vars(strategy)


class Odd:
    """An object that moves itself to a device, as batches of graphs do."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device, **_: Any) -> Odd:
        moved = copy.copy(self)
        moved.x = self.x.to(device)
        return moved


class TakesOdd(LightningModule):
    def predict_step(self, batch, batch_idx):
        return batch["odd"].x * 2 if isinstance(batch, dict) else batch * 2


@pytest.mark.parametrize("case", ["an object", "small", "on the device", "switched off"])
def test_what_is_left_to_lightning(harness, device, case):
    made: dict[str, Any] = {
        "an object": [{"x": torch.randn(LARGE), "odd": Odd(torch.randn(4))} for _ in range(6)],
        "small": [torch.randn(4, 4) for _ in range(6)],
        "on the device": [torch.randn(LARGE, device=device) for _ in range(6)],
        "switched off": [torch.randn(LARGE) for _ in range(6)],
    }
    items = made[case]
    expected = harness.trainer().predict(TakesOdd(), loader(items))
    callback = harness.callback(overlap_copies=case != "switched off")
    trainer = harness.trainer(callback)
    assert_same(trainer.predict(TakesOdd(), loader(items)), expected)
    assert callback.stats.overlapped_copies == 0


def test_the_strategy_is_as_before(harness):
    class Looks(Callback):
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def on_predict_batch_start(self, trainer, *_: Any) -> None:
            self.seen.append("batch_to_device" in vars(trainer.strategy))

        def on_predict_end(self, trainer, *_: Any) -> None:
            self.seen.append("batch_to_device" in vars(trainer.strategy))

    looks = Looks()
    trainer = harness.trainer(harness.callback(), looks)
    trainer.predict(TakesOdd(), loader([torch.randn(LARGE) for _ in range(3)]))
    assert looks.seen == [harness.backend == "cuda"] * 3 + [False]


def test_the_strategy_is_as_before_after_an_exception(harness):
    class Raises(Slow):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise KeyError("mine")
            return batch["x"]

    trainer = harness.trainer(harness.callback())
    with pytest.raises(KeyError, match="mine"):
        trainer.predict(Raises(), loader(batches(4)))
    assert "batch_to_device" not in vars(trainer.strategy)
