"""Each detector alone, without a Trainer: what it finds, where, and nothing on a clean step."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import logging
import pkgutil
import random
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from random import random as draw_unseen
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers.pytorch import RegisterRecordFunction
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from tqdm.contrib import DummyTqdmFile

from cg_lightning import BatchDescriptor, CUDAGraphMode, ForwardContext, diagnose
from cg_lightning.backends import RecorderBackend, resolve_backend
from cg_lightning.core.causes import Cause
from cg_lightning.core.forward_context import StepInProgress, override_forward_context
from cg_lightning.core.lines import Elsewhere
from cg_lightning.core.reasons import Reason
from cg_lightning.diagnosis import detectors as package
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.detectors.attribute_reads import AttributeReads
from cg_lightning.diagnosis.detectors.batch_index import BatchIndex
from cg_lightning.diagnosis.detectors.compiled import CompiledModules
from cg_lightning.diagnosis.detectors.global_reads import GlobalReads
from cg_lightning.diagnosis.detectors.hooks import ForwardHooks
from cg_lightning.diagnosis.detectors.host_reads import HostReads
from cg_lightning.diagnosis.detectors.logging import Logging
from cg_lightning.diagnosis.detectors.metric_updates import MetricUpdates
from cg_lightning.diagnosis.detectors.mutations import Mutations
from cg_lightning.diagnosis.detectors.operations import Operations
from cg_lightning.diagnosis.detectors.printing import Printing
from cg_lightning.diagnosis.detectors.random_numbers import RandomNumbers
from cg_lightning.diagnosis.detectors.rebound_state import ReboundState
from cg_lightning.diagnosis.detectors.trainer_reads import TrainerReads
from cg_lightning.diagnosis.detectors.undone_reads import UndoneReads
from cg_lightning.diagnosis.findings import Finding
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.diagnosis.watcher import DETECTORS, StepWatcher
from cg_lightning.effects.module_effects import ModuleEffects
from tests import models
from tests.harness import Harness, features, validate
from tests.models import Body, ConvNetClassifier, Predictor

KEPT: list[Any] = []
FACTOR = 2.0
logger = logging.getLogger("user")


class Refuses(dict):
    """A mapping that cannot be read, as that of a closed file."""

    def __iter__(self):
        raise OSError("closed")


class Inner(nn.Module):
    limit = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.temperature = 2.0

    def forward(self, x):
        return self.linear(x) / self.temperature


class Runs(LightningModule):
    """Runs one function as its step."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner = Inner()
        self.metric = MeanMetric()
        self.function = function
        self.scale = 3.0
        self.cache: Any = None
        self.table = Refuses(a=1)

    def predict_step(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class UsesBatchIndex(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch)
        return output * batch_idx  # here


def watch(kinds: tuple[type[Detector], ...], module: LightningModule, *args: Any) -> WatchedStep:
    backend = resolve_backend("recorder", torch.device("cpu"))
    watcher = StepWatcher(module, backend, effects=None, run_logging=False, detectors=kinds)
    x = torch.randn(4, 8)
    key = BatchDescriptor.from_batch(x, stage="predict")
    context = ForwardContext(CUDAGraphMode.NONE, key, step=StepInProgress())
    with torch.no_grad(), override_forward_context(context):
        return watcher.watch(lambda: module.predict_step(x, *args), x)[1]


def line_of(function: Any) -> str:
    """The line marked ``# here``; of a lambda its only line."""
    lines, first = inspect.getsourcelines(function)
    marked = [number for number, line in enumerate(lines) if "# here" in line]
    return f"{__file__}:{first + (marked[0] if marked else 0)}"


def graphed_by_compiler() -> Runs:
    module = Runs(lambda m, x: m.net(x))
    module.net = torch.compile(nn.Linear(8, 8), backend="eager")
    module.net.dynamo_ctx.compiler_config = {"triton.cudagraphs": True}
    return module


def hooked() -> Runs:
    module = Runs(lambda m, x: m.inner(x))
    module.inner.register_forward_hook(functools.partial(lambda scale, *_: None, []))
    return module


def profiled() -> Runs:
    module = Runs(lambda m, x: m.inner(x))
    RegisterRecordFunction(module.inner).__enter__()
    return module


def rebinds(m: Runs, x: torch.Tensor) -> torch.Tensor:
    y = m.inner(x)
    m.cache = y if hasattr(m, "cache") else y * 2  # here
    return y


def enables_gradients(m: Runs, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return m.inner.linear.weight * 2  # here


Case = tuple[type[Detector], Any, Cause, str, str | None]
"""The detector, the step or what makes the module, the cause, the operation, another location."""
CASES: dict[str, Case] = {
    "item": (Operations, lambda m, x: x.sum().item(), Cause.HOST_SYNC, "aten::item", None),
    "mask": (Operations, lambda m, x: x[x > 0], Cause.DATA_DEPENDENT_SHAPE, "aten::index", None),
    "gradients": (Operations, enables_gradients, Cause.GRADIENTS, "aten::mul", None),
    "tolist": (HostReads, lambda m, x: x.tolist(), Cause.HOST_SYNC, "Tensor.tolist", None),
    "new_tensor": (
        HostReads,
        lambda m, x: x.new_tensor([x.sum()]),
        Cause.TENSOR_FROM_PYTHON,
        "Tensor.new_tensor",
        None,
    ),
    "input": (
        Mutations,
        lambda m, x: torch._foreach_add_([x[0], m.inner.linear.bias], 1),
        Cause.INPUT_MUTATED,
        "aten::_foreach_add_",
        None,
    ),
    "shape": (
        Mutations,
        lambda m, x: x.t_(),
        Cause.INPUT_MUTATED,
        "memory of batch",
        Elsewhere.AT_THE_END,
    ),
    "random": (
        RandomNumbers,
        lambda m, x: x * random.random(),
        Cause.HOST_RANDOMNESS,
        "random.random",
        None,
    ),
    "NumPy": (
        RandomNumbers,
        lambda m, x: x * float(np.random.rand()),
        Cause.HOST_RANDOMNESS,
        "numpy.random.rand",
        None,
    ),
    "generator": (
        RandomNumbers,
        lambda m, x: torch.rand(8, generator=torch.Generator().manual_seed(1)),
        Cause.HOST_RANDOMNESS,
        "aten::rand with a generator of its own",
        None,
    ),
    "hook": (ForwardHooks, hooked, Cause.FORWARD_HOOK, "Inner", None),
    "profiler": (
        ForwardHooks,
        profiled,
        Cause.PROFILER_HOOK,
        "PyTorchProfiler",
        Elsewhere.NOT_YOURS,
    ),
    "attribute": (ReboundState, rebinds, Cause.STATE_REBOUND, "cache", None),
    "container": (
        ReboundState,
        lambda m, x: m.__dict__.setdefault("kept", []).append(x),
        Cause.STATE_REBOUND,
        "kept",
        Elsewhere.AT_THE_END,
    ),
    "metric": (
        MetricUpdates,
        lambda m, x: m.metric.update(x),
        Cause.METRIC_UPDATED,
        "update",
        None,
    ),
    "hidden metric": (
        MetricUpdates,
        lambda m, x: MeanMetric().update(x),
        Cause.METRIC_UPDATED,
        "a metric that is no submodule",
        None,
    ),
    "log": (Logging, lambda m, x: m.log("x", x.mean()), Cause.LOGGED, "self.log", None),
    "print": (Printing, lambda m, x: print("x"), Cause.PRINTED, "print", None),
    "self.print": (Printing, lambda m, x: m.print("x"), Cause.PRINTED, "self.print", None),
    "logging": (Printing, lambda m, x: logger.warning("x"), Cause.PRINTED, "logging", None),
    "logger": (Printing, lambda m, x: m.logger, Cause.PRINTED, "self.logger", None),
    "private trainer": (
        TrainerReads,
        lambda m, x: x if m._trainer is None else x * m._trainer.current_epoch,
        Cause.TRAINER_READ,
        "self._trainer",
        None,
    ),
    "global": (
        GlobalReads,
        lambda m, x: KEPT.append(x),
        Cause.STATE_REBOUND,
        "global KEPT",
        None,
    ),
    "unreadable": (
        AttributeReads,
        lambda m, x: m.table and x,
        Cause.STATE_REBOUND,
        "self.table cannot be looked into: OSError: closed",
        None,
    ),
    "compiler's graphs": (
        CompiledModules,
        graphed_by_compiler,
        Cause.GRAPHED_ALREADY,
        "OptimizedModule",
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_finds_its_cause_with_operation_and_line(name):
    kind, function, cause, operation, location = CASES[name]
    makes = not inspect.signature(function).parameters
    module = function() if makes else Runs(function)
    findings = watch((kind,), module).findings
    assert {finding.cause for finding in findings} == {cause}
    assert findings[0].operation.endswith(operation)
    assert findings[0].location == (location or line_of(module.function))


def clean(m: Runs, x: torch.Tensor) -> torch.Tensor:
    return m.inner(x) * m.scale * FACTOR * models.FACTOR + torch.rand_like(x)


@pytest.mark.parametrize("kind", DETECTORS)
def test_finds_nothing_on_a_clean_step(kind):
    assert watch((kind,), Runs(clean)).findings == []


def test_the_batch_index_names_the_line_that_uses_it():
    (finding,) = watch((BatchIndex,), UsesBatchIndex(Body()), 1).findings
    assert (finding.cause, finding.operation) == (Cause.BATCH_INDEX_USED, "predict_step")
    assert finding.location == line_of(UsesBatchIndex.predict_step)
    assert watch((BatchIndex,), Predictor(Body()), 1).findings == []


def test_a_draw_that_no_module_function_made_is_seen_by_the_comparison():
    (finding,) = watch((RandomNumbers,), Runs(lambda m, x: x * draw_unseen())).findings
    assert (finding.cause, finding.operation) == (Cause.HOST_RANDOMNESS, "random state moved")
    assert random.random.__module__ is None, "random.random is not put back"


def test_each_line_that_draws_is_named_once():
    def step(m: Runs, x: torch.Tensor) -> torch.Tensor:
        first = random.random()
        second = np.random.rand()
        for _ in range(3):
            first += random.random()
        return x * first * second

    start = step.__code__.co_firstlineno
    found = [
        (finding.operation, int(finding.location.rpartition(":")[2]) - start)
        for finding in watch((RandomNumbers,), Runs(step)).findings
    ]
    assert found == [("random.random", 1), ("numpy.random.rand", 2), ("random.random", 4)]


def test_each_line_that_prints_is_named_once():
    def step(m: Runs, x: torch.Tensor) -> torch.Tensor:
        print("one")
        print("two")
        return x

    found = watch(DETECTORS, Runs(step)).findings
    lines = [finding.location for finding in found if finding.cause is Cause.PRINTED]
    start = step.__code__.co_firstlineno
    assert lines == [f"{__file__}:{start + 1}", f"{__file__}:{start + 2}"]


def test_a_draw_on_the_host_names_its_line_where_steps_run_on_a_device():
    backend: Any = types.SimpleNamespace(
        device=torch.device("cuda"), ignoring_host_syncs=contextlib.nullcontext
    )
    function = lambda m, x: x + torch.rand(8)
    module = Runs(function)
    watcher = StepWatcher(module, backend, effects=None, detectors=(RandomNumbers,))
    x = torch.randn(4, 8)
    (finding,) = watcher.watch(lambda: module.predict_step(x), x)[1].findings
    assert (finding.operation, finding.location) == ("aten::rand", line_of(function))


@pytest.mark.parametrize(
    ("dropout", "training", "found"), [(0.5, True, 1), (0.5, False, 0), (0.0, True, 0)]
)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
def test_dropout_of_a_recurrent_network_has_a_state_of_its_own(
    backend, device, dropout, training, found, inference
):
    """On a CPU it draws from PyTorch's generator."""
    if backend == "recorder":
        found = 0
    net = nn.LSTM(8, 8, num_layers=2, dropout=dropout, batch_first=True).to(device)
    # cuDNN keeps one state a process; made in inference mode, it could not be used to train
    nn.LSTM(2, 2, num_layers=2, dropout=0.5).to(device)(torch.zeros(1, 1, 2, device=device))
    net.train(training)
    module = Runs(lambda m, x: net(x)[0])
    graphs: Any = resolve_backend(backend, device)
    watcher = StepWatcher(module, graphs, effects=None, detectors=(RandomNumbers,))
    x = torch.randn(2, 4, 8, device=device)
    with torch.inference_mode(inference), torch.no_grad():
        module.predict_step(x)  # cuDNN makes its state with a number of the host
        findings = watcher.watch(lambda: module.predict_step(x), x)[1].findings
    assert len(findings) == found, findings


def modules() -> list[Any]:
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


class Slotted:
    """A stream whose attributes cannot be set."""

    __slots__ = ("lines",)

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str) -> None:
        self.lines.append(text)


def test_text_to_a_stream_whose_write_cannot_be_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream := Slotted())
    (finding,) = watch((Printing,), Runs(lambda m, x: sys.stdout.write("said"))).findings
    assert (finding.cause, finding.operation) == (Cause.PRINTED, "sys.stdout.write")
    assert sys.stdout is stream
    assert stream.lines == ["said"]


def test_text_to_a_stream_that_passes_on_what_is_set(monkeypatch):
    """As streams of tqdm do, which write above a progress bar."""
    monkeypatch.setattr(sys, "stdout", stream := DummyTqdmFile(io.StringIO()))
    (finding,) = watch((Printing,), Runs(lambda m, x: sys.stdout.write("said"))).findings
    assert (finding.cause, finding.operation) == (Cause.PRINTED, "sys.stdout.write")
    assert sys.stdout is stream
    assert "write" not in vars(stream)


def test_each_file_has_one_detector():
    found = []
    for module in modules():
        kinds = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Detector)
            and value.__module__ == module.__name__
        ]
        assert len(kinds) == 1, module.__name__
        found += kinds
    assert set(found) == {*DETECTORS, UndoneReads}  # of runs that the user did not ask for


