"""The callback: its interceptions, their removal, and its reports."""

import contextlib
import copy
import gc
import io
import json
import pickle
import re
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from cg_lightning import CaptureError, CUDAGraphCallback
from cg_lightning.backends import resolve_backend
from cg_lightning.backends.cuda import CUDACapturedGraph
from cg_lightning.backends.recorder import RecordedGraph
from tests.conftest import modules_with_a_trace
from tests.harness import assert_same, features, images, predict, validate
from tests.models import Body, ConvNetClassifier, Predictor

GRAPHS = {"recorder": RecordedGraph, "cuda": CUDACapturedGraph}


class Looks(Callback):
    """Inspects the module from another callback, at every batch."""

    def __init__(self, look: Any) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
        self.seen.append(self.look(pl_module))

    on_predict_batch_end = on_validation_batch_end


def test_counts_add_up(harness):
    """Hazard 21: a test can assert that graphs were used."""
    callback = harness.callback(mode="PIECEWISE", warmup_steps=2)
    harness.compare(Predictor(Body()), predict(features(26)), callback)
    stats = callback.stats
    assert stats.captures == 1
    assert (
        stats.replays == stats.steps["PIECEWISE"] == 7 - 1 - 2
    )  # batches, less the partial one, less warm-up
    assert stats.steps["NONE"] == stats.eager == sum(stats.eager_reasons.values()) == 3
    assert stats.eager_reasons == {"warm-up": 3}
    (entry,) = stats.entries
    assert (entry.stage, entry.mode, entry.target, entry.shapes) == (
        "predict",
        "PIECEWISE",
        "net",
        "4x8",
    )
    assert (entry.captures, entry.replays) == (1, 4)
    assert stats.capture_seconds == entry.seconds > 0
    assert stats.graph_bytes == entry.bytes > 0
    assert json.loads(json.dumps(stats.to_dict()))["replays"] == 4


