"""Effects and their recorder without a Trainer: a plain module with metrics, captured by hand."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MulticlassF1Score
from torchmetrics.functional import accuracy

from cg_lightning import CaptureError
from cg_lightning.backends import resolve_backend
from cg_lightning.core.equality import same_leaf
from cg_lightning.effects.effect import Effect, methods
from cg_lightning.effects.kinds import (
    AddToCounters,
    Appended,
    AppendToLists,
    Counter,
    ExpectAttributes,
    MoveMetricStates,
    ReadChecksLater,
    RepeatLogCalls,
    SetAttributes,
)
from cg_lightning.effects.logged_values import Calls
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.effects.recorder import Recorder
from cg_lightning.effects.recording import FinishedStep
from cg_lightning.effects.step_state import HostRandomState, StepState
from tests.harness import assert_same

Step = Callable[[nn.Module, Tensor], Any]


class Measured(nn.Module):
    def __init__(self, **metrics: Metric | MetricCollection) -> None:
        super().__init__()
        for name, metric in metrics.items():
            setattr(self, name, metric)


class Collects(Metric):
    """A list state."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, value: Tensor) -> None:
        self.values.append(value * 2)

    def compute(self) -> Tensor:
        return torch.cat(self.values)


class Captured:
    """Captures a step with a recorder and replays it, as a custom loop does."""

    def __init__(self, module: nn.Module, step: Step, example: Tensor, **settings: Any) -> None:
        self.backend = resolve_backend("recorder", example.device)
        self.effects = ModuleEffects(module, example.device, **settings)
        self.input = example.clone()
        self.captures = 0
        self._call = lambda: step(module, self.input)
        with self.effects.recorder() as recorder:
            captured = self._capture(recorder)
            checked = captured[1][3]
            if not checked.have_memory():
                del captured
                recorder.reserve_checks(checked)
                captured = self._capture(recorder)
        self.graph, (self.output, self.kinds, self.tensors, _) = captured

    def _capture(self, recorder: Recorder) -> Any:
        def run() -> Any:
            with recorder.step() as recording:
                output = self._call()
                finished = recording.finish()
                return output, finished.effects, finished.tensors, recording.checked

        self.captures += 1
        return self.backend.capture(run, collect_garbage=False, capture_error_mode="thread_local")

    def replay(self, value: Tensor) -> Any:
        assert all(is_valid() for is_valid in methods(self.kinds, "is_valid"))
        self.input.copy_(value)
        for effect in self.kinds:
            effect.before_replay()
        self.graph.replay()
        tensors = iter([tensor.clone() for tensor in self.tensors])
        for effect in self.kinds:
            effect.after_replay(tensors)
        assert next(tensors, None) is None  # each effect took its own tensors
        return self.output.clone() if isinstance(self.output, Tensor) else self.output

    def has(self, kind: type[Effect]) -> bool:
        return any(isinstance(effect, kind) for effect in self.kinds)


def shown(module: nn.Module) -> list[Any]:
    """Return everything that a user can read from the metrics, without a change."""
    metrics = [child for child in module.modules() if isinstance(child, Metric)]
    names = ("_update_count", "_forward_cache", "_computed", "_dtype")
    return [
        [{name: getattr(metric, name) for name in (*metric._defaults, *names)}]
        for metric in copy.deepcopy(metrics)
    ]


def batches(number: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(8, 4, generator=generator) for _ in range(number)]


def labels(x: Tensor) -> Tensor:
    return (x.sum(1) * 7).long() % 4


def update(module: Any, x: Tensor) -> Tensor:
    module.metric.update(x, labels(x))
    return x * 2


def forward(module: Any, x: Tensor) -> Tensor:
    return module.metric(x, labels(x))


def resets(module: Any, x: Tensor) -> Tensor:
    module.metric.reset()
    module.metric.update(x, labels(x))
    return module.metric.compute()


def append(module: Any, x: Tensor) -> Tensor:
    module.metric.update(x.flatten())
    module.metric.update(x[0])
    return x + 1