def test_each_cause_is_reported_by_some_file():
    files = Path(package.__file__).parents[2].rglob("*.py")
    text = "".join(file.read_text() for file in files if file.name != "causes.py")
    assert [cause for cause in Cause if not re.search(rf"Cause\.{cause.name}\b", text)] == []


def test_sources_are_unique_and_read_as_the_user_writes_them():
    seen = watch((AttributeReads, GlobalReads), Runs(clean))
    paths = [str(source) for source in seen.sources()]
    assert len(paths) == len(set(paths))
    assert {"self.scale", "self.inner.temperature", "FACTOR", "models.FACTOR"} <= set(paths)
    assert "Inner.limit" in paths
    by_path = {str(source): source for source in seen.sources()}
    assert by_path["self.scale"].value() == 3.0
    assert by_path["models.FACTOR"].value() == models.FACTOR


def test_sources_of_one_submodule():
    module = Runs(clean)
    seen = watch((AttributeReads, GlobalReads), module)
    assert [str(source) for source in seen.sources(module.inner)] == [
        "Inner.limit",
        "attributes of forward",
        "Inner.forward",
        "self.inner.temperature",
    ]


def test_findings_of_a_submodule_are_those_of_the_step_too():
    def forward(x):
        return x * x.sum().item()

    module = Runs(lambda m, x: m.inner(x))
    module.inner.linear = nn.Identity()
    module.inner.linear.forward = forward
    seen = watch((Operations,), module)
    assert [finding.module for finding in seen.findings] == ["inner.linear"]
    assert seen.findings_of("inner") == seen.findings_of("inner.linear") == seen.findings
    assert seen.called() == ["inner", "inner.linear"]
    assert seen.findings_of("metric") is None


