"""Predictions are copied while the device computes, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loops import prediction_loop
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cg_lightning import CUDAGraphCallback
from cg_lightning.backends import resolve_backend
from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.report.timeline import Ran
from cg_lightning.trainer import prediction_copies
from tests.harness import Harness, assert_same

CYCLES = 2_000_000  # about a millisecond on the device
NUMBER = 20


class LateOnHost:
    """Fills the copies when it is asked to finish, and not before; for a backend without queues."""

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor]] = []

    def can_copy(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and not tensor.requires_grad

    def start(self, tensor: Tensor) -> Tensor:
        result = torch.full_like(tensor, 77)
        self.pending.append((tensor.clone(), result))
        return result

    def finish(self) -> None:
        for values, result in self.pending:
            with torch.inference_mode():
                result.copy_(values)
        self.pending.clear()


@pytest.fixture
def late(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """A harness whose backend copies late."""
    if harness.backend == "recorder":
        monkeypatch.setattr(RecorderBackend, "late_copies", lambda self: LateOnHost())
    return harness


@pytest.fixture
def exposed(late: Harness, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """The same, although hooks of the user see the lists: these are right by themselves as well."""
    monkeypatch.setattr(prediction_copies, "_has_hooks", lambda trainer, module: False)
    return late


def number_of_replays(callback: CUDAGraphCallback) -> int:
    """Return how many steps ran from a graph, without the last one."""
    return sum(row[1] is Ran.REPLAY for row in callback.stats.timeline.rows) - 1


class Pair(NamedTuple):
    one: Tensor
    other: Any


class Model(LightningModule):
    """Returns its prediction in containers of all kinds."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)
        self.kind = kind

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch.is_cuda:
            torch.cuda._sleep(CYCLES)
        y = self.net(batch)
        return {
            "tensor": lambda: y,
            "transposed": lambda: y.T,
            "expanded": lambda: y[:1].expand(4, -1),
            "dict": lambda: {"y": y, "more": [y * 2, (y + 1, "text", 3)], "again": y},
            "named": lambda: Pair(y, {"mean": y.mean(), "integers": y.argmax(1)}),
            "half": lambda: (y.half(), y > 0, torch.complex(y, y)),
            "empty": lambda: (y[:0], y),
        }[self.kind]()


def inputs(number: int = NUMBER, start: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(start)
    return [torch.randn(4, 8, generator=generator) for _ in range(number)]


def loader(items: Any) -> DataLoader:
    return DataLoader(items, batch_size=None)


def strides(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [(value.stride(), value.is_inference(), value.is_pinned(), value.requires_grad)]
    if isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return [type(value), *map(strides, parts)]
    return []


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize(
    "kind", ["tensor", "transposed", "expanded", "dict", "named", "half", "empty"]
)
def test_predictions_are_those_of_eager(late, kind, inference_mode):
    model = Model(kind)
    reference, runs = copy.deepcopy(model), []
    callback = late.callback()
    for module, callbacks in ((reference, ()), (model, (callback,))):
        trainer = late.trainer(*callbacks, inference_mode=inference_mode)
        runs.append(trainer.predict(module, loader(inputs())))
    assert_same(*runs)
    if late.backend == "cuda" or kind != "expanded":  # on a CPU, Lightning copies nothing
        assert strides(runs[0]) == strides(runs[1])
    assert callback.stats.late_predictions == number_of_replays(callback) > 0
    assert f"{callback.stats.late_predictions} predictions copied behind" in callback.summary()
    assert vars(prediction_loop)["move_data_to_device"] is move_data_to_device


def test_several_dataloaders_and_stages(late):
    model, callback = Model("dict"), late.callback()
    reference = copy.deepcopy(model)
    loaders = [loader(inputs(9, start)) for start in range(3)]
    expected = late.trainer().predict(reference, loaders)
    trainer = late.trainer(callback)
    for _ in range(2):
        predicted = trainer.predict(model, loaders)
        assert_same(predicted, expected)
        assert type(predicted) is list
        assert [type(each) for each in predicted] == [list] * 3
        assert type(trainer.predict_loop._predictions) is list
    assert callback.stats.late_predictions > 10


class ReadsAll(Callback):
    """Takes the predictions at each hook, by all ways that a list has."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def read(self, trainer: Any) -> None:
        loop = trainer.predict_loop
        self.seen.append([each.clone() for each in loop.predictions])
        if self.seen[-1]:
            self.seen.append(torch.stack(loop.predictions))
        [inner] = loop._predictions
        self.seen += [inner[-1:], list(reversed(loop._predictions))]
        self.seen.append(loop._predictions + [1])  # noqa: RUF005
        self.seen[-3:] = copy.deepcopy(self.seen[-3:])
        self.seen.append(repr(loop._predictions))
        self.seen.append(loop._predictions == [inner])

    def on_predict_batch_start(self, trainer, *_: Any) -> None:
        self.read(trainer)

    on_predict_batch_end = on_predict_epoch_end = on_predict_batch_start


class ReadsInTransfer(Model):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append([each.clone() for each in self.trainer.predict_loop.predictions])
        return batch


class ReadsInData(Dataset):
    """Chooses what comes next by what was predicted."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def __len__(self) -> int:
        return NUMBER

    def __getitem__(self, index: int) -> Tensor:
        made = self.trainer.predict_loop.predictions if index else []
        return inputs(1, index)[0] + (made[-1].sum() if made else 0)


def test_whoever_takes_the_predictions_gets_them_complete(exposed):
    runs = []
    model = ReadsInTransfer()
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (exposed.callback(),))):
        reads, data = ReadsAll(), ReadsInData()
        trainer = data.trainer = exposed.trainer(*callbacks, reads)
        predicted = trainer.predict(module, loader(data))
        runs.append((predicted, module.seen, reads.seen))
    assert_same(*runs)


