"""Logged, kept and predicted values equal eager, compared with a copy that had no callback."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cg_lightning.core.tree import flatten
from tests.harness import (
    Harness,
    KeepOutputs,
    assert_same,
    features,
    images,
    loader,
    predict,
    validate,
)
from tests.models import Attention, Body, ConvNetClassifier, Predictor, Recurrent

MODES = ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"]


def sequences(number: int = 20, batch_size: int = 4) -> DataLoader:
    """Return a loader of sequences ``(batch, 5, 8)``."""
    return loader(
        torch.randn(number, 5, 8, generator=torch.Generator().manual_seed(5)), batch_size=batch_size
    )


class Residual(nn.Module):
    """Changes a tensor in place, and reads it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))

    def forward(self, x):
        y = x * 1
        return self.block(y) + y


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Body()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.encoder(x) - self.scale * self.encoder(x * 2) + self.encoder(x + 1)


class CellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 8)
        outputs = []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            outputs.append(state)
        return torch.stack(outputs, 1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 8)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(self.embedding(x))


class Layers(nn.Module):
    """Calls children of a ModuleList, and a slice of a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Body() for _ in range(3)])
        self.trunk = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.trunk[:2](x)


class Counter(nn.Module):
    """Counts in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Body()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return self.net(x) * self.steps


class BatchNormInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout()
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        self.norm.train()
        self.dropout.train()
        return self.head(self.dropout(self.norm(x)))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


NETS = {
    "body": (Body, features),
    "residual with in-place input": (Residual, features),
    "siamese": (Siamese, features),  # hazard 31
    "tied weights": (Tied, features),
    "module list and slice": (Layers, features),
    "buffer counter": (Counter, features),  # hazard 10
    "batch norm and dropout in training": (BatchNormInTraining, features),  # hazard 9
    "lstm": (lambda: Recurrent(nn.LSTM), sequences),
    "gru": (lambda: Recurrent(nn.GRU), sequences),
    "attention": (Attention, sequences),
    "encoder": (encoder, sequences),
    "loop of cells": (CellLoop, sequences),
}


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(NETS))
def test_networks(harness, name, mode):
    make, data = NETS[name]
    callback = harness.callback(mode=mode, warmup_steps=1)
    job = lambda trainer, module: (
        trainer.validate(module, data(), verbose=False),
        trainer.predict(module, data()),
        trainer.fit(module, data(), data()),
        trainer.test(module, data(), verbose=False),
    )
    harness.compare(Predictor(make()), job, callback)
    assert callback.stats.replays > 0, callback.summary()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_precisions(harness, backend, mode, precision):
    """Hazard 5: validate, optimizer steps, validate."""
    if backend == "recorder" and precision == "16-mixed":
        pytest.skip("Lightning has no 16-mixed on the CPU")
    fit = lambda trainer, module: trainer.fit(module, images(), images())
    callback = harness.compare(
        ConvNetClassifier(4), fit, harness.callback(mode=mode, warmup_steps=1), precision=precision
    )
    if mode != "FULL":
        assert callback.stats.replays > 0, callback.summary()
    callback = harness.compare(
        ConvNetClassifier(4), predict(images()), harness.callback(mode=mode), precision=precision
    )
    assert callback.stats.replays == 2


@pytest.mark.parametrize("mode", MODES)
def test_several_loaders_partial_batches_and_shapes_in_any_order(harness, mode):
    """Hazards 1, 2 and 11."""
    callback = harness.callback(mode=mode, warmup_steps=1)
    loaders = [features(18, 4), features(9, 3), sequences(7, 2)]

    class TwoLoaders(Predictor):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            output = self.net(batch[0]) + dataloader_idx
            self.log("mean", output.mean())
            return output

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.net(batch[0]) + dataloader_idx

    job = lambda t, m: (t.validate(m, loaders, verbose=False), t.predict(m, loaders))
    harness.compare(TwoLoaders(Body()), job, callback)
    assert callback.stats.replays > 0


