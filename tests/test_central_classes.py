"""Central classes that no other file makes directly: each is made here without a Trainer."""

from __future__ import annotations

import contextlib
import copy
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import SumMetric

from cg_lightning import BatchDescriptor, CaptureError, CUDAGraphMode
from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.capture.cache import GraphCache
from cg_lightning.capture.call import GraphCall
from cg_lightning.capture.capture import Capturer
from cg_lightning.capture.entry import Captured, GraphEntry
from cg_lightning.capture.outputs import OutputPlan
from cg_lightning.capture.passed_on import PassedOnValues
from cg_lightning.capture.static_inputs import StaticInputs
from cg_lightning.core.causes import Cause
from cg_lightning.core.closure import ClosureInput, ClosureOutput, UnfinishedClosure
from cg_lightning.core.descriptor import Fixed, describe_fields, passed_on
from cg_lightning.core.errors import ValueReadError
from cg_lightning.core.forward_context import (
    ForwardContext,
    StepInProgress,
    override_forward_context,
)
from cg_lightning.core.reasons import Reason, Status
from cg_lightning.core.settings import Settings
from cg_lightning.diagnosis.operation_mode import OperationMode
from cg_lightning.diagnosis.step_run import Observer, StepRun
from cg_lightning.diagnosis.step_watch import StepWatch, StoppedStep
from cg_lightning.diagnosis.watched_step import WrittenTensors
from cg_lightning.diagnosis.watcher import StepWatcher
from cg_lightning.diagnosis.way import WayRecorder
from cg_lightning.effects.attributes import AttributesSnapshot
from cg_lightning.effects.late_updates import LateStep, LateUpdates
from cg_lightning.effects.logged_values import NothingLogged
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.effects.recording import RecordedParts, StepRecording
from cg_lightning.effects.step_state import StepState
from cg_lightning.guards.guard_set import GuardSet, Unguarded
from cg_lightning.guards.identity import SameItems
from cg_lightning.guards.module_guard import ModuleGuard
from cg_lightning.guards.sources import Source
from cg_lightning.guards.written_settings import WrittenSettings
from cg_lightning.host_values.provenance import Provenance
from cg_lightning.metrics.deferred_checks import CheckedCalls, DeferredChecks
from cg_lightning.metrics.states import MetricStates, WrittenState
from cg_lightning.metrics.units import units_of
from cg_lightning.modules.compilation import Compilation
from cg_lightning.padding.entry import PaddedEntry
from cg_lightning.padding.leaves import Fill, PaddedLeaf, PaddedLeaves
from cg_lightning.padding.output_cut import OutputCut
from cg_lightning.padding.padder import Padder
from cg_lightning.padding.rules import GivenRules
from cg_lightning.report.records import EntryRecord, PaddingRecord
from cg_lightning.report.stats import CUDAGraphStats
from cg_lightning.runtime.ahead import CaptureAhead
from cg_lightning.runtime.alike_steps import AlikeSteps
from cg_lightning.runtime.dispatcher import CUDAGraphDispatcher
from cg_lightning.runtime.keys import Variant
from cg_lightning.runtime.padded_pieces import PaddedPiece, PaddedPieces
from cg_lightning.runtime.padded_shapes import PaddedShapes
from cg_lightning.runtime.padded_steps import PaddedSteps
from cg_lightning.runtime.plans import Action
from cg_lightning.runtime.profiling import Ranges
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.step_runner import StepRunner
from cg_lightning.runtime.submodule_runner import SubmoduleRunner
from cg_lightning.runtime.submodules import Submodules
from cg_lightning.runtime.target import GraphTarget, TargetParts
from cg_lightning.runtime.verifier import Verifier
from cg_lightning.trainer.examples import BatchesAhead
from cg_lightning.trainer.installation import Installation
from cg_lightning.trainer.training import TrainingInstallation
from cg_lightning.trainer.training_step import (
    InterceptedClosure,
    TrainingStep,
    _with_hooks_of_module,
)
from tests.harness import assert_same
from tests.models import Body, Predictor

CPU = torch.device("cpu")
NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL


class Net(nn.Module):
    """A module with steps, and no Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.register_buffer("steps", torch.zeros(()))

    def step(self, batch: Any) -> Tensor:
        return self.body(batch[0]) * 2

    def counting_step(self, batch: Any) -> Tensor:
        self.steps += 1
        return self.body(batch[0]) * self.steps + torch.rand(())

    def reducing_step(self, batch: Any) -> Tensor:
        return self.body(batch[0]) - batch[0].mean()


class Scaled(nn.Module):
    """A submodule that reads a number in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(8, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class Metrics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.total = SumMetric()


def session_of(module: nn.Module, has_backward: bool = False, **settings: Any) -> Session:
    backend = RecorderBackend(CPU)
    defaults = {"warmup_steps": 1, "verify_replays": 0, "min_saving": 0, "backend": "recorder"}
    effects = ModuleEffects(module, CPU)
    options = Settings(**{**defaults, **settings})
    stats = CUDAGraphStats()
    return Session(module, backend, options, stats, effects, has_backward=has_backward)


def batches(*rows: int) -> list[tuple[Tensor]]:
    return [(torch.randn(number, 8),) for number in rows]


MADE_BY_OTHERS = {
    "KeyState": "CUDAGraphDispatcher",
    "WatchedStep": "StepWatcher",
    "Effect": "StepRecording",
    "Outcome": "StepRunner",
}
"""Types of the table that no test makes, and the classes that make them in these tests."""


def test_each_class_with_an_owner_is_made_in_a_test():
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "architecture.md").read_text()
    rows = page.split("## Who owns what")[1].split("Rules:")[0].splitlines()
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row.partition(" | ")[0])]
    code = "\n".join([file.read_text() for file in tests.glob("test_*.py")])
    not_made = {name for name in names if not re.search(rf"\b{name}\(", code)}
    assert len(names) >= 30
    assert not_made == set(MADE_BY_OTHERS)
    assert all(re.search(rf"\b{name}\(", code) for name in MADE_BY_OTHERS.values())


# runtime/


def target_of(module: nn.Module, **settings: Any) -> GraphTarget:
    return GraphTarget(module, PIECEWISE, parts_of_targets(**settings))


def parts_of_targets(**settings: Any) -> TargetParts:
    backend, written = RecorderBackend(CPU), WrittenTensors()
    cache = GraphCache(backend, 64)
    options = Settings(**{"warmup_steps": 0, "verify_replays": 1, **settings})
    capturer = Capturer(backend, options, cache, written)
    verifier = Verifier(backend, "exact", written)
    return TargetParts(capturer, verifier, CUDAGraphStats())


@torch.no_grad()
def run_target(target: GraphTarget, function: Any, x: Tensor) -> tuple[Action, Any]:
    """Run a call whose key is allowed and warm."""
    call = GraphCall(BatchDescriptor.from_batch([x]), function, [x], [x])
    target.dispatcher.add_cudagraph_key(PIECEWISE, call.descriptor)
    state = target.dispatcher.state(call.descriptor.fields)
    target.dispatcher.ran_before(state, runs=1)
    plan = target.dispatcher.plan(state)
    return plan.action, target.run("net", plan, call)


def test_a_target_captures_a_call_and_tells_its_dispatcher():
    net, x = Body(), torch.randn(4, 8)
    target = target_of(net)
    action, outcome = run_target(target, lambda given: net(given[0]), x)
    assert (action, outcome.mode, outcome.reason) == (Action.CAPTURE, PIECEWISE, None)
    assert_same(outcome.output, net(x).detach())
    (entry,) = target.cache.entries()
    assert target.dispatcher.entries() == [entry]
    target.cache.drop_all()


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. a replay differed")
def test_a_target_gives_eagers_result_if_the_replay_differs_and_drops_the_graph():
    x, factors = torch.ones(4), iter([1.0, 2.0, 1.0])
    target = target_of(nn.Identity())
    _, outcome = run_target(target, lambda given: given[0] * next(factors), x)
    assert_same(outcome.output, x)
    assert (outcome.mode, outcome.reason.kind) == (NONE, Status.VERIFICATION)
    assert target.cache.entries() == []
    with torch.no_grad():
        key = BatchDescriptor.from_batch([x])
    assert target.dispatcher.dispatch(key).runtime_mode is NONE


def test_a_submodule_runs_from_graphs_only_in_steps_that_allow_it():
    net, key = Scaled(), BatchDescriptor(batch_size=4)
    reference = copy.deepcopy(net)
    target = target_of(net, verify_replays=0)
    runner = SubmoduleRunner(
        "net", target, RecorderBackend(CPU), Ranges(RecorderBackend(CPU), None)
    )
    runner.allow(key, GuardSet([Source(net, "factor", "self.net.factor")]), (), runs=1)
    runner.install()

    def call(mode: CUDAGraphMode, descriptor: BatchDescriptor) -> StepInProgress:
        step, (x,) = StepInProgress(), batches(4)[0]
        with override_forward_context(ForwardContext(mode, descriptor, step)):
            assert_same(net(x), reference(x))
        return step

    with torch.no_grad():
        assert [call(PIECEWISE, key).graphs for _ in range(3)] == [0, 1, 1]
        others = [call(NONE, key), call(PIECEWISE, BatchDescriptor(batch_size=5))]
        assert [step.graphs for step in others] == [0, 0]
        net.factor = reference.factor = 3.0
        step = call(PIECEWISE, key)
    assert (step.graphs, step.reasons["net"].kind) == (0, Status.CHANGED)
    runner.remove()
    target.cache.drop_all()


