"""Batches padded up to captured sizes: the same numbers as eager, or a clear reason."""

from __future__ import annotations

import copy
import functools
import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from cg_lightning import CUDAGraphCallback
from cg_lightning.backends import resolve_backend
from cg_lightning.capture.entry import Captured, GraphEntry
from cg_lightning.capture.outputs import OutputPlan
from cg_lightning.capture.static_inputs import StaticInputs
from cg_lightning.core.causes import Cause
from cg_lightning.core.pad_rules import check_pad_dims
from cg_lightning.core.tree import flatten
from cg_lightning.diagnosis.watcher import DETECTORS, StepWatcher
from cg_lightning.host_values.exact_operations import SCALAR_READS
from cg_lightning.padding.entry import PaddedEntry
from cg_lightning.padding.leaves import Fill, PaddedLeaf, PaddedLeaves
from cg_lightning.padding.output_cut import OutputCut
from cg_lightning.padding.path import PaddedPath
from cg_lightning.padding.rules import MOST_KINDS, GivenRules, ProposedRules
from cg_lightning.report.records import EntryRecord, PaddingRecord
from cg_lightning.runtime import padded_steps as padded_steps_module
from tests.harness import KeepOutputs


def batches(*sizes: int, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, width, generator=generator) for size in sizes]


def texts(*lengths: int, rows: int = 4) -> list[dict[str, Tensor]]:
    """Return token ids and masks; the first row of each batch is the longest."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in lengths:
        ids = torch.randint(1, 50, (rows, length), generator=generator)
        mask = torch.ones(rows, length, dtype=torch.long)
        for row in range(1, rows):
            kept = int(torch.randint(1, length + 1, (1,), generator=generator))
            mask[row, kept:] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def rules(sizes: Any = (8, 16)) -> dict[str, Any]:
    rule = {1: {"sizes": sizes if isinstance(sizes, str) else list(sizes), "value": 0}}
    return {"input_ids": rule, "attention_mask": rule}


class Step(LightningModule):
    """Runs a function as each step, and keeps what it returns."""

    def __init__(self, function: Any = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.embedding = nn.Embedding(50, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale, self.total = 1.0, 0
        self.register_buffer("seen", torch.zeros(()))
        self.kept = torch.zeros(())
        self.function = function

    def on_predict_start(self) -> None:
        self.kept = self.kept.to(self.device)  # Lightning moves no plain attributes

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.function(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(harness, model: LightningModule, data: list[Any], *others: Any, **settings: Any):
    """Predict with and without the callback, and compare everything that was returned."""
    callback = harness.callback(**{"verify_tolerance": "close", **settings})
    reference = copy.deepcopy(model)
    results = []
    for module, extra in ((model, [callback]), (reference, [])):
        torch.manual_seed(1)
        kept = KeepOutputs()
        trainer = harness.trainer(*extra, kept, *[make() for make in others])
        returned = trainer.predict(module, DataLoader(copy.deepcopy(data), batch_size=None))
        results.append((returned, kept.kept, dict(module.state_dict()), module.scale, module.total))
    (leaves, structure), (wanted, wanted_structure) = map(flatten, results)
    assert structure == wanted_structure
    for leaf, other in zip(leaves, wanted, strict=True):
        if isinstance(leaf, Tensor):
            assert leaf.stride() == other.stride()
        torch.testing.assert_close(leaf, other, equal_nan=True)
    return callback


def padded_steps(callback: CUDAGraphCallback) -> int:
    return sum(record.steps for record in callback.stats.padding)


def causes(callback: CUDAGraphCallback) -> set[Any]:
    return {record.reason.kind for record in callback.stats.padding if record.reason is not None}


def plain(self, x):
    return self.net(x)


SIZES = (4, 4, 4, 4, 3, 2, 3, 2, 3, 2, 4, 1, 1, 1, 3)


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_partial_batches_run_from_the_graph_of_the_full_one(harness, mode, verify_replays):
    """Hazard 11."""
    callback = run(
        harness,
        Step(plain),
        batches(*SIZES),
        capture_sizes=[4],
        mode=mode,
        verify_replays=verify_replays,
    )
    assert callback.stats.captures == 1
    # the first other shape is watched, the second one is compared when it comes again
    assert padded_steps(callback) == 8, callback.summary()
    (record,) = callback.stats.padding
    assert record.shapes == "4x8"
    assert record.padded_elements == 8 * 4 * 8
    assert record.elements == (3 * 3 + 2 * 2 + 3 * 1) * 8


@pytest.mark.parametrize(("sizes", "padded"), [((), 0), ((30, 29, 30, 29, 28, 28), 7)])
def test_shapes_that_never_come_again_are_not_compared(harness, sizes, padded):
    """Each comparison costs more than an eager step, and is in vain here."""
    sizes = (40, 40, 40, 40, 39, *sizes, *range(27, 10, -1))
    callback = run(harness, Step(plain), batches(*sizes), capture_sizes=[40])
    assert padded_steps(callback) == padded, callback.summary()


def test_a_graph_of_another_size_is_not_captured_again(harness):
    callback = run(harness, Step(plain), batches(*SIZES), capture_sizes=[2, 4])
    assert callback.stats.captures == 2
    assert "captured again" not in callback.summary()


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda self, x: {"y": self.net(x), "t": (x * 2, None, 3)}, id="nested"),
        pytest.param(lambda self, x: x, id="the batch itself"),
        pytest.param(lambda self, x: self.net(x).t(), id="rows are the last dimension"),
        pytest.param(lambda self, x: self.net(x)[:, None].expand(-1, 4, -1), id="expanded"),
        pytest.param(lambda self, x: (self.net.weight_sum if False else self.net[0].weight,
                                      self.net(x)), id="a parameter"),
        pytest.param(lambda self, x: (y := self.net(x), y), id="one tensor twice"),
        pytest.param(lambda self, x: self.net(x).argmax(1), id="integers"),
    ],
)  # fmt: skip
def test_outputs_are_cut_to_those_of_eager(harness, function):
    callback = run(harness, Step(function), batches(*SIZES), capture_sizes=[4])
    assert padded_steps(callback) >= 6, callback.summary()


def _accumulate(self, x):
    self.total += 1
    return self.net(x)


def _write_buffer(self, x):
    self.seen.add_(x.sum())
    return self.net(x)


def _write_tensor(self, x):
    self.kept.add_(x.amax())
    return self.net(x)


def _one_hot_max(self, x):
    hot = x["hot"]
    return self.net(x["x"]) + hot.amax(0)[:3]


def _branch_on_rows(self, x):
    return self.net(x) if len(x) > 2 else self.net(x) * 2


def _tanh_or_not(self, x):
    return self.net(x) if len(x) == 4 else self.net(x) * self.scale


def _read_host(self, x):
    return self.net(x) * (2 if bool((x[0] > 0).all()) else 1)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda self, x: self.net(x - x.mean(0)), id="mean over the batch"),
        pytest.param(lambda self, x: self.net(x) * len(x), id="number of rows"),
        pytest.param(lambda self, x: (self.net(x), len(x)), id="number of rows returned"),
        pytest.param(lambda self, x: self.net(x).softmax(0), id="softmax over the batch"),
        pytest.param(lambda self, x: self.net(x) @ self.net(x).t(), id="similarities"),
        pytest.param(lambda self, x: self.net(x).sum(), id="sum"),
        pytest.param(lambda self, x: self.net(x).max(0).values, id="maximum"),
        pytest.param(lambda self, x: list(self.net(x)), id="list of rows"),
        pytest.param(lambda self, x: self.net(x).flip(0), id="flipped"),
        pytest.param(lambda self, x: self.net(x)[-1], id="last row"),
        pytest.param(lambda self, x: torch.rand_like(self.net(x)), id="random"),
        pytest.param(lambda self, x: self.net(x).flatten(), id="flattened"),
        pytest.param(
            lambda self, x: self.net(x) * (x.std(0, correction=0).amax() < 9), id="rare threshold"
        ),
        pytest.param(lambda self, x: self.net(x) * (x.amax() < 2), id="threshold"),
        pytest.param(lambda self, x: self.net(x)[x.sum(1).argsort()], id="sorted"),
        pytest.param(lambda self, x: self.net(x) + (x > 1).sum(), id="count"),
        pytest.param(lambda self, x: self.net(x).cumsum(0).flip(0), id="flipped sums"),
        pytest.param(lambda self, x: self.net(x)[torch.arange(len(x) - 1, -1, -1)], id="reversed"),
        pytest.param(lambda self, x: nn.functional.normalize(x, dim=0), id="normalized"),
        pytest.param(lambda self, x: x[x[:, 0] > 0], id="selected rows"),
        pytest.param(lambda self, x: {f"row {i}": y for i, y in enumerate(x)}, id="keys"),
        pytest.param(_accumulate, id="counter"),
        pytest.param(_write_buffer, id="buffer"),
        pytest.param(_write_tensor, id="tensor"),
        pytest.param(_branch_on_rows, id="branch on rows"),
    ],
)
def test_what_looks_at_the_whole_batch_gives_the_numbers_of_eager(harness, function):
    """Hazard 11."""
    run(harness, Step(function), batches(*SIZES), capture_sizes=[4])
    run(harness, Step(function), batches(*SIZES[4:]), capture_sizes=[4], verify_replays=0)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda self, x: self.net(x - x.mean(0)), id="mean"),
        pytest.param(lambda self, x: self.net(x).softmax(0), id="softmax"),
        pytest.param(_accumulate, id="counter"),
        pytest.param(_write_buffer, id="buffer"),
    ],
)
def test_dependent_rows_keep_their_shapes_for_this_reason(harness, function):
    """Hazard 11."""
    callback = run(harness, Step(function), batches(*SIZES * 2), capture_sizes=[4])
    assert causes(callback) == {Cause.ROWS_NOT_INDEPENDENT}
    assert padded_steps(callback) == 0
    assert callback.stats.steps["FULL"] >= 14, callback.summary()  # from graphs of their own shapes
    assert "rows not independent" in str(callback.summary())


def test_batch_norm_in_training_mode(harness):
    model = Step(lambda self, x: self.norm(self.net(x)))
    model.norm = nn.BatchNorm1d(3)
    callback = run(harness, model, batches(*SIZES), capture_sizes=[4])
    assert padded_steps(callback) >= 6
    model = Step(lambda self, x: self.norm.train()(self.net(x)))
    model.norm = nn.BatchNorm1d(3)
    callback = run(harness, model, batches(*[max(s, 2) for s in SIZES]), capture_sizes=[4])
    assert padded_steps(callback) == 0


def test_values_of_the_first_shape_that_change_later(harness):
    """The shape with three rows reads ``scale``, and that of the graph does not."""

    class Change(KeepOutputs):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_):
            pl_module.scale = 1.0 if batch_idx < 10 else 3.0

    callback = run(
        harness, Step(_tanh_or_not), batches(*[4] * 5, *[3] * 10), Change, capture_sizes=[4]
    )
    assert padded_steps(callback) >= 4


def test_host_values_of_the_batch_and_of_the_padded_batch(harness):
    data = [*batches(*[4] * 5, *[3] * 4), *[x.abs() for x in batches(3, 4, 3, 3)], *batches(3, 3)]
    run(harness, Step(_read_host), data, capture_sizes=[4])


def _any_all(self, x):
    """All rows decide: the padded batch may take another branch than the batch."""
    return self.net(x) if bool((x.sum(0) > 0).all()) else self.net(x) * 2


def test_a_branch_that_padding_changes(harness):
    data = [x + shift for shift in (1.0, -1.0, 0.2) for x in batches(4, 4, 4, 4, 3, 3, 3, 2, 2, 2)]
    run(harness, Step(_any_all), data, capture_sizes=[4])


def _flag_and_number(self, batch):
    x, mask = self.net(self.embedding(batch["input_ids"])), batch["attention_mask"]
    many = int((mask.sum(1) > 4).sum()) > 2
    y = x if bool(mask.all()) else x.clone()
    return y * 2 if many else y


def _float_as_a_flag(self, batch):
    x = self.net(self.embedding(batch["input_ids"]))
    hidden = (1 - batch["attention_mask"]) * 0.25
    y = x * 2 if hidden[:, 1].amax() else x
    return y * 3 if int((batch["input_ids"] > 100).sum()) else y


def _last_of_each(self, batch):
    """To look for an element by its index may fail, so each value is read before what follows."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    x = self.net(self.embedding(ids))
    if bool(mask[:, 0].all()) and bool((ids.gather(1, mask.sum(1, keepdim=True) - 1) > 25).any()):
        return x * 2
    return x


