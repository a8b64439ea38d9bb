"""Session, runners, target, verifier, cache and entry, made without a Trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cg_lightning import CaptureError, CUDAGraphMode, CUDAGraphOptions
from cg_lightning.backends import resolve_backend
from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.capture import outputs
from cg_lightning.capture.cache import GraphCache
from cg_lightning.capture.call import CaptureTarget, GraphCall
from cg_lightning.capture.capture import Capturer
from cg_lightning.capture.entry import Captured, GraphEntry
from cg_lightning.capture.outputs import OutputPlan
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import NoRoomError
from cg_lightning.core.reasons import Status
from cg_lightning.core.settings import Settings
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.watched_step import WrittenTensors
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.report.records import EntryRecord
from cg_lightning.report.stats import CUDAGraphStats
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.step_runner import StepRunner, first_parameter
from cg_lightning.runtime.verifier import Verifier
from tests.harness import assert_same
from tests.models import Body


class Net(nn.Module):
    """A module with a step, and no Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.waits = Body(), 1.0, False
        self.register_buffer("steps", torch.zeros(()))

    def step(self, batch: Any, factor: float = 1.0) -> Tensor:
        self.steps += 1
        output = self.body(batch[0]) * self.scale * self.steps * factor
        return output * output.sum().item() if self.waits else output


class Loop:
    """Runs the steps of a module as a Trainer would, and of an untouched copy."""

    def __init__(self, backend: str, module: Any, **settings: Any) -> None:
        self.backend = resolve_backend(backend)
        self.module = module.to(self.backend.device)
        self.reference = copy.deepcopy(self.module)
        self.stats = CUDAGraphStats()
        defaults = {"warmup_steps": 1, "verify_replays": 0, "min_saving": 0, "backend": backend}
        self.settings = Settings(**{**defaults, **settings})
        effects = ModuleEffects(self.module, self.backend.device)
        self.session = Session(self.module, self.backend, self.settings, self.stats, effects)
        self.runner = StepRunner(self.session, "predict", "step", self.module.step)
        self.kept: list[tuple[Any, Any]] = []

    def run(self, number: int, rows: int = 4, **kwargs: Any) -> None:
        self.session.install()
        try:
            with torch.inference_mode():
                for _ in range(number):
                    batch = (torch.randn(rows, 8, device=self.backend.device),)
                    output = self.runner.run((batch,), dict(kwargs))
                    self.kept.append((output, self.reference.step(batch, **kwargs)))
        finally:
            self.session.remove()

    def check(self) -> None:
        """All outputs are eager's, also those of the first steps."""
        for output, expected in self.kept:
            assert_same(output, expected)
        assert_same(dict(self.module.state_dict()), dict(self.reference.state_dict()))


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_a_session_runs_steps_from_one_graph(backend, verify_replays):
    loop = Loop(backend, Net(), verify_replays=verify_replays)
    loop.run(6)
    loop.run(6)
    loop.check()
    assert loop.stats.steps == {"NONE": 1, "PIECEWISE": 0, "FULL": 11}
    assert len(loop.session.graphs("FULL")) == 1
    loop.session.close()
    assert loop.session.graphs("FULL") == []


def test_a_session_runs_submodules_and_says_why(backend):
    module = Net()
    module.waits = True
    loop = Loop(backend, module)
    loop.run(6)
    loop.check()
    assert loop.stats.steps == {"NONE": 1, "PIECEWISE": 5, "FULL": 0}
    (record,) = [record for record in loop.stats.reasons if record.mode == "PIECEWISE"]
    assert record.reason.kind is Cause.HOST_SYNC
    assert [entry.target for entry in loop.stats.entries] == ["body"]
    loop.session.close()


def test_keyword_arguments_are_frozen_and_the_batch_may_be_one(backend):
    loop = Loop(backend, Net())
    loop.run(4, factor=2.0)
    loop.check()
    with torch.inference_mode():
        batch = (torch.ones(4, 8, device=loop.backend.device),)
        assert loop.runner.run((), {"batch": batch}).shape == (4, 8)
    loop.session.close()


