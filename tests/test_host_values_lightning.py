"""Host values under a Trainer: metrics, logs, hooks that write to the batch, copies on the host."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from cg_lightning.backends import resolve_backend
from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.core.lines import Elsewhere
from cg_lightning.diagnosis.watcher import StepWatcher
from cg_lightning.host_values.host_copies import HostCopies
from cg_lightning.host_values.path import HostRead, Operation, Read, ReadPath, Ref, Root
from cg_lightning.trainer.batch_transfer import NotedTransfer
from tests.harness import predict, validate


def bidirectional_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As transformers does: no mask if nothing is padded."""
    if mask is None or mask.bool().all():
        return None
    padded = mask[:, None, None, :] == 0
    return torch.zeros(padded.shape, dtype=dtype, device=mask.device).masked_fill(
        padded, torch.finfo(dtype).min
    )


class Encoder(LightningModule):
    """Attention with the mask checks of transformers, and a loss over the labels that count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)
        self.accuracy = MulticlassAccuracy(5, ignore_index=-100)
        self.mean = MeanMetric()
        self.counts: list[int] = []

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.embedding(ids)).unsqueeze(1).chunk(3, -1)
        bias = bidirectional_mask(mask, q.dtype)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).squeeze(1))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch["ids"], batch["mask"])
        counted = batch["labels"] != -100
        loss = F.cross_entropy(logits[counted], batch["labels"][counted])
        self.mean.update(loss)
        self.log("loss", loss)
        self.log("mean", self.mean)
        self.log("longest", batch["mask"].sum(1).max().item() * 1.0)
        return logits

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        longest = int(batch["mask"].sum(1).max())
        return {"logits": self(batch["ids"], batch["mask"])[:, :longest], "longest": longest}


def batches(number: int = 26) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for index in range(number):
        ids = torch.randint(0, 20, (4, 6), generator=generator)
        mask = torch.ones(4, 6, dtype=torch.long)
        if index % 3 == 1:
            mask[1, 4:] = 0
        if index % 8 == 5:
            mask[:, 5:] = 0
        labels = torch.randint(0, 5, (4, 6), generator=generator)
        made.append({"ids": ids, "mask": mask, "labels": labels.where(mask == 1, -100)})
    made.append({name: value[:2] for name, value in made[0].items()})
    return made


def loader(items: list[Any]) -> DataLoader:
    """Each batch has memory of its own, because hooks may write to it."""

    def copied(item: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in item.items()}

    return DataLoader(items, batch_size=None, collate_fn=copied)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("job", [validate, predict])
def test_mask_checks_and_counts_of_labels(harness, job, mode, precision):
    """Hazard 41."""
    callback = harness.callback(mode=mode)
    model = Encoder().eval()
    harness.compare(model, job(loader(batches())), callback, precision=precision)
    if mode != "PIECEWISE":
        assert callback.stats.steps["FULL"] >= 12, callback.summary()


def test_the_checks_of_reads_are_expected_in_the_first_capture(harness, monkeypatch):
    """Only other checks, which nothing has shown before, need a second one."""
    kind = type(resolve_backend(harness.backend))
    captured: list[Any] = []
    original = kind.capture

    def capture(self, *args: Any, **kwargs: Any) -> Any:
        captured.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "capture", capture)
    callback = harness.compare(Encoder().eval(), predict(loader(batches())))
    assert callback.stats.captures == len(captured) > 1
    captured.clear()
    # the loss and the accuracy check the labels as well
    callback = harness.compare(Encoder().eval(), validate(loader(batches())))
    assert len(captured) == 2 * callback.stats.captures > 2


class WithLateMetrics(Encoder):
    """Metrics that count labels themselves, beside the reads of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.perplexity = Perplexity(ignore_index=-100)
        self.mean_of_many = MeanMetric()

    def validation_step(self, batch, batch_idx):
        logits = super().validation_step(batch, batch_idx)
        self.perplexity.update(logits, batch["labels"])
        self.mean_of_many.update(logits.mean(-1))
        self.log("perplexity", self.perplexity)
        self.log("mean_of_many", self.mean_of_many)
        return logits


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_reads_of_metrics_whose_updates_follow_the_step(harness, mode):
    callback = harness.callback(mode=mode)
    harness.compare(WithLateMetrics().eval(), validate(loader(batches())), callback)
    assert callback.stats.steps["FULL"] >= 12, callback.summary()


def test_fit_and_further_stages(harness):
    def job(trainer, module):
        trainer.validate(module, loader(batches()), verbose=False)
        predicted = trainer.predict(module, loader(batches()))
        with torch.no_grad():
            module.head.weight.mul_(2)
        return trainer.validate(module, loader(batches()), verbose=False), predicted

    callback = harness.callback()
    harness.compare(Encoder().eval(), job, callback)
    assert callback.stats.steps["FULL"] >= 40, callback.summary()