@pytest.mark.parametrize("function", [_flag_and_number, _float_as_a_flag, _last_of_each])
def test_host_values_of_padded_positions(harness, function):
    data = texts(*[5, 7, 6] * 12, *[3, 8, 5, 7, 6] * 4)
    for batch in data[::3]:
        batch["attention_mask"].fill_(1)
    callback = run(harness, Step(function), data, pad_dims=rules((8,)), verify_replays=0)
    assert padded_steps(callback) >= 6, callback.summary()


def _longest(self, batch):
    """``longest`` is not padded, so what is read of it holds for the padded batch as well."""
    x = self.net(self.embedding(batch["input_ids"]))
    return x * 2 if int(batch["longest"].max()) > 6 else x


class Operations(Callback):
    """Counts the operations of each step, without a mode that sees what it calls."""

    def __init__(self) -> None:
        self.of_steps: list[Counter[str]] = []

    def on_predict_batch_start(self, *_: Any) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.start()

    def on_predict_batch_end(self, *_: Any) -> None:
        self.profile.stop()
        self.of_steps.append(Counter(event.name for event in self.profile.events()))

    def latest(self, number: int) -> Counter[str]:
        """Return the operations of the latest steps together."""
        return sum(self.of_steps[-number:], Counter())


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_host_values_of_what_is_not_padded_are_read_once(harness):
    data = texts(*[5, 7, 6] * 8)
    for index, batch in enumerate(data):
        batch["longest"] = torch.tensor([index % 3, 6 if index < 15 and index % 2 else 7])
    made: list[Operations] = []
    make = lambda: made.append(Operations()) or made[-1]
    callback = run(harness, Step(_longest), data, make, pad_dims=rules((8,)), verify_replays=0)
    assert padded_steps(callback) >= 6, callback.summary()
    assert made[0].latest(6)["aten::_local_scalar_dense"] == 6


DECIDED: dict[str, tuple[bool, Callable[[Tensor], Any]]] = {
    "one that is not true": (True, lambda mask: bool(mask.all())),
    "cast": (True, lambda mask: bool(mask.to(torch.bool).all())),
    "compared": (True, lambda mask: bool((mask == 0).any())),
    "not all": (True, lambda mask: bool(~(mask != 0).all())),
    "two reads": (True, lambda mask: (bool(mask.all()), bool((mask == 0).any()))),
    "any other": (False, lambda mask: bool(mask.any())),
    "all alike": (False, lambda mask: bool((mask == 0).all())),
    "one is open": (False, lambda mask: (bool(mask.all()), bool(mask.any()))),
    "a number": (False, lambda mask: int(mask.sum())),
    "an element": (False, lambda mask: int(mask[0, 0])),
    "rows": (False, lambda mask: bool(mask.all(1).any())),
    "two tensors": (False, lambda mask: bool((mask == mask.flip(1)).all())),
}


@pytest.mark.parametrize("name", DECIDED)
def test_values_that_padding_alone_decides(backend, device, name):
    """They need not be read in each step. Other values of the batch cannot change them."""
    is_decided, step = DECIDED[name]
    of_backend = resolve_backend(backend, device)
    watcher = StepWatcher(nn.Linear(2, 2).to(device), of_backend, effects=None)
    padded = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], device=device)
    with torch.no_grad():
        path = watcher.host_values(lambda: step(padded), padded)
        assert path.is_decided_by({0: padded.new_full((1,), 0)}) is is_decided
        assert not path.is_decided_by({})
        if is_decided:
            assert not path.is_decided_by({0: padded.new_full((1,), 1)})
            others = [torch.randint(0, 2, (2, 4), device=device) for _ in range(20)]
            for other in others:
                other[:, -1] = 0
                assert step(other) == step(padded)


def _masked_if_needed(self, batch):
    """As the masks of transformers: there is none if nothing is masked."""
    x = self.net(self.embedding(batch["input_ids"]))
    mask = batch["attention_mask"]
    return x if mask.to(torch.bool).all() else x * mask[..., None]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_a_mask_is_read_once_and_its_padding_is_not(harness):
    data = texts(*[5, 7, 6] * 8)
    made: list[Operations] = []
    make = lambda: made.append(Operations()) or made[-1]
    callback = run(harness, Step(_masked_if_needed), data, make, pad_dims=rules((8,)))
    assert padded_steps(callback) >= 6, callback.summary()
    operations = made[0].latest(6)
    assert operations["aten::_local_scalar_dense"] == 6
    # one operation pads each tensor where the graph reads it
    assert operations["aten::cat"] == 2 * 6