@pytest.mark.parametrize("warmup_steps", [0, 1, 3, 5])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"])
def test_warm_up_is_the_first_batches_and_nothing_runs_twice(harness, mode, warmup_steps):
    """Steps are counted in the digits that NumPy prints: no guard sees them."""

    class Counts(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            np.set_printoptions(precision=np.get_printoptions()["precision"] + 1)
            return self.net(batch[0])

    callback = harness.callback(mode=mode, warmup_steps=warmup_steps, verify_replays=0)
    model = Counts(Body())
    with np.printoptions(precision=0):
        harness.trainer(callback).predict(model, features(32))
        ran = np.get_printoptions()["precision"]
    eager = max(warmup_steps, 1)  # the first one is watched
    assert callback.stats.replays == 8 - eager
    assert callback.stats.eager == eager
    assert ran == (8 if mode == "PIECEWISE" else eager + 1)


def test_targets_are_patterns_of_names(harness):
    callback = harness.callback(mode="PIECEWISE", targets=["net.[02]"], warmup_steps=0)
    harness.compare(Predictor(Body()), predict(features()), callback)
    assert [entry.target for entry in callback.stats.entries] == ["net.0", "net.2"]
    assert callback.stats.replays == 2 * 4


@pytest.mark.parametrize("settings", [{}, {"targets": ["net.block"]}])
def test_a_named_target_that_changes_its_input_is_refused(harness, settings):
    """A second run of an in-place ReLU has the same output, so a comparison cannot show it."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = (
                nn.Linear(8, 8),
                nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)),
            )

        def forward(self, x):
            x = self.first(x)
            return self.block(x) + x

    callback = harness.callback(mode="PIECEWISE", warmup_steps=0, **settings)
    harness.compare(Predictor(Residual()), predict(features()), callback)
    if settings:
        assert any("input mutated in place" in reason for reason in callback.stats.eager_reasons)
    else:
        assert callback.stats.replays == 4


def test_what_is_clean_for_one_shape_only_is_graphed_for_that_one(harness):
    from tests.test_equivalence import OnTensor, ragged

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.long = nn.Linear(8, 8), 0

        def forward(self, x):
            if x.shape[1] > 3:
                self.long += 1
            return self.linear(x) * (1 + self.long)

    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.compare(OnTensor(Picky()), predict(ragged([3, 3, 3, 5, 5, 5, 3, 5, 3])), callback)
    assert {(entry.target, entry.shapes) for entry in callback.stats.entries} == {
        ("net", "2x3x8"),
        ("net.linear", "2x5x8"),
    }


def test_the_largest_submodules_are_found_and_metrics_are_left_alone(harness):
    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.compare(ConvNetClassifier(4), validate(images()), callback)
    assert [entry.target for entry in callback.stats.entries] == ["forward"]

    class MetricInside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
            self.accuracy = MulticlassAccuracy(4)

        def forward(self, x):
            logits = self.head(self.trunk(x))
            self.accuracy.update(logits, logits.argmax(1))
            return logits * self.accuracy.update_count

    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.compare(Predictor(MetricInside()), predict(features()), callback)
    assert [entry.target for entry in callback.stats.entries] == ["net.trunk", "net.head"]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_forward_hooks_fire_as_often_as_in_eager(harness, hook):
    """Hazard 20."""
    fired = []
    model = Predictor(Body())
    handle = getattr(model.net[0], hook)(lambda *args: fired.append(1) and None)
    callback = harness.callback(warmup_steps=1)
    harness.trainer(callback).predict(model, features())
    handle.remove()
    assert len(fired) == 5
    assert [entry.target for entry in callback.stats.entries] == ["net.2"]


def test_python_state_keeps_moving(harness):
    """Hazard 6."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            self.count += 1
            return self.linear(x) * self.count

    model = Predictor(Counts())
    for mode in ("PIECEWISE", "FULL", "FULL_AND_PIECEWISE"):
        model.net.count = 0
        callback = harness.callback(mode=mode, warmup_steps=1)
        harness.compare(model, predict(features()), callback)
        assert model.net.count == 5
        assert callback.stats.steps["FULL"] == 0


def test_a_cache_that_the_first_step_builds_is_no_obstacle(harness):
    """Hazard 28."""

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.mask = None

        def forward(self, x):
            if self.mask is None or self.mask.shape != x.shape:
                self.mask = torch.ones_like(x).triu()
            return self.linear(x) * self.mask

    callback = harness.callback(mode="PIECEWISE", warmup_steps=2)
    harness.compare(Predictor(Lazy()), predict(features(24)), callback)
    assert "net" in {entry.target for entry in callback.stats.entries}


def test_what_cannot_be_captured_runs_eagerly_and_says_which_line(harness):
    class Syncs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Body(), nn.Linear(8, 8)

        def forward(self, x):
            x = self.body(x)
            return self.head(x) * x.mean().item()

    model = Predictor(Syncs())
    callback = harness.callback(warmup_steps=1)
    harness.compare(model, predict(features()), callback)
    assert {entry.target for entry in callback.stats.entries} == {"net.body", "net.head"}
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(model, predict(features()), callback)
    (reason,) = (reason for reason in callback.stats.eager_reasons if reason != "warm-up")
    assert reason.startswith("host sync: aten::")
    assert "in net (" in reason
    assert f"{__file__}:" in reason


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_failed_capture_is_eager_for_good(harness, warmup_steps):
    """Hazards 17 and 22: a target that the user named, and a step that was never watched."""

    class Syncs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            y = self.linear(x)
            return y[y[:, 0] > 0]

    for settings in ({"targets": ["net"]}, {"mode": "FULL"}):
        callback = harness.callback(warmup_steps=warmup_steps, **settings)
        harness.compare(Predictor(Syncs()), predict(features()), callback)
        assert callback.stats.captures == callback.stats.replays == 0
        assert callback.stats.eager == 5
        assert sum(callback.stats.eager_reasons.values()) == 5


def test_the_module_looks_untouched_in_the_middle_of_a_stage(harness):
    def look(module):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        copies = [
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(file, weights_only=False),
        ]
        x = torch.ones(2, 8, device=module.device)
        outputs = []
        for other in copies:
            assert type(other) is Predictor
            assert type(other.net) is nn.Sequential
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(2)
            outputs.append(other.net(x))
        assert isinstance(module, Predictor)
        return list(module.state_dict()), sorted(vars(module)), sorted(vars(module.net)), outputs

    seen = []
    model = Predictor(Body())
    for extra in ([harness.callback(warmup_steps=1)], []):
        looks = Looks(look)
        harness.trainer(*extra, looks).predict(copy.deepcopy(model), features())
        seen.append(looks.seen)
    assert_same(*seen)


def test_checkpoints_are_the_same(harness, tmp_path):
    saved = []
    model = ConvNetClassifier(4)
    for name in ("with", "without"):
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path / name, monitor="val_loss", save_last=True)
        extra = [harness.callback(warmup_steps=1)] if name == "with" else []
        trainer = harness.trainer(checkpoint, *extra, enable_checkpointing=True)
        trainer.fit(copy.deepcopy(model), images(), images())
        last = torch.load(tmp_path / name / "last.ckpt", weights_only=False)
        saved.append(
            (
                last["state_dict"],
                sorted(last),
                [key for key in last["callbacks"] if "CUDAGraph" in key],
            )
        )
    assert_same(*saved)