def test_submodules_are_intercepted_from_install_to_remove():
    net, key = Scaled(), BatchDescriptor(batch_size=4)
    reference, (x,) = copy.deepcopy(net), batches(4)[0]
    backend, parts = RecorderBackend(CPU), parts_of_targets(verify_replays=0)
    submodules = Submodules(parts, backend, Ranges(backend, None))

    def graphs_in_step() -> int:
        step = StepInProgress()
        with override_forward_context(ForwardContext(PIECEWISE, key, step)), torch.no_grad():
            assert_same(net(x), reference(x))
        return step.graphs

    submodules.install()
    submodules.add({"net": net})
    (runner,) = submodules.runners()
    guards = GuardSet([Source(net, "factor", "self.net.factor")])
    runner.allow(key, guards, (), runs=1)
    assert [graphs_in_step() for _ in range(3)] == [0, 1, 1]
    submodules.remove()
    assert graphs_in_step() == 0
    submodules.add({"again": net})
    assert submodules.runners() == [runner]
    submodules.install()
    assert graphs_in_step() == 1
    submodules.clear()
    assert (graphs_in_step(), submodules.runners()) == (0, [])
    parts.capturer.cache.drop_all()


def padded_runner(session: Session, step: Any) -> StepRunner:
    padded = PaddedSteps(session, "predict", "step", step, Padder((8,), GivenRules({})))
    return StepRunner(session, "predict", "step", step, padded=padded)


def run_padded(session: Session, step: Any, expected: Any) -> None:
    runner = padded_runner(session, step)
    session.install()
    with torch.inference_mode():
        for batch in batches(3, 5, 7, 3, 5, 7, 3, 5, 7, 3, 5, 7):
            torch.testing.assert_close(runner.run((batch,), {}), expected(batch))


def test_batches_of_several_sizes_run_padded_from_one_graph():
    net = Net()
    session = session_of(net, capture_sizes=(8,), verify_tolerance="close")
    run_padded(session, net.step, copy.deepcopy(net).step)
    assert session.stats.steps["FULL"] >= 6
    assert len(session.graphs("FULL")) == 1
    session.close()


def test_a_padded_size_that_was_refused_is_not_used_again():
    stats, dispatcher = CUDAGraphStats(), CUDAGraphDispatcher()
    shapes = PaddedShapes(Padder((8,), GivenRules({})), stats, "step")
    small, exact = batches(3, 8)
    states = [
        dispatcher.state(describe_fields(batch, stage="predict", training=())[0])
        for batch in (small, exact)
    ]
    padding, fields = shapes.find(states[0], small)
    assert [tuple(leaf.shape) for leaf in padding.pad(list(small))] == [(8, 8)]
    assert fields == states[1].descriptor.fields
    assert shapes.find(states[1], exact) is None
    reason = Reason(Cause.ROWS_NOT_INDEPENDENT, "rows")
    shapes.refuse(states[1].descriptor, reason)
    assert shapes.find(states[0], small) is None
    assert shapes.refusal(states[1].descriptor) is stats.padding[0].reason is reason


def test_a_step_that_reduces_over_rows_is_not_padded():
    net = Net()
    session = session_of(net, capture_sizes=(8,), verify_tolerance="close", mode="FULL")
    run_padded(session, net.reducing_step, copy.deepcopy(net).reducing_step)
    kinds = {record.reason.kind for record in session.stats.reasons if record.reason}
    assert Cause.ROWS_NOT_INDEPENDENT in kinds
    session.close()


def test_a_submodule_is_padded_in_a_step_that_is_not():
    net = Net()
    reference = copy.deepcopy(net)
    session = session_of(net, capture_sizes=(8,), verify_tolerance="close")
    piece = PaddedPiece(session, "predict", "body", net.body, GivenRules({}))
    piece.install()
    graphs = []
    with torch.inference_mode():
        for batch in batches(3, 5, 3, 5, 3, 5, 3, 5):
            step = StepInProgress(batch)
            key = BatchDescriptor.from_batch(batch, stage="predict")
            with override_forward_context(ForwardContext(PIECEWISE, key, step)):
                found = net.reducing_step(batch)
                torch.testing.assert_close(found, reference.reducing_step(batch))
            graphs.append(step.graphs)
    assert graphs[-2:] == [1, 1]
    assert len(session.cache.entries()) == 1
    piece.close()
    session.close()