class Reads(TorchDispatchMode):
    """Counts the operations that read a number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        self.number += func._schema.name in SCALAR_READS
        return func(*args, **(kwargs or {}))


def test_host_values_of_a_padded_step_are_read_at_once(backend, device):
    """The device is waited for once, and the batch is padded once, where the graph reads it."""

    def step(x: Tensor) -> None:
        if not bool((x > 0).all()):
            int((x > 1).sum())

    def counted(*numbers: int) -> Tensor:
        """Return rows with so many values that are counted. Padding repeats the last row."""
        return torch.tensor([[2.0] * n + [-1.0] * (6 - n) for n in numbers], device=device)

    of_backend = resolve_backend(backend, device)
    watcher = StepWatcher(nn.Linear(2, 2).to(device), of_backend, effects=None)
    real, large = counted(2, 1, 1), counted(2, 1, 1, 1)
    padding = PaddedLeaves({0: PaddedLeaf((3, 6), (4, 6), {})}, elements=18)
    with torch.no_grad():
        paths = [watcher.host_values(lambda x=x: step(x), x) for x in (real, large)]
        inputs = StaticInputs([large], large, device)
        graph, output = of_backend.capture(
            functools.partial(torch.mul, inputs.leaves[0], 2),
            collect_garbage=False,
            capture_error_mode="thread_local",
        )
        plan, computed = OutputPlan.make(output, inputs.leaves, set())
        record = EntryRecord("predict", "FULL", "step", "4x6")
        owner = GraphEntry(graph, inputs, Captured(plan, computed), record)
        counts = PaddingRecord("predict", "step", "4x6")
        entry = PaddedEntry(owner, None, padding, OutputCut(real * 2), counts, 0)
        path = PaddedPath(paths[0], paths[1], entry)
        path.holds([real])  # the first views of what the graph reads
        waits: list[str] = []
        leaves = [real]
        with of_backend.noticing_host_syncs(lambda _, what: waits.append(what)), Reads() as reads:
            assert path.holds(leaves)
        assert (len(waits), reads.number) == (1, 0), waits
        real_before = real.clone()
        real.zero_()  # what was padded is not padded again
        assert torch.equal(entry.replay(leaves, 1), real_before * 2)
        assert torch.equal(entry.replay(leaves, 2), real_before * 0)
        for other, change in (
            (counted(3, 2, 0), "now 5, before 4"),  # of the batch alone
            (counted(1, 1, 2), "now 6, before 5"),  # of the padded batch alone
            (torch.ones_like(real), "now True, before False"),
        ):
            assert not path.holds([other])
            assert path.explain().endswith(change)
            assert torch.equal(entry.replay([other], 3), other * 2)
        static = weakref.ref(inputs.leaves[0])
        inputs.leaves.clear()
        owner.drop()
        del inputs, graph, output, plan, computed
        gc.collect()
        assert static() is None, "an entry whose graph was dropped keeps its memory"
        assert path.holds([real_before])


def test_a_step_that_fails_for_the_padded_batch_only(harness):
    def step(self, x):
        if len(x) == 4:
            raise RuntimeError("four")
        return self.net(x)

    callback = run(harness, Step(step), batches(3, 3, 3, 3, 3, 3, 3), capture_sizes=[4])
    assert padded_steps(callback) == 0
    assert "the step raised RuntimeError for the padded batch: four" in str(callback.summary())
    assert callback.stats.steps["FULL"] >= 1


def test_sizes_above_the_largest_and_empty_batches(harness):
    callback = run(
        harness, Step(plain), batches(5, 5, 5, 5, 5, 0, 0, 3, 3, 3, 1, 1, 1), capture_sizes=[2, 4]
    )
    assert {record.shapes for record in callback.stats.padding} == {"4x8", "2x8"}


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. all graphs of max_graphs")
def test_eviction_and_two_epochs_of_one_module(harness):
    model = Step(plain)
    data = batches(*[4] * 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 3, 2, 1)
    callback = run(harness, model, data, capture_sizes=[1, 2, 4], max_graphs=1)
    assert len(callback.stats.padding) >= 1
    run(harness, model, data, capture_sizes=[2, 4])


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. all graphs of max_graphs")
@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. graphs that are in use leave too little")
@pytest.mark.parametrize("stage", ["predict", "validate"])
def test_more_padded_sizes_than_graphs_are_not_captured_again_and_again(harness, stage):
    """Each would take the place of another one that comes again soon."""
    lengths = [7, 8, 15, 16, 23, 24, 30, 32] * 6
    settings: dict[str, Any] = {"pad_dims": rules((8, 16, 24, 32))}

    def stats(**others: Any) -> Any:
        if stage == "predict":
            model = Encodes(encodes)
            return run(harness, model, texts(*lengths), **settings, **others).stats
        settings["targets"] = ["encoder"]
        return compare_validation(harness, Validated(), texts(*lengths), **settings, **others).stats

    stats()  # the process's first capture also takes memory of libraries
    everything = stats()
    assert everything.captures == 4
    assert stats(max_graphs=3).captures == 3
    fewer = stats(max_graph_bytes=everything.graph_bytes - 1)
    assert fewer.captures == 4  # the last one shows that its graph finds no room
    assert fewer.replays > 20


@pytest.mark.parametrize(("dtype", "fills"), [(torch.long, 1), (torch.float32, 3)])
def test_integers_have_one_other_padding_and_floats_three(harness, monkeypatch, dtype, fills):
    """There is nothing above and below all integers, and no integer that is not a number."""
    checked: list[Fill] = []
    original = PaddedEntry.replay

    def replay(self, leaves, step, tree=None, fill=Fill.GIVEN):
        checked.append(fill)
        return original(self, leaves, step, tree, fill)

    monkeypatch.setattr(PaddedEntry, "replay", replay)
    data = [(x * 9).to(dtype) for x in batches(*[4] * 4, *[3] * 4)]
    model = Step(lambda self, x: self.net(x.float()))
    callback = run(harness, model, data, capture_sizes=[4])
    assert padded_steps(callback)
    assert len([fill for fill in checked if fill is not Fill.GIVEN]) == fills


def test_weights_that_are_replaced(harness):
    class Replace(KeepOutputs):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_):
            if batch_idx == 9:
                layer = pl_module.net[0]
                layer.weight = nn.Parameter(layer.weight.detach() * 2)

    run(harness, Step(plain), batches(*[4] * 4, *[3] * 12), Replace, capture_sizes=[4])


def test_outputs_in_graph_memory_are_cut_as_well(harness):
    model, callback = (
        Step(plain),
        harness.callback(capture_sizes=[4], verify_tolerance="close", copy_outputs=False),
    )
    reference = copy.deepcopy(model)
    data = batches(*SIZES)
    found = harness.trainer(callback).predict(model, DataLoader(data, batch_size=None))
    wanted = harness.trainer().predict(reference, DataLoader(data, batch_size=None))
    assert [x.shape for x in found] == [x.shape for x in wanted]


# other dimensions


def _masked_attention(self, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    x = self.embedding(ids)
    y, _ = self.attention(x, x, x, key_padding_mask=mask == 0, need_weights=False)
    return {"all": self.net(y), "first": self.net(y[:, 0])}


LENGTHS = (5, 7, 8, 5, 7, 5, 7, 12, 9, 12, 9, 12, 16, 16, 3, 3, 3, 20, 20)


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. 30 batches")
@pytest.mark.parametrize("pads", [False, True])
def test_the_summary_advises_to_pad_only_who_does_not(harness, pads):
    settings = {"pad_dims": rules((32,))} if pads else {}
    callback = run(harness, Step(_masked_attention), texts(*range(3, 32), 3), **settings)
    assert ("most steps are warm-ups" in str(callback.summary())) is not pads


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_positions_behind_a_mask(harness, verify_replays):
    callback = run(
        harness,
        Step(_masked_attention),
        texts(*LENGTHS),
        pad_dims=rules(),
        verify_replays=verify_replays,
    )
    assert padded_steps(callback) >= 7, callback.summary()
    assert not causes(callback), callback.summary()
    assert callback.stats.captures <= 3


def _mean(self, batch):
    return self.net(self.embedding(batch["input_ids"]).mean(1))


def _max(self, batch):
    return self.net(self.embedding(batch["input_ids"]).amax(1))


def _unmasked(self, batch):
    x = self.embedding(batch["input_ids"])
    return self.net(self.attention(x, x, x, need_weights=False)[0])


def _last(self, batch):
    return self.net(self.embedding(batch["input_ids"])[:, -1])


def _length(self, batch):
    return self.net(self.embedding(batch["input_ids"])) / batch["input_ids"].shape[1]


@pytest.mark.parametrize("function", [_mean, _max, _unmasked, _last, _length])
def test_dependent_positions_keep_their_shapes_for_this_reason(harness, function):
    callback = run(harness, Step(function), texts(*LENGTHS), pad_dims=rules())
    assert causes(callback) == {Cause.POSITIONS_NOT_INDEPENDENT}
    assert padded_steps(callback) == 0


def test_maxima_of_masks_over_rows(harness):
    generator = torch.Generator().manual_seed(9)
    data = [
        {"x": x, "hot": (torch.rand(x.shape, generator=generator) < 0.3).float()}
        for x in batches(*SIZES * 2)
    ]
    run(harness, Step(_one_hot_max), data, capture_sizes=[4])
    data = [{"x": each["x"], "hot": each["hot"].bool()} for each in data]
    step = Step(lambda self, b: self.net(b["x"]) + b["hot"].any(0)[:3])
    run(harness, step, data, capture_sizes=[4])


def test_positions_are_checked_although_rows_were(harness):
    """The graph is checked with padded rows first, and runs padded positions later."""
    data = [*texts(*[8] * 5), *texts(*[8] * 4, rows=3), *texts(*[5, 6, 7] * 5)]
    callback = run(harness, Step(_max), data, pad_dims=rules(), capture_sizes=[4])
    assert Cause.POSITIONS_NOT_INDEPENDENT in causes(callback)


def test_a_refused_padding_leaves_the_own_graph_of_a_shape(harness):
    """The step reads on the host, so its own graph needs the reads of its own shape."""

    def step(self, x):
        y = self.net(x) * (2 if bool((x > -1e9).all()) else 1)
        return y.softmax(0)

    callback = run(harness, Step(step), batches(*SIZES * 2), capture_sizes=[4])
    assert padded_steps(callback) == 0
    assert callback.stats.steps["FULL"] >= 10, callback.summary()


def test_a_threshold_that_padding_may_cross_later_is_found_at_once(harness):
    step = Step(lambda self, x: self.net(x) * (x.std(0, correction=0).amax() < 9))
    callback = run(harness, step, batches(*SIZES), capture_sizes=[4])
    assert causes(callback) == {Cause.ROWS_NOT_INDEPENDENT}


POSITIONS = {"x": {1: {"sizes": [8], "value": 0}}}


@pytest.mark.parametrize("hidden", [float("-inf"), -1e9])
def test_a_mask_that_is_added_to_scores(harness, hidden):
    data = []
    for index, x in enumerate(batches(*[5, 6, 7] * 4, width=1)):
        mask = torch.zeros(1, len(x))
        mask[:, : 1 + index % 2] = hidden
        data.append({"x": x[None], "mask": mask})

    def step(self, batch):
        return (batch["mask"].softmax(1)[..., None] * batch["x"]).sum(1)

    rule = {"x": {1: {"sizes": [8], "value": 0}}, "mask": {1: {"sizes": [8], "value": hidden}}}
    callback = run(harness, Step(step), data, pad_dims=rule)
    assert padded_steps(callback) >= 6, callback.summary()


UNLIKE: dict[str, Any] = {
    "zeros first": (lambda index: 0.0 if index < 6 else 1.0, lambda x: x.mean(1)),
    "both signs first": (lambda index: 1.0, lambda x: x.amin(1)),
    "small": (lambda index: 1e-6, lambda x: x.mean(1)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_positions_that_only_later_batches_show(harness, name):
    """The first batches are unlike the others: silence, say; or all results are small."""
    scale, function = UNLIKE[name]
    generator = torch.Generator().manual_seed(3)
    data = [
        {"x": torch.randn(1, (5, 6, 7)[index % 3], 1, generator=generator) * scale(index)}
        for index in range(12)
    ]
    if name != "small":
        data += [{"x": each["x"] + 3} for each in data[6:]]
    step = Step(lambda self, batch: function(batch["x"]))
    callback = run(harness, step, data, pad_dims=POSITIONS)
    assert causes(callback) == {Cause.POSITIONS_NOT_INDEPENDENT}, callback.summary()


VIEWS: dict[str, Any] = {
    "of another part": lambda y, x: {"all": y, "first": y[:, 0]},
    "another name": lambda y, x: {"all": y, "same": y.detach()},
    "of the batch": lambda y, x: {"all": y, "flat": x.flatten(0)},
}


@pytest.mark.parametrize("name", VIEWS)
def test_parts_of_an_output_that_share_memory(harness, name):
    """A callback that writes to one part changes the other one."""

    class Writes(Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
            outputs["all"].mul_(100)

    step = Step(lambda self, x: VIEWS[name](self.net(x), x))
    callback = run(harness, step, batches(*SIZES), Writes, capture_sizes=[4])
    assert padded_steps(callback) == 0


def test_an_output_that_needs_no_cut_has_the_strides_of_eager(harness):
    data = [{"x": torch.randn(4, 1, 8)} for _ in range(8)]
    step = Step(lambda self, batch: self.net(batch["x"])[:, 0])
    callback = run(harness, step, data, pad_dims={"x": {1: {"sizes": [8], "value": 0}}})
    assert padded_steps(callback) > 4, callback.summary()


def _returns_its_batch(self, batch):
    self.net(batch["x"])
    return batch


@pytest.mark.parametrize(
    ("step", "does"),
    [
        (_returns_its_batch, "returns a container of its batch"),
        (lambda self, batch: self.net(batch["x"].mul_(2)), "writes to its batch"),
    ],
)
def test_a_step_that_does_more_than_compute_is_not_padded(harness, step, does):
    data = [{"x": x} for x in batches(*SIZES)]
    callback = run(harness, Step(step), data, capture_sizes=[4])
    assert padded_steps(callback) == 0
    assert any(does in record.reason.text for record in callback.stats.reasons), callback.summary()


def test_leaves_are_named_by_their_place_in_nested_batches(harness):
    data = [(text["input_ids"], [{"mask": text["attention_mask"]}]) for text in texts(*LENGTHS)]
    rule = {1: {"sizes": "pow2"}}

    def step(self, batch):
        return _masked_attention(
            self, {"input_ids": batch[0], "attention_mask": batch[1][0]["mask"]}
        )

    callback = run(harness, Step(step), data, pad_dims={"0": rule, "1.0.mask": rule})
    assert padded_steps(callback) >= 7, callback.summary()


def test_batches_without_a_key_and_names_that_change(harness):
    data = [{**text, "file": object()} for text in texts(5, 7, 5, 7, 5, 7)]
    run(harness, Step(_masked_attention), data, pad_dims=rules(), capture_sizes=[4])
    data = [{**text, "file": f"{i}"} for i, text in enumerate(texts(*[5, 7, 8] * 8))]
    run(harness, Step(_masked_attention), data, pad_dims=rules(), capture_sizes=[4])


def test_names_and_objects_that_are_passed_on(harness):
    class Name:
        def __init__(self, index: int) -> None:
            self.index = index

    class Indices(KeepOutputs):
        def on_predict_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
            seen.append((outputs["name"], outputs["object"].index))

    seen: list[Any] = []
    data = [
        {"x": x, "name": f"{i}", "object": Name(i)}
        for i, x in enumerate(batches(*[4, 4, 3, 2, 3, 4, 3, 2, 3] * 3))
    ]

    def step(self, batch):
        return {"x": self.net(batch["x"]), "name": batch["name"], "object": batch["object"]}

    for extra in ([harness.callback(capture_sizes=[4], verify_tolerance="close")], []):
        trainer = harness.trainer(*extra, Indices())
        trainer.predict(Step(step), DataLoader(data, batch_size=None))
    assert seen[:27] == seen[27:] == [(f"{i}", i) for i in range(27)]


def test_strict_does_not_raise_for_a_padding_that_is_refused(harness):
    step = Step(lambda self, x: self.net(x.softmax(0)))
    run(harness, step, batches(*SIZES), capture_sizes=[4], strict=True, mode="FULL")


def test_every_nth_replay_is_compared(harness):
    run(harness, Step(plain), batches(*SIZES), capture_sizes=[4], verify_every=1, verify_replays=0)
    run(harness, Step(plain), batches(*SIZES), capture_sizes=[4], verify_every=2)


def test_rows_and_positions_together(harness):
    data = [*texts(5, 7, 8, 5, 7, 7), *texts(5, 7, 5, 7, 6, 6, 6, rows=3)]
    callback = run(
        harness, Step(_masked_attention), data, pad_dims=rules("pow2"), capture_sizes=[4]
    )
    assert padded_steps(callback) >= 4, callback.summary()
    assert callback.stats.captures == 1


def bert(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    return transformers.BertModel(config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_encoder_of_transformers(harness, attention):
    model = Step(lambda self, batch: self.bert(**batch))
    model.bert = bert(attention)
    data = texts(*LENGTHS)
    data[7]["attention_mask"].fill_(1)
    data[10]["attention_mask"].fill_(1)  # it reads on the host whether something is masked
    callback = run(harness, model, data, pad_dims=rules())
    assert padded_steps(callback) >= 6, callback.summary()
    assert not causes(callback), callback.summary()


# steps that are padded in pieces


class Validated(Step):
    """Logs a loss and an accuracy of the first position, and keeps what its steps return."""

    def __init__(self, function: Any = None) -> None:
        super().__init__(function)
        self.encoder = Encoder()
        self.accuracy = MulticlassAccuracy(3)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.function is not None:
            return self.function(self, batch)
        logits = self.net(self.encoder(**batch)[:, 0])
        target = batch["input_ids"][:, 0] % 3
        loss = nn.functional.cross_entropy(logits, target)
        self.accuracy.update(logits, target)
        self.log("loss", loss)
        self.log("accuracy", self.accuracy)
        return {"loss": loss, "logits": logits}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(self.encoder(**batch)).square().mean()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.layer(x, src_key_padding_mask=attention_mask == 0)


def compare_validation(harness, model, data, *others, epochs=1, fit=False, **settings):
    callback = harness.callback(**{"verify_tolerance": "close", **settings})
    reference = copy.deepcopy(model)
    results = []
    for module, extra in ((model, [callback]), (reference, [])):
        torch.manual_seed(1)
        kept = KeepOutputs()
        trainer = harness.trainer(*extra, kept, *[make() for make in others], max_epochs=epochs)
        loader = DataLoader(data, batch_size=None)
        if fit:
            trainer.fit(module, loader, loader)
            logged = [dict(trainer.callback_metrics)]
        else:
            logged = [trainer.validate(module, loader, verbose=False) for _ in range(epochs)]
        results.append((logged, kept.kept, dict(module.state_dict())))
    (leaves, structure), (wanted, wanted_structure) = map(flatten, results)
    assert structure == wanted_structure
    for leaf, other in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf, other, equal_nan=True)
    return callback


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_a_step_with_a_loss_is_padded_in_pieces(harness, mode):
    callback = compare_validation(
        harness, Validated(), texts(*LENGTHS), epochs=2, pad_dims=rules(), mode=mode
    )
    assert padded_steps(callback) >= 12, callback.summary()
    assert {record.target for record in callback.stats.padding} == {"encoder"}
    assert callback.stats.steps["PIECEWISE"] >= 12


def test_batches_of_a_captured_size_run_from_the_graphs_of_the_padded_ones(harness, monkeypatch):
    watched = watched_steps(monkeypatch)
    data = texts(5, 7, *[8, 16, 5, 12, 7] * 6)
    callback = compare_validation(harness, Validated(), data, pad_dims=rules())
    assert callback.stats.steps["FULL"] == 0, callback.summary()
    encoder = [entry for entry in callback.stats.entries if entry.target == "encoder"]
    assert sum(entry.captures for entry in encoder) == 2
    assert len([batch for batch in watched if isinstance(batch, dict)]) == 1


@pytest.mark.parametrize("prints", [False, True])
def test_batches_of_a_captured_size_that_come_often_are_watched(harness, monkeypatch, prints):
    monkeypatch.setattr(padded_steps_module, "WATCH_AT", 5)

    class Prints(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if prints and batch_idx > 2:
                print("batch")
            return super().validation_step(batch, batch_idx)

    watched = watched_steps(monkeypatch)
    data = texts(5, 7, *[8, 5, 7] * 14)
    callback = compare_validation(harness, Prints(), data, pad_dims=rules())
    steps = [batch for batch in watched if isinstance(batch, dict)]
    assert sum(batch["input_ids"].shape[1] == 8 for batch in steps) == 1
    assert (callback.stats.steps["FULL"] > 5) is not prints, callback.summary()
    assert callback.stats.steps["PIECEWISE"] > (35 if prints else 25), callback.summary()


def test_partial_batches_of_a_step_with_a_loss(harness):
    """Hazard 11."""
    data = [*texts(*[8] * 6), *texts(8, 8, 8, rows=3), *texts(8, 8, 8, rows=2)]
    callback = compare_validation(harness, Validated(), data, epochs=2, capture_sizes=[4])
    assert {record.target for record in callback.stats.padding} == {"encoder", "net"}
    assert padded_steps(callback) >= 12, callback.summary()


def test_validation_inside_fit(harness):
    data = texts(5, 7, 8, 5, 7, 5, 7, 12, 5, 7, 12)
    callback = compare_validation(harness, Validated(), data, epochs=3, fit=True, pad_dims=rules())
    assert padded_steps(callback) >= 16, callback.summary()


class Adapted(Encoder):
    """Adds the mean over all positions, times a weight that is 0 until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask):
        mean = self.embedding(input_ids).mean(1, keepdim=True)
        return super().forward(input_ids, attention_mask) + self.gate * mean