class BoomError(RuntimeError):
    pass


EXITS = [
    "on_validation_start",
    "on_validation_batch_start",
    "validation_step",
    "on_validation_batch_end",
    "val_dataloader",
]


@pytest.mark.in_turn("at")
@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("place", EXITS)
def test_every_exit_restores_the_module(harness, place, at, error):
    """Hazard 29."""
    calls = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == (1 if place == "on_validation_start" else at + 1):
            raise error("boom")

    class Fails(Predictor):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if place == "validation_step":
                fail()
            return super().validation_step(batch, batch_idx)

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Any:
            if place == "val_dataloader" and index % 4 == 0:
                fail()
            return (torch.full((8,), float(index)),)

    hooks = type(
        "Hooks", (Callback,), {place: lambda *_: fail()} if place.startswith("on_") else {}
    )
    model, callback = (
        Fails(Body()),
        harness.callback(mode="PIECEWISE", warmup_steps=2, targets=["net"]),
    )
    trainer = harness.trainer(callback, hooks())
    with pytest.raises((error, SystemExit)), contextlib.redirect_stderr(io.StringIO()):
        trainer.validate(model, torch.utils.data.DataLoader(Data(), batch_size=4), verbose=False)
    assert modules_with_a_trace() == []
    model.train()
    harness.compare(
        model, lambda t, m: t.fit(m, features(), features()), harness.callback(warmup_steps=1)
    )


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["capture", "second capture", "replay", "third replay"])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_an_interrupt_inside_us_restores_the_module(harness, monkeypatch, mode, place, error):
    """Hazard 29."""
    backend = resolve_backend(harness.backend)
    owner, name = (
        (type(backend), "capture") if "capture" in place else (GRAPHS[harness.backend], "replay")
    )
    original, calls = getattr(owner, name), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == {"second": 2, "third": 3}.get(place.split()[0], 1):
            raise error("boom")
        return original(*args, **kwargs)

    model = ConvNetClassifier(4)
    before = copy.deepcopy(model.state_dict())
    two_shapes = torch.utils.data.DataLoader([*images(24), *images(20, 5)], batch_size=None)
    with monkeypatch.context() as patched, contextlib.redirect_stderr(io.StringIO()):
        patched.setattr(owner, name, fails, raising=False)
        trainer = harness.trainer(harness.callback(mode=mode, warmup_steps=1))
        with pytest.raises((error, SystemExit)):
            trainer.validate(model, two_shapes, verbose=False)
    assert modules_with_a_trace() == []
    assert_same(dict(before), {name: value.cpu() for name, value in model.state_dict().items()})
    model.train()  # an exception leaves it as it was, and Lightning then warns
    model._metric_attributes = (
        None  # Lightning remembers metrics by identity, and a deep copy has others
    )
    harness.compare(
        model,
        lambda t, m: t.fit(m, images(), images()),
        harness.callback(mode=mode, warmup_steps=1),
    )