def test_a_finding_is_reported_once_however_deep_it_is_seen():
    module = Runs(lambda m, x: m.inner(x))
    module.inner.linear = nn.Identity()
    module.inner.linear.forward = lambda x: x * draw_unseen()
    assert len(watch((RandomNumbers,), module).findings) == 1


def test_the_line_of_a_library_is_told_beside_the_users():
    place = torchmetrics.__file__.replace("__init__.py", "functional/made_up.py")
    namespace: dict[str, Any] = {}
    exec(compile("\ndef sync(x): return x.sum().item()", place, "exec"), namespace)
    function = lambda m, x, sync=namespace["sync"]: sync(x)
    (finding,) = watch((Operations,), Runs(function)).findings
    assert finding.location == line_of(function)
    assert finding.library_location == "torchmetrics/functional/made_up.py:2"
    assert str(finding).endswith(f"({line_of(function)}, in {finding.library_location})")


def test_what_torch_calls_is_no_library():
    function = lambda m, x: F.one_hot(x.argmax(-1)).sum()
    findings = watch((Operations,), Runs(function)).findings
    places = {(finding.location, finding.library_location) for finding in findings}
    assert places == {(line_of(function), "")}


def test_the_reason_of_a_finding():
    finding = Finding(Cause.HOST_SYNC, "aten::item", "net", "my.py:12", "timm/layers.py:3")
    text = "host sync: aten::item in net (my.py:12, in timm/layers.py:3)"
    assert finding.reason() == Reason(Cause.HOST_SYNC, text, "my.py:12")
    of_net = finding.reason().of_submodule("net")
    assert (of_net.text, of_net.submodule) == (f"net: {text}", finding.module or "net")
    for place in Elsewhere:
        unseen = Finding(Cause.STATE_REBOUND, "kept", "", place)
        assert (str(unseen), unseen.reason().location) == (
            f"module state rebound: kept ({place})",
            "",
        )
    as_text = Finding(Cause.STATE_REBOUND, "kept", "", str(Elsewhere.UNKNOWN.value))
    assert as_text.reason().location == "unknown"  # the type decides, and not the text