@pytest.mark.parametrize("is_trained", [True, False])
def test_padding_is_compared_again_if_weights_have_changed(harness, is_trained):
    """In the first epochs of validation nothing shows what the gate lets through later."""

    class Opens(Callback):
        def on_validation_start(self, trainer, pl_module) -> None:
            if is_trained and trainer.current_epoch == 2:
                with torch.no_grad():
                    pl_module.encoder.gate.fill_(1.0)

    model = Validated()
    model.encoder = Adapted()
    model.encoder.gate.requires_grad_(False)
    data = texts(5, 7, 6, 5, 7, 6, 5, 7, 6)
    callback = compare_validation(
        harness, model, data, Opens, epochs=5, fit=True, pad_dims=rules(), verify_replays=0
    )
    refused = {cause for cause in causes(callback) if isinstance(cause, Cause)}
    assert (Cause.POSITIONS_NOT_INDEPENDENT in refused) is is_trained, callback.summary()


def test_a_whole_step_of_validate_is_never_padded(harness):
    callback = compare_validation(
        harness, Validated(), texts(*LENGTHS), pad_dims=rules(), mode="FULL"
    )
    assert callback.stats.padding == []


def _siamese(self, batch):
    one = self.encoder(**batch)
    other = self.encoder(batch["input_ids"].flip(0), batch["attention_mask"].flip(0))
    return {"distance": (one - other).square().mean(), "one": one, "other": other}