def test_submodules_to_pad_are_those_that_a_watched_step_has_shown():
    net = Net()
    session = session_of(net, capture_sizes=(8,), verify_tolerance="close")
    pieces = PaddedPieces(session, "predict", GivenRules({}))
    assert not pieces.are_known()
    with torch.no_grad():
        batch = batches(3)[0]
        _, watched = session.watcher.watch(lambda: net.reducing_step(batch), batch)
    assert pieces.add(watched)
    assert list(session.pieces) == [("predict", id(net.body))]
    assert pieces.are_known()
    assert not PaddedPieces(session, "test", GivenRules({})).are_known()
    session.close()
    assert not pieces.are_known()


class Printing(nn.Module):
    """A submodule that no graph can contain."""

    def forward(self, x: Tensor) -> Tensor:
        print(end="")
        return x + 1


def test_each_eager_call_of_a_padded_submodule_tells_the_step_its_reason():
    net = nn.ModuleDict({"body": Printing()})
    session = session_of(net, capture_sizes=(8,), verify_tolerance="close")
    piece = PaddedPiece(session, "predict", "body", net["body"], GivenRules({}))
    piece.install()
    with torch.inference_mode():
        for batch in batches(3, 3, 3, 3):
            step = StepInProgress(batch)
            key = BatchDescriptor.from_batch(batch, stage="predict")
            with override_forward_context(ForwardContext(PIECEWISE, key, step)):
                net["body"](*batch)
            assert (step.graphs, list(step.reasons), step.is_warm) == (0, ["body"], False)
    assert step.reasons["body"].kind is Cause.PRINTED
    piece.close()
    session.close()


def test_a_step_takes_over_what_a_watched_one_of_another_shape_has_shown():
    net, dispatcher, ways = Net(), CUDAGraphDispatcher(), WayRecorder()
    small, large = batches(3, 5)
    key, other = map(BatchDescriptor.from_batch, (small, large))
    watched = types.SimpleNamespace(only_computes=True)
    variant = Variant(Unguarded(), [FULL], watched=watched)
    dispatcher.add_variant(dispatcher.state(key.fields, key), variant)
    ways_run = [
        ways.run(step, batch)[1]
        for step in (net.step, net.reducing_step)
        for batch in (small, large)
    ]
    way, same, different, _ = ways_run
    alike = AlikeSteps(dispatcher)
    alike.note(key, variant, None, way)
    assert alike.knows(other)
    assert alike.find(other, large, same, None) == (variant, None)
    assert alike.find(other, large, different, None) is None
    taken = alike.expect(other, large)
    assert taken is not None
    assert (taken.guards, taken.is_taken_over) == (variant.guards, True)
    alike.note_unlike(other, different)
    assert alike.expect(other, large) is None
    third = Variant(Unguarded(), [FULL], watched=watched)
    dispatcher.add_variant(dispatcher.state(key.fields, key), third)
    alike.note(key, third, None, different)
    found = alike.expect(other, large)  # a step of its own way was watched meanwhile
    assert found is not None
    assert found.is_taken_over
    alike.note_unlike(other, different)  # so what it reads on the host is unlike
    assert alike.expect(other, large) is None
    watched.only_computes = False
    assert not alike.knows(key)
    assert not alike.has_gone(key, different)
    watched.only_computes = True
    assert alike.knows(key)
    dispatcher.forget(key)
    assert not alike.knows(key)


class Given:
    """Batches that are captured ahead."""

    def __init__(self, given: Sequence[Any]) -> None:
        self.examples = [types.SimpleNamespace(shapes="", load=lambda b=b: b) for b in given]
        self.refused: list[Reason] = []

    def take(self, stage: str, dataloader_idx: int) -> Sequence[Any]:
        return self.examples

    def progress(self, examples: Sequence[Any]) -> Iterable[Any]:
        return examples

    def not_captured(self, example: Any, reason: Reason) -> None:
        self.refused.append(reason)


def test_what_is_captured_ahead_leaves_no_trace_and_gives_what_eager_gives():
    net = Net()
    reference = copy.deepcopy(net)
    session, examples = session_of(net), Given(batches(4, 6))
    ahead = CaptureAhead(session, "predict", "step", net.counting_step)
    session.install()
    with torch.inference_mode():
        before = torch.get_rng_state()
        ahead.run(examples, 0, (), {})
        assert (examples.refused, len(session.graphs("FULL"))) == ([], 2)
        assert_same(torch.get_rng_state(), before)
        assert_same(net.steps, reference.steps)
        runner = StepRunner(session, "predict", "step", net.counting_step)
        for batch in batches(4, 6, 4):
            torch.manual_seed(1)
            found = runner.run((batch,), {})
            torch.manual_seed(1)
            assert_same(found, reference.counting_step(batch))
    assert session.stats.steps["FULL"] == 3
    session.close()