def test_an_exception_of_the_step_comes_through_unchanged_from_a_capture(harness):
    class Fails(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise BoomError("mine")
            return self.net(batch[0])

    with pytest.raises(BoomError, match="mine"):
        harness.trainer(harness.callback(mode="FULL", warmup_steps=1)).predict(
            Fails(Body()), features()
        )


def test_the_sanity_check_and_other_stages_are_left_alone(harness):
    callback = harness.callback(stages=["test"], warmup_steps=0)
    job = lambda t, m: (t.fit(m, images(), images()), t.predict(m, images()))
    harness.compare(ConvNetClassifier(4), job, callback)
    assert callback.stats.steps == {"NONE": 0, "PIECEWISE": 0, "FULL": 0}
    callback = harness.callback(warmup_steps=1)
    harness.compare(
        ConvNetClassifier(4),
        lambda t, m: t.fit(m, images(), images()),
        callback,
        num_sanity_val_steps=2,
    )
    assert sum(callback.stats.steps.values()) == 2 * 5


def signature(step: Any) -> type[Predictor]:
    return type("Signature", (Predictor,), {"predict_step": step})


@pytest.mark.parametrize(
    "step",
    [
        lambda self, batch: self.net(batch[0]),
        torch.no_grad()(lambda self, batch: self.net(batch[0])),
        torch.inference_mode()(lambda self, batch, batch_idx: self.net(batch[0]) + batch_idx),
        lambda self, batch, batch_idx: self.net(batch[0]) + batch_idx,
        lambda self, batch, batch_idx, dataloader_idx=0: (
            self.net(batch[0]) + batch_idx + dataloader_idx
        ),
        lambda self, *args: self.net(args[0][0]) + args[1],
        lambda self, batch, **_: self.net(batch[0]),
    ],
    ids=["batch", "no_grad", "inference_mode", "batch_idx", "dataloader_idx", "args", "kwargs"],
)
def test_signatures(harness, step):
    callback = harness.callback(warmup_steps=1)
    harness.compare(signature(step)(Body()), predict(features()), callback)
    assert callback.stats.replays == 4


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_dataloader_iter_is_eager_with_that_reason(harness):
    class Iterates(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Body()

        def validation_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return self.net(batch[0].to(self.device))

    callback = harness.callback()
    harness.compare(Iterates(), validate(features()), callback)
    (reason,) = callback.stats.eager_reasons
    assert "dataloader_iter" in reason


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE", "PIECEWISE"])
def test_a_batch_that_cannot_be_keyed_runs_in_pieces_with_the_leafs_path(harness, mode):
    class Odd(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"]) * len(batch["ids"])

    batches = [{"x": torch.randn(2, 8), "ids": {1, 2}} for _ in range(8)]
    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(
        Odd(Body()), predict(torch.utils.data.DataLoader(batches, batch_size=None)), callback
    )
    in_pieces = callback.stats.steps["PIECEWISE"]
    assert (in_pieces == 0) if mode == "FULL" else (in_pieces >= 5), callback.summary()
    assert callback.stats.steps["FULL"] == 0
    reason = "batch['ids'] is a value of type builtins.set, which cannot be part of a key"
    reasons = {str(record.reason) for record in callback.stats.reasons}
    assert mode == "PIECEWISE" or reason in reasons, reasons


def test_gradients_in_an_evaluation_step_are_kept(harness):
    """Hazard 24."""

    class Saliency(Predictor):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                return torch.autograd.grad(self.net(x).sum(), x)[0] + self.net(batch[0]).detach()

    callback = harness.callback(warmup_steps=1)
    harness.compare(Saliency(Body()), validate(features()), callback, inference_mode=False)
    assert callback.stats.replays == 0


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. all graphs of max_graphs")
def test_the_place_of_a_graph_that_is_still_used_is_not_taken(harness):
    from tests.test_equivalence import OnTensor, ragged

    callback = harness.callback(max_graphs=2, warmup_steps=1)
    harness.compare(OnTensor(Body()), predict(ragged([3, 4, 5, 3, 4, 3, 5, 3, 4])), callback)
    #                                             captured: ^  ^
    assert callback.stats.captures == 2
    assert callback.stats.replays == 5
    assert any(
        "all graphs of max_graphs=2 are in use" in why for why in callback.stats.eager_reasons
    )


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. all graphs of max_graphs")
def test_a_graph_that_is_overdue_goes_first(harness):
    from tests.test_equivalence import OnTensor, ragged

    sizes = [3, 4, 3, 4, 3, 4, *[3] * 17, 5, 5, 3, 5, 3, 4, 5]
    callback = harness.callback(max_graphs=2, warmup_steps=1)
    harness.compare(OnTensor(Body()), predict(ragged(sizes)), callback)
    # 4 had come every second time, and is away for 17: 5 takes its place
    assert callback.stats.captures == 3
    assert {entry.shapes: entry.captures for entry in callback.stats.entries} == {
        "2x3x8": 1,
        "2x4x8": 1,
        "2x5x8": 1,
    }
    assert callback.stats.replays == 26


def test_more_pieces_than_graphs_are_captured_once(harness):
    """Two shapes by turns: each would take the places of the other."""
    from tests.test_equivalence import OnTensor, ragged

    callback = harness.callback(
        mode="PIECEWISE", max_graphs=3, warmup_steps=1, targets=["net.0", "net.2"]
    )
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="all graphs of max_graphs=3 are in use") as warned:
        harness.compare(OnTensor(net), predict(ragged([3, 4] * 30)), callback)
    assert sum("max_graphs" in str(each.message) for each in warned) == 1
    assert callback.stats.captures == 3
    assert callback.stats.replays == 3 * 29


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. graphs that are in use leave too little")
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_graphs_beyond_their_bytes_do_not_drop_those_in_use(harness, mode):
    from tests.test_equivalence import OnTensor, ragged

    # on a GPU an output of 10 MiB or more takes memory of its own; smaller ones share 20 MiB
    outputs = 2**19 if harness.backend == "cuda" else 8

    def run(sizes: list[int], max_graph_bytes: int | None) -> Any:
        gc.collect()  # how much memory graphs take depends on what lies in the allocator's cache
        torch.cuda.empty_cache()
        callback = harness.callback(mode=mode, warmup_steps=1, max_graph_bytes=max_graph_bytes)
        harness.compare(OnTensor(nn.Linear(8, outputs)), predict(ragged(sizes)), callback)
        return callback.stats

    sizes = [3, 4, 5, 3, 4, 3, 5, 3, 4]
    run(sizes, None)  # the process's first capture also takes cuBLAS's workspace
    everything = run(sizes, None)
    assert everything.captures == 3
    total = everything.graph_bytes
    assert run(sizes, total).captures == 3
    fewer = run(sizes, total - 1)
    assert fewer.captures == 3  # the last one shows that its graph finds no room
    assert fewer.replays == 5
    assert any("in use leave too little memory of" in reason for reason in fewer.eager_reasons)
    none = run(sizes, 1)
    assert none.replays == 0
    assert any("max_graph_bytes=1; raise" in reason for reason in none.eager_reasons)
    often = run([3, 4, 5] * 20, total - 1)
    assert (often.captures, often.replays) == (3, 2 * 19)
    later = run([3, 4, 5, 3, 4, 5, *[3] * 17, 5, 5, 5], total - 1)
    assert (later.captures, later.replays) == (4, 22)  # 5 takes the place of 4


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. all graphs of max_graphs")
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_more_shapes_than_graphs_do_not_capture_in_every_step(harness, mode):
    from tests.test_equivalence import OnTensor, ragged

    callback = harness.callback(mode=mode, max_graphs=2, warmup_steps=1, verify_replays=0)
    harness.compare(OnTensor(Body()), predict(ragged([3, 4, 5] * 20)), callback)
    assert callback.stats.captures <= 12  # of 57 steps past their warm-up
    assert any("max_graphs=2" in reason for reason in callback.stats.eager_reasons), (
        callback.summary()
    )


class Named(Predictor):
    """Returns the name that came with the features."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"output": self.net(batch["features"]), "name": batch["name"]}


def named(names: list[str]) -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    return DataLoader(
        [{"features": torch.randn(3, 8, generator=generator), "name": name} for name in names],
        batch_size=None,
    )


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_a_name_that_is_another_one_in_each_batch(harness, mode):
    """Hazard 21: keys never repeat, so without care each step would be a watched warm-up."""
    callback = harness.callback(mode=mode, warmup_steps=2)
    twice = lambda trainer, module: [
        trainer.predict(module, named([f"{i}.png" for i in range(40)])) for _ in range(2)
    ]
    harness.compare(Named(Body()), twice, callback)
    assert callback.stats.steps["FULL"] >= 2 * (40 - 6), callback.summary()


def test_a_few_names_are_part_of_the_key(harness):
    callback = harness.callback(warmup_steps=1)
    harness.compare(Named(Body()), predict(named(["a", "b", "c"] * 20)), callback)
    assert callback.stats.steps["FULL"] == 57


def test_one_step_that_needs_more_graphs_than_there_may_be(harness):
    from tests.test_equivalence import CellLoop, sequences

    callback = harness.callback(
        mode="PIECEWISE", max_graphs=3, warmup_steps=1, targets=["net.cell"]
    )
    harness.compare(Predictor(CellLoop()), predict(sequences()), callback)
    assert callback.stats.captures == 3  # not in every step
    assert callback.stats.replays == 3 * 4


def test_strict_raises_where_a_step_runs_lower_than_asked(harness):
    class Syncs(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) * batch[0].sum().item()

    harness.trainer(harness.callback(strict=True, warmup_steps=1)).predict(
        Syncs(Body()), features()
    )  # net is graphed
    for settings in ({"mode": "FULL"}, {"targets": ["unused"]}):
        model = Syncs(Body())
        model.unused = nn.Linear(1, 1)
        with pytest.raises(CaptureError, match="strict=False") as caught:
            harness.trainer(harness.callback(strict=True, warmup_steps=1, **settings)).predict(
                model, features()
            )
        if settings == {"mode": "FULL"}:
            assert "aten::" in str(caught.value.diagnosis)
            assert caught.value.diagnosis.capturable("net")


def test_a_second_callback_stays_inert_and_says_so(harness):
    first, second = harness.callback(warmup_steps=1), harness.callback(warmup_steps=1)
    with pytest.warns(UserWarning, match="another CUDAGraphCallback comes first") as caught:
        harness.trainer(first, second).predict(Predictor(Body()), features())
    assert len([w for w in caught if "CUDAGraphCallback" in str(w.message)]) == 1
    assert first.stats.replays == 4
    assert second.stats.replays == 0


def test_one_callback_given_twice(harness):
    callback = harness.callback(warmup_steps=1)
    harness.compare(Predictor(Body()), lambda t, m: t.predict(m, features()), callback)
    model = Predictor(Body())
    harness.trainer(callback, callback).predict(model, features())
    assert callback.stats.replays == 8


def test_pickles_and_deepcopies_with_its_counts(harness):
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.trainer(callback).predict(Predictor(Body()), features())
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.stats.to_dict() == callback.stats.to_dict()
        harness.compare(Predictor(Body()), predict(features()), other)
        assert other.stats.replays == callback.stats.replays + 4
    assert "state_dict" not in vars(CUDAGraphCallback)
    assert callback.state_dict() == {}


def test_copied_in_the_middle_of_a_stage(harness):
    class Copies(Callback):
        def on_predict_batch_end(self, trainer, *_: Any) -> None:
            self.copied = pickle.loads(pickle.dumps(trainer.callbacks[0]))

    copies = Copies()
    harness.trainer(harness.callback(warmup_steps=1), copies).predict(Predictor(Body()), features())
    harness.compare(Predictor(Body()), predict(features()), copies.copied)


@pytest.mark.parametrize("report", [True, False])
def test_the_summary_is_printed_once_when_the_trainer_is_done(harness, capsys, report):
    callback = harness.callback(warmup_steps=1, report=report)
    harness.trainer(callback).fit(ConvNetClassifier(4), images(), images())
    printed = capsys.readouterr().out
    assert printed.count("CUDA graphs (backend:") == int(report)
    for stage in ("validate", "test", "predict"):
        getattr(harness.trainer(callback), stage)(ConvNetClassifier(4), images())
        printed = capsys.readouterr().out
        assert printed.count("CUDA graphs (backend:") == int(report)
        shown = re.findall(r"^(\w+): \d+ steps", printed, re.MULTILINE)
        assert shown == [stage] * report, printed
    assert re.findall(r"^(\w+): ", callback.summary(), re.MULTILINE) == [
        *("validate", "test", "predict")
    ]


@pytest.mark.parametrize("report", [True, False])
def test_a_fit_that_is_interrupted_has_its_summary(harness, capsys, report):
    class Interrupts(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    callback = harness.callback(stages=["train", "validate"], report=report)
    trainer = harness.trainer(callback, Interrupts(), max_epochs=3)
    with pytest.raises(SystemExit):
        trainer.fit(ConvNetClassifier(4), images(), images())
    printed = capsys.readouterr().out
    for part in (
        "CUDA graphs (backend:",
        "\ntrain: 7 steps FULL, 3",
        "\nvalidate: 7 steps FULL, 3",
    ):
        assert printed.count(part) == int(report), printed


def test_an_error_has_its_traceback_and_no_summary(harness, capsys):
    class Fails(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            raise BoomError("boom")

    with pytest.raises(BoomError):
        harness.trainer(harness.callback(report=True)).predict(Fails(Body()), features())
    assert capsys.readouterr().out == ""


def test_nothing_of_ours_waits_for_the_garbage_collector(harness):
    """Hazard 34: static states, static inputs and graphs are freed when the Trainer is done."""
    from cg_lightning.capture.static_inputs import StaticInputs
    from cg_lightning.effects.recorder import EffectRecorder
    from cg_lightning.metrics.states import MetricState

    def alive() -> list[Any]:
        kinds = (StaticInputs, EffectRecorder, CUDACapturedGraph, RecordedGraph)
        found = [obj for obj in gc.get_objects() if type(obj) in kinds]
        return found + [
            obj
            for obj in gc.get_objects()
            if type(obj) is MetricState and hasattr(obj, "graph_tensor")
        ]

    gc.collect()
    before = len(alive())  # the anchor of a pool
    gc.disable()
    try:
        callback = harness.callback(warmup_steps=1)
        trainer = harness.trainer(callback)
        trainer.validate(ConvNetClassifier(4), images(20), verbose=False)
        assert callback.stats.steps["FULL"] > 0
        assert len(alive()) <= before + 1  # a pool may have been made
    finally:
        gc.enable()


def test_batches_are_freed_without_a_collection_of_garbage(harness):
    """Hazard 34: what has watched a step does not keep its tensors."""
    alive: list[weakref.ref[torch.Tensor]] = []

    class Keeps(Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, *_: Any) -> None:
            alive.append(weakref.ref(batch[0] if isinstance(batch, list) else batch))

    trainer = harness.trainer(harness.callback(warmup_steps=1), Keeps())
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            trainer.predict(Predictor(Body()), features(40), return_predictions=False)
        assert len(alive) == 20
        assert [reference() for reference in alive] == [None] * 20
    finally:
        gc.enable()


def test_memory_comes_back(harness, backend):
    """Hazard 34."""
    if backend != "cuda":
        pytest.skip("the recorder has no memory pool")
    model, callback = (
        Predictor(Body(256)),
        harness.callback(mode="FULL_AND_PIECEWISE", warmup_steps=1),
    )
    trainer = harness.trainer(callback)
    figures = []
    gc.collect()  # what earlier tests have left
    for _ in range(30):
        trainer.validate(model, features(12, 4, 256), verbose=False)
        trainer.predict(model, features(12, 4, 256), return_predictions=False)
        figures.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(figures[2:])) == 1, figures
