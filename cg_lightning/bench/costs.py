"""What graphs cost beside the time that they save."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score

from cg_lightning.backends import GraphBackend, cuda
from cg_lightning.bench.cases import CASES, CLASSES, Case
from cg_lightning.bench.contestants import Nothing, Step
from cg_lightning.bench.measure import Figures, Settings, run_once
from cg_lightning.bench.run import backend_to_measure, loader
from cg_lightning.callback import CUDAGraphCallback

KEYS = 20
_MORE = 5
"""So many times the batches, and the rounds: these are small differences."""
_FEW = 4
"""Batches of one key: one is watched, one captures."""


class _TwoMetrics(Step):
    """So little for the GPU to do that a batch takes what the host takes: two input tensors, two metrics, two logs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.f1 = MulticlassF1Score(CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``loss`` and ``accuracy``, and updates ``f1`` as well."""
        inputs, labels = batch
        logits = self.net(inputs)
        self.accuracy.update(logits, labels)
        self.f1.update(logits, labels)
        self.log("loss", cross_entropy(logits, labels))
        self.log("accuracy", self.accuracy)


def host_costs(settings: Settings, backend: GraphBackend) -> dict[str, float]:
    """Microseconds a batch beyond Lightning's bare loop, each the least of all rounds: what disturbs the host only adds.

    ``any_callback``: what Lightning itself takes for a callback that does nothing. ``other_stage``: ours, in a stage that it
    does not run from graphs. ``step``: a step from one graph.
    """
    case = Case(lambda: nn.Linear(64, CLASSES), (32, 64))
    settings = dataclasses.replace(
        settings, batches=_MORE * settings.batches, rounds=_MORE * settings.rounds
    )
    data = loader(case, settings, backend.device)
    made: dict[str, tuple[LightningModule, list[Callback]]] = {
        "loop": (Nothing(nn.Identity()), []),
        "any_callback": (Nothing(nn.Identity()), [Callback()]),
        "other_stage": (
            Nothing(nn.Identity()),
            [CUDAGraphCallback(stages=["test"], backend=backend.name, report=False)],
        ),
        "step": (
            _TwoMetrics(case.network()),
            [CUDAGraphCallback(backend=backend.name, report=False)],
        ),
    }
    figures = {name: Figures([], [], {}) for name in made}
    for _ in range(settings.rounds):
        for name, (module, callbacks) in made.items():
            run_once("validate", module, callbacks, data, settings, backend, figures[name])
    assert figures["step"].mode == "FULL"
    loop = min(figures["loop"].times)
    return {
        name: round(min(figure.times) - loop, 1)
        for name, figure in figures.items()
        if name != "loop"
    }


def memory_of_keys(backend: GraphBackend) -> dict[str, float]:
    """Captures the MLP for :data:`KEYS` batch sizes; MiB that PyTorch reserves for it, and the mean time of a capture."""
    case = CASES["mlp"]
    inputs, labels = (part.to(backend.device) for part in case.batch(0))
    batches = [
        (inputs[:size], labels[:size])
        for size in range(len(labels) - KEYS + 1, len(labels) + 1)
        for _ in range(_FEW)
    ]
    graphs = CUDAGraphCallback(warmup_steps=1, verify_replays=0, backend=backend.name, report=False)
    reserved = []
    for callbacks in ([], [graphs]):  # first without, so that what eager reserves is there
        before = cuda.reserved_bytes()
        settings = Settings(1, 1, 1)
        data: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
        peak = _Peak()
        run_once(
            "validate",
            Step(case.network()),
            [*callbacks, peak],
            data,
            settings,
            backend,
            Figures([], [], {}),
        )
        reserved.append(peak.reserved - before)
    assert graphs.stats.captures == KEYS
    return {
        "keys_mebibytes": round(reserved[1] / 2**20, 1),
        "capture_milliseconds": round(graphs.stats.capture_seconds / KEYS * 1e3, 1),
    }


def measure_costs(settings: Settings, backend_name: str) -> dict[str, Any]:
    """Gives one record of :func:`host_costs` and :func:`memory_of_keys`."""
    backend = backend_to_measure(backend_name)
    return {
        "costs": {"host_microseconds": host_costs(settings, backend), **memory_of_keys(backend)}
    }


class _Peak(Callback):
    """Reads what is reserved while the graphs are still there."""

    reserved = 0

    def on_validation_epoch_end(self, *_: Any) -> None:
        """Reads it."""
        self.reserved = cuda.reserved_bytes()