# diagnose() agrees with the callback


def states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return (
        random.getstate(),
        (name, keys.tobytes(), *rest),
        torch.get_rng_state().numpy().tobytes(),
    )


def test_diagnosis_consumes_no_random_numbers():
    module = Runs(lambda m, x: x * random.random() * np.random.rand() * torch.rand(8))
    module.table, x = None, torch.randn(4, 8)
    before = states()
    diagnose(module, x)
    assert states() == before
    module.predict_step(x)
    assert states() != before


def test_a_step_that_reads_a_trainer_that_is_not_there():
    found = diagnose(
        Runs(lambda m, x: x * m.trainer.current_epoch * x.sum().item()), torch.randn(4, 8)
    )
    (finding,) = found.findings
    assert (finding.cause, finding.operation) == (Cause.TRAINER_READ, "self.trainer")
    assert not found.capturable()
    assert "there is no Trainer" in str(found)
    assert "there is no Trainer" in found._repr_html_()


def test_other_errors_of_a_step_come_through():
    def fails(m, x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        diagnose(Runs(fails), torch.randn(4, 8))


class Collects(Predictor):
    """The metrics form groups at their first update, which waits for the device."""

    def __init__(self) -> None:
        super().__init__(Body())
        self.metrics = MetricCollection({"a": MeanMetric(), "b": MeanMetric()})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metrics.update(self.net(batch[0]).mean())
        self.log("mean", self.net(batch[0]).mean(), on_epoch=True)


class FillsACache(Predictor):
    def __init__(self) -> None:
        super().__init__(Body())
        self.cache: Any = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.cache is None:
            self.cache = torch.arange(8, device=self.device)
        self.log("mean", (self.net(batch[0]) * self.cache).mean())


class Waits(Predictor):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", 2 * self.net(batch[0]).mean().item())


@pytest.mark.parametrize(
    ("make", "is_capturable"),
    [
        (Collects, True),
        (FillsACache, True),
        (lambda: Waits(Body()), False),
        (lambda: UsesInValidation(Body()), False),
    ],
)
def test_diagnosis_says_what_the_callback_does(tmp_path, make, is_capturable):
    harness = Harness("recorder", tmp_path)
    callback = harness.callback(mode="FULL", warmup_steps=3)
    validate(features(32))(harness.trainer(callback), make())
    found = diagnose(make(), (torch.randn(4, 8),), stage="validate")
    assert (callback.stats.steps["FULL"] > 0) is is_capturable, callback.summary()
    assert found.capturable() is is_capturable, str(found)


class UsesInValidation(Predictor):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", self.net(batch[0]).mean() * batch_idx)


def test_the_demos_step_is_capturable_as_the_callback_captures_it():
    batch = (torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,)))
    for stage in ("validate", "test", "predict"):
        assert diagnose(ConvNetClassifier(4), batch, stage=stage).capturable()