def test_gradients_run_eagerly_with_that_reason(backend):
    loop = Loop(backend, Net())
    batch = (torch.ones(4, 8, device=loop.backend.device),)
    output = loop.runner.run((batch,), {})
    assert output.requires_grad
    (record,) = loop.stats.reasons
    assert record.reason.kind is Status.GRADIENTS
    loop.session.close()


def test_strict_names_the_reason_and_carries_the_diagnosis(backend):
    module = Net()
    module.waits = True
    loop = Loop(backend, module, mode="FULL", strict=True)
    with pytest.raises(CaptureError, match="strict=False") as caught:
        loop.run(3)
    assert "host sync" in str(caught.value)
    assert caught.value.diagnosis.capturable("body")
    loop.session.close()


def test_a_step_without_a_readable_signature():
    assert first_parameter(print) in ("", "args")
    assert first_parameter(lambda dataloader_iter: None) == "dataloader_iter"


def call_of(function: Any, *tensors: Tensor) -> GraphCall:
    descriptor = BatchDescriptor.from_batch(list(tensors))
    return GraphCall(descriptor, function, list(tensors), list(tensors))


def target_of(module: nn.Module) -> CaptureTarget:
    record = EntryRecord("predict", "PIECEWISE", "net", "4x8")
    return CaptureTarget(
        mode=CUDAGraphMode.PIECEWISE,
        module=module,
        effects=None,
        held=(),
        record=record,
    )


def make_capturer(backend: str, **settings: Any) -> tuple[Capturer, GraphCache]:
    found = resolve_backend(backend)
    cache = GraphCache(found, settings.get("max_graphs", 64))
    return Capturer(found, Settings(**settings), cache, WrittenTensors()), cache


def test_a_capture_gives_an_entry_that_replays(backend, device):
    capturer, _ = make_capturer(backend)
    net = Body().to(device)
    target = target_of(net)
    x = torch.randn(4, 8, device=device)
    with torch.no_grad():
        entry = capturer.capture(target, call_of(lambda given: net(given[0]), x))
        assert (target.record.captures, target.record.replays) == (1, 0)
        outputs = []
        for _ in range(3):
            x = torch.randn(4, 8, device=device)
            outputs.append((entry.replay([x], 1), net(x)))
            entry.count()
        assert_same([a for a, _ in outputs], [b for _, b in outputs])
    assert (entry.replays, target.record.replays) == (3, 3)
    assert entry.is_valid()
    assert entry.num_bytes > 0
    entry.drop()
    assert not entry.is_valid()


def test_outputs_that_are_not_copied_live_until_the_next_replay(backend, device):
    capturer, _ = make_capturer(backend, copy_outputs=False)
    x = torch.ones(4, device=device)
    with torch.no_grad():
        entry = capturer.capture(target_of(nn.Identity()), call_of(lambda given: given[0] * 2, x))
        first = entry.replay([x], 1)
        first.unsqueeze_(0)
        second = entry.replay([x + 1], 2)
    assert first.data_ptr() == second.data_ptr()
    assert_same(second, (x + 1) * 2)
    entry.drop()


@pytest.mark.parametrize(
    ("output", "is_one_tensor", "is_one_value"),
    [(torch.ones(1), True, False), (None, False, True), ((None,), False, False)],
)
def test_kinds_of_outputs(output, is_one_tensor, is_one_value):
    plan, computed = OutputPlan.make(output, [], set())
    assert (plan.is_one_tensor, plan.is_one_value) == (is_one_tensor, is_one_value)
    assert_same(plan.build([], computed, None), output)


OUTPUTS = {
    "a slice": lambda x: (x * 2)[:, ::2],
    "an expanded tensor": lambda x: (x * 2).sum(0).expand(3, 4),
    "overlapping windows": lambda x: (x * 2).flatten().unfold(0, 3, 1),
    "views of each other": lambda x: (lambda y: (y.t(), None, y[:, 1:], y))(x * 2),
    "a view of the input": lambda x: {"view": x[1:].t(), "x": x, "more": (x * 2, (x * 3)[:1])},
    "empty ones": lambda x: ((x * 2)[:0], x[:0], (x * 2)[:0]),
}


