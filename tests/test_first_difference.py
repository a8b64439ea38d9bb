"""A replay that differs from eager names the first operation that does, where it can be told."""

from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from cg_lightning.backends import recorder
from cg_lightning.diagnosis import operation_log
from cg_lightning.diagnosis.operation_log import Operation, digest, first_difference
from tests.harness import Harness, assert_same, features, predict, validate
from tests.models import Body, Predictor
from tests.test_verification import MODES, ChangesUnseen, ReadsUnseen, unseen

pytestmark = pytest.mark.filterwarnings("ignore:.*a replay differed")
FILE = __file__
NAMES = ("one", "other")


def differences(callback: Any) -> list[str]:
    """The reasons that verification gave, each once."""
    texts = [str(record.reason) for record in callback.stats.reasons]
    return [text for text in texts if "from the graph" in text or "leaves" in text]


def line_of_text(text: str) -> int:
    """The number of the line of this file that ends with a text."""
    with open(FILE) as file:
        return next(number for number, line in enumerate(file, 1) if line.rstrip().endswith(text))


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_the_frozen_value_is_named(harness, mode):
    """Hazard 8: the operation, its line, and both values."""
    callback = harness.callback(mode=mode, warmup_steps=1, verify_every=1)
    harness.compare(ChangesUnseen(ReadsUnseen()), predict(features(32)), callback)
    (text,) = set(differences(callback))
    assert "aten::mul.Tensor" in text
    assert "test_verification.py:" in text
    assert "given 1.0 in the watched step and 2.0 in this step" in text
    assert "has frozen that value" in text
    assert "Why is not known" not in text


def is_captured() -> bool:
    """What code that goes round our answer learns, for example an extension in C++."""
    if getattr(recorder._recording, "recorder", None) is not None:
        return True
    return torch.cuda.is_available() and torch._C._cuda_isCurrentStreamCapturing()


class OtherWhenCaptured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(x)
        if is_captured():
            return torch.sin(x)  # in the graph
        return torch.cos(x)  # in eager


class OtherValueWhenCaptured(OtherWhenCaptured):
    def forward(self, x):
        return self.linear(x).relu() * (3.0 if is_captured() else 2.0)


@pytest.mark.parametrize("mode", MODES)
def test_other_operations_in_a_capture_are_named(harness, mode):
    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(Predictor(OtherWhenCaptured()), predict(features(32)), callback)
    graph, eager = (line_of_text(f"# in {where}") for where in ("the graph", "eager"))
    expected = (
        f"The first operation that differs: the graph runs aten::sin ({FILE}:{graph}) where eager "
        f"runs aten::cos ({FILE}:{eager})"
    )
    assert differences(callback)
    assert all(expected in text for text in differences(callback)), differences(callback)


@pytest.mark.parametrize("mode", MODES)
def test_another_value_in_a_capture_is_named(harness, mode):
    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(Predictor(OtherValueWhenCaptured()), predict(features(32)), callback)
    assert differences(callback)
    for text in differences(callback):
        assert "aten::mul.Tensor" in text
        assert "given 3.0 in the graph and 2.0 in eager" in text


_library = torch.library.Library("first_difference_test", "DEF")
_library.define("odd(Tensor x) -> Tensor")
_library.impl(
    "odd",
    lambda x: x * 3 if torch.is_inference_mode_enabled() else x * 2,
    "CompositeExplicitAutograd",
)


class Odd(nn.Module):
    """Its operation gives something else where replays of the recorder run: in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.ops.first_difference_test.odd(self.linear(x).sin()).relu()


@pytest.mark.parametrize("mode", MODES)
def test_an_operation_with_equal_inputs_and_another_output_is_named(mode, tmp_path):
    harness = Harness("recorder", tmp_path)
    callback = harness.callback(mode=mode, warmup_steps=1)
    module = Predictor(Odd())
    outputs = harness.trainer(callback, inference_mode=False).predict(module, features(32))
    with torch.no_grad():
        assert_same(outputs, [module.net(batch[0]) for batch in features(32)])
    assert differences(callback)
    for text in differences(callback):
        assert "first_difference_test::odd" in text
        assert "has equal inputs and another output" in text


counted, count_up = unseen(0.0)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        count_up(counted() + 1)
        return self.linear(x) * counted()


def test_what_differs_in_each_eager_run_is_said(harness):
    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.trainer(callback).predict(Predictor(Counts()), features(32))
    assert differences(callback)
    assert all("so eager differs from itself" in text for text in differences(callback))


class Moves(nn.Module):
    """Its state moves in each run: all runs that look for an operation are undone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.norm.train()
        self.steps += 1
        x = nn.functional.dropout(self.norm(self.linear(x)), 0.5) * self.steps
        return x * (3.0 if is_captured() else 2.0)


class Sums(Predictor):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.sums: dict[str, torch.Tensor] = {}
        self.seen: list[torch.Tensor] = []

    def on_predict_epoch_start(self) -> None:
        self.sums["all"] = torch.zeros(8, device=self.device)

    def predict_step(self, batch, batch_idx):
        output = super().predict_step(batch, batch_idx)
        self.sums["all"] += output.sum(0)
        return output, self.sums["all"].clone()


@pytest.mark.parametrize("mode", MODES)
def test_the_search_leaves_the_state_of_one_step(harness, mode):
    """Hazard 10: buffers, attributes and random numbers."""
    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(Sums(Moves()), predict(features(32)), callback)
    assert any("3.0 in the graph" in text for text in differences(callback)), differences(callback)