def _loss_inside(self, batch):
    return {"loss": self.pool(**batch)}


class Pool(Encoder):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask).exp().mean()


class Counting(Encoder):
    def forward(self, input_ids, attention_mask):
        self.calls += 1
        return super().forward(input_ids, attention_mask) * (1 + self.calls % 2)


class Drawing(Encoder):
    def forward(self, input_ids, attention_mask):
        x = super().forward(input_ids, attention_mask)
        return x + torch.rand_like(x)


class Switching(Encoder):
    """Reads on the host whether anything is masked, and does something else then."""

    def forward(self, input_ids, attention_mask):
        x = super().forward(input_ids, attention_mask)
        return x * 2 if bool(attention_mask.all()) else x


class ByLength(Encoder):
    def forward(self, input_ids, attention_mask):
        x = super().forward(input_ids, attention_mask)
        return x if input_ids.shape[1] > 6 else x * 3


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("kind", [Encoder, Pool, Counting, Drawing, Switching, ByLength])
@pytest.mark.parametrize("verify_replays", [0, 2])
def test_submodules_of_all_kinds_give_the_numbers_of_eager(harness, kind, verify_replays):
    data = texts(*LENGTHS)
    for index in (5, 6, 8, 9):
        data[index]["attention_mask"].fill_(1)
    model = Validated(lambda self, batch: {"y": self.encoder(**batch)})
    model.encoder = kind()
    compare_validation(
        harness,
        model,
        data,
        epochs=2,
        pad_dims=rules(),
        capture_sizes=[2, 4],
        verify_replays=verify_replays,
    )


def test_a_submodule_that_is_called_twice(harness):
    callback = compare_validation(
        harness, Validated(_siamese), texts(*LENGTHS), epochs=2, pad_dims=rules()
    )
    assert padded_steps(callback) >= 8, callback.summary()


