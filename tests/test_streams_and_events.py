"""Streams, events, graphs, memory pools and allocators of the user's, on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from cg_lightning.backends import RecorderBackend
from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.watcher import StepWatcher
from tests.harness import Harness, features, validate
from tests.models import Body
from tests.processes import run_python

BATCHES = 12


class Step(LightningModule):
    """Logs a metric of what ``compute`` returns."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = Body()
        self.mean = MeanMetric()
        self.compute = compute
        self.read: list[Any] = []

    def on_validation_start(self) -> None:
        if self.compute is own_graph:
            self.given = torch.zeros(4, 8, device=self.device)
            self.net(self.given)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.made = self.net(self.given)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.compute(self, batch[0])
        self.mean.update(output)
        self.log("mean", self.mean)
        return output


def plain(module: Any, x: Tensor) -> Tensor:
    return module.net(x)


def side_stream(module: Any, x: Tensor) -> Tensor:
    stream, caller = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        output = module.net(x)
    caller.wait_stream(stream)
    return output * 1


def event_inside(module: Any, x: Tensor) -> Tensor:
    output = module.net(x)
    event = torch.cuda.Event()
    event.record()
    torch.cuda.current_stream().wait_event(event)
    return output


def timed(module: Any, x: Tensor) -> Tensor:
    start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    start.record()
    output = module.net(x)
    end.record()
    end.synchronize()
    module.read.append(start.elapsed_time(end) >= 0)
    return output


def asked(module: Any, x: Tensor) -> Tensor:
    output = module.net(x)
    module.read.append(type(torch.cuda.current_stream().query()))
    return output


def kept_event(module: Any, x: Tensor) -> Tensor:
    output = module.net(x)
    module.event = torch.cuda.Event(enable_timing=True)
    module.event.record()
    return output


def own_graph(module: Any, x: Tensor) -> Tensor:
    module.given.copy_(x)
    module.graph.replay()
    return module.made.clone()


STEPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a stream of its own": (side_stream, ""),
    "an event in the step": (event_inside, ""),
    "a timed step": (timed, "host sync: Event.synchronize"),
    "a stream that is asked": (asked, "opaque object used: Stream.query"),
    "an event that is kept": (kept_event, "opaque object used: Event.record"),
    "a graph of its own": (own_graph, "CUDA graphs of its own: CUDAGraph.replay"),
}


class ReadsEvent(Callback):
    """Asks the event that a step has kept for its time."""

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if hasattr(pl_module, "event"):
            torch.cuda.synchronize()
            pl_module.read.append(pl_module.event.elapsed_time(pl_module.event))


@pytest.mark.gpu
@pytest.mark.parametrize("verify", [0, 3])
@pytest.mark.parametrize("name", STEPS)
def test_streams_events_and_graphs_in_a_step(tmp_path, name, verify):
    """Hazard 13: a step is one graph, or a reason names the call. Nobody gets an error."""
    compute, reason = STEPS[name]
    harness = Harness("cuda", tmp_path)
    callback = harness.callback(verify_replays=verify)
    model = Step(compute)
    harness.compare(model, validate(features(4 * BATCHES)), callback, lambda: [ReadsEvent()])
    steps, stats = callback.stats.steps_of("validate"), callback.stats
    if not reason:
        assert steps["FULL"] >= 8, callback.summary()
    else:
        assert steps.get("FULL", 0) == 0
        found = [each for each in stats.to_dict()["reasons"] if reason in each["text"]]
        assert found, callback.summary()
        first = compute.__code__.co_firstlineno
        file, line = found[0]["location"].rsplit(":", 1)
        assert file == __file__
        assert first < int(line) < first + 15


class SetsStream(Callback):
    """Each batch runs in another stream, as with ``torch.cuda.set_stream`` in a hook."""

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
        before = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if i % 2 else torch.cuda.default_stream()
        stream.wait_stream(before)
        torch.cuda.set_stream(stream)

    def on_validation_end(self, *_: Any) -> None:
        last = torch.cuda.current_stream()
        torch.cuda.set_stream(torch.cuda.default_stream())
        torch.cuda.current_stream().wait_stream(last)


class CopiesLater(Callback):
    """Copies outputs and batches in a stream that is late."""

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Tensor, batch: Any, *_: Any
    ) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            pl_module.read += [outputs.clone(), batch[0].clone()]
        outputs.record_stream(stream)
        batch[0].record_stream(stream)

    def on_validation_end(self, *_: Any) -> None:
        torch.cuda.synchronize()