def ragged(lengths: list[int]) -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    return DataLoader(
        [torch.randn(2, length, 8, generator=generator) for length in lengths], batch_size=None
    )


class OnTensor(Predictor):
    """The batch is one tensor, and the step takes no batch_idx."""

    def validation_step(self, batch: Any) -> Any:
        return self.net(batch)

    def predict_step(self, batch: Any) -> Any:
        return self.net(batch)


@pytest.mark.parametrize("mode", MODES)
def test_shapes_in_any_order(harness, mode):
    lengths = [3, 5, 3, 3, 7, 5, 5, 3, 7, 7, 3, 5, 7]
    callback = harness.compare(
        OnTensor(Body()), predict(ragged(lengths)), harness.callback(mode=mode, warmup_steps=1)
    )
    assert callback.stats.captures == 3
    assert callback.stats.replays == len(lengths) - 3


def test_shapes_that_change_inside_a_step(harness):
    """Hazard 3: batches are equal, arguments of the submodule differ."""

    class Trims(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0][:, : 2 + batch_idx % 3])

    callback = harness.callback(targets=["net"], warmup_steps=1)
    harness.compare(Trims(Body()), predict(sequences(40)), callback)
    assert callback.stats.captures == 3


def test_validation_every_few_steps(harness):
    fit = lambda trainer, module: trainer.fit(module, images(40), images(12))
    callback = harness.callback(warmup_steps=2)
    harness.compare(
        ConvNetClassifier(4),
        fit,
        callback,
        val_check_interval=3,
        max_epochs=2,
        num_sanity_val_steps=2,
    )
    assert callback.stats.captures == 1  # weights change in place: one capture serves all epochs
    assert callback.stats.replays == callback.stats.steps["FULL"] == 3 * 6 - 2


def test_one_callback_through_every_stage_and_two_trainers(harness):
    """Hazards 23 and 34."""
    callback = harness.callback(warmup_steps=1)
    model = ConvNetClassifier(4)
    for _ in range(2):

        def job(trainer: Trainer, module: ConvNetClassifier) -> list[Any]:
            return [
                trainer.fit(module, images(), images()),
                trainer.validate(module, images(), verbose=False),
                trainer.test(module, images(), verbose=False),
                trainer.predict(module, images()),
                trainer.validate(module, images(), verbose=False),
                trainer.fit_loop.epoch_progress.reset(),
                trainer.fit(module, images(), images()),
            ]

        harness.compare(model, job, callback)
    assert {entry.stage for entry in callback.stats.entries} == {"validate", "test", "predict"}


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    extra: Any = None


def nested(self: Predictor, batch: Any, batch_idx: int) -> Any:
    y = self.net(batch[0])
    return {
        "y": y,
        "again": [y, Output(y.mean(), {"n": 3, "name": "a", "none": None})],
        "view": y[:, :2],
        "half": y.half(),
    }


@pytest.mark.parametrize("mode", MODES)
def test_nested_outputs(harness, mode):
    """Hazard 25."""
    step = type("Nested", (Predictor,), {"predict_step": nested})
    callback = harness.compare(step(Body()), predict(features(24)), harness.callback(mode=mode))
    assert callback.stats.replays == 3