def test_an_attribute_that_cannot_be_looked_into_keeps_a_step_out_of_graphs(tmp_path):
    class Reads(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.table = Refuses(a=1)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) * len(self.table)

    harness = Harness("recorder", tmp_path)
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.trainer(callback).predict(Reads(), features(16))
    assert any("self.table cannot be looked into" in r for r in callback.stats.eager_reasons)


class WaitsAsAGPU(RecorderBackend):
    """Reports all reads of tensors in Python, as PyTorch does for those of a GPU."""

    @contextlib.contextmanager
    def noticing_host_syncs(self, on_call: Any) -> Iterator[None]:
        def noticed(original: Any) -> Any:
            def read(*args: Any) -> Any:
                on_call(Cause.HOST_SYNC, "synchronizing CUDA operation")
                return original(*args)

            return read

        with contextlib.ExitStack() as stack:
            for owner, name in (
                (torch.Tensor, "__bool__"),
                (torch.Tensor, "item"),
                (torch, "equal"),
            ):
                patched = patch.object(owner, name, noticed(getattr(owner, name)))
                stack.enter_context(patched)
            yield


class Busy(ConvNetClassifier):
    """Updates a metric, logs, changes a tensor and a list: all that we compare afterwards."""

    def __init__(self) -> None:
        super().__init__(4)
        self.total, self.seen = torch.zeros(1), [torch.zeros(1)]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.total += 1


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_we_compare_ourselves_is_no_wait_of_the_steps(is_compiled):
    """On a GPU each comparison of ours waits for the device, and is none of the step's."""
    model = Busy()
    if is_compiled:
        model.net = torch.compile(model.net, backend="eager")
    effects = ModuleEffects(model, torch.device("cpu"))
    backend = WaitsAsAGPU(torch.device("cpu"))
    watcher = StepWatcher(model, backend, effects=effects, run_logging=False)
    batch = (torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,)))
    with torch.no_grad():
        for _ in range(3):
            watched = watcher.watch(lambda: model.validation_step(batch, 0), batch)[1]
        assert [str(finding) for finding in watched.findings] == []
        reads = lambda: model.net(batch[0]).sum().item()
        waits = watcher.watch(reads, batch)[1]
    assert Cause.HOST_SYNC in {finding.cause for finding in waits.findings}