class CapturesAlso(Callback):
    """Captures a graph of its own between two batches, and replays it."""

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Tensor, batch: Any, *_: Any
    ) -> None:
        graph, given = torch.cuda.CUDAGraph(), batch[0].clone()
        with torch.cuda.graph(graph):
            made = pl_module.net(given)
        graph.replay()
        pl_module.read.append(made.clone())


class EmptiesCaches(Callback):
    """Frees all cached memory around each batch."""

    def on_validation_batch_start(self, *_: Any) -> None:
        torch.cuda.empty_cache()

    on_validation_batch_end = on_validation_batch_start


@pytest.mark.gpu
@pytest.mark.parametrize("verify", [0, 3])
@pytest.mark.parametrize("kind", [SetsStream, CopiesLater, CapturesAlso, EmptiesCaches])
def test_streams_and_graphs_of_a_callback(tmp_path, kind, verify):
    harness = Harness("cuda", tmp_path)
    callback = harness.callback(verify_replays=verify)
    seen = []

    def job(trainer: Any, module: Any) -> Any:
        result = trainer.validate(module, features(4 * BATCHES), verbose=False)
        seen.append(module.read)
        return result, module.read

    harness.compare(Step(plain), job, callback, lambda: [kind()])
    assert callback.stats.steps_of("validate")["FULL"] >= 8
    assert len(seen[0]) == len(seen[1])


def in_stream(priority: int) -> Callable[[], Any]:
    stream = torch.cuda.Stream(priority=priority)
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


PLACES: dict[str, Callable[[], Any]] = {
    "stream": lambda: in_stream(0),
    "stream with high priority": lambda: in_stream(-1),
    "memory pool": lambda: torch.cuda.use_mem_pool(torch.cuda.MemPool()),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLACES)
def test_a_trainer_inside_a_context_of_the_users(tmp_path, name):
    harness = Harness("cuda", tmp_path)
    callback = harness.callback()

    def job(trainer: Any, module: Any) -> Any:
        with PLACES[name]():
            result = trainer.validate(module, features(4 * BATCHES), verbose=False)
            torch.cuda.synchronize()
        return result

    harness.compare(Step(plain), job, callback)
    assert callback.stats.steps_of("validate")["FULL"] >= 8


SCRIPT = """
import copy, json, torch
from tests.harness import Harness, features, validate
from tests.test_streams_and_events import Step, plain
from pathlib import Path
harness = Harness("cuda", Path("."))
callback = harness.callback()
harness.compare(Step(plain), validate(features(48)), callback)
reasons = [each["text"] for each in callback.stats.to_dict()["reasons"]]
print(json.dumps([callback.stats.steps_of("validate"), reasons]))
from cg_lightning import graphed
net = torch.nn.Linear(8, 8, device="cuda")
with torch.no_grad():
    run, x = graphed(net), torch.randn(4, 8, device="cuda")
    assert all(torch.equal(run(x), net(x)) for _ in range(8))
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync"),
        ("CUDA_LAUNCH_BLOCKING", "1"),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),
    ],
)
def test_allocators_and_launches(tmp_path, name, value):
    """With ``cudaMallocAsync``, torch 2.11 replays no graph: the steps are eager, and say so."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, name: value}
    done = run_python("-c", SCRIPT, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout.strip().splitlines()[-1]
    if value == "backend:cudaMallocAsync":
        assert "choose backend:native" in printed
        assert '"FULL"' not in printed
    elif name != "PYTORCH_NO_CUDA_MEMORY_CACHING":
        assert '"FULL": 9' in printed, printed


class OwnEvent:
    """An event of a device that this machine need not have."""

    def __init__(self) -> None:
        self.times = 0

    def record(self) -> None:
        self.times += 1


class HasEvents(RecorderBackend):
    event_types = (OwnEvent,)


@pytest.mark.parametrize("is_kept", [False, True])
def test_an_event_that_is_kept_is_a_finding(is_kept):
    model = nn.Linear(8, 8)
    kept: list[OwnEvent] = []

    def step(x: Tensor) -> Tensor:
        event = OwnEvent()
        event.record()
        assert event.times == 1
        if is_kept:
            kept.append(event)
        return model(x)

    x = torch.randn(2, 8)
    with torch.no_grad():
        watcher = StepWatcher(model, HasEvents(torch.device("cpu")), effects=None)
        output, watched = watcher.watch(lambda: step(x), (x,))
        assert torch.equal(output, model(x))
    found = [each for each in watched.findings if each.operation == "OwnEvent.record"]
    assert [each.cause for each in found] == [Cause.OPAQUE] * is_kept
    line = step.__code__.co_firstlineno + 2
    assert all(each.location == f"{__file__}:{line}" for each in found)
    assert "noted" not in OwnEvent.record.__qualname__