def test_that_values_which_do_not_come_are_seen(exposed, monkeypatch):
    model = Model()
    expected = exposed.trainer().predict(copy.deepcopy(model), loader(inputs()))
    lists = prediction_copies._Lists
    monkeypatch.setattr(lists, "__getitem__", lambda self, index: list.__getitem__(self, index))
    seen: list[Tensor] = []

    class Reads(Callback):
        def on_predict_batch_start(self, trainer, *_: Any) -> None:
            if made := list.__getitem__(trainer.predict_loop._predictions, 0):
                seen.append(made[-1].clone())

    exposed.trainer(exposed.callback(), Reads()).predict(model, loader(inputs()))
    with pytest.raises(AssertionError):
        assert_same(seen, expected[:-1])


class HoldsTheList(Callback):
    """Takes the list once, and looks at it at each hook."""

    def __init__(self) -> None:
        self.held: Any = None
        self.seen: list[Any] = []

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx == 12:
            self.held = trainer.predict_loop.predictions
        if batch_idx >= 12:
            self.seen.append([each.clone() for each in self.held])


def test_a_list_that_somebody_holds_is_filled_without_delay(exposed):
    runs, model, callback = [], Model(), exposed.callback()
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (callback,))):
        holds = HoldsTheList()
        predicted = exposed.trainer(*callbacks, holds).predict(module, loader(inputs()))
        assert holds.held is predicted
        runs.append((predicted, holds.seen))
    assert_same(*runs)
    assert callback.stats.late_predictions == number_of_replays(callback) - 7