class WritesBatch(Callback):
    """Pads the batch on the device, after it was copied."""

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx % 4 == 2:
            batch["mask"][:, 3:] = 0


class PadsAfterTransfer(Encoder):
    """Does the same in a hook of the module."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch["mask"][:2, 4:] *= batch["ids"][:2, 4:] % 2
        return batch


class ReplacesMask(Encoder):
    """Transfers the batch itself, with another mask."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        moved = {name: value.to(device) for name, value in batch.items()}
        moved["mask"] = torch.ones_like(moved["mask"])
        moved["mask"][0, int(moved["ids"][0, 0]) % 6 :] = 0
        return moved


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize(
    ("kind", "others"),
    [(Encoder, [WritesBatch]), (PadsAfterTransfer, []), (ReplacesMask, [])],
)
def test_hooks_that_write_to_the_batch(harness, kind, others, verify_replays):
    callback = harness.callback(verify_replays=verify_replays)
    job = predict(loader(batches()))
    harness.compare(kind().eval(), job, callback, lambda: [each() for each in others])
    assert callback.stats.steps["FULL"] >= 8, callback.summary()


def test_batches_that_are_on_the_device_already(harness):
    device = "cuda" if harness.backend == "cuda" else "cpu"
    given = [{name: value.to(device) for name, value in batch.items()} for batch in batches()]
    callback = harness.callback()
    harness.compare(Encoder().eval(), predict(loader(given)), callback)
    assert callback.stats.steps["FULL"] >= 12, callback.summary()


def test_an_exception_leaves_nothing(harness):
    class Raises(Encoder):
        def predict_step(self, batch, batch_idx):
            if batch["ids"][0, 0] < 0:
                raise ValueError("negative")
            return super().predict_step(batch, batch_idx)

    given = batches()
    given.append({**given[0], "ids": given[0]["ids"] - 100})
    model, callback = Raises().eval(), harness.callback()
    trainer = harness.trainer(callback)
    with pytest.raises(ValueError, match="negative"):
        trainer.predict(model, loader(given))
    assert "batch_to_device" not in vars(trainer.strategy)
    harness.compare(model, predict(loader(batches())), harness.callback())


def test_no_batch_is_kept_after_a_stage(harness):
    given = batches(8)
    kept = [weakref.ref(batch["mask"]) for batch in given]
    trainer = harness.trainer(harness.callback())
    items = loader(given)
    trainer.validate(Encoder().eval(), items, verbose=False)
    given.clear()
    items.dataset.clear()
    del items
    trainer.validate(Encoder().eval(), loader(batches(2)), verbose=False)
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


def all_of_leaf() -> ReadPath:
    """``leaves[1].all()`` was True."""
    operation = Operation(torch.ops.aten.all.default, (Ref(0),), {}, (1,), True)
    read = Read(0, torch.ops.aten.is_nonzero.default, (Ref(1),))
    return ReadPath(
        [HostRead("aten::is_nonzero", "my.py:3", value=True)],
        [Root(0, 1, False)],
        [operation, read],
    )


def test_a_read_at_no_line_of_the_users_has_no_location():
    path = all_of_leaf()
    assert path.varying().location == "my.py:3"
    path.reads[0].location = Elsewhere.UNKNOWN
    reason = path.varying()
    assert (reason.location, "(unknown)" in str(reason)) == ("", True)


def test_the_host_answers_for_the_very_tensors_that_were_copied():
    path, copies = all_of_leaf(), HostCopies()
    path.use(copies)
    assert copies.are_wanted
    on_host = [torch.zeros(2), torch.ones(3)]
    moved = [leaf.clone() for leaf in on_host]
    copies.note(on_host, moved)
    moved[1].zero_()  # shows who is asked
    assert path.holds(moved)
    assert not path.holds([moved[0], moved[1].clone()])
    copies.clear()
    assert not path.holds(moved)
    assert "now False, before True" in path.explain()


