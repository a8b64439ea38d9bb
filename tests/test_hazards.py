"""Hazards without a file of their own. hazards.md names the tests of each hazard."""

import builtins
import copy
import gc
import logging
import random
import re
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader
from torchmetrics import Metric, SumMetric
from torchmetrics.aggregation import BaseAggregator
from torchmetrics.classification import MulticlassAccuracy

from cg_lightning import (
    BatchDescriptor,
    CaptureError,
    CUDAGraphMode,
    CUDAGraphWrapper,
    set_forward_context,
)
from cg_lightning.backends.cuda import CUDACapturedGraph
from tests.harness import (
    Harness,
    KeepOutputs,
    assert_same,
    features,
    images,
    newer_callback,
    predict,
    validate,
)
from tests.models import Body, ConvNetClassifier, Predictor
from tests.processes import run_two_ranks

FULL = CUDAGraphMode.FULL


MAKERS = {
    "EMA": lambda: newer_callback("WeightAveraging", avg_fn=get_ema_avg_fn(0.5)),
    # integer buffers cannot be averaged on a GPU (torch 2.11)
    "SWA": lambda: newer_callback("WeightAveraging", use_buffers=False),
    "SWA with its learning rate": lambda: StochasticWeightAveraging(
        swa_lrs=0.01, swa_epoch_start=1
    ),
    "pruning": lambda: ModelPruning("l1_unstructured"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_callbacks_that_swap_or_mask_weights(harness, make):
    """Hazard 4: averaging swaps weights for validation; pruning masks them after each epoch."""
    outcomes = []
    model = ConvNetClassifier(4)
    for graphed in (True, False):
        torch.manual_seed(1)
        module = copy.deepcopy(model)
        callback = harness.callback(warmup_steps=1)
        trainer = harness.trainer(*([callback] if graphed else []), make(), max_epochs=3)
        trainer.fit(module, images(), images())
        outcomes.append((dict(trainer.callback_metrics), dict(module.state_dict())))
        assert callback.stats.replays > 0 or not graphed
    assert_same(*outcomes)


class DoublesWeight(nn.Module):
    def forward(self, weight):
        return weight * 2


def loads(assign):
    def change(module):
        state = {name: torch.full_like(value, 0.01) for name, value in module.state_dict().items()}
        module.load_state_dict(state, assign=assign)

    return change


CHANGES = {
    "load_state_dict": loads(False),
    "load_state_dict with assign": loads(True),
    "a merged adapter": lambda m: setattr(m.net[0].weight, "data", m.net[0].weight.data + 0.1),
    "a parametrization": lambda m: parametrize.register_parametrization(
        m.net[0], "weight", DoublesWeight()
    ),
    "to the host and back": lambda m: m.to(torch.device("cpu")).to(m.trainer.strategy.root_device),
    "a new buffer": lambda m: m.net[0].register_buffer("extra", torch.zeros(1, device=m.device)),
}


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
@pytest.mark.parametrize("name", list(CHANGES))
def test_weights_that_change_in_mid_epoch(harness, name, mode):
    """Hazard 4."""

    class Changes(Predictor):
        def on_predict_batch_start(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if batch_idx == 5:
                CHANGES[name](self)

    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    model = Changes(Body())
    seen = []
    for extra in ([callback], []):
        seen.append(harness.trainer(*extra).predict(copy.deepcopy(model), features(40)))
    assert_same(*seen)
    assert callback.stats.replays >= 6


ILLEGAL = {
    "item": lambda x: x * x.sum().item(),
    "bool": lambda x: x if x.sum() > 0 else -x,
    "tolist": lambda x: x * len(x.tolist()),
    "cpu": lambda x: x.cpu(),
    "print": lambda x: str(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().abs().bincount(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "inverse": lambda x: torch.linalg.inv(x.diag() + torch.eye(4, device=x.device)),
    "from Python": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
}


def test_twelve_failing_captures_leave_a_healthy_process(backend, device):
    """Hazards 17 and 30."""
    x = torch.ones(4, device=device)
    key = BatchDescriptor(batch_size=4)
    healthy = CUDAGraphWrapper(lambda x: x * 2, FULL, backend=backend)
    for name, step in ILLEGAL.items():
        with torch.no_grad(), set_forward_context(FULL, key):
            with pytest.raises(CaptureError) as caught:
                CUDAGraphWrapper(step, FULL, backend=backend)(x)
            assert caught.value.__cause__ is not None, name
            if backend == "cuda":
                assert not torch.cuda.is_current_stream_capturing()
                assert torch.cuda.current_stream() == torch.cuda.default_stream()
            assert torch.randn(3, device=device).isfinite().all(), name
            assert step(torch.ones(4, device=device)) is not None, name
            assert healthy(x).tolist() == [2, 2, 2, 2], name
            linear = nn.Linear(4, 4).to(device)
            expected = linear(x)  # also the warm-up: the first run makes the handles of libraries
            assert torch.equal(CUDAGraphWrapper(linear, FULL, backend=backend)(x), expected), name
    net = nn.Linear(4, 1).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = net.weight.detach().clone()
    net(nn.functional.dropout(x)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, net.weight)


def test_gradients_after_a_print_that_failed(backend, device):
    """Hazard 30: the traceback of a failed ``str(tensor)`` keeps a guard of the dispatcher."""
    x = torch.ones(4, device=device)
    with torch.inference_mode(), set_forward_context(FULL, BatchDescriptor(batch_size=4)):
        str(x)
        with pytest.raises(CaptureError) as caught:
            CUDAGraphWrapper(str, FULL, backend=backend)(x)
    del caught
    gc.collect()
    assert nn.Linear(4, 4).to(device)(x).requires_grad


# the sync debug mode belongs to the process
@pytest.mark.filterwarnings("ignore:called a synchronizing CUDA operation")
def test_other_threads_while_capturing(harness, backend, device):
    """Hazard 18: 50 captures, while a worker loads and a thread allocates and queries."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                # no random numbers: the device refuses them during a capture
                tensor = torch.ones(64, 64, device=device)
                (tensor @ tensor).sum().item()
                if backend == "cuda":
                    event = torch.cuda.Event()
                    event.record()
                    event.query()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        lengths = [length for length in range(1, 51) for _ in range(2)]
        generator = torch.Generator().manual_seed(0)
        data = [(torch.randn(length, 8, generator=generator),) for length in lengths]
        model = Predictor(Body())
        loader = DataLoader(data, batch_size=None, num_workers=1, pin_memory=backend == "cuda")
        callback = harness.callback(mode="FULL", warmup_steps=1)
        kept = harness.trainer(callback).predict(model, loader)
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert_same(kept, harness.trainer().predict(model, DataLoader(data, batch_size=None)))
    assert callback.stats.captures == 50


class Measured(Predictor):
    def __init__(self) -> None:
        super().__init__(Body(4))
        self.accuracy = MulticlassAccuracy(4)
        self.total = SumMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        self.total.update(output.mean())
        self.accuracy(output, batch[0].argmax(1))
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return output


def replaceable() -> list[Any]:
    places: list[Any] = [builtins.print, logging.Logger.handle, random.random, torch.tensor]
    places += [Metric.__setattr__, BaseAggregator._cast_and_nan_check_input]
    return [*places, torch.Tensor.tolist, torch.Tensor.new_tensor]


@pytest.mark.filterwarnings("ignore:called a synchronizing CUDA operation")
def test_trainers_in_two_threads(harness):
    """Hazards 2 and 18: they watch, capture and replay at the same time, and share nothing."""
    before, found, errors = replaceable(), {}, []

    def work(name: int, module: Measured, *callbacks: Callback) -> None:
        try:
            kept = KeepOutputs()
            trainer = harness.trainer(*callbacks, kept)
            data = features(64, size=4)
            seen = [trainer.validate(module, data, verbose=False) for _ in range(2)]
            found[name] = (seen, kept.kept, float(module.total.compute()))
        except BaseException as error:
            errors.append(error)

    for _ in range(3):
        module = Measured()
        work(-1, copy.deepcopy(module))
        threads = [
            threading.Thread(
                target=work, args=(name, copy.deepcopy(module), harness.callback(warmup_steps=2))
            )
            for name in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert_same(found[0], found[-1])
        assert_same(found[1], found[-1])
        assert all(one is other for one, other in zip(replaceable(), before, strict=True))


def test_strategies_that_move_parameters_are_refused(harness):
    """Hazard 19."""
    from cg_lightning.trainer.preconditions import why_inert

    class Trainer:
        strategy = FSDPStrategy()

    assert "FSDPStrategy moves parameters" in why_inert(Trainer, Body())
    assert why_inert(harness.trainer(), Body()) == ""


class TwoTensors(torch.Tensor):
    """A wrapper subclass, like quantised and distributed parameters."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return TwoTensors(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, args)
        return func(*args, **(kwargs or {}))


def test_parameters_whose_memory_cannot_be_watched(tmp_path):
    from tests.harness import Harness

    harness = Harness("recorder", tmp_path)
    model = Predictor(Body())
    model.register_buffer("odd", TwoTensors(torch.zeros(2)), persistent=False)
    callback = harness.callback(warmup_steps=1)
    with pytest.warns(UserWarning, match="odd is a TwoTensors"):
        harness.trainer(callback).predict(model, features())
    assert callback.stats.replays == 0


def test_lazy_parameters(harness):
    model = Predictor(nn.Sequential(nn.LazyLinear(8), nn.ReLU()))
    for extra in ([harness.callback(warmup_steps=1)], []):
        torch.manual_seed(3)
        fresh = copy.deepcopy(model)
        kept = harness.trainer(*extra).predict(fresh, features(32))
        assert_same(kept, harness.trainer().predict(copy.deepcopy(fresh), features(32)))
        assert not extra or extra[0].stats.replays > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*sync_dist=True")
# Lightning makes DDP on its own stream
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_one_process_of_ddp(harness, backend):
    """Hazards 19 and 27: the inner module runs from graphs, and the process ends."""
    fit = lambda trainer, module: trainer.fit(module, images(), images())
    callback = harness.callback(warmup_steps=1)
    try:
        harness.compare(ConvNetClassifier(4), fit, callback, strategy="ddp")
    finally:
        torch.distributed.destroy_process_group()
    assert callback.stats.replays > 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_of_ddp(tmp_path, backend):
    """Hazards 19 and 27: metrics equal eager, and no rank waits, also if one cannot capture."""
    if backend == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    done = run_two_ranks("tests.ddp_worker", backend, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = [(tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1)]
    assert first[0] == second[0]
    assert first[1] == first[0] != second[1]


def test_a_step_that_switches_streams(harness, backend):
    """Hazard 13."""
    if backend == "recorder":
        pytest.skip("the CPU has no streams")

    class Switches(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                output = self.net(batch[0])
            torch.cuda.current_stream().wait_stream(side)
            return output

    harness.compare(
        Switches(Body()), predict(features()), harness.callback(mode="FULL", warmup_steps=1)
    )


def test_a_tensor_made_in_a_step_and_dropped(harness):
    """Hazard 15: a graph keeps the memory that it reads."""

    class Closure(Predictor):
        def on_predict_start(self) -> None:
            self.bias = torch.full((8,), 3.0, device=self.device)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) + self.bias

        def on_predict_batch_end(
            self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if batch_idx == 4:
                self.bias = torch.full((8,), 5.0, device=self.device)
            for _ in range(20):
                torch.full((8,), 7.0, device=self.device)

    harness.compare(
        Closure(Body()), predict(features(40)), harness.callback(mode="FULL", warmup_steps=1)
    )


def test_metrics_that_share_their_states(harness):
    """Hazard 32: compute groups, over two epochs."""
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassF1Score, MulticlassPrecision

    class Collects(ConvNetClassifier):
        def __init__(self) -> None:
            super().__init__(4)
            self.scores = MetricCollection([MulticlassF1Score(10), MulticlassPrecision(10)])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self(batch[0])
            self.scores.update(logits, batch[1])
            self.log_dict(self.scores)

    fit = lambda trainer, module: trainer.fit(module, images(), images())
    for mode in ("PIECEWISE", "FULL_AND_PIECEWISE"):
        callback = harness.callback(mode=mode, warmup_steps=1)
        harness.compare(Collects(), fit, callback)
        assert callback.stats.replays > 0


def test_training_is_never_graphed(harness):
    """Hazard 26."""

    class Watches(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_: Any) -> None:
            from tests.conftest import modules_with_a_trace

            assert modules_with_a_trace() == []

    fit = lambda trainer, module: trainer.fit(module, images(), images())
    harness.compare(
        ConvNetClassifier(4), fit, harness.callback(warmup_steps=0), accumulate_grad_batches=2
    )
    harness.trainer(harness.callback(warmup_steps=0), Watches(), val_check_interval=2).fit(
        ConvNetClassifier(4), images(), images()
    )


def test_two_validations_with_training_in_between(harness):
    """Hazard 34."""
    callback = harness.callback(warmup_steps=1)
    job = lambda t, m: (
        t.validate(m, images(), verbose=False),
        t.fit(m, images(), images()),
        t.validate(m, images(), verbose=False),
    )
    harness.compare(ConvNetClassifier(4), job, callback)
    assert callback.stats.captures == 3
    harness.compare(ConvNetClassifier(4), validate(images()), callback)


HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (\d+) \|.*\| (.+) \|$", (HERE / "hazards.md").read_text(), re.MULTILINE)


def test_every_hazard_has_its_tests_and_every_test_its_row():
    numbers = [int(number) for number, _ in ROWS]
    assert numbers[:34] == list(range(1, 35))
    assert numbers == sorted(set(numbers))
    defined = {
        name
        for file in HERE.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    for number, tests in ROWS:
        for name in re.findall(r"`(\w+)`", tests):
            assert name in defined, f"hazard {number} names {name}, which is no test"
    carried: dict[str, set[str]] = {}
    for file in HERE.glob("test_*.py"):
        for name, text in re.findall(
            r"^def (test_\w+)[^\n]*\n +\"\"\"(.*?)\"\"\"", file.read_text(), re.M | re.S
        ):
            if match := re.search(r"Hazards? ([\d, and]+)", text):
                carried[name] = set(re.findall(r"\d+", match[1]))
    for name, numbers in carried.items():
        for number in numbers:
            tests = dict(ROWS)[number]
            assert f"`{name}`" in tests, (
                f"{name} carries hazard {number}, whose row does not name it"
            )


def test_out_of_memory_evicts_the_least_recently_used_once(harness):
    from tests.test_equivalence import OnTensor, ragged

    class Greedy(OnTensor):
        """Runs out of memory if another graph exists, and always for the longest input."""

        def predict_step(self, batch: Any) -> Any:
            if harness_captures() and (
                len(callback._installation.session.cache.entries()) > 0 or batch.shape[1] == 9
            ):
                raise torch.OutOfMemoryError("out of memory")
            return self.net(batch)

    def harness_captures() -> bool:
        return (
            callback._installation is not None
            and callback._installation.session.backend.is_capturing()
        )

    callback = harness.callback(mode="FULL", warmup_steps=1)
    lengths = [3, 3, 4, 4, 4, 9, 9, 9, 3]
    kept = harness.trainer(callback).predict(Greedy(Body()), ragged(lengths))
    assert len(kept) == len(lengths)
    assert callback.stats.captures == 3  # 3 and 4, each evicting the other, and 3 again
    assert sum("OutOfMemoryError" in reason for reason in callback.stats.eager_reasons) == 1


def test_no_batch_is_kept(harness):
    """Batch and output of a watched step are released."""
    alive: list[weakref.ref] = []

    class Notes(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            output = self.net(batch[0])
            alive.extend([weakref.ref(batch[0]), weakref.ref(output)])
            return output.sum(1)

        def on_predict_epoch_end(self) -> None:
            gc.collect()
            assert [ref() for ref in alive[:-2]] == [None] * (len(alive) - 2)

    harness.trainer(harness.callback(mode="PIECEWISE", warmup_steps=2)).predict(
        Notes(Body()), features()
    )
    assert len(alive) == 10


@pytest.mark.gpu
def test_random_numbers_of_a_replay_that_overtakes_its_capture(tmp_path, monkeypatch):
    """Hazard 9: on a busy device, the stream of captures is still at work when the replay begins.

    PyTorch writes seed and offset of the generator on that stream before each capture, and a replay
    writes them on the caller's. Here the former is late, and the graph reads them later still.
    """
    harness = Harness("cuda", tmp_path)
    begin = CUDACapturedGraph.capture_begin

    def late(self, *args, **kwargs):
        torch.cuda._sleep(200_000_000)  # in cycles: some 0.1 seconds
        begin(self, *args, **kwargs)

    class Draws(nn.Module):
        def forward(self, x):
            torch.cuda._sleep(400_000_000)
            return nn.functional.dropout(x, 0.5, training=True)

    monkeypatch.setattr(CUDACapturedGraph, "capture_begin", late)
    callback = harness.callback(warmup_steps=1, verify_replays=0)
    harness.compare(Predictor(Draws()), predict(features(24)), callback)
    assert callback.stats.captures == 1


def test_random_numbers_after_a_capture_that_failed(harness):
    """Hazard 9: a graph from before the failure draws the same numbers as eager."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.dropout(self.linear(x), 0.5, training=True)

    class Step(Predictor):
        def __init__(self) -> None:
            super().__init__(Draws())
            self.late = FailsLate()

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.late(self.net(batch[0]))

    class FailsLate(nn.Module):
        """Has no finding while it is watched, and cannot be captured."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            session = callback._installation.session if callback._installation is not None else None
            if session is not None and session.backend.is_capturing():
                x.sum().item()
            return x * self.scale

    callback = harness.callback(warmup_steps=2, verify_replays=0)
    harness.compare(Step(), predict(features(40)), callback)
    assert callback.stats.captures == 2  # of the dropout, before the failure and after it
    assert callback.stats.replays == 8