class ChangesInPlace(Callback):
    """Changes outputs before the copy, and those that it keeps after it."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_predict_batch_start(self, *_: Any) -> None:
        for output in self.kept:
            output.mul_(3)

    def on_predict_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
        outputs.add_(1)
        # on a CPU, Lightning keeps the very tensor, so that a later change is one of the prediction
        if outputs.is_cuda:
            self.kept.append(outputs)


@pytest.mark.parametrize("copies", [True, False])
def test_outputs_that_are_changed_in_place(exposed, copies):
    if not copies and exposed.backend != "cuda":
        pytest.skip("on a CPU, Lightning keeps the output itself, which the next replay changes")
    model, runs = Model(), []
    callback = exposed.callback(copy_outputs=copies)
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (callback,))):
        others = ChangesInPlace()
        if not copies:
            others.kept = ()  # such an output lives until the next replay only
            others.on_predict_batch_end = lambda t, m, outputs, *_: outputs.add_(1)
        trainer = exposed.trainer(*callbacks, others)
        runs.append(trainer.predict(module, loader(inputs())))
    assert_same(*runs)
    assert callback.stats.late_predictions == number_of_replays(callback) > 0


class Raises(Model):
    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 7:
            raise KeyError("mine")
        return super().predict_step(batch, batch_idx)


def test_an_error_leaves_complete_predictions(late):
    model, runs = Raises(), []
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (late.callback(),))):
        trainer = late.trainer(*callbacks)
        with pytest.raises(KeyError, match="mine"):
            trainer.predict(module, loader(inputs()))
        assert type(trainer.predict_loop._predictions) is list
        runs.append(trainer.predict_loop.predictions)
    assert len(runs[0]) == 7
    assert_same(*runs)
    assert vars(prediction_loop)["move_data_to_device"] is move_data_to_device


class TakesAll(Callback):
    """Copies and saves all predictions, before our own hooks run, and keeps them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.copies: list[Any] = []
        self.kept: Any = None

    def on_predict_batch_end(self, trainer, *_: Any) -> None:
        predictions = trainer.predict_loop.predictions
        for copied in (predictions, copy.copy(predictions), [[1]] + predictions):  # noqa: RUF005
            self.copies.append(copy.deepcopy(copied))
        torch.save(predictions, self._path)
        self.copies.append(torch.load(self._path, weights_only=False))

    def on_predict_epoch_end(self, trainer, *_: Any) -> None:
        self.kept = trainer.predict_loop.predictions
        assert type(self.kept) is list
        torch.save(self.kept, self._path)
        self.copies.append(torch.load(self._path))


def test_several_lists_are_copied_and_saved_as_lightnings(exposed, tmp_path):
    model, runs, callback = Model("dict"), [], exposed.callback()
    loaders = [loader(inputs(9, start)) for start in range(2)]
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (callback,))):
        takes = TakesAll(tmp_path / "predictions")
        predicted = exposed.trainer(takes, *callbacks).predict(module, loaders)
        assert takes.kept is predicted
        runs.append((predicted, takes.copies))
    assert_same(*runs)
    assert all(type(each) is list for each in runs[1][1])
    assert callback.stats.late_predictions > 0


class Empties(Callback):
    """Drops all predictions now and then, and reads the list that it has set."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        self.seen.append([each.clone() for each in trainer.predict_loop.predictions])
        if batch_idx > 10 and batch_idx % 4 == 2:
            trainer.predict_loop._predictions = [[]]


def test_lists_that_a_user_has_set_are_filled_without_delay(exposed):
    model, runs, callback = Model(), [], exposed.callback()
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (callback,))):
        empties = Empties()
        predicted = exposed.trainer(*callbacks, empties).predict(module, loader(inputs()))
        runs.append((predicted, empties.seen))
    assert_same(*runs)
    assert 0 < callback.stats.late_predictions < number_of_replays(callback)


@pytest.mark.parametrize("before", [True, False])
def test_a_list_that_a_thread_takes_during_a_copy_is_complete(exposed, monkeypatch, before):
    """The copies take it themselves, before and after they are known to be under way."""
    held: list[Any] = []
    seen: list[Tensor] = []
    callback = exposed.callback()
    trainer = exposed.trainer(callback)
    copies = type(late_copies_of(exposed))
    start = copies.start

    def take() -> None:
        if not held and callback.stats.late_predictions == 4:
            held.append(trainer.predict_loop._predictions[0])

    def start_and_take(self: Any, tensor: Tensor) -> Tensor:
        if before:
            take()
        started = start(self, tensor)
        take()
        return started

    class Reads(Callback):
        def on_predict_batch_start(self, *_: Any) -> None:
            if held:
                seen.append(list.__getitem__(held[0], -1).clone())

    monkeypatch.setattr(copies, "start", start_and_take)
    trainer.callbacks.append(Reads())
    predicted = trainer.predict(Model(), loader(inputs()))
    assert len(seen) > 5
    assert_same(seen, predicted[-1 - len(seen) : -1])


def late_copies_of(late: Harness) -> Any:
    return resolve_backend(late.backend).late_copies()


class OwnStream(Model):
    """Computes on a stream of its own, and reads no value that the other stream writes."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        computing = torch.cuda.current_stream()
        with torch.cuda.stream(self.stream):
            y = self.table * batch_idx
        computing.wait_stream(self.stream)
        torch.cuda._sleep(20 * CYCLES)
        return y