def test_a_submodule_that_reduces_over_positions_says_so(harness):
    model = Validated(_loss_inside)
    model.pool = Pool()
    callback = compare_validation(harness, model, texts(*LENGTHS), epochs=2, pad_dims=rules())
    assert causes(callback) == {Cause.POSITIONS_NOT_INDEPENDENT}
    assert padded_steps(callback) == 0


def test_a_submodule_that_is_replaced(harness):
    class Replace(KeepOutputs):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_):
            if batch_idx == 8:
                torch.manual_seed(4)
                pl_module.encoder = Encoder().eval().to(pl_module.device)
            if batch_idx == 12:
                weight = pl_module.encoder.layer.linear1.weight
                weight.data = torch.ones_like(weight)

    compare_validation(harness, Validated(), texts(*LENGTHS), Replace, pad_dims=rules())


def test_a_hook_that_is_added_to_a_padded_piece_runs(harness):
    class Add(KeepOutputs):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_):
            if batch_idx == 8:
                hook = lambda module, args, output: output * 2
                pl_module.encoder.register_forward_hook(hook)

    compare_validation(harness, Validated(), texts(*LENGTHS), Add, epochs=2, pad_dims=rules())


def test_an_exception_in_a_padded_piece_leaves_nothing(harness):
    class Failing(Encoder):
        def forward(self, input_ids, attention_mask):
            if input_ids.shape[1] == 13:
                raise RuntimeError("thirteen")
            return super().forward(input_ids, attention_mask)

    model = Validated()
    model.encoder = Failing()
    callback = harness.callback(verify_tolerance="close", pad_dims=rules())
    data = texts(5, 7, 5, 7, 5, 7, 13)
    with pytest.raises(RuntimeError, match="thirteen"):
        harness.trainer(callback).validate(model, DataLoader(data, batch_size=None), verbose=False)
    copy.deepcopy(model)
    assert padded_steps(callback) >= 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_encoder_of_transformers_as_a_submodule(harness, attention):
    model = Validated(_with_bert)
    model.bert = bert(attention)
    data = texts(*LENGTHS)
    for index in (7, 10):
        data[index]["attention_mask"].fill_(1)
    callback = compare_validation(harness, model, data, epochs=2, pad_dims=rules())
    assert padded_steps(callback) >= 10, callback.summary()
    assert not causes(callback), callback.summary()
    # on a GPU, one path of the encoder for masks of ones has a piece of it only
    targets = {record.target for record in callback.stats.padding}
    assert "bert" in targets and targets <= {"bert", "bert.embeddings"}  # noqa: PT018


def _with_bert(self, batch):
    hidden = self.bert(**batch).last_hidden_state
    logits = self.head(hidden[:, 0]) if hasattr(self, "head") else hidden[:, 0]
    loss = nn.functional.cross_entropy(logits, batch["input_ids"][:, 0] % 3)
    self.log("loss", loss)
    return {"logits": logits, "loss": loss}


@pytest.mark.exhaustive
def test_shapes_that_never_repeat_are_not_watched_for_good(harness):
    data = batches(4, *[4] * 4, width=8)
    data += [torch.randn(4, width) for width in range(100, 200)]

    def step(self, x):
        return torch.relu(x * 2)

    rule = {1: {"sizes": "pow2"}}
    wrapped = [{"x": each} for each in data]
    callback = run(harness, Step(lambda self, b: step(self, b["x"])), wrapped, pad_dims={"x": rule})
    assert padded_steps(callback) < 10
    assert callback.stats.steps["NONE"] > 90
    callback = run(
        harness, Step(lambda self, b: step(self, b["x"])), wrapped * 3, pad_dims={"x": rule}
    )
    assert padded_steps(callback) >= 100


def watched_steps(monkeypatch) -> list[Any]:
    """Return a list that receives the batch of each step that is watched by all detectors."""
    found: list[Any] = []
    original = StepWatcher.watch

    def watch(self, step, batch, *rest):
        if self._detectors is DETECTORS:
            found.append(batch)
        return original(self, step, batch, *rest)

    monkeypatch.setattr(StepWatcher, "watch", watch)
    return found


def encodes(self, batch):
    return self.encode(batch) * self.scale


def own_value_of_a_length(self, batch):
    values = self.encode(batch) * self.scale
    return values * self.other if batch["input_ids"].shape[1] % 2 else values


def own_read_of_a_length(self, batch):
    mask = batch["attention_mask"]
    if mask.shape[1] % 2 and mask.all():
        return self.encode(batch) * 1.0
    return self.encode(batch)


class Encodes(Step):
    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self.other = 1.0

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(self.embedding(batch["input_ids"])) * batch["attention_mask"][..., None]


class Sets(Callback):
    """Sets an attribute before one batch."""

    def __init__(self, name: str, index: int) -> None:
        self.name, self.index = name, index

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx == self.index:
            setattr(pl_module, self.name, 3.0)


MANY = [*range(3, 33), *range(3, 33), *range(32, 2, -1)]


def test_not_each_shape_of_steps_that_read_the_same_is_watched(harness, monkeypatch):
    watched = watched_steps(monkeypatch)
    rule = rules((8, 16, 24, 32))
    callback = run(harness, Encodes(encodes), texts(*MANY), pad_dims=rule)
    assert callback.stats.steps["FULL"] > 50, callback.summary()
    assert len(watched) == 1


def test_each_way_through_the_code_is_watched(harness, monkeypatch):
    watched = watched_steps(monkeypatch)
    rule = rules((8, 16, 24, 32))
    callback = run(harness, Encodes(own_value_of_a_length), texts(*MANY), pad_dims=rule)
    assert callback.stats.steps["FULL"] > 40, callback.summary()
    lengths = [batch["input_ids"].shape[1] for batch in watched]
    assert {length % 2 for length in lengths} == {0, 1}
    assert len(watched) <= 6


def test_each_shape_is_watched_if_it_has_host_values_that_the_padded_batch_has_not(
    harness, monkeypatch
):
    watched = watched_steps(monkeypatch)
    run(harness, Encodes(own_read_of_a_length), texts(*MANY), pad_dims=rules((8, 16, 24, 32)))
    lengths = {batch["input_ids"].shape[1] for batch in watched}
    assert lengths >= {length for length in MANY if length % 2}


def only_five(self, batch):
    return self.encode(batch) * (self.scale if batch["input_ids"].shape[1] == 5 else 1.0)


def table_by_length(self, batch):
    return self.encode(batch) * self.table[batch["input_ids"].shape[1] % 3]


def name_by_length(self, batch):
    return self.encode(batch) * getattr(
        self, "other" if batch["input_ids"].shape[1] == 5 else "one"
    )


def computed_name(self, batch):
    return self.encode(batch) * getattr(self, ("one", "scale", "other")[len(batch["n"]) % 3])


def module_by_length(self, batch):
    return self.encode(batch) * self.factors[batch["input_ids"].shape[1] % 2](batch["n"][:, None])


def object_by_length(self, batch):
    holder = self.holders[int(batch["input_ids"].shape[1] == 5)]
    return self.encode(batch) * holder.scale


def all_are_long(self, batch):
    values = self.encode(batch)
    return values * 2 if bool((batch["n"] == batch["input_ids"].shape[1]).all()) else values


def first_is_long(self, batch):
    values = self.encode(batch)
    return values * 2 if batch["n"][0].item() >= batch["input_ids"].shape[1] else values


def counts_long(self, batch):
    number = int((batch["n"] >= batch["input_ids"].shape[1]).sum())
    return self.encode(batch) * (1 + number)


def masked_at_the_fifth(self, batch):
    values = self.encode(batch)
    return values * 2 if bool(batch["attention_mask"][:, :5].all()) else values


def prints_for_five(self, batch):
    if batch["input_ids"].shape[1] == 5:
        self.total += 1
    return self.encode(batch)


def fails_and_goes_on(self, batch):
    try:
        value = self.short[batch["input_ids"].shape[1]]
    except KeyError:
        value = 1.0
    return self.encode(batch) * value


def fifth_position(self, batch):
    return self.encode(batch) + self.embedding(batch["input_ids"][:, :5]).sum(1)[:, None, :3]


def number_in_batch(self, batch):
    return self.encode(batch) * (self.scale if batch["k"] == 1 else 1.0)


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, n: Tensor) -> Tensor:
        return (self.weight + 0 * n)[..., None]


class Holder:
    scale = 1.0