@pytest.mark.parametrize(
    "given",
    [
        (torch.int64,),
        ("cpu", torch.int64),
        (torch.int64, False, True),
        (torch.device("cpu"), torch.bool, False, True),
        {"dtype": torch.int64, "memory_format": torch.channels_last},
        {"device": "cpu", "dtype": torch.int64, "memory_format": torch.channels_last},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_conversions_are_made_with_all_their_arguments(given, mode):
    watcher = StepWatcher(nn.Linear(2, 2), RecorderBackend(torch.device("cpu")), effects=None)
    x = torch.ones(2, 3, 4, 4, dtype=torch.int32)
    args, kwargs = (given, {}) if isinstance(given, tuple) else ((), given)
    with mode():
        path = watcher.host_values(lambda: bool(x.to(*args, **kwargs).all()), (x,))
        assert path is not None
        assert path.holds([x.clone()])
        assert not path.holds([x * 0])
        one, other = path.begin([x.clone()]), path.begin([x * 0])
        assert (one, other) == ([torch.tensor(True)], [torch.tensor(False)])


def test_a_path_holds_for_the_padded_batch_if_what_it_reads_is_not_padded():
    path, other = all_of_leaf(), all_of_leaf()
    assert path.is_same_for(other, {0})
    assert not path.is_same_for(other, {0, 1})
    assert not path.is_same_for(None, ())
    other.reads[0].value = False
    assert not path.is_same_for(other, {0})


def test_values_that_one_path_rules_out_are_not_computed_again():
    def path(*values: Any) -> ReadPath:
        reads = [HostRead("aten::item", "", value=value) for value in values]
        slots = [Read(i, torch.ops.aten.item.default, (Ref(i),)) for i in range(len(values))]
        return ReadPath(reads, [Root(i, i, False) for i in range(len(values))], slots)

    batch = [torch.tensor(1), torch.tensor(2), torch.tensor(3)]
    failed = path(1, 7, 3)
    assert not failed.holds(batch)
    assert path(1, 5).is_ruled_out_by(failed)
    assert path(1, 7).is_ruled_out_by(failed)
    assert not path(1, 2, 4).is_ruled_out_by(failed)
    assert not path(0, 5).is_ruled_out_by(failed), "it makes another second read"
    assert not path(1).is_ruled_out_by(failed)
    assert path(1, 2, 3).holds(batch)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_several_values_are_read_by_one_wait(monkeypatch, number):
    """Where only the device has the batch: a flag, and counts of two types."""
    waits: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)
        return lambda tensor: (waits.append(name), original(tensor))[1]

    for name in ("item", "tolist", "__bool__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    values = [True, 5, 7][:number]
    operations = [torch.ops.aten.is_nonzero.default, *[torch.ops.aten.item.default] * 2]

    def path() -> ReadPath:
        reads = [HostRead(operations[i]._schema.name, "", value=values[i]) for i in range(number)]
        slots = [Read(i, operations[i], (Ref(i),)) for i in range(number)]
        return ReadPath(reads, [Root(i, i, False) for i in range(number)], slots)

    right = [torch.tensor(True), torch.tensor(5, dtype=torch.int32), torch.tensor(7)][:number]
    assert path().holds(right)
    assert len(waits) == 1
    for place in range(number):
        wrong = [torch.zeros_like(x) if i == place else x for i, x in enumerate(right)]
        failed = path()
        assert not failed.holds(wrong)
        changed = str(failed.explain())
        assert changed.endswith(f"now {[False, 0, 0][place]!r}, before {values[place]!r}"), changed
    assert len(waits) == 1 + number


class Clones(SingleDeviceStrategy):
    """A strategy that copies even on a CPU."""

    def batch_to_device(self, batch, device=None, dataloader_idx=0):
        return {name: value.clone() for name, value in batch.items()}


def test_transfers_are_noted_only_while_somebody_wants_them():
    strategy, copies = Clones(torch.device("cpu")), HostCopies()
    transfer = NotedTransfer(strategy, copies)
    transfer.install()
    batch = {"x": torch.ones(3), "large": torch.ones(100_000), "y": torch.zeros(2)}
    moved = strategy.batch_to_device(batch)
    assert copies.of(list(moved.values()), [0]) is None
    copies.are_wanted = True
    moved = list(strategy.batch_to_device(batch).values())
    found = copies.of(moved, [0, 2])
    assert found is not None
    assert found[0] is batch["x"]
    assert copies.of(moved, [0, 1]) is None, "large tensors are not computed on the host"
    transfer.remove()
    assert "batch_to_device" not in vars(strategy)


class Drifts(Encoder):
    """Reads a value that is another one in each batch."""

    def predict_step(self, batch, batch_idx):
        return self(batch["ids"], None) * batch["ids"].sum().item()


def test_a_value_that_is_another_one_in_each_batch(harness):
    callback = harness.callback()
    harness.compare(Drifts().eval(), predict(loader(batches(60))), callback)
    assert callback.stats.steps["PIECEWISE"] >= 25, callback.summary()
    assert "another value in each batch" in " ".join(callback.summary().split())


def test_strict_accepts_new_values(harness):
    callback = harness.callback(strict=True)
    harness.compare(Encoder().eval(), predict(loader(batches())), callback)


def test_masks_of_other_types(harness):
    """Each type has graphs of its own, with the values of its own reads."""
    types = (torch.long, torch.bool, torch.float32, torch.uint8)
    given = [
        {**batch, "mask": batch["mask"].to(types[index // 13])}
        for index, batch in enumerate(batches(52)[:52])
    ]
    callback = harness.callback(warmup_steps=1)
    harness.compare(Encoder().eval(), predict(loader(given)), callback)
    assert callback.stats.steps["FULL"] >= 26, callback.summary()