@pytest.mark.gpu
def test_memory_of_another_stream_is_not_used_again_before_the_copy(late):
    if late.backend != "cuda":
        pytest.skip("needs streams")
    model, runs = OwnStream(), []
    callback = late.callback(warmup_steps=NUMBER)  # all steps are eager
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (callback,))):
        module.stream = torch.cuda.Stream()
        module.table = torch.ones(256, 256, device="cuda")
        trainer = late.trainer(*callbacks)
        runs.append(trainer.predict(module, loader(inputs())))
    assert_same(*runs)
    assert callback.stats.late_predictions == 0, "eager steps"


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.written: list[Any] = []

    def write_on_batch_end(self, trainer, pl_module, prediction, *_: Any) -> None:
        self.written.append(prediction.cpu())

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices) -> None:
        self.written.append(copy.deepcopy(predictions))


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
@pytest.mark.parametrize("returns", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_writers_get_complete_predictions(exposed, returns, is_first):
    model, runs, callback = Model(), [], exposed.callback()
    for module, callbacks in ((copy.deepcopy(model), []), (model, [callback])):
        writer = Writer()
        order = [writer, *callbacks] if is_first else [*callbacks, writer]
        trainer = exposed.trainer(*order)
        result = trainer.predict(module, loader(inputs()), return_predictions=returns)
        runs.append((result, writer.written))
    assert_same(*runs)
    assert callback.stats.late_predictions == number_of_replays(callback) > 0


def test_no_list_no_copies(late):
    callback = late.callback()
    late.trainer(callback).predict(Model(), loader(inputs()), return_predictions=False)
    assert callback.stats.late_predictions == 0


class PredictsInside(Callback):
    """Predicts by another Trainer at one of the batches."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self.made: Any = None

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_: Any) -> None:
        if batch_idx == 3:
            other = copy.deepcopy(pl_module)
            self.made = self._harness.trainer(Holds()).predict(other, loader(inputs(6, 9)))


class Holds(Callback):
    """Reads what the loop's list held when it was taken, without a way that anybody could see."""

    def on_predict_batch_start(self, trainer, *_: Any) -> None:
        for made in trainer.predict_loop.predictions:
            assert not (made == 77).any()


class Hook(Callback):
    def on_predict_batch_start(self, *_: Any) -> None:
        pass


class HookOfModule(Model):
    def on_predict_batch_end(self, *_: Any) -> None:
        pass


class HookOfData(Model):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def a_hook_set_on_an_object() -> Model:
    model = Model()
    model.on_predict_batch_start = lambda *_: None
    return model


@pytest.mark.parametrize("case", ["callback", "module", "data", "object", "writer"])
@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_hooks_of_the_user_get_lightnings_wait(late, case):
    """What a hook has copied with ``non_blocking=True`` may be read by the next one."""
    models = {"module": HookOfModule, "data": HookOfData, "object": a_hook_set_on_an_object}
    others = {"callback": [Hook()], "writer": [Writer()]}.get(case, [])
    callback = late.callback()
    late.trainer(callback, *others).predict(models.get(case, Model)(), loader(inputs()))
    assert callback.stats.late_predictions == 0


def test_progress_bars_are_no_hooks_of_the_user(late):
    callback = late.callback()
    trainer = late.trainer(callback, enable_progress_bar=True)
    trainer.predict(Model(), loader(inputs()))
    assert callback.stats.late_predictions == number_of_replays(callback) > 0


class FillsAgain(Dataset):
    """Has one batch in pinned memory, which it fills anew each time."""

    def __init__(self) -> None:
        self.batch = torch.empty(4, 8).pin_memory()

    def __len__(self) -> int:
        return NUMBER

    def __getitem__(self, index: int) -> Tensor:
        return self.batch.copy_(inputs(1, index)[0])


@pytest.mark.gpu
def test_pinned_memory_is_not_filled_while_the_device_reads_it(late):
    if late.backend != "cuda":
        pytest.skip("needs pinned memory")
    model, runs, callback = Model(), [], late.callback()
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (callback,))):
        runs.append(late.trainer(*callbacks).predict(module, loader(FillsAgain())))
    assert_same(*runs)
    assert callback.stats.late_predictions == 0