class ByLengths(Encodes):
    """Has what a step may read for some lengths only. ``change`` changes all of it."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self.one = 1.0
        self.table = [1.0, 1.0, 1.0]
        self.short = {5: 1.0}
        self.holders = [Holder(), Holder()]
        self.factors = nn.ModuleList([Factor(), Factor()])

    def change(self) -> None:
        self.scale = self.other = self.table[2] = self.short[5] = 3.0
        self.holders[1].scale = 2.0
        with torch.no_grad():
            self.factors[1].weight.fill_(2.0)


class Changes(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx == 60:
            pl_module.change()


@pytest.mark.parametrize(
    "function",
    [
        *(only_five, table_by_length, name_by_length, computed_name, module_by_length),
        *(object_by_length, all_are_long, first_is_long, counts_long, masked_at_the_fifth),
        *(
            prints_for_five,
            fails_and_goes_on,
            fifth_position,
            number_in_batch,
            own_read_of_a_length,
        ),
    ],
)
@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", [{}, {"verify_replays": 0}, {"mode": "FULL"}], ids=str)
def test_what_only_some_lengths_do_gives_the_numbers_of_eager(harness, function, settings):
    """Hazard 11."""
    lengths = [3, 3, 4, 4, 6, 6, 7, 7, *[3, 4, 5, 6, 7, 9, 10, 11] * 12]
    data = texts(*lengths)
    for index, batch in enumerate(data):
        batch["n"] = torch.full((4,), lengths[index] if index > 60 and index % 3 else 1)
        batch["k"] = index % 2
        if index > 60 and index % 2:
            batch["attention_mask"].fill_(1)
    run(harness, ByLengths(function), data, Changes, pad_dims=rules((8, 12)), **settings)


def counts_even(self, batch):
    (self.seen.add_, self.seen.add)[len(batch) % 2](1)  # a function of C is chosen: no other way
    return self.net(batch) + self.seen


def draws_even(self, batch):
    (self.seen.uniform_, self.seen.size)[len(batch) % 2]()
    return self.net(batch) + self.seen


def draws_on_the_host_for_even(self, batch):
    (random.random, float)[len(batch) % 2]()
    return self.net(batch)


def writes_even(self, batch):
    (batch.mul_, batch.add)[len(batch) % 2](2)
    return self.net(batch), batch.sum(1)


def updates(self, batch):
    values = self.net(batch)
    self.metrics[0].update(values)
    return values


class HasMetrics(Step):
    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self.metrics = [MeanMetric()]

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self.metrics[0].to(self.device)
        random.seed(3)

    def on_predict_epoch_end(self) -> None:
        self.seen.fill_(self.metrics[0]._update_count + random.random())


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize(
    "function", [counts_even, draws_even, draws_on_the_host_for_even, writes_even, updates]
)
def test_what_only_the_padded_batch_changes_is_undone(harness, function, verify_replays):
    """``run`` compares buffers: the metric's count is in one, and the next number of the host."""
    data = batches(*[3, 5, 7, 4, 6, 3, 5, 7, 2, 8, 6, 4, 3, 5] * 2)
    model = HasMetrics(function)
    run(harness, model, data, capture_sizes=[4, 8], verify_replays=verify_replays)


@pytest.mark.parametrize("name", ["scale", "other"])
@pytest.mark.parametrize("function", [encodes, own_value_of_a_length, own_read_of_a_length])
def test_values_that_change_after_shapes_were_taken_over(harness, function, name):
    rule = rules((8, 16, 24, 32))
    run(harness, Encodes(function), texts(*MANY), lambda: Sets(name, 70), pad_dims=rule)


# settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"capture_sizes": []}, ["capture_sizes=[]", "whole numbers"]),
        ({"capture_sizes": 4}, ["capture_sizes=4", "list"]),
        ({"capture_sizes": [0, 2]}, ["0 is not positive"]),
        ({"capture_sizes": [2, 2]}, ["increase", "2 comes after 2", "[2]"]),
        ({"capture_sizes": [4, 2]}, ["increase", "[2, 4]"]),
        ({"capture_sizes": [1.5]}, ["whole numbers"]),
        ({"pad_dims": []}, ["pad_dims=[]", "or map leaves"]),
        ({"pad_dims": {"x": 3}}, ["pad_dims['x']=3"]),
        ({"pad_dims": {"x": {0: {"sizes": "pow2"}}}}, ["dimension 0", "capture_sizes"]),
        ({"pad_dims": {"x": {1: {"size": [2]}}}}, ["'sizes'"]),
        ({"pad_dims": {"x": {1: {"sizes": "pow3"}}}}, ["'pow3'", "'pow2'"]),
        ({"pad_dims": {"x": {1: {"sizes": [4, 2]}}}}, ["pad_dims['x'][1]['sizes']", "increase"]),
        ({"pad_dims": {"x": {1: {"sizes": [2], "value": "a"}}}}, ["'a'", "number"]),
        ({"pad_dims": "all"}, ["'all'", "'auto'", "for example"]),
        ({"pad_dims": "auto", "verify_tolerance": "exact"}, ["pad_dims='auto'", "'close'"]),
        ({"capture_sizes": [4], "verify_tolerance": "exact"}, ["verify_tolerance='close'"]),
        ({"capture_sizes": [4], "mode": "NONE"}, ["capture_sizes=[4]", "mode='NONE'"]),
        ({"capture_sizes": [4], "stages": ["train"]}, ["capture_sizes=[4]", "stages=['train']"]),
        (
            {"pad_dims": "auto", "mode": "FULL", "stages": ["validate"]},
            ["pad_dims='auto'", "mode='FULL'", "'FULL_AND_PIECEWISE'"],
        ),
        ({"capture_ahead": True, "stages": ["train"]}, ["capture_ahead=True", "['train']"]),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        CUDAGraphCallback(**{"verify_tolerance": "close", **settings})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("pad_dims", "words"),
    [
        ({"ids": {1: {"sizes": "pow2"}}}, ["'ids'", "'input_ids', 'attention_mask'"]),
        ({"input_ids": {2: {"sizes": "pow2"}}}, ["dimension 2", "(4, 5)", "0 to 1"]),
        ({"input_ids": {1: {"sizes": "pow2", "value": 0.5}}}, ["0.5", "torch.int64"]),
        ({"input_ids": {1: {"sizes": "pow2", "value": 2**70}}}, ["torch.int64", "from -"]),
        ({"input_ids": {1: {"sizes": "pow2", "value": float("nan")}}}, ["nan", "whole number"]),
    ],
)
def test_settings_that_do_not_fit_the_batch_are_refused_before_it_runs(harness, pad_dims, words):
    ran = []
    model = Step(lambda self, batch: ran.append(1))
    callback = harness.callback(verify_tolerance="close", pad_dims=pad_dims)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        harness.trainer(callback).predict(model, DataLoader(texts(5), batch_size=None))
    assert not ran
    for word in words:
        assert word in str(error.value)


def test_a_size_that_memory_cannot_hold_is_not_padded(harness):
    data = [x for width in (8, 9) for x in batches(*[4] * 6, *[3] * 6, width=width)]
    step = Step(lambda self, x: self.net(x[:, :8]))
    with pytest.warns(UserWarning, match=r"shapes 4x8 are not padded: no memory for .*") as seen:
        callback = run(harness, step, data, capture_sizes=[10**13])
    assert sum("are not padded" in str(each.message) for each in seen) == 1
    records = callback.stats.padding
    assert [each.shapes for each in records] == ["10000000000000x8", "10000000000000x9"]
    assert causes(callback) == {Cause.PADDING_TOO_LARGE}
    assert "not padded: no memory for the padded batch" in str(callback.summary())
    assert callback.stats.replays == 12, callback.summary()


def test_memory_that_gets_scarce_leaves_batches_in_their_own_shapes(harness, monkeypatch):
    """No test can fill the memory of the host, so the allocation is made to fail."""
    pad = PaddedLeaves.pad

    def fails_for_three(self, leaves, fill=Fill.GIVEN):
        if len(leaves[0]) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return pad(self, leaves, fill)

    monkeypatch.setattr(PaddedLeaves, "pad", fails_for_three)
    with pytest.warns(UserWarning, match="shapes 3x8 are not padded: .*CUDA out of memory"):
        callback = run(harness, Step(plain), batches(*SIZES, *SIZES), capture_sizes=[4])
    assert causes(callback) == {Cause.PADDING_TOO_LARGE}
    assert padded_steps(callback) >= 4, callback.summary()  # of shapes that were compared before