# diagnosis/


def test_what_is_reported_belongs_to_all_calls_under_way():
    net, (x,) = Body(), batches(4)[0]
    watch = StepWatch(net, RecorderBackend(CPU), (x,))
    with watch.calling(watch.new_call("0", net[0], (x,), {})):
        with watch.calling(watch.new_call("2", net[2], (x,), {})):
            watch.report(Cause.HOST_SYNC, "item")
        with watch.paused():
            watch.report(Cause.PRINTED, "print")
    with watch.calling(watch.new_call("1", net[1], (x,), {})):
        pass
    watched = watch.result()
    assert [finding.cause for finding in watched.findings] == [Cause.HOST_SYNC]
    assert [len(watched.findings_of(path)) for path in ("0", "2", "1")] == [1, 1, 0]
    assert watched.findings_of("") is None


def test_a_watched_step_is_stopped_before_it_does_what_it_may_not():
    watch = StepWatch(Body(), RecorderBackend(CPU), (), stops_at=frozenset({Cause.PRINTED}))
    watch.report(Cause.HOST_SYNC, "item")
    with pytest.raises(StoppedStep, match="print"):
        watch.report(Cause.PRINTED, "print")


class _Names(Observer):
    """Keeps the names of the operations that it is told of."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.suspensions = 0

    def before_operation(self, function: Any, args: Any, kwargs: Any) -> None:
        self.names.append(function._schema.name)

    def before_read(self, tensor: Tensor) -> None:
        self.names.append("read")

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        self.suspensions += 1
        yield


def test_observers_are_told_of_a_step_except_where_its_mode_is_left():
    run, observer, x = StepRun(), _Names(), torch.ones(2)
    mode = OperationMode(StepWatch(Body(), RecorderBackend(CPU), ()), [observer])
    x.sin()
    with run.running(mode, [observer]):
        x.cos()
        run.before_read(x)
        with run.mode_left():
            x.sin()
        with run.suspended_for_compiled_code(as_written=False):
            x.sin()
        x.exp()
    x.sin()
    assert observer.names == ["aten::cos", "read", "aten::exp"]
    assert observer.suspensions == 1


def test_a_watched_step_computes_what_eager_computes_and_shows_which_submodules_are_clean():
    net, batch = Net(), batches(4)[0]
    reference = copy.deepcopy(net)
    watcher = StepWatcher(net, RecorderBackend(CPU), effects=None)

    def step(module: Any) -> Any:
        module.steps += 1
        output = module.body(batch[0])
        return output * 2 if output.sum().item() > 0 else output

    with torch.no_grad():
        output, watched = watcher.watch(lambda: step(net), batch)
        assert_same((output, net.steps), (step(reference), reference.steps))
    assert Cause.HOST_SYNC in [finding.cause for finding in watched.findings]
    assert watched.largest_capturable() == {"body": net.body}


def test_a_watcher_tells_the_host_values_of_a_batch():
    watcher = StepWatcher(Net(), RecorderBackend(CPU), effects=None)
    flags = torch.tensor([True, False])
    with torch.no_grad():
        path = watcher.host_values(lambda: flags.any().item(), (flags,))
        assert path is not None
        assert path.holds([torch.tensor([True, True])])
        assert not path.holds([torch.tensor([False, False])])


# effects/


def test_a_recording_gives_the_effects_of_a_step_that_the_user_has_not_seen():
    metric, x = SumMetric(), torch.tensor(3.0)
    states = MetricStates(CPU, DeferredChecks())
    late = LateStep(LateUpdates(), [])
    with torch.no_grad(), states.held_for_capture([metric]) as held:
        before = AttributesSnapshot([metric])
        parts = RecordedParts([metric], held, states, NothingLogged(), late)
        recording = StepRecording(CheckedCalls(), parts)
        with recording.watching():
            metric.update(x)
            finished = recording.finish()
            with pytest.raises(CaptureError, match=r"the state SumMetric\.sum_value"):
                finished.refuse_states_in((x, held[0].graph_tensor))
        before.restore()
    assert (metric.update_count, metric.sum_value.item()) == (0, 0.0)
    held_tensors = iter(finished.tensors)
    for effect in finished.effects:
        effect.after_replay(held_tensors)
    assert (metric.update_count, metric.compute().item()) == (1, 3.0)
    states.release(check=False)


def test_late_updates_are_left_out_by_the_step_and_made_once():
    module, updates = Metrics(), LateUpdates()
    with updates.collected(units_of(module)) as found:
        module.total.update(torch.tensor(2.0))
    assert (module.total.update_count, len(found.calls)) == (0, 1)
    with updates.held():
        assert not updates.make(found.calls, found.arguments)
        ((name, value),) = updates.latest_arguments()
        assert (name.startswith("argument of SumMetric.update"), value.item()) == (True, 2.0)
    assert module.total.update_count == 0
    assert updates.make(found.calls, found.arguments)
    assert (module.total.update_count, module.total.compute().item()) == (1, 2.0)


def test_all_that_a_step_changes_is_put_back_in_place():
    net, batch, drawn = Net(), {"x": torch.ones(2, 8)}, torch.zeros(2)
    net.body.history = []
    state = StepState(net, RecorderBackend(CPU), None, [drawn], batch)
    address, random = net.steps.data_ptr(), torch.get_rng_state()
    net.steps += 1
    net.body.history.append(1)
    batch["y"] = drawn.uniform_()
    state.restore()
    assert (net.steps.item(), net.steps.data_ptr()) == (0, address)
    assert (net.body.history, list(batch)) == ([], ["x"])
    assert_same((drawn, torch.get_rng_state()), (torch.zeros(2), random))


# metrics/


def test_a_state_that_a_user_has_read_stays_what_it_was():
    asked: list[int] = []

    class Asked(DeferredChecks):
        def raise_if_met(self) -> None:
            asked.append(1)

    metric, states = SumMetric(), MetricStates(CPU, Asked())
    (state,) = states.of([metric])
    states.intercept([metric])
    for value in (5.0, 7.0):
        state.graph_tensor.fill_(value)  # as a replay does
        states.move_to_graph([WrittenState(state, state.graph_tensor, False)])
        assert "sum_value" not in vars(metric)
        if value == 5.0:
            kept = metric.sum_value
    assert (kept.item(), metric.sum_value.item(), len(asked)) == (5.0, 7.0, 2)
    states.release(check=True)
    state.graph_tensor.fill_(9.0)
    assert vars(metric)["sum_value"].item() == 7.0


# host_values/


class Followed(TorchDispatchMode):
    """Tells of each operation, as the detector does."""

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self.provenance = provenance

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.provenance.begin(func, args, kwargs, True)
        output = func(*args, **kwargs)
        self.provenance.end(output)
        return output


def test_a_read_that_the_batch_alone_decides_is_known_before_the_step():
    lengths, foreign = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])
    found = []
    for read in (lengths, foreign):
        provenance = Provenance([lengths], lambda: ("line", "", ""))
        with torch.no_grad(), Followed(provenance):
            read[1:].max().item()
        found.append(provenance.path())
    path, unknown = found
    assert unknown is None
    assert path is not None
    assert [each.value for each in path.reads] == [3]
    assert path.holds([torch.tensor([9, 3, 0])])
    assert not path.holds([torch.tensor([3, 0, 0])])


# capture/


def test_a_value_that_is_passed_on_may_be_any_and_one_that_is_read_may_not():
    leaves = [torch.ones(2), "a.png"]
    keys = list(BatchDescriptor.from_batch(leaves).leaves)
    values = PassedOnValues([keys[0], passed_on(keys[1])])
    hidden = values.hidden_in(leaves)
    with values.during_step():
        output = {"name": hidden[1], "x": hidden[0] * 2}
    assert output["name"] is hidden[1]
    assert leaves[1] == "a.png"

    def reads_and_catches() -> None:
        with values.during_step():
            try:
                hidden[1].upper()
            except Exception:
                return

    with pytest.raises(ValueReadError, match="test_central_classes"):
        reads_and_catches()


def test_an_entry_copies_a_batch_in_and_its_outputs_out():
    backend, (x,) = RecorderBackend(CPU), batches(4)[0]
    inputs = StaticInputs([x], [x], CPU)
    inputs.copy_from([x])
    options: Any = {"collect_garbage": False, "capture_error_mode": "thread_local"}
    with torch.no_grad():
        graph, output = backend.capture(lambda: inputs.leaves[0] * 2, **options)
        plan, computed = OutputPlan.make(output, inputs.leaves, set())
        record = EntryRecord("predict", "FULL", "step", "4x8")
        entry = GraphEntry(graph, inputs, Captured(plan, computed), record)
        first, second = entry.replay([x], 1), entry.replay([x + 1], 2)
    assert_same((first, second), (x * 2, (x + 1) * 2))
    entry.drop()
    assert not entry.is_valid()


# padding/


def test_a_padded_entry_pads_a_batch_and_cuts_its_output():
    backend, (large,), (x,) = RecorderBackend(CPU), batches(4)[0], batches(3)[0]
    inputs = StaticInputs([large], [large], CPU)
    inputs.copy_from([large])
    options: Any = {"collect_garbage": False, "capture_error_mode": "thread_local"}
    with torch.no_grad():
        graph, output = backend.capture(lambda: inputs.leaves[0] * 2, **options)
        plan, computed = OutputPlan.make(output, inputs.leaves, set())
        record = EntryRecord("predict", "FULL", "step", "4x8")
        owner = GraphEntry(graph, inputs, Captured(plan, computed), record)
        padding = PaddedLeaves({0: PaddedLeaf((3, 8), (4, 8), {})}, elements=24)
        padded = PaddingRecord("predict", "step", "4x8")
        entry = PaddedEntry(owner, GuardSet(), padding, OutputCut(x * 2), padded, 0)
        for step, fill in enumerate(Fill):
            assert_same(entry.replay([x], step, fill=fill), x * 2)
            entry.count()
    assert (padded.steps, padded.elements, padded.padded_elements) == (4, 96, 128)
    assert (entry.replays, record.replays, entry.is_valid()) == (4, 4, True)
    owner.drop()
    assert not entry.is_valid()


# guards/


def test_a_setting_that_is_set_during_a_stage_is_seen():
    drop, settings = nn.Dropout(0.1), WrittenSettings()
    frozen = settings.frozen([("net.drop", drop)])
    settings.install()
    drop.p = 0.5
    assert not frozen.hold()
    assert frozen.explain() == "self.net.drop.p: now 0.5, before 0.1"
    later = settings.frozen([("net.drop", drop)])
    assert later.hold()
    drop.p = 0.1
    assert (frozen.hold(), later.hold()) == (True, False)
    settings.remove()


def exchange(first: list[Any], second: list[Any]) -> None:
    second.insert(0, first.pop())


CHANGES: dict[str, Any] = {
    "an equal item": lambda space, a, b: a.__setitem__(0, [*a[0]]),
    "an item inside": lambda space, a, b: a[0].__setitem__(0, object()),
    "one more": lambda space, a, b: b.append(1),
    "moved to the next": lambda space, a, b: exchange(a, b),
    "a key": lambda space, a, b: space["map"].__setitem__("other", space["map"].pop("key")),
    "a name": lambda space, a, b: space.__setitem__("name", object()),
    "no name": lambda space, a, b: space.pop("name"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_the_same_items_are_the_same_objects_in_the_same_order(name):
    first, second, expected = [[object()], object()], [object()], object()
    space = {"name": expected, "map": {"key": 1}}
    same = SameItems(None)
    assert all(map(same.add, [first, second, space["map"]]))
    same.add_name(space, "name", expected)
    assert same.hold()
    CHANGES[name](space, first, second)
    assert not same.hold()


# modules/


def test_submodules_run_compiled_only_while_that_is_installed():
    compiled, ran = [], []

    def compiler(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return lambda *args: (ran.append(1), graph.forward(*args))[1]

    net, (x,) = Net(), batches(4)[0]
    reference = copy.deepcopy(net)
    times: list[float] = []

    class Counts(CUDAGraphStats):
        def compiled(self, seconds: float) -> None:
            times.append(seconds)

    compilation = Compilation({"backend": compiler}, Counts())
    with torch.no_grad():
        for _ in range(2):
            compilation.install(net)
            assert_same(net.step((x,)), reference.step((x,)))
            with compilation.suspended():
                net.step((x,))
            compilation.remove()
            net.step((x,))
    assert (len(compiled), len(ran), len(times)) == (1, 2, 1)
    assert vars(net.body).keys() == vars(reference.body).keys()


# trainer/


def test_an_installation_runs_the_steps_of_a_strategy_and_changes_no_module():
    module = Predictor(Body()).eval()
    reference, names = copy.deepcopy(module), set(vars(module))
    strategy = SingleDeviceStrategy(device=CPU)
    strategy.connect(module)
    installation = Installation(strategy, module, session_of(module))
    installation.install("predict")
    with torch.inference_mode():
        for index, batch in enumerate(batches(4, 4, 4, 4)):
            found = strategy.predict_step(batch, index)
            assert_same(found, reference.predict_step(batch, index))
    assert installation.session.stats.steps["FULL"] == 3
    assert len(installation.graphs("FULL")) == 1
    assert (set(vars(module)), "predict_step" in vars(type(module))) == (names, True)
    installation.remove()
    assert "predict_step" not in vars(strategy)
    installation.close()


def test_batches_to_capture_ahead_come_once_and_the_largest_first():
    warnings: list[str] = []
    trainer: Any = types.SimpleNamespace()
    ahead = BatchesAhead(trainer, {"predict": batches(2, 5, 3)}, False, warnings.append)
    ahead.warn_if_left("predict")
    assert "nothing was captured ahead" in warnings.pop()
    examples = ahead.take("predict", 0)
    assert [example.shapes for example in examples] == ["5x8", "3x8", "2x8"]
    assert ahead.take("predict", 0) == ahead.take("test", 0) == []
    ahead.not_captured(examples[0], Reason(Cause.PRINTED, "print"))
    assert "shapes 5x8 was not captured ahead: print" in warnings.pop()
    ahead.warn_if_left("predict")
    assert warnings == []


class Loop:
    """Makes closures as Lightning's loop does."""

    def __init__(self, module: Predictor) -> None:
        self.module = module

    def _make_closure(self, kwargs: dict[str, Any], *_: Any) -> Closure:
        def step() -> ClosureResult:
            loss = self.module.training_step(*kwargs.values())
            return ClosureResult.from_training_step_output(loss)

        return Closure(step, Tensor.backward, self.module.zero_grad)