def test_long_steps_are_not_compared(harness, monkeypatch):
    """It is said that there are too many operations, and the search ends."""
    monkeypatch.setattr(operation_log, "MOST_OPERATIONS", 2)
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(Predictor(OtherValueWhenCaptured()), predict(features(32)), callback)
    assert all("No operation is named" in text for text in differences(callback))
    assert differences(callback)


class FailsInTheSearch(OtherValueWhenCaptured):
    """Its fourth call comes after the watched, the eager and the captured one."""

    def forward(self, x):
        count_up(counted() + 1)
        if counted() == 4:
            raise KeyError("mine")
        return super().forward(x)


def test_a_step_that_fails_in_the_search_names_nothing(harness):
    count_up(0)
    callback = harness.callback(mode="FULL", warmup_steps=1)
    outputs = harness.trainer(callback).predict(Predictor(FailsInTheSearch()), features(16))
    assert len(outputs) == 4
    assert all("Why is not known" in text for text in differences(callback))
    assert differences(callback)


def test_digests_tell_bits_places_and_shapes():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64):
        for size in (1, 7, 1024, 5000):
            x = (torch.randn(size) * 100).to(dtype)
            same, other = x.clone(), x.clone()
            other.view(-1)[size // 2] += 1
            assert digest(x) == digest(same)
            assert digest(x) != digest(other)
            if size > 1:
                swapped = x.clone()
                swapped[0], swapped[-1] = x[-1], x[0]
                assert digest(x) != digest(swapped), (dtype, size)
    rows = torch.randn(8, 1024)
    assert digest(rows) != digest(rows[[1, 0, *range(2, 8)]])
    assert digest(rows.t()) == digest(rows.t().contiguous())
    assert digest(torch.zeros(3)) != digest(-torch.zeros(3))
    assert digest(torch.tensor([float("nan")])) == digest(-torch.tensor([float("nan")]))
    assert digest(torch.ones(2, dtype=torch.bool)) != digest(torch.zeros(2, dtype=torch.bool))
    assert digest(torch.empty(0)) == 0
    assert digest(torch.ones(2, 2).to_sparse()) is None


def run_of(*operations: tuple[str, Any, Any]) -> list[Operation]:
    return [Operation(name, ("1",), "", [given], [gives]) for name, given, gives in operations]


def test_where_two_runs_first_differ():
    """Operations of one run only count if what follows them differs."""
    base = run_of(("a", 1, 2), ("b", 2, 3), ("c", 3, 4))
    assert first_difference(base, base, NAMES) is None
    other = run_of(("a", 1, 2), ("b", 2, 9), ("c", 9, 8))
    assert first_difference(other, base, NAMES).text == "b has equal inputs and another output"
    unknown = run_of(("a", 7, 9), ("b", 9, 3), ("c", 3, 4))
    assert first_difference(unknown, base, NAMES) is None
    harmless = run_of(("a", 1, 2), ("x", 2, 3), ("y", 3, 3), ("c", 3, 4))
    assert first_difference(harmless, base, NAMES) is None
    harmful = run_of(("a", 1, 2), ("x", 2, 5), ("c", 5, 6))
    assert first_difference(harmful, base, NAMES).text == "one runs x where other runs b"
    later = run_of(("a", 1, 2), ("x", 2, 3), ("c", 3, 9))
    assert first_difference(later, base, NAMES).text == "c has equal inputs and another output"
    at_the_end = run_of(("a", 1, 2), ("b", 2, 3))
    assert first_difference(at_the_end, base, NAMES).text == "one runs nothing where other runs c"


def test_operations_of_side_effects_are_not_blamed():
    """A graph leaves out, or does otherwise, what its replays do in Python."""
    base = run_of(("a", 1, 2), ("update", 2, 3), ("b", 2, 4), ("c", 4, 5), ("b", 3, 6))
    graph = run_of(("a", 1, 2), ("b", 2, 7), ("c", 7, 8), ("b", 2, 9))
    assert first_difference(graph, base, NAMES).text == "b has equal inputs and another output"
    graph = run_of(("a", 1, 2), ("x", 2, 3), ("b", 2, 4), ("y", 4, 9), ("b", 9, 7))
    base = run_of(("a", 1, 2), ("b", 2, 4), ("z", 4, 5), ("b", 5, 6))
    assert first_difference(graph, base, NAMES).text == "one runs y where other runs z"
    graph = run_of(("a", 1, 2), ("x", 2, 3), ("b", 8, 9))
    base = run_of(("a", 1, 2), ("b", 2, 4))
    assert first_difference(graph, base, NAMES) is None


class LogsOtherwise(Predictor):
    """A capture logs another value, after metrics whose states a graph keeps otherwise."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 4))
        self.accuracy = MulticlassAccuracy(4)
        self.auroc = MulticlassAUROC(4)

    def validation_step(self, batch, batch_idx):
        out = self.net(batch[0]).softmax(-1)
        labels = batch[0][:, :4].argmax(1)
        self.auroc.update(out, labels)
        self.accuracy(out, labels)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("mean", out.square().mean() * (3.0 if is_captured() else 2.0))


def test_a_difference_after_metrics_is_named(harness):
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.compare(LogsOtherwise(), validate(features(32)), callback)
    assert differences(callback)
    for text in differences(callback):
        assert "aten::mul.Tensor" in text
        assert "given 3.0 in the graph and 2.0 in eager" in text


def test_steps_that_agree_name_nothing(harness):
    callback = harness.callback(mode="FULL", warmup_steps=1, verify_every=1)
    harness.compare(Predictor(Body()), predict(features(32)), callback)
    assert not differences(callback)