class ReadsTheLastBatch(Model):
    """Runs in pieces, and reads what it has copied in the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.last: Any = None

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.last is not None:
            self.seen.append(self.last.clone())
        output = super().predict_step(batch, batch_idx)
        if float(output.sum()) > 1e9:
            output = output * 2
        self.last = output.to("cpu", non_blocking=True)
        return output


def test_steps_that_run_the_users_code_get_lightnings_wait(late):
    model, runs, callback = ReadsTheLastBatch(), [], late.callback()
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (callback,))):
        predicted = late.trainer(*callbacks).predict(module, loader(inputs()))
        runs.append((predicted, module.seen))
    assert_same(*runs)


def test_another_trainer_inside_is_left_alone(exposed):
    model, runs, callback = Model(), [], exposed.callback()
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (callback,))):
        inside = PredictsInside(exposed)
        predicted = exposed.trainer(*callbacks, inside).predict(module, loader(inputs()))
        runs.append((predicted, inside.made))
    assert_same(*runs)
    assert callback.stats.late_predictions == number_of_replays(callback) > 0


class Moves:
    """An object that moves itself."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any, **_: Any) -> Moves:
        return Moves(self.x.to(device))


LEFT = {
    "an object": lambda y: {"y": y, "object": Moves(y)},
    "a sparse tensor": lambda y: y.to_sparse(),
    "a parameter": lambda y: [y, nn.Parameter(y.clone())],
    "nothing": lambda y: None,
    "a number": lambda y: 3,
}


@pytest.mark.filterwarnings("ignore:predict returned None")
@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_lightning(late, case):
    class Other(Model):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            return LEFT[case](super().predict_step(batch, batch_idx))

    model, runs, callback = Other(), [], late.callback()
    for module, callbacks in ((copy.deepcopy(model), ()), (model, (callback,))):
        predicted = late.trainer(*callbacks, inference_mode=False).predict(module, loader(inputs()))
        runs.append(predicted)
    if case == "an object":
        runs = [[(each["y"], each["object"].x) for each in predicted] for predicted in runs]
    if case == "a sparse tensor":
        runs = [[each.to_dense() for each in predicted] for predicted in runs]
    assert_same(*runs)
    assert callback.stats.late_predictions == 0


def test_large_predictions_are_left_to_lightning(late, monkeypatch):
    monkeypatch.setattr(prediction_copies, "_MOST_BYTES", 4 * 8 * 4 - 1)
    callback = late.callback()
    late.trainer(callback).predict(Model(), loader(inputs()))
    assert callback.stats.late_predictions == 0


def test_the_option_switches_it_off(late):
    callback = late.callback(overlap_copies=False)
    late.trainer(callback).predict(Model(), loader(inputs()))
    assert callback.stats.late_predictions == 0


@pytest.mark.parametrize("changed", ["function", "lists"])
def test_a_loop_that_is_not_known_is_left_alone(late, monkeypatch, changed):
    class Own(list):
        pass

    class Changes(Callback):
        def on_predict_start(self, trainer, *_: Any) -> None:
            loop = trainer.predict_loop
            loop._predictions = Own(loop._predictions)

    calls: list[Any] = []
    others = [Changes()] if changed == "lists" else []
    if changed == "function":
        own = lambda *args: (calls.append(args), move_data_to_device(*args))[1]
        monkeypatch.setattr(prediction_loop, "move_data_to_device", own)
    callback = late.callback()
    late.trainer(*others, callback).predict(Model(), loader(inputs()))
    assert callback.stats.late_predictions == 0
    assert len(calls) == (NUMBER if changed == "function" else 0)


def test_lightnings_loop_is_as_we_know_it():
    step = inspect.getsource(prediction_loop._PredictionLoop._predict_step)
    append = "self._predictions[dataloader_idx].append(move_data_to_device(predictions, "
    assert append in step, "trainer/prediction_copies.py must know the new loop"
    assert step.count("_predictions[") == 1
    assert "self._predictions = [[] for _ in range(num_dataloaders)]" in inspect.getsource(
        prediction_loop._PredictionLoop.reset
    )