def test_the_key_of_a_padded_batch_is_known_without_padding_it(harness, monkeypatch):
    """Nothing is written until the graph of a shape is compared with eager."""
    padded: list[int] = []
    write = PaddedLeaf.write

    def counted(self, parts, tensor, fill):
        padded.append(len(tensor))
        write(self, parts, tensor, fill)

    monkeypatch.setattr(PaddedLeaf, "write", counted)
    sizes = (4, 4, 4, 4, 3, 2, 1)  # they come once, so they are not compared
    run(harness, Step(plain), batches(*sizes), capture_sizes=[4])
    assert not padded
    run(harness, Step(plain), batches(*SIZES), capture_sizes=[4])
    assert set(padded) == {1, 2, 3}


def test_a_later_batch_that_settings_do_not_fit_keeps_its_shape(harness):
    def step(self: Any, batch: Any) -> Any:
        return _masked_attention(self, batch) if "attention_mask" in batch else batch["other"] * 2

    others = [{"other": torch.full((4, 3), float(index))} for index in range(6)]
    data = [*texts(5, 6, 7, 5, 6, 7), *others, *texts(5, 6, 7, 5, 6, 7)]
    with pytest.warns(UserWarning, match="its leaves are 'other'. Such") as warned:
        callback = run(harness, Step(step), data, pad_dims=rules())
    assert len([each for each in warned if "own shapes" in str(each.message)]) == 1
    assert padded_steps(callback) >= 6, callback.summary()


def test_the_sanity_check_refuses_settings_before_training(harness):
    callback = harness.callback(
        mode="FULL_AND_PIECEWISE", verify_tolerance="close", pad_dims={"ids": {1: {"sizes": [8]}}}
    )
    trainer = harness.trainer(callback, max_epochs=1, num_sanity_val_steps=1)
    loader = DataLoader(texts(5, 6), batch_size=None)
    with pytest.raises(ValueError, match="pad_dims names the leaf 'ids'"):
        trainer.fit(Validated(), loader, loader)
    assert trainer.global_step == 0


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 70000.0), (torch.float32, 10**400)])
def test_a_value_beyond_the_floats_of_a_leaf_is_refused(dtype, value):
    rules = GivenRules(check_pad_dims({"x": {1: {"sizes": "pow2", "value": value}}}))
    batch = {"x": torch.zeros(2, 3, dtype=dtype)}
    with pytest.raises(ValueError, match=f"does not fit {dtype}; set a number from -"):
        rules.of(batch, [batch["x"]])


def lengths(number: int, longest: int = 40) -> list[int]:
    drawn = torch.randint(3, longest + 1, (number,), generator=torch.Generator().manual_seed(7))
    return drawn.tolist()


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_proposed_dimensions(harness, verify_replays):
    """Hazard 11: nothing is known of the shapes beforehand."""
    settings = {"pad_dims": "auto", "verify_replays": verify_replays}
    data = texts(*lengths(150))
    callback = run(harness, Step(_masked_attention), data, **settings)
    assert set(callback.stats.proposed_pad_dims) == {"input_ids", "attention_mask"}
    assert padded_steps(callback) > 40, callback.summary()
    assert "proposed: pad_dims={'input_ids': {1: {'sizes': [" in " ".join(
        str(callback.summary()).split()
    )


def test_proposed_dimensions_are_those_that_can_be_pasted(harness):
    callback = run(harness, Step(_masked_attention), texts(*lengths(100)), pad_dims="auto")
    given = callback.stats.proposed_pad_dims
    again = run(harness, Step(_masked_attention), texts(*lengths(100)), pad_dims=given)
    assert padded_steps(again) > padded_steps(callback)
    assert callback.stats.to_dict()["proposed_pad_dims"] == given


@pytest.mark.parametrize("function", [_mean, _unmasked, _last, _length])
def test_proposed_dimensions_that_change_a_result_are_not_used(harness, function):
    callback = run(harness, Step(function), texts(*lengths(120)), pad_dims="auto")
    assert padded_steps(callback) == 0, callback.summary()
    assert causes(callback) == {Cause.POSITIONS_NOT_INDEPENDENT}


def test_few_shapes_and_few_batches_propose_nothing(harness):
    for data in (texts(*[4, 5, 6, 7] * 15), texts(*lengths(10))):
        callback = run(harness, Step(_masked_attention), data, pad_dims="auto")
        assert callback.stats.proposed_pad_dims == {}


def test_a_size_is_added_for_longer_batches(harness):
    data = texts(*lengths(60), *[60, 55, 52, 50] * 15)
    callback = run(harness, Step(_masked_attention), data, pad_dims="auto")
    sizes = callback.stats.proposed_pad_dims["input_ids"][1]["sizes"]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 60
    assert padded_steps(callback) > 20, callback.summary()


def test_batches_of_other_kinds_have_rules_of_their_own(harness):
    def either(self: Any, batch: Any) -> Any:
        return _masked_attention(self, batch) if isinstance(batch, dict) else self.net(batch)

    mixed = [
        each for pair in zip(texts(*lengths(80)), batches(*[4] * 80), strict=True) for each in pair
    ]
    callback = run(harness, Step(either), mixed, pad_dims="auto")
    assert set(callback.stats.proposed_pad_dims) == {"input_ids", "attention_mask"}
    assert padded_steps(callback) > 10, callback.summary()


def test_proposed_dimensions_of_submodules(harness):
    callback = compare_validation(
        harness,
        Validated(),
        texts(*lengths(120)),
        pad_dims="auto",
        mode="FULL_AND_PIECEWISE",
    )
    assert padded_steps(callback) > 20, callback.summary()


def test_nothing_is_proposed_for_rows_and_from_empty_batches(harness):
    """Rows are for ``capture_sizes``. A size of 0 is padded nowhere."""
    rows = [torch.randn(size, 8) for size in lengths(60)]
    callback = run(harness, Step(plain), rows, pad_dims="auto")
    assert callback.stats.proposed_pad_dims == {}
    data = [each for size in lengths(60) for each in (*texts(size), *texts(1))]
    for batch in data[1::6]:
        batch["attention_mask"] = batch["attention_mask"][:, :0]
        batch["input_ids"] = batch["input_ids"][:, :0]
    callback = run(harness, Step(lambda self, batch: batch["input_ids"] * 2), data, pad_dims="auto")
    assert min(callback.stats.proposed_pad_dims["input_ids"][1]["sizes"]) > 0


def test_sparse_tensors_are_not_padded(harness):
    """A batch with one has no key today; the rules must not look at its strides."""
    data = [{"x": each["input_ids"], "s": torch.eye(3).to_sparse()} for each in texts(*lengths(60))]
    callback = run(harness, Step(lambda self, batch: batch["x"] * 2), data, pad_dims="auto")
    assert "s" not in callback.stats.proposed_pad_dims


def test_kinds_of_batches_without_end_are_not_kept():
    rules = ProposedRules({})
    for number in range(2 * MOST_KINDS):
        batch = {f"id_{number}": torch.zeros(1, 2)}
        rules.note(batch)
        assert rules.of(batch, list(batch.values())) == {}
    assert len(rules._kinds) == MOST_KINDS


def test_some_leaves_are_padded_as_the_whole_batch():
    """The host pads what it has of a batch, to compute what the padded batch reads."""
    padding = PaddedLeaves({0: PaddedLeaf((2, 3), (4, 5), {1: 7.0})}, 12)
    leaves = [torch.randn(2, 3), "text", torch.randn(6)]
    found = padding.pad_some({0: leaves[0], 2: leaves[2]})
    whole = padding.pad(leaves)
    assert list(found) == [0, 2]
    assert all(leaf.equal(whole[place]) for place, leaf in found.items())
    assert found[0].tolist()[3] == [*leaves[0].tolist()[1], 7.0, 7.0]


def _loss_of_tokens(self, batch):
    logits = self.net(self.embedding(batch["input_ids"]))
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="none"
    )
    return loss.view_as(batch["labels"])


def test_labels_that_are_ignored_have_no_other_padding(harness):
    """Between -100 and the classes are labels that end the process on a GPU."""
    data = texts(*LENGTHS)
    for batch in data:
        hidden = batch.pop("attention_mask") == 0
        batch["labels"] = torch.where(hidden, -100, batch["input_ids"] % 3)
    ids = rules()["input_ids"]
    labels = {1: {**ids[1], "value": -100}}
    step = Step(_loss_of_tokens)
    callback = run(harness, step, data, pad_dims={"input_ids": ids, "labels": labels})
    assert padded_steps(callback) >= 6, callback.summary()