def one_value(module: Any, x: Tensor) -> Tensor:
    module.metric.update(x.sum())
    return x + 1


def collection(module: Any, x: Tensor) -> Tensor:
    module.metric.update(x, labels(x))
    return x + 1


STEPS: dict[str, tuple[Step, Callable[[], Any], set[type[Effect]]]] = {
    "update": (update, lambda: MulticlassAccuracy(4), {MoveMetricStates, AddToCounters}),
    "forward": (forward, lambda: MulticlassF1Score(4), {MoveMetricStates, SetAttributes}),
    "reset in the step": (resets, lambda: MulticlassAccuracy(4), {MoveMetricStates, SetAttributes}),
    "list": (append, Collects, {AppendToLists, AddToCounters}),
    "reads its dtype": (one_value, MeanMetric, {ExpectAttributes, ReadChecksLater}),
    "compute group": (
        collection,
        lambda: MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)]),
        {MoveMetricStates, AddToCounters},
    ),
}


@contextlib.contextmanager
def released(captured: Captured, check: bool = True) -> Any:
    try:
        with torch.inference_mode():
            yield
            captured.effects.release(check)
    finally:
        captured.effects.release(check=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", list(STEPS))
def test_replays_leave_what_eager_leaves(name):
    step, make, kinds = STEPS[name]
    module, (first, *others) = Measured(metric=make()), batches()
    with torch.inference_mode():
        step(module, first)
    reference = copy.deepcopy(module)
    before = shown(module)
    with torch.inference_mode():
        captured = Captured(module, step, first)
    assert_same(shown(module), before)  # a capture leaves no trace
    assert all(map(captured.has, kinds))
    with released(captured):
        for x in others:
            assert_same(captured.replay(x), step(reference, x))
            assert_same(shown(module), shown(reference))
        module.metric.reset()
        reference.metric.reset()
        assert_same(captured.replay(first), step(reference, first))
    assert_same(shown(module), shown(reference))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", list(STEPS))
def test_that_an_effect_that_is_missing_or_wrong_is_seen(name):
    """The comparison above can fail: without any one effect that changes a metric, it does."""
    step, make, kinds = STEPS[name]
    for kind in kinds - {ExpectAttributes, ReadChecksLater}:
        module, (first, second, *_) = Measured(metric=make()), batches()
        with torch.inference_mode():
            step(module, first)
            reference = copy.deepcopy(module)
            captured = Captured(module, step, first)
            spoilt = next(effect for effect in captured.kinds if isinstance(effect, kind))
            spoilt.after_replay = lambda tensors: list(tensors) and None
            with released(captured):
                with contextlib.suppress(StopIteration):
                    captured.replay(second)
                step(reference, second)
                with pytest.raises(AssertionError):
                    assert_same(shown(module), shown(reference))


def test_a_state_that_is_kept_changes_as_in_eager():
    """``SumMetric`` adds in place."""
    module, (first, second, third, _) = Measured(metric=SumMetric(nan_strategy="error")), batches()
    with torch.inference_mode():
        captured = Captured(module, one_value, first)
    with released(captured):
        captured.replay(second)
        kept = module.metric.sum_value
        expected = kept.clone()
        captured.replay(third)
        assert kept is module.metric.sum_value
        assert not torch.equal(kept, expected)


def test_a_state_of_another_shape_makes_the_graph_invalid():
    module, (first, second, *_) = Measured(metric=MulticlassAccuracy(4)), batches()
    with torch.inference_mode():
        captured = Captured(module, update, first)
    with released(captured):
        captured.replay(second)
        before = module.metric.tp
        module.metric.tp = torch.zeros(7, dtype=torch.long)
        assert not all(effect.is_valid() for effect in captured.kinds)
        module.metric.tp = before
        assert all(effect.is_valid() for effect in captured.kinds)


def test_a_graph_of_before_another_shape_stays_invalid():
    """A new graph uses other static tensors, so the old one would write to unused tensors."""
    module, (first, *_) = Measured(metric=MulticlassAccuracy(4)), batches()
    with torch.inference_mode():
        captured = Captured(module, update, first)
        right = module.metric.tp
        module.metric.tp = torch.zeros(7, dtype=torch.long)
        states = captured.effects.states.of([module.metric])
        assert states
        module.metric.tp = right
        assert not all(effect.is_valid() for effect in captured.kinds)


def test_another_dtype_that_the_step_has_read_makes_the_graph_invalid():
    module, (first, *_) = Measured(metric=SumMetric(nan_strategy="error")), batches()
    with torch.inference_mode():
        captured = Captured(module, one_value, first)
    assert all(effect.is_valid() for effect in captured.kinds)
    module.metric._dtype = torch.float64
    assert not all(effect.is_valid() for effect in captured.kinds)


def test_a_counter_that_is_copied_follows_its_source():
    one, other = {"count": 5}, {"count": 0}
    effect = AddToCounters([Counter(one, "count", one, 2), Counter(other, "count", one, 2)])
    for _ in range(2):
        effect.after_replay(iter([]))
    assert one == other == {"count": 9}


@pytest.mark.parametrize("keeps_list", [True, False])
def test_appending_keeps_the_list_or_makes_a_new_one(keeps_list):
    attributes = {"value": [torch.zeros(1)]}
    before = attributes["value"]
    AppendToLists([Appended(attributes, "value", 2, keeps_list)]).after_replay(
        iter([torch.ones(1), torch.ones(2)])
    )
    assert len(attributes["value"]) == 3
    assert (attributes["value"] is before) is keeps_list


def checked(module: Any, x: Tensor) -> Tensor:
    module.metric.update(x[:, 0], x[:, 1].mul(2).long())
    return x + 1


def functional(module: Any, x: Tensor) -> Tensor:
    return accuracy(x[:, 0], x[:, 1].mul(2).long(), task="binary")


@pytest.mark.parametrize("step", [checked, functional])
def test_checks_are_read_later_and_raise_what_eager_raises(step):
    first = batches()[0].clamp(max=0.9)
    bad = first.clone()
    bad[3, 1] = 2.0
    module = Measured(metric=BinaryAccuracy())
    if step is functional:
        del module.metric
    with pytest.raises(RuntimeError, match="Detected the following values") as expected:
        step(copy.deepcopy(module), bad)
    with torch.inference_mode():
        captured = Captured(module, step, first)
    assert captured.has(ReadChecksLater)
    assert captured.captures == 2
    with torch.inference_mode():
        captured.replay(bad)
    for effect in captured.kinds:
        effect.drop()  # its result is still read
    with pytest.raises(RuntimeError) as caught:
        captured.effects.release(check=True)
    assert str(caught.value) == str(expected.value)
    captured.effects.release(check=True)  # one warning only


def test_a_step_that_checks_nothing_is_captured_once():
    with torch.inference_mode():
        assert Captured(Measured(), lambda _, x: x * 2, batches()[0]).captures == 1


def test_checks_for_which_no_memory_was_reserved_are_not_lost():
    module, (first, *_) = Measured(metric=BinaryAccuracy()), batches()
    effects = ModuleEffects(module, first.device)

    def capture_once() -> None:
        with effects.recorder() as recorder, recorder.step() as recording:
            checked(module, first.clamp(max=0.9))
            recording.finish()

    with torch.inference_mode(), pytest.raises(CaptureError, match="captured only once"):
        capture_once()


def test_a_capture_that_fails_leaves_no_trace():
    module, (first, *_) = Measured(metric=MulticlassAccuracy(4)), batches()
    before = shown(module)

    def fails(module: Any, x: Tensor) -> None:
        update(module, x)
        raise ArithmeticError("mine")

    with torch.inference_mode(), pytest.raises(CaptureError, match="mine"):
        Captured(module, fails, first)
    assert_same(shown(module), before)


class KeepsInPython(SumMetric):
    def update(self, value: Tensor) -> None:
        self.seen = getattr(self, "seen", 0) + 1
        super().update(value)


def test_what_a_replay_cannot_do_is_refused():
    with torch.inference_mode(), pytest.raises(CaptureError, match="seen is kept in Python"):
        Captured(Measured(metric=KeepsInPython(nan_strategy="error")), one_value, batches()[0])


class OwnLog(nn.Module):
    """A module with the ``log`` of another framework, whose logged values are unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[str, float]] = []

    def log(self, name: str, value: Tensor) -> None:
        self.logged.append((name, float(value)))


class OwnLogCalls:
    """Implements ``LogCalls`` for it."""

    def __init__(self, module: OwnLog) -> None:
        self.module, self.is_held = module, False

    @contextlib.contextmanager
    def collected(self) -> Any:
        calls: Calls = []
        self.module.log = lambda *args, **kwargs: calls.append((args, kwargs))
        try:
            yield calls
        finally:
            del self.module.log

    @contextlib.contextmanager
    def held(self) -> Any:
        self.is_held = True
        yield
        self.is_held = False

    def make(self, calls: Calls) -> None:
        for args, kwargs in () if self.is_held else calls:
            self.module.log(*args, **kwargs)


class OwnLoggedValues:
    """Implements ``LoggedValues`` for it."""

    def __init__(self, module: OwnLog) -> None:
        self.calls = OwnLogCalls(module)

    def is_supported(self) -> bool:
        return False

    def metrics(self) -> list[nn.Module]:
        return []

    def effect(self) -> Effect:
        raise AssertionError

    def begin(self) -> None: ...
    def snapshot(self) -> None: ...
    def restore(self, snapshot: None) -> None: ...
    def release(self) -> None: ...


def logs(module: Any, x: Tensor) -> Tensor:
    module.log("mean", x.mean())
    module.log(name="most", value=x.max())
    return x + 1


def test_log_calls_are_made_after_each_replay():
    module, (first, *others) = OwnLog(), batches()
    reference = OwnLog()
    with torch.inference_mode():
        captured = Captured(module, logs, first, logged=OwnLoggedValues(module))
        assert captured.has(RepeatLogCalls)
        assert module.logged == []
        for x in others:
            assert_same(captured.replay(x), logs(reference, x))
    assert len(module.logged) == 6
    assert module.logged == reference.logged


def test_log_calls_of_a_comparison_are_made_once():
    module, (first, second, *_) = OwnLog(), batches()
    with torch.inference_mode():
        captured = Captured(module, logs, first, logged=OwnLoggedValues(module))
        with captured.effects.comparing() as comparison:
            for _ in range(2):
                comparison.run(lambda: logs(module, second))
            captured.replay(second)
            assert module.logged == []
        assert [name for name, _ in module.logged] == ["mean", "most"]
        captured.effects.rehearse(lambda: logs(module, second))
        assert len(module.logged) == 2


def test_what_cannot_be_logged_again_is_refused():
    module = OwnLog()
    step = lambda module, x: module.log("all", [object()])
    with torch.inference_mode(), pytest.raises(CaptureError, match="cannot be logged again"):
        Captured(module, step, batches()[0], logged=OwnLoggedValues(module))


def test_a_submodule_has_no_effects():
    recorder = Recorder()
    with recorder.step() as recording:
        assert recording.finish() == FinishedStep([], [], [], [])
    assert recording.checked.have_memory()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", list(STEPS))
def test_a_step_is_taken_back(name):
    step, make, _ = STEPS[name]
    module, (first, second, *_) = Measured(metric=make(), norm=nn.BatchNorm1d(4)), batches()
    with torch.inference_mode():
        step(module, first)
        captured = Captured(module, step, first)
    with released(captured):
        captured.replay(second)
        state = StepState(module, captured.backend, captured.effects)
        before = copy.deepcopy(state.values())
        generators = HostRandomState()
        step(module, second)
        module.norm(second)
        torch.rand(1)
        assert not all(
            same_leaf(one, other)
            for (_, one), (_, other) in zip(before, state.values(), strict=False)
        )
        state.restore()
        assert_same(state.values(), before)
        assert not generators.was_drawn("cuda")
