"""Times evaluations, in turn and in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from cg_lightning.backends import GraphBackend
from cg_lightning.callback import CUDAGraphCallback

STAGES = ("validate", "predict")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long it is measured."""

    batches: int
    """Batches in one measurement."""
    warmup: int
    """Batches before it."""
    rounds: int
    """Measurements of each, in turn, so that drift hits all alike."""


class Clock(Callback):
    """Microseconds a batch, without the first ones; and of the graph of a whole step, if there is one."""

    def __init__(
        self, settings: Settings, backend: GraphBackend, graphs: CUDAGraphCallback | None
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._graphs = graphs
        self.microseconds = 0.0
        self.latest: Any = None
        self.replay: float | None = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any
    ) -> None:
        """Reads the time after the last batch of the warm-up and after the last one."""
        self._read(rest[1])

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any
    ) -> None:
        """Likewise, and keeps what was predicted."""
        self._read(rest[1])
        self.latest = outputs

    def _read(self, batch_idx: int) -> None:
        if batch_idx == self._settings.warmup - 1:
            self._backend.synchronize()
            self._began = time.perf_counter()
        if batch_idx == self._settings.warmup + self._settings.batches - 1:
            self._backend.synchronize()
            self.microseconds = (time.perf_counter() - self._began) / self._settings.batches * 1e6

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All results are out: replays do no harm now."""
        installation = None if self._graphs is None else self._graphs._installation
        graphs = [] if installation is None else installation.graphs_of_steps()
        if len(graphs) == 1:
            self._backend.synchronize()
            began = time.perf_counter()
            for _ in range(self._settings.batches):
                graphs[0].replay()
            self._backend.synchronize()
            self.replay = (time.perf_counter() - began) / self._settings.batches * 1e6

    on_predict_end = on_validation_end


@dataclasses.dataclass
class Figures:
    """What one contestant took, in microseconds a batch, and what it logged and predicted."""

    times: list[float]
    replays: list[float]
    values: dict[str, torch.Tensor]
    capture_milliseconds: float = 0.0
    mode: str = ""

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """From the fastest to the slowest round."""
        return max(self.times) - min(self.times)


def run_once(
    stage: str, module: LightningModule, callbacks: list[Callback], data: DataLoader[Any], settings: Settings,
    backend: GraphBackend, figures: Figures,
) -> None:  # fmt: skip
    """Evaluates once, and adds what it took to ``figures``, in microseconds a batch.

    Args:
        stage: One of :data:`STAGES`.
        module: The module.
        callbacks: Those that the contestant needs.
        data: As many batches as ``settings`` say.
        settings: How long it is measured.
        backend: Where.
        figures: Of the contestant so far.
    """
    graphs = next(
        (callback for callback in callbacks if isinstance(callback, CUDAGraphCallback)), None
    )
    clock = Clock(settings, backend, graphs)
    trainer = Trainer(
        accelerator="gpu" if backend.device.type == "cuda" else "cpu",
        devices=1,
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if stage == "validate":
        trainer.validate(module, data, verbose=False)
        figures.values = dict(trainer.callback_metrics)
    else:
        trainer.predict(module, data, return_predictions=False)
        figures.values = {} if clock.latest is None else {"prediction": clock.latest}
    figures.times.append(clock.microseconds)
    if clock.replay is not None:
        figures.replays.append(clock.replay)
    if graphs is not None:
        steps = graphs.stats.graphed_steps(stage)
        figures.mode = max(("NONE", *steps), key=lambda mode: steps.get(mode, 0))
        captures = max(1, graphs.stats.captures)
        figures.capture_milliseconds = graphs.stats.capture_seconds / captures * 1e3