def test_an_installation_in_training_replaces_the_closures_of_the_loop():
    module = Predictor(Body())
    reference, session = copy.deepcopy(module), session_of(module, True, mode="FULL")
    loop = Loop(module)
    trainer: Any = types.SimpleNamespace(
        fit_loop=types.SimpleNamespace(
            epoch_loop=types.SimpleNamespace(automatic_optimization=loop)
        ),
        strategy=types.SimpleNamespace(model=module),
        precision_plugin=Precision(),
        accumulate_grad_batches=1,
        optimizers=[],
        callbacks=[],
        profiler=PassThroughProfiler(),
        lightning_module=module,
    )
    module._trainer = reference._trainer = trainer
    installation = TrainingInstallation(trainer, module, session)
    installation.install()
    for index, batch in enumerate(batches(4, 4, 4, 4)):
        given = {"batch": batch, "batch_idx": index}
        found = loop._make_closure(given)()
        expected = Loop(reference)._make_closure(given)()
        assert_same(found, expected)
        assert_same([p.grad for p in module.parameters()], [p.grad for p in reference.parameters()])
    assert session.stats.steps["FULL"] == 3, session.stats.reasons
    assert len(installation.graphs("FULL")) == 1
    installation.close()
    assert set(vars(loop)) == {"module"}


