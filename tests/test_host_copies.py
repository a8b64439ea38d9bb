"""Copies to the host that the step does not read: each replay makes them after its graph."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cg_lightning.capture.host_copies import HostCopy, answered_host_copies
from cg_lightning.capture.outputs import OutputPlan
from cg_lightning.core.causes import Cause
from cg_lightning.core.errors import CaptureError
from cg_lightning.effects.late_reads import LateRead
from tests.harness import Harness, assert_same, features, predict, validate
from tests.models import Body, Predictor

META = torch.device("meta")
Step = Callable[[Any, Tensor], Any]


def appended(m: Any, x: Tensor) -> Any:
    y = m.net(x)
    m.kept.append(y.detach().cpu())
    m.kept.append({"rows": y.argmax(1).cpu(), "x": x.cpu()})
    return y.square().mean()


def shared(m: Any, x: Tensor) -> Any:
    y = m.net(x)
    copy = y.cpu()
    m.kept.append(copy)
    return {"y": y, "copy": copy, "same": copy.detach(), "other": y.cpu(), "rows": len(copy)}


def changed_later(m: Any, x: Tensor) -> Any:
    y = m.net(x)
    m.last = y.cpu()
    y.mul_(2)
    return y.sum()


def views(m: Any, x: Tensor) -> Any:
    y = m.net(x)
    return y[:2].cpu(), y.t().to("cpu"), y.expand(2, *y.shape).cpu(), x[1].to(device="cpu")


GRAPHS = {step.__name__: step for step in (appended, shared, changed_later, views)}
READ: dict[str, Step] = {
    "an operation": lambda m, x: m.net(x).cpu() * 2,
    "an operation on a view": lambda m, x: m.net(x).cpu().detach() + 1,
    "an array": lambda m, x: m.kept.append(m.net(x).cpu().numpy()),
    "a list": lambda m, x: m.kept.extend(m.net(x).cpu().tolist()),
    "a branch": lambda m, x: x if m.net(x).mean().cpu() > 0 else -x,
    "a loop": lambda m, x: max(row.sum() for row in m.net(x).cpu()),
    "a text": lambda m, x: f"{m.net(x).cpu()}",
    "a conversion": lambda m, x: m.net(x).cpu().double(),
    "a number of the batch": lambda m, x: m.net(x) * (x > 0).sum().cpu().item(),
    "an index": lambda m, x: x[m.net(x).argmax(1).cpu() % 4],
    "a logged value": lambda m, x: m.log("y", m.net(x).mean().cpu()),
}


class Model(Predictor):
    def __init__(self, step: Step) -> None:
        super().__init__(Body())
        self.step = step
        self.kept: list[Any] = []
        self.last: Any = None

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch[0])

    def on_validation_epoch_end(self) -> None:
        tensors = [each for each in self.kept if isinstance(each, Tensor)]
        self.log("kept", float(sum(each.sum() for each in tensors)))


@pytest.mark.parametrize("name", list(GRAPHS))
def test_copies_that_nobody_reads(harness: Harness, name: str):
    model = Model(GRAPHS[name])
    callback = harness.callback(warmup_steps=1, verify_replays=1)
    harness.compare(model, predict(features(40)), callback)
    assert callback.stats.steps["FULL"] >= 8, callback.summary()


def test_a_validation_step_that_appends(harness: Harness):
    callback = harness.callback(warmup_steps=1)
    harness.compare(Model(appended), validate(features(20)), callback)
    assert callback.stats.steps["FULL"] >= 3, callback.summary()


@pytest.mark.parametrize("name", list(READ))
def test_copies_that_the_step_reads(harness: Harness, name: str):
    callback = harness.callback(warmup_steps=1, verify_replays=0)
    harness.compare(Model(READ[name]), validate(features(20)), callback)
    assert not callback.stats.steps["FULL"]
    (reason,) = {record.reason for record in callback.stats.reasons if record.mode == "PIECEWISE"}
    assert reason.kind is Cause.HOST_SYNC
    assert "test_host_copies.py" in reason.location


def test_a_copy_of_another_device():
    """There is no such device here, so nothing is copied: what the capture asks for is seen."""
    x = torch.empty(3, 4, device=META).t()
    with torch.inference_mode(), answered_host_copies(META):
        copies = [x.cpu(), x.to("cpu"), x.to(device=torch.device("cpu"))]
        view = copies[0].detach()
        assert view.cpu() is view
        for read in (
            *(lambda: view + 1, lambda: view[0, 0].item(), lambda: view.clone(), lambda: str(view)),
            *(view.numpy, lambda: view.T, lambda: torch.stack([view]), lambda: pickle.dumps(view)),
        ):
            with pytest.raises(CaptureError, match="reads a copy on the host"):
                read()
        assert x.to(META) is x
        assert x.to(torch.float64).device == META
    for copy in (*copies, view):
        assert isinstance(copy, HostCopy)
        assert (copy.is_cpu, len(copy), copy.shape, copy.stride()) == (True, 4, x.shape, x.stride())
        assert copy.source.device == META
        assert copy.source is not x  # the step may change it later


def test_arrays_of_one_copy_share_its_memory(monkeypatch):
    """As in eager; another copy of the same tensor has memory of its own."""
    y = torch.randn(2, 3)
    copy, other = HostCopy(y), HostCopy(y)
    array, again = (LateRead(y, "numpy", copy) for _ in range(2))
    output = [array, copy, again, array, LateRead(y, "numpy", other), LateRead(y, "tolist", copy)]
    plan, computed = OutputPlan.make(output, [], set())
    assert len(computed) == 2
    monkeypatch.setattr(Tensor, "cpu", Tensor.clone)  # as on a device
    x = torch.ones(2, 3)
    first, tensor, second, same, apart, values = plan.build([], [x, x], None)
    assert first is same
    assert first is not second
    tensor.zero_()
    assert not first.any()
    assert not second.any()
    assert apart.all()
    assert values == x.tolist()


def test_one_copy_of_each_replay():
    y = torch.randn(2, 3)
    one, two = HostCopy(y), HostCopy(y)
    plan, computed = OutputPlan.make({"y": y, "one": [one, one], "two": two}, [], set())
    assert computed == [y]
    assert not plan.is_one_tensor
    assert not OutputPlan.make(one, [], set())[0].is_one_tensor
    built = plan.build([], [torch.ones(2, 3)], None)
    assert built["one"][0] is built["one"][1]
    assert_same(built["two"], torch.ones(2, 3))