@pytest.mark.parametrize("name", list(OUTPUTS))
def test_outputs_have_strides_and_shared_memory_of_eager(name, backend, device):
    function = OUTPUTS[name]
    capturer, _ = make_capturer(backend)
    x = torch.arange(12.0, device=device).view(3, 4)
    with torch.no_grad():
        entry = capturer.capture(
            target_of(nn.Identity()), call_of(lambda given: function(given[0]), x)
        )
        for step in range(3):
            given, own = x + step, x + step
            found, expected = entry.replay([given], step), function(own)
            assert_same(found, expected)
            tensors, others = tensors_in(found), tensors_in(expected)
            assert [each.stride() for each in tensors] == [each.stride() for each in others]
            if name in ("views of each other", "a view of the input"):
                for each, other in zip([*tensors, given], [*others, own], strict=True):
                    each.add_(1)
                    other.add_(1)
                assert_same((found, given), (expected, own))
    entry.drop()


def test_an_output_that_shares_memory_under_another_dtype_is_refused(backend, device):
    capturer, _ = make_capturer(backend)
    x = torch.ones(4, device=device)
    with torch.no_grad(), pytest.raises(CaptureError, match=r"output\[1\] shares memory"):
        capturer.capture(
            target_of(nn.Identity()),
            call_of(lambda given: (lambda y: (y, y.view(torch.int32)))(given[0] * 2), x),
        )


def test_a_failed_capture_drops_the_other_graphs_and_leaves_the_rest(backend, device):
    capturer, cache = make_capturer(backend)
    x = torch.ones(4, device=device)
    with torch.no_grad():
        entry = capturer.capture(target_of(nn.Identity()), call_of(lambda given: given[0] * 2, x))
        cache.add(entry, "owner")
        with pytest.raises(CaptureError, match="The capture failed"):
            capturer.capture(
                target_of(nn.Identity()), call_of(lambda given: given[0].item(), x[:1])
            )
        assert not entry.is_valid()
        again = capturer.capture(target_of(nn.Identity()), call_of(lambda given: given[0] * 2, x))
        assert_same(again.replay([x], 1), x * 2)
        again.drop()


class Graph:
    """Stands in for a captured graph that takes no memory."""

    num_bytes = 0

    def replay(self) -> None:
        """Do nothing."""


def entry_of(step: int) -> GraphEntry:
    from cg_lightning.capture.static_inputs import StaticInputs

    inputs = StaticInputs([], (), torch.device("cpu"))
    plan, computed = OutputPlan.make(None, [], set())
    record = EntryRecord("predict", "FULL", "step", "")
    entry = GraphEntry(Graph(), inputs, Captured(plan, computed), record)
    entry.last_step = step
    return entry


def test_the_cache_drops_graphs_until_a_new_one_fits_into_its_bytes():
    cache = GraphCache(RecorderBackend(torch.device("cpu")), 64, max_bytes=30)
    entries = [entry_of(step) for step in range(6)]
    for entry in entries:
        entry.graph.num_bytes = 10
    for step in range(3):
        cache.step = step
        assert cache.make_room_for(entries[step]) == []
        cache.add(entries[step], f"owner {step}")
    cache.step = 16
    entries[0].replay([], cache.step)
    with pytest.raises(NoRoomError, match="leave too little memory of max_graph_bytes=30"):
        cache.make_room_for(entries[5])  # the others may be used again soon
    with pytest.warns(UserWarning, match="Raise max_graph_bytes"):
        assert "max_graph_bytes=30" in cache.why_no_room(0)  # as much as the refused one
    assert cache.why_no_room(10)
    cache.step = 18
    assert not cache.why_no_room(0)
    assert not cache.why_no_room(10)
    entries[2].replay([], cache.step)
    assert cache.make_room_for(entries[3]) == ["owner 1"]
    assert "max_graph_bytes=30" in cache.why_too_large
    cache.add(entries[3], "owner 3")
    entries[0].replay([], cache.step)  # so the step under way has used all of them
    with pytest.raises(CaptureError, match="raise max_graph_bytes"):
        cache.make_room_for(entries[4])
    assert [entry.is_valid() for entry in entries] == [True, False, True, True, False, False]