def training_step_of(module: Predictor) -> TrainingStep:
    """Only what a step asks of a Trainer is there."""
    trainer = types.SimpleNamespace(
        precision_plugin=Precision(),
        callbacks=[],
        profiler=PassThroughProfiler(),
        lightning_module=module,
    )
    module._trainer = trainer
    return TrainingStep(trainer, module, ModuleGuard(module), False, RecorderBackend(CPU))


def closure_input(batch: Any) -> ClosureInput:
    return ClosureInput(batch, Fixed(2), None)


def test_a_hook_with_an_empty_cell_has_no_hooks_of_a_module():
    def hook(gradient):
        return later

    assert _with_hooks_of_module(hook) == [hook]
    later = 1
    assert hook(later) == 1


def test_a_training_step_computes_gradients_and_changes_none_until_it_is_finished():
    module = Predictor(Body())
    reference = copy.deepcopy(module)
    step = training_step_of(module)
    for batch in batches(4, 4):
        held = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        output = step.compute(closure_input(batch), 0)
        assert isinstance(output, ClosureOutput)
        assert_same([p.grad for p in module.parameters()], held)
        closure = InterceptedClosure(Closure(lambda: None), (), lambda each: each.as_it_is(), print)
        result = step.finish(closure, output)
        loss = reference.training_step(batch, 0) / 2
        loss.backward()
        assert_same([result.closure_loss, result.loss], [loss.detach()] * 2)
        expected = [p.grad for p in reference.parameters()]
        assert_same([p.grad for p in module.parameters()], expected)


def test_a_training_step_with_a_loss_of_a_foreign_tensor_is_left_to_lightning():
    foreign = torch.ones((), requires_grad=True)

    class Foreign(Predictor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * foreign

    module = Foreign(Body())
    output = training_step_of(module).compute(closure_input(batches(4)[0]), 0)
    assert isinstance(output, UnfinishedClosure)
    assert "no parameter of the module" in output.problem
    assert foreign.grad is None
    assert all(parameter.grad is None for parameter in module.parameters())
