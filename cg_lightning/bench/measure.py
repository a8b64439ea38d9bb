"""Measures the time of a batch: contestants take turns, all in one process."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cg_lightning.backends import CapturedGraph, GraphBackend
from cg_lightning.callback import CUDAGraphCallback
from cg_lightning.core.settings import check_name
from cg_lightning.core.stages import TRAIN

EVALUATIONS = ("validate", "predict")
STAGES = (*EVALUATIONS, TRAIN)

PLACES = ("device", "host", "pinned")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much to measure."""

    batches: int
    """Batches in one measurement."""
    warmup: int
    """Batches before each measurement. They are not timed."""
    rounds: int
    """Measurements of each contestant. Contestants take turns, so drift affects all of them."""
    batches_on: str = "device"
    """Where the loader's batches are: ``device``, ``host`` or ``pinned`` (pinned host memory)."""

    def __post_init__(self) -> None:
        check_name("bench.batches_on", self.batches_on, PLACES)


@runtime_checkable
class HasGraphs(Protocol):
    """A callback with graphs, whose time on the device is measured."""

    def graphs(self, mode: str) -> list[CapturedGraph]:
        """Return the graphs of one mode."""


class BatchTimer(Callback):
    """Measures microseconds per batch after the warm-up.

    If there is one graph, it also measures the replay of that graph alone.
    """

    def __init__(self, settings: Settings, backend: GraphBackend, graphs: HasGraphs | None) -> None:
        self._settings = settings
        self._backend = backend
        self._graphs = graphs
        self.microseconds = 0.0
        self.latest_output: Any = None
        self.replay: float | None = None
        self.weights: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Reads the time after the warm-up and after the last batch; stores the latest output."""
        self.latest_output = outputs
        if batch_idx == self._settings.warmup - 1:
            self._backend.synchronize()
            self._began = time.perf_counter()
        if batch_idx == self._settings.warmup + self._settings.batches - 1:
            self._backend.synchronize()
            self.microseconds = (time.perf_counter() - self._began) / self._settings.batches * 1e6

    on_predict_batch_end = on_train_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the graph alone. All results were returned, so more replays do no harm."""
        graphs = [] if self._graphs is None else self._graphs.graphs("FULL")
        if len(graphs) == 1:
            self._backend.synchronize()
            began = time.perf_counter()
            for _ in range(self._settings.batches):
                graphs[0].replay()
            self._backend.synchronize()
            self.replay = (time.perf_counter() - began) / self._settings.batches * 1e6

    on_predict_end = on_validation_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stores weights and buffers, which more replays would change, and measures the graph."""
        self.weights = weights(pl_module)
        self.on_validation_end(trainer, pl_module)


@dataclasses.dataclass
class Measurement:
    """All rounds of one contestant on one case, and the values that it logged or predicted."""

    times: list[float]
    """Microseconds per batch, one number for each round."""
    replays: list[float]
    """Microseconds per replay of the step's graph, one number for each round that had one."""
    values: dict[str, Tensor]
    """Logged values and the latest prediction of the latest round."""
    weights: list[Tensor] = dataclasses.field(default_factory=list)
    """Weights and buffers after the latest round of training."""
    against_eager: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How they compare with those of eager's first round."""
    capture_milliseconds: float = 0.0
    """Mean time of a capture."""
    mode: str = ""
    """The runtime mode of most steps; empty without the callback."""

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """The difference between the slowest and the fastest round."""
        return max(self.times) - min(self.times)


def weights(module: nn.Module) -> list[Tensor]:
    """Return copies of all parameters and buffers, on the host."""
    return [value.cpu().clone() for value in module.state_dict().values()]


def bare_trainer(backend: GraphBackend, callbacks: list[Callback], **settings: Any) -> Trainer:
    """Return a Trainer on the device of ``backend`` that does nothing but the loop."""
    return Trainer(
        accelerator="gpu" if backend.device.type == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def batches_in_turn(distinct: Sequence[Any], number: int) -> DataLoader[Any]:
    """Return a loader of ``number`` batches, which repeats the distinct ones in turn."""
    items = list(itertools.islice(itertools.cycle(distinct), number))
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]  # a list will do


def run_once(
    stage: str, module: LightningModule, callbacks: list[Callback], data: DataLoader[Any],
    settings: Settings, backend: GraphBackend, measurement: Measurement,
) -> None:  # fmt: skip
    """Runs one evaluation or training and adds its round to ``measurement``.

    Args:
        stage: One of :data:`STAGES`.
        module: The module to evaluate or train.
        callbacks: The callbacks of the contestant.
        data: Exactly ``settings.warmup + settings.batches`` batches.
        settings: How much to measure.
        backend: The backend, which knows the device.
        measurement: The earlier rounds of the same contestant.
    """
    graphs = next((callback for callback in callbacks if isinstance(callback, HasGraphs)), None)
    timer = BatchTimer(settings, backend, graphs)
    of_training = {"max_epochs": 1, "gradient_clip_val": 1.0} if stage == TRAIN else {}
    trainer = bare_trainer(backend, [timer, *callbacks], **of_training)
    if stage == TRAIN:
        trainer.fit(module, data)
        measurement.weights = timer.weights
    elif stage == "validate":
        trainer.validate(module, data, verbose=False)
        measurement.values = dict(trainer.callback_metrics)
    else:
        trainer.predict(module, data, return_predictions=False)
        output = timer.latest_output
        measurement.values = {} if output is None else {"prediction": output}
    measurement.times.append(timer.microseconds)
    if timer.replay is not None:
        measurement.replays.append(timer.replay)
    if isinstance(graphs, CUDAGraphCallback):
        steps = graphs.stats.steps_of(stage)
        measurement.mode = max(("NONE", *steps), key=lambda mode: steps.get(mode, 0))
        captures = max(1, graphs.stats.captures)
        measurement.capture_milliseconds = graphs.stats.capture_seconds / captures * 1e3