def test_the_cache_drops_the_least_recently_used_and_names_its_owner():
    waited: list[int] = []

    class Waits(RecorderBackend):
        def synchronize(self) -> None:
            waited.append(1)

    cache = GraphCache(Waits(torch.device("cpu")), 2)
    entries = []
    for step in range(2):
        cache.step = step
        entries.append(entry_of(step))
        assert cache.make_room() is None
        cache.add(entries[-1], f"owner {step}")
    cache.step = 2
    entries[0].replay([], cache.step)
    assert cache.make_room() == "owner 1"
    assert [entry.is_valid() for entry in entries] == [True, False]
    assert waited == [1]
    assert "max_graphs=2" in cache.why_evicted
    cache.add(entry_of(2), "owner 2")
    with pytest.raises(CaptureError, match="raise max_graphs"):
        cache.make_room()  # both were used by the step under way
    assert cache.drop_all()
    assert not cache.drop_all()
    assert cache.entries() == []


class Adds(nn.Module):
    """Counts in a buffer; with ``wrong`` a second run gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


def verified(backend: str, device: torch.device, function: Any, module: nn.Module) -> Any:
    capturer, _ = make_capturer(backend)
    call, target = call_of(function, torch.ones(4, device=device)), target_of(module)
    verifier = Verifier(resolve_backend(backend), "exact", WrittenTensors())
    with torch.no_grad():
        return verifier.check(target, call, lambda: capturer.capture(target, call), 1)


def test_the_verifier_lets_a_user_see_one_step(backend, device):
    module = Adds().to(device)
    verdict = verified(backend, device, lambda given: module(given[0]), module)
    assert (verdict.difference, verdict.error) == ("", None)
    assert_same(verdict.output, torch.full((4,), 2.0, device=device))
    assert module.count.item() == 1


def test_the_verifier_names_what_differs_and_gives_eagers_result(backend, device):
    module, factors = nn.Identity(), iter([1.0, 2.0, 1.0])
    verdict = verified(backend, device, lambda given: given[0] * next(factors), module)
    assert "output is [2.0, 2.0, 2.0] ... of shape (4,) from the graph" in verdict.difference
    assert_same(verdict.output, torch.ones(4, device=device))


def test_the_verifier_gives_eagers_result_if_there_is_no_graph(backend, device):
    runs: list[int] = []

    def waits(given: Any) -> Any:
        runs.append(1)
        return given[0] * given[0].sum().item()

    verdict = verified(backend, device, waits, nn.Identity())
    assert isinstance(verdict.error, CaptureError)
    assert_same(verdict.output, torch.full((4,), 4.0, device=device))
    assert len(runs) == 2  # eager, and the capture that failed


def test_options_reach_the_backend(backend, device, monkeypatch):
    seen: list[dict[str, Any]] = []
    kind = type(resolve_backend(backend))
    original = kind.capture
    monkeypatch.setattr(
        kind, "capture", lambda *args, **kw: seen.append(kw) or original(*args, **kw)
    )
    capturer, _ = make_capturer(backend, options=CUDAGraphOptions(capture_error_mode="relaxed"))
    x = torch.ones(4, device=device)
    with torch.no_grad():
        capturer.capture(target_of(nn.Identity()), call_of(lambda given: given[0] * 2, x)).drop()
    assert seen == [{"collect_garbage": False, "capture_error_mode": "relaxed"}]


@pytest.mark.parametrize("clones", [outputs._clones, outputs._clones_of_older_torch])
def test_grouped_copies_are_clones(device, monkeypatch, clones):
    monkeypatch.setattr(outputs, "_clones", clones)
    kinds = [torch.float32, torch.int64, torch.float32, torch.bool, torch.int64]
    tensors = [torch.rand(2, 3, device=device).mul(9).to(kind) for kind in kinds]
    tensors[2] = tensors[2].t()
    copies = outputs.GroupedCopies(tensors)
    for value in (0, 1):
        tensors[0].fill_(value)
        made = copies.make()
        assert_same(made, [each.clone() for each in tensors])
        assert [each.stride() for each in made] == [each.stride() for each in tensors]
        assert {each.data_ptr() for each in made}.isdisjoint(map(Tensor.data_ptr, tensors))