@pytest.mark.parametrize("mode", MODES)
def test_a_nested_batch_with_values_in_every_leaf(harness, mode):
    """Hazard 3: each leaf gets new values."""

    class Reads(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["a"][0]) * batch["scale"] + batch["a"][1]["deep"], batch["name"]

    generator = torch.Generator().manual_seed(1)
    batches = [
        {
            "a": (
                torch.randn(2, 8, generator=generator),
                {"deep": torch.randn(2, 1, generator=generator)},
            ),
            "scale": 2.0 if index % 2 else 3,
            "name": "same",
        }
        for index in range(12)
    ]
    callback = harness.compare(
        Reads(Body()), predict(DataLoader(batches, batch_size=None)), harness.callback(mode=mode)
    )
    assert callback.stats.captures == (2 if mode != "PIECEWISE" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_an_output_that_is_a_batch_tensor_or_a_parameter_is_that_object(harness, mode):
    seen = []

    class Identity(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch[0], self.net[0].weight, self.net(batch[0])

        def on_predict_batch_end(self, outputs, batch, *_):
            seen.append((outputs[0] is batch[0], outputs[1] is self.net[0].weight))

    callback = harness.callback(mode=mode)
    harness.trainer(callback).predict(Identity(Body()), features(24))
    assert seen == [(True, True)] * 6
    assert callback.stats.replays == 3


def test_a_submodule_that_gives_back_its_input(harness):
    same = []

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(1, 1)

        def forward(self, x):
            return x, self.unused.bias

    class Step(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            output, bias = self.net(batch[0])
            same.append(output is batch[0] and bias is self.net.unused.bias)
            return output * 2

    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.compare(Step(Skips()), predict(features()), callback)
    assert same == [True] * 10
    assert callback.stats.replays == 4


def test_without_copies_outputs_live_until_the_next_replay_of_their_entry(harness):
    model, callback = (
        OnTensor(Body()),
        harness.callback(mode="FULL", copy_outputs=False, warmup_steps=1),
    )
    kept, expected = KeepOutputs(), KeepOutputs()
    harness.trainer(callback, kept).predict(
        model, ragged([3, 4, 3, 4, 3]), return_predictions=False
    )
    assert kept.kept[2].data_ptr() == kept.kept[4].data_ptr()  # the same graph wrote both
    harness.trainer(expected).predict(model, ragged([3, 4, 3, 4, 3]), return_predictions=False)
    # another graph of the pool did not overwrite this one
    assert_same(kept.kept[3:], expected.kept[3:])


def test_that_the_comparison_can_fail(harness):
    class Random(Predictor):
        drawn = 0

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            Random.drawn += 1
            return self.net(batch[0]) + Random.drawn

    with pytest.raises(AssertionError):
        harness.compare(Random(Body()), predict(features()), harness.callback(mode="PIECEWISE"))


def test_inference_mode_off(harness):
    callback = harness.callback(warmup_steps=2)
    harness.compare(Predictor(Body()), validate(features()), callback, inference_mode=False)
    assert callback.stats.replays == 3


def test_weights_that_move_between_and_inside_stages(harness):
    """Hazard 4."""

    class Moves(Predictor):
        def on_predict_batch_start(self, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 3:
                self.net[0].weight.data = self.net[0].weight.data * 2
            if batch_idx == 4:
                self.net[2] = nn.Linear(16, 8).requires_grad_(False).to(self.device)
                nn.init.constant_(self.net[2].weight, 0.5)
                nn.init.constant_(self.net[2].bias, 0.1)

    for mode in MODES:
        callback = harness.callback(mode=mode, warmup_steps=1)
        harness.compare(Moves(Body()), predict(features(40)), callback)
        assert callback.stats.captures == 3


def test_children_set_after_the_stage_began_are_found(harness):
    class Grows(Predictor):
        def on_predict_epoch_start(self):
            self.head = nn.Linear(8, 2).requires_grad_(False).to(self.device)
            nn.init.constant_(self.head.weight, 0.25)
            nn.init.constant_(self.head.bias, 0.0)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.head(self.net(batch[0]))

    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.compare(Grows(Body()), predict(features()), callback)
    assert {entry.target for entry in callback.stats.entries} == {"net", "head"}


@pytest.mark.slow
def test_pinned_memory_and_workers(harness, backend):
    """Hazard 12."""

    def data() -> DataLoader:
        numbers = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        return loader(numbers, num_workers=1, pin_memory=backend == "cuda")

    model = Predictor(Body())
    one = harness.trainer(harness.callback()).predict(model, data())
    other = harness.trainer().predict(model, data())
    assert_same(one, other)


class Graph(nn.Module):
    """A graph network: the neighbours are a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, neighbours, x):
        return torch.sparse.mm(neighbours, self.linear(x))


@pytest.mark.parametrize("mode", MODES)
def test_sparse_tensors_on_the_way(harness, mode):
    class Step(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch[0]
            return self.net(torch.eye(4, device=x.device).to_sparse(), x), (x > 0).to_sparse()

    callback = harness.callback(mode=mode, warmup_steps=1)
    model, data = Step(Graph()), features()
    one, other = (harness.trainer(*extra).predict(model, data) for extra in ([callback], []))
    assert_same([(a, b.to_dense()) for a, b in one], [(a, b.to_dense()) for a, b in other])
    assert callback.stats.eager + callback.stats.steps["PIECEWISE"] == 5


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(?s).*TensorFloat32 tensor cores")  # PyTorch, when it compiles
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_network(tmp_path, mode):
    """Compare with the same compiled network without graphs. The recorder runs it uncompiled."""
    net, harness = Body(), Harness("cuda", tmp_path)
    callback = harness.callback(mode=mode, warmup_steps=1)
    seen = []
    for extra in ([callback], []):
        module = Predictor(torch.compile(copy.deepcopy(net)))
        kept = harness.trainer(*extra).predict(module, features(32))
        seen.append((kept, harness.trainer(*extra).validate(module, features(32), verbose=False)))
    assert_same(*seen)
    assert callback.stats.replays > 8, callback.summary()


class Padded(nn.Module):
    """Ignores the positions that channel 0 marks. In inference, PyTorch may drop them instead."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x, src_key_padding_mask=x[..., 0] > 0))


def padded_sequences() -> DataLoader:
    """Return a loader of sequences that are padded at the end or, every second one, elsewhere."""
    x = torch.randn(10, 4, 6, 8, generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([[3, 6, 4, 5]])
    x[..., 0] = (torch.arange(6) >= lengths[..., None]).float()
    x[1::2, :, :, 0] = x[1::2, :, :, 0].flip(-1)
    return loader(x.flatten(0, 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("verify_replays", [0, 2])
def test_nested_tensors_and_the_look_at_a_mask(harness: Harness, mode, verify_replays):
    """PyTorch looks at the mask on the host, and makes a nested tensor of what is padded."""
    callback = harness.callback(mode=mode, verify_replays=verify_replays)
    job = lambda trainer, module: (
        trainer.predict(module, padded_sequences()),
        trainer.validate(module, padded_sequences(), verbose=False),
    )
    harness.compare(Predictor(Padded().eval()), job, callback)
    assert callback.stats.steps["FULL"] == 0, callback.summary()
    if mode != "FULL":
        assert callback.stats.steps["PIECEWISE"] > 0, callback.summary()


def _outside_inference_mode(net: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return net(x.clone()) * 2


KINDS = {
    "jacrev": lambda net, x: torch.func.vmap(torch.func.jacrev(net))(x),
    "jacrev beside others": lambda net, x: (torch.func.vmap(torch.func.jacrev(net))(x), net(x)),
    "outside": _outside_inference_mode,
    "many": lambda net, x: [torch.func.jacrev(net)(row) for row in x] * 3,
}


class GivesKinds(Predictor):
    def __init__(self, function: Any) -> None:
        super().__init__(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
        self.function = function

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.function(self.net, batch[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(KINDS))
def test_outputs_that_are_no_inference_tensors(harness, name, mode):
    """In inference mode, the derivatives of ``torch.func`` can be used under autograd."""
    module = GivesKinds(KINDS[name])
    kinds = []
    for extra in ([harness.callback(mode=mode)], []):
        kept = KeepOutputs()  # what Lightning returns was copied to the host
        harness.trainer(*extra, kept).predict(copy.deepcopy(module), features(40))
        leaves = [leaf for leaf in flatten(kept.kept)[0] if isinstance(leaf, Tensor)]
        kinds.append([(leaf.is_inference(), leaf.requires_grad) for leaf in leaves])
    assert kinds[0] == kinds[1]
    if name == "outside":  # of what torch.func makes, that depends on the version of PyTorch
        assert not any(is_inference for is_inference, _ in kinds[1])
