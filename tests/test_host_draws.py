"""Random numbers of the host that nobody uses: drawn again with each replay."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.dlpack
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.detectors.copied_constants import CopiedConstants
from cg_lightning.diagnosis.detectors.host_reads import HostReads
from cg_lightning.diagnosis.detectors.metric_updates import MetricUpdates
from cg_lightning.diagnosis.detectors.operations import Operations
from cg_lightning.diagnosis.detectors.random_numbers import RandomNumbers
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.diagnosis.watcher import StepWatcher
from cg_lightning.effects.host_draws import DrawAgain
from cg_lightning.effects.module_effects import ModuleEffects
from tests.harness import Harness, assert_same, features
from tests.models import Body, Predictor

META = torch.device("meta")
Use = Callable[[Any, Tensor], Any]


class DropsLayers(nn.Module):
    """As some models of transformers do it."""

    def forward(self, x: Tensor) -> Tensor:
        probability = torch.rand([])
        skips = self.training and (probability < 0.5)
        return x if skips else x * 2


def several(m: Any, x: Tensor) -> Tensor:
    torch.rand([])
    torch.randint(3, (2, 2))
    torch.randperm(5)
    torch.randn(3, dtype=torch.float64)
    return x


def branches(m: Any, x: Tensor) -> Tensor:
    return x if torch.rand([]) < 0.5 else x * 2


def kept(m: Any, x: Tensor) -> Tensor:
    m.drawn = torch.rand([])
    return x


def one_of_two(m: Any, x: Tensor) -> Any:
    torch.rand([])
    return x, torch.rand(2)[0]


def through_numpy(m: Any, x: Tensor) -> Any:
    values = torch.rand(2).numpy()
    return x * 2 if values[0] < 0.5 else x


def through_dlpack(m: Any, x: Tensor) -> Any:
    return x * 2 if np.from_dlpack(torch.rand(2))[0] < 0.5 else x


def through_a_capsule(m: Any, x: Tensor) -> Any:
    capsule = torch.utils.dlpack.to_dlpack(torch.rand(2))
    return x * 2 if torch.utils.dlpack.from_dlpack(capsule)[0] < 0.5 else x


def in_place(m: Any, x: Tensor) -> Tensor:
    torch.empty(3).uniform_()
    return x


def of_python(m: Any, x: Tensor) -> Tensor:
    torch.rand([])
    random.random()
    return x


def of_numpy(m: Any, x: Tensor) -> Tensor:
    np.random.rand()
    torch.rand([])
    return x


def seeded(m: Any, x: Tensor) -> Tensor:
    torch.rand([])
    torch.manual_seed(3)
    return x


UNUSED: dict[str, Use] = {
    "one": lambda m, x: (torch.rand([]), x)[1],
    "several": several,
    "in a submodule": lambda m, x: m.drops(m.drops(x)),
    "detached": lambda m, x: (torch.rand(2).detach(), x)[1],
}
USED: dict[str, Use] = {
    "branches": branches,
    "kept": kept,
    "returned": lambda m, x: (x, torch.rand([])),
    "one of two": one_of_two,
    "a number": lambda m, x: x * torch.rand([]),
    "in place": in_place,
    "Python's": of_python,
    "NumPy's": of_numpy,
    "seeded": seeded,
}


READ_UNSEEN: dict[str, Use] = {
    "numpy": through_numpy,
    "dlpack": through_dlpack,
    "a capsule of dlpack": through_a_capsule,
}
"""No operation shows that the values are read."""


class Net(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.drops = DropsLayers()
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def watch(
    use: Use, detectors: Sequence[type[Detector]] = (RandomNumbers, Operations, HostReads)
) -> WatchedStep:
    net, x = Net(use).eval(), torch.empty(3, 4, device=META)
    watcher = StepWatcher(net, RecorderBackend(META), effects=None, detectors=detectors)
    with torch.inference_mode():
        return watcher.watch(net, x, (x,))[1]


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", UNUSED)
def test_what_nobody_uses_is_no_finding_and_is_drawn_again(name):
    torch.manual_seed(0)
    watched = watch(UNUSED[name])
    after = torch.get_rng_state()
    assert [str(finding) for finding in watched.findings] == []
    torch.manual_seed(0)
    DrawAgain(watched.host_draws).before_replay()
    assert_same(torch.get_rng_state(), after)


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", UNUSED)
def test_a_metric_that_the_step_does_not_update_changes_nothing(name):
    step, x = Draws(UNUSED[name]).eval(), torch.empty(3, 8, device=META)
    step.mean = MeanMetric()
    effects = ModuleEffects(step, META)
    watcher = StepWatcher(
        step, RecorderBackend(META), effects=effects, detectors=(MetricUpdates, RandomNumbers)
    )
    with torch.inference_mode():
        watched = watcher.watch(lambda batch: step.use(step, batch), x, (x,))[1]
    assert [str(finding) for finding in watched.findings] == []
    assert watched.host_draws


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", USED)
def test_what_is_used_is_found(name):
    watched = watch(USED[name])
    assert Cause.HOST_RANDOMNESS in {finding.cause for finding in watched.findings}


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", READ_UNSEEN)
def test_what_no_operation_reads_is_found(name):
    watched = watch(READ_UNSEEN[name])
    assert Cause.HOST_SYNC in {finding.cause for finding in watched.findings}


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", READ_UNSEEN)
def test_what_no_operation_reads_is_found_where_a_device_waits_for_nothing(name):
    """On CUDA nothing waits for a tensor of the host."""
    watched = watch(READ_UNSEEN[name], detectors=(RandomNumbers, CopiedConstants))
    assert Cause.HOST_RANDOMNESS in {finding.cause for finding in watched.findings}


class Draws(Predictor):
    def __init__(self, use: Use) -> None:
        super().__init__(Body())
        self.drops = DropsLayers()
        self.use = use
        self.mean = MeanMetric()

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.use(self, self.net(batch[0]))


class DrawsToo(Callback):
    """Keeps what it draws on the host after each batch."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def on_predict_batch_end(self, *_: Any) -> None:
        self.drawn.append(torch.rand(2))


def run(harness: Harness, use: Use, *callbacks: Any) -> Any:
    torch.manual_seed(1)
    draws = DrawsToo()
    trainer = harness.trainer(*callbacks, draws)
    outputs = [trainer.predict(Draws(use), features(56)) for _ in range(2)]
    return outputs, draws.drawn, torch.get_rng_state()


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", [{}, {"verify_replays": 0}, {"mode": "PIECEWISE"}], ids=str)
@pytest.mark.parametrize("name", [*UNUSED, *USED, *READ_UNSEEN])
def test_the_host_draws_what_it_draws_in_eager(harness, name, settings):
    """Hazard 9."""
    use = {**UNUSED, **USED, **READ_UNSEEN}[name]
    callback = harness.callback(**settings)
    found = run(harness, use, callback)
    assert_same(found, run(harness, use))
    if name in UNUSED and "mode" not in settings:
        assert callback.stats.steps["FULL"] > 10, callback.summary()
    if name in (*USED, *READ_UNSEEN) and harness.backend == "cuda":
        assert callback.stats.steps["FULL"] == 0, callback.summary()
