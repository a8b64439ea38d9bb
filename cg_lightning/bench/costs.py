"""The costs of graphs: time on the host, memory, and captures."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score

from cg_lightning.backends import GraphBackend, cuda
from cg_lightning.bench.cases import CASES, CLASSES, Case
from cg_lightning.bench.contestants import BenchmarkStep, Contestant, EmptyStep
from cg_lightning.bench.measure import Measurement, Settings, run_once
from cg_lightning.bench.run import backend_to_measure, loader
from cg_lightning.callback import CUDAGraphCallback

KEYS = 20
"""Number of batch sizes in :func:`memory_of_keys`."""
_REPEATS = 5
"""Factor on batches and rounds, because the differences to measure are small."""
_BATCHES_PER_KEY = 4
"""The first batch is watched, the second one captures, and two are replayed."""


class _TwoMetrics(BenchmarkStep):
    """A step with two input tensors, two metrics and two logs.

    With a small network the GPU has so little to do that a batch takes the time of the host.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.f1 = MulticlassF1Score(CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``loss`` and ``accuracy``, and update ``f1``."""
        inputs, labels = batch
        logits = self.net(inputs)
        self.accuracy.update(logits, labels)
        self.f1.update(logits, labels)
        self.log("loss", cross_entropy(logits, labels))
        self.log("accuracy", self.accuracy)


def host_costs(settings: Settings, backend: GraphBackend) -> dict[str, float]:
    """Return microseconds per batch that are added to Lightning's bare loop.

    Each number is the minimum of all rounds, because disturbances of the host only add time.

    - ``any_callback``: the cost of Lightning for a callback that does nothing.
    - ``other_stage``: the cost of our callback in a stage that is not in ``stages``.
    - ``step``: the cost of a step that runs from one graph.
    """
    case = Case(lambda: nn.Linear(64, CLASSES), (32, 64))
    settings = dataclasses.replace(
        settings, batches=_REPEATS * settings.batches, rounds=_REPEATS * settings.rounds
    )
    data = loader(case, settings, backend.device)
    contestants: dict[str, Contestant] = {
        "loop": (EmptyStep(nn.Identity()), []),
        "any_callback": (EmptyStep(nn.Identity()), [Callback()]),
        "other_stage": (
            EmptyStep(nn.Identity()),
            [CUDAGraphCallback(stages=["test"], backend=backend.name, report=False)],
        ),
        "step": (
            _TwoMetrics(case.network()),
            # a stage of such cheap steps may be too short to win back a graph
            [CUDAGraphCallback(backend=backend.name, report=False, min_saving=0)],
        ),
    }
    measurements = {name: Measurement([], [], {}) for name in contestants}
    for _ in range(settings.rounds):
        for name, (module, callbacks) in contestants.items():
            run_once("validate", module, callbacks, data, settings, backend, measurements[name])
    assert measurements["step"].mode == "FULL"
    loop = min(measurements["loop"].times)
    return {
        name: round(min(measurement.times) - loop, 1)
        for name, measurement in measurements.items()
        if name != "loop"
    }


def memory_of_keys(backend: GraphBackend) -> dict[str, float]:
    """Capture the MLP for :data:`KEYS` batch sizes.

    Return the MiB that PyTorch reserves for the graphs, and the mean time of a capture.
    """
    case = CASES["mlp"]
    inputs, labels = (part.to(backend.device) for part in case.batch(0))
    batches = [
        (inputs[:size], labels[:size])
        for size in range(len(labels) - KEYS + 1, len(labels) + 1)
        for _ in range(_BATCHES_PER_KEY)
    ]
    graphs = CUDAGraphCallback(
        warmup_steps=1, verify_replays=0, min_saving=0, backend=backend.name, report=False
    )
    reserved = []
    for callbacks in ([], [graphs]):  # the run without graphs reserves the memory of eager steps
        before = cuda.reserved_bytes()
        settings = Settings(1, 1, 1)
        data: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        module, peak = BenchmarkStep(case.network()), _ReservedMemory()
        unused = Measurement([], [], {})
        run_once("validate", module, [*callbacks, peak], data, settings, backend, unused)
        reserved.append(peak.reserved - before)
    assert graphs.stats.captures == KEYS
    return {
        "keys_mebibytes": round(reserved[1] / 2**20, 1),
        "capture_milliseconds": round(graphs.stats.capture_seconds / KEYS * 1e3, 1),
    }


def measure_costs(settings: Settings, backend_name: str) -> dict[str, Any]:
    """Return one record with :func:`host_costs` and :func:`memory_of_keys`."""
    backend = backend_to_measure(backend_name)
    return {
        "costs": {"host_microseconds": host_costs(settings, backend), **memory_of_keys(backend)}
    }


class _ReservedMemory(Callback):
    """Reads the reserved memory while the graphs still exist."""

    reserved = 0

    def on_validation_epoch_end(self, *_: Any) -> None:
        """Read it."""
        self.reserved = cuda.reserved_bytes()
