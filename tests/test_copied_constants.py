"""Tensors of the host that a step copies to the device: made before the capture, and guarded.

A machine without a GPU has one device that computes nothing, ``meta``: there a copy from the host
is seen, and so is what a capture asks for. The numbers are compared on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cg_lightning import BatchDescriptor, CUDAGraphMode, ForwardContext, graphed
from cg_lightning.backends import RecorderBackend
from cg_lightning.capture.host_constants import HostConstants
from cg_lightning.core.causes import Cause
from cg_lightning.core.forward_context import override_forward_context
from cg_lightning.diagnosis.detectors.attribute_reads import AttributeReads
from cg_lightning.diagnosis.detectors.copied_constants import CopiedConstants
from cg_lightning.diagnosis.detectors.global_reads import GlobalReads
from cg_lightning.diagnosis.detectors.host_constants import HostConstants as HostConstantCalls
from cg_lightning.diagnosis.detectors.host_reads import HostReads
from cg_lightning.diagnosis.detectors.operations import Operations
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.diagnosis.watcher import StepWatcher
from cg_lightning.guards.guard_set import GuardSet
from tests.harness import assert_same

DETECTORS = (AttributeReads, CopiedConstants, Operations, HostReads, HostConstantCalls, GlobalReads)
"""Those that compare no tensors of the device."""
META = torch.device("meta")
Use = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._use = use
        self.table = torch.arange(12.0).reshape(3, 4)
        self.scale = torch.tensor(2.0)
        self.columns = torch.tensor([1, 0, 1])
        self.array = np.array([1.0, 2.0, 3.0, 4.0])
        self.large = torch.arange(40000.0).reshape(10000, 4)

    def forward(self, x: Tensor) -> Any:
        return self._use(self, self.linear(x))


def written(x: Tensor, value: Tensor) -> Tensor:
    return torch.zeros_like(x[0]).copy_(value) + x


def put(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.tensor(3).type_as(x) + torch.tensor([1.0, 2.0, 3.0, 4.0]).to(x.device)


CONSTANT: dict[str, Use] = {
    "an attribute": lambda m, x: x + m.table.to(x.device),
    "another type": lambda m, x: x + m.table[0].to(x.device, torch.float64),
    "like another tensor": lambda m, x: x * m.scale.to(x),
    "type_as": lambda m, x: x * m.table[1].double().type_as(x),
    "a range": lambda m, x: x + torch.arange(x.shape[1]).to(x.device),
    "a list": lambda m, x: x + torch.as_tensor([1.0, 2.0, 3.0, 4.0]).to(x.device),
    "an array": lambda m, x: x + torch.from_numpy(m.array).to(x),
    "from an array": lambda m, x: x + torch.as_tensor(m.array, device=x.device),
    "copied into a tensor": lambda m, x: written(x, m.table[2]),
    "a number": lambda m, x: x * m.scale,
    "an index": lambda m, x: x[:, m.columns],
    "an index made here": lambda m, x: x[torch.tensor([1, 0])],
    "set": lambda m, x: put(x, (slice(None), m.columns), m.scale),
    "added to": lambda m, x: torch.index_put(x, (m.columns,), m.scale, accumulate=True),
    "TorchScript": lambda m, x: scripted(x),
    "made on the host": lambda m, x: x + torch.linspace(0, 1, 4).add_(m.scale).to(x.device),
    "filled and dropped": lambda m, x: x * torch.from_numpy(np.ones(4)).fill_(2.0).to(x),
    "without elements": lambda m, x: x.sum() + m.table[:0].to(x.device).sum(),
    "a list index": lambda m, x: x[[0, 1, 0]],
}
COPY_NOTHING = ("a number", "from an array", "a list index")
"""On ``meta`` a list that is an index needs no copy."""
LOWER: dict[str, Use] = {
    "a large tensor": lambda m, x: x + m.large.to(x.device)[: len(x)],
    "written on the host": lambda m, x: x * m.scale.add_(1.0),
    "filled and kept": lambda m, x: x * m.scale.fill_(2.0),
    "drawn on the host": lambda m, x: x + torch.rand(4).to(x.device),
    "a mask": lambda m, x: x[:, torch.tensor([True, False, True, False])],
}


def watch(net: Net) -> WatchedStep:
    watcher = StepWatcher(net, RecorderBackend(META), effects=None, detectors=DETECTORS)
    x = torch.empty(3, 4, device=META)
    key = BatchDescriptor.from_batch(x)
    with (
        torch.inference_mode(),
        override_forward_context(ForwardContext(CUDAGraphMode.NONE, key)),
    ):
        return watcher.watch(net, x, (x,))[1]


def net_on(device: torch.device, use: Use) -> Net:
    torch.manual_seed(3)
    return Net(use).to(device).eval()


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", list(CONSTANT))
def test_copies_of_constants_are_no_finding(name):
    watched = watch(net_on(META, CONSTANT[name]))
    assert [str(finding) for finding in watched.findings] == []


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", [n for n in CONSTANT if n not in COPY_NOTHING])
def test_a_capture_asks_for_what_it_copies(name):
    net = net_on(META, CONSTANT[name])
    assert watch(net).copies_from_host()
    constants, backend = HostConstants(META, with_copies=True), RecorderBackend(META)
    x = torch.empty(3, 4, device=META)

    def run() -> Any:
        with constants.answered() as asked_for:
            net(x)
        return asked_for

    settings = {"collect_garbage": False, "capture_error_mode": "thread_local"}
    with torch.inference_mode():
        _, first = backend.capture(run, **settings)
        assert not constants.are_made(first)
        constants.make(first)
        _, second = backend.capture(run, **settings)
    assert constants.are_made(second)
    assert all(tensor.device == META for tensor in constants.tensors)


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", list(LOWER))
def test_what_is_not_constant_is_found(name):
    watched = watch(net_on(META, LOWER[name]))
    assert {finding.cause for finding in watched.findings} & {
        *(Cause.CROSS_DEVICE_COPY, Cause.STATE_REBOUND, Cause.DATA_DEPENDENT_SHAPE),
        Cause.HOST_SYNC,
    }


COPIED_BACK: dict[str, Use] = {
    "made of the network": lambda m, x: x + x.cpu().to(x.device),
    "copied to the host": lambda m, x: x + torch.zeros(3, 4).copy_(x).to(x.device),
    "a list of numbers": lambda m, x: x * torch.tensor([x[0, 0], 1.0, 2.0, 3.0]).to(x.device),
}
"""Nothing can be copied from ``meta``."""
CHANGES: dict[str, tuple[Use, Callable[[Net], Any]]] = {
    "in place": (CONSTANT["an attribute"], lambda m: m.table.mul_(2.0)),
    "through data": (CONSTANT["an attribute"], lambda m: m.table.data.mul_(2.0)),
    "a number": (CONSTANT["a number"], lambda m: m.scale.fill_(3.0)),
    "the sign of zero": (CONSTANT["a number"], lambda m: m.scale.fill_(-0.0)),
    "another tensor": (CONSTANT["an index"], lambda m: setattr(m, "columns", 1 - m.columns)),
    "an array": (CONSTANT["an array"], lambda m: m.array.__setitem__(1, 7.0)),
    "a list": (lambda m, x: x * m.table[0].tolist()[1], lambda m: m.table.add_(1.0)),
    "a view by numpy": (lambda m, x: x * float(m.table.numpy()[0, 1]), lambda m: m.table.add_(1)),
    "one of a large tensor": (lambda m, x: x * m.large[7, 1], lambda m: m.large.mul_(2.0)),
}


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", list(CHANGES))
def test_guards_see_what_changes_on_the_host(name):
    """Hazard 7."""
    use, change = CHANGES[name]
    net = net_on(META, use)
    net.scale.fill_(0.0)
    guards = GuardSet(watch(net).sources())
    assert guards.check()
    change(net)
    assert not guards.check()
    assert guards.explain()


USES = {**CONSTANT, **LOWER, **COPIED_BACK}


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", [*CONSTANT, *LOWER, *COPIED_BACK, *CHANGES])
def test_the_numbers_are_those_of_eager(name, verify_replays, backend, device):
    """Hazards 7 and 12. Each kind of change comes once in eight batches, and once is undone."""
    use, change = CHANGES.get(name) or (USES[name], lambda m: None)
    net = net_on(device, use)
    reference = copy.deepcopy(net)
    batches = torch.randn(24, 3, 4, generator=torch.Generator().manual_seed(1))
    found, expected = [], []
    with (
        torch.inference_mode(),
        graphed(net, backend=backend, verify_replays=verify_replays) as fast,
    ):
        for index, x in enumerate(batches.to(device)):
            for module in (net, reference):
                if index % 8 == 7:
                    change(module)
            torch.manual_seed(index)
            found.append(fast(x))
            torch.manual_seed(index)
            expected.append(reference(x))
    assert_same(found, expected)
    is_full = fast.stats.steps["FULL"] > 0
    assert is_full or name not in CONSTANT or backend == "recorder", fast.summary()
