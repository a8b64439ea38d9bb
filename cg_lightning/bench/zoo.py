"""Runs the models of :mod:`~cg_lightning.bench.zoo_models` with and without graphs."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from cg_lightning.backends import GraphBackend
from cg_lightning.bench.measure import (
    EVALUATIONS,
    Measurement,
    Settings,
    bare_trainer,
    batches_in_turn,
    run_once,
)
from cg_lightning.bench.records import read_lines
from cg_lightning.bench.zoo_models import MODELS, ZooModel
from cg_lightning.callback import CUDAGraphCallback
from cg_lightning.core.equality import same_leaf
from cg_lightning.core.tree import flatten

_DISTINCT_BATCHES = 6
_CHECKED_BATCHES = 30


class ZooStep(LightningModule):
    """The steps of a user: a model, a mean, an accuracy if there are classes, and their logs."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.mean = MeanMetric()
        self.accuracy: MulticlassAccuracy | None = None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Log the mean of the output, and return it."""
        output = _main_output(self.net(**batch))
        value = output.float().mean()
        self.mean.update(value)
        self.log("mean", self.mean, batch_size=len(output))
        self.log("value", value, batch_size=len(output))
        return output

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the main output of the model."""
        return _main_output(self.net(**batch))


def _main_output(output: Any) -> Tensor:
    """Return the logits, or else the first tensor."""
    if isinstance(output, Tensor):
        return output
    values = output if isinstance(output, dict) else dict(enumerate(output))
    for name in ("logits", "out", "logits_per_image"):
        if name in values:
            return values[name]  # type: ignore[no-any-return]
    return next(value for value in values.values() if isinstance(value, Tensor))


@dataclasses.dataclass
class ZooResult:
    """The result of one stage of one model."""

    model: str
    stage: str
    mode: str = ""
    """The mode of most steps; empty if the model could not be made or run, even without graphs."""
    difference: str = ""
    """The first value that differs from eager; empty if all are equal in every bit."""
    repeats: bool = True
    """False if two eager runs differ from each other, so a difference shows nothing."""
    reason: str = ""
    """Why most steps ran in a lower mode than FULL, or why there is no result."""
    eager: float = 0.0
    """Microseconds a batch without graphs."""
    graphs: float = 0.0
    """Microseconds a batch with graphs."""

    @property
    def is_wrong(self) -> bool:
        """Whether graphs gave another value than eager, which repeats itself."""
        return bool(self.difference) and self.repeats


class _Keeps(Callback):
    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self.outputs.append(outputs)

    on_predict_batch_end = on_validation_batch_end


def visit(names: Sequence[str], settings: Settings, backend: GraphBackend) -> Iterator[ZooResult]:
    """Yield a result for each model and stage.

    Args:
        names: Models of :data:`~cg_lightning.bench.zoo_models.MODELS`.
        settings: How much to measure.
        backend: Captures and replays.
    """
    for name in names:
        model = MODELS[name]
        if not model.is_available:
            yield ZooResult(name, "", reason=f"{model.library} is not installed")
            continue
        try:
            seed_everything(0, verbose=False)
            step = ZooStep(model.make().eval())
        except Exception as error:
            yield ZooResult(name, "", reason=f"{type(error).__name__}: {error}"[:200])
            continue
        for stage in EVALUATIONS:
            yield _visit(ZooResult(name, stage), model, step, settings, backend)


def _visit(
    result: ZooResult, model: ZooModel, step: ZooStep, settings: Settings, backend: GraphBackend
) -> ZooResult:
    distinct = [
        {key: value.to(backend.device) for key, value in model.inputs(seed).items()}
        for seed in range(_DISTINCT_BATCHES)
    ]
    try:
        expected = _outputs(result.stage, copy.deepcopy(step), distinct, None, backend)
    except Exception as error:
        result.reason = f"eager raises {type(error).__name__}: {error}"[:200]
        return result
    callback = CUDAGraphCallback(backend=backend.name, report=False)
    found = _outputs(result.stage, copy.deepcopy(step), distinct, callback, backend)
    result.difference = _first_difference(found, expected)
    if result.difference:  # atomic additions, for example, give other bits in each run
        again = _outputs(result.stage, copy.deepcopy(step), distinct, None, backend)
        result.repeats = not _first_difference(again, expected)
    steps = callback.stats.steps_of(result.stage)
    result.mode = max(("NONE", *steps), key=lambda mode: steps.get(mode, 0))
    if result.mode != "FULL":
        reasons = sorted(callback.stats.reasons, key=lambda record: -record.steps)
        result.reason = next((str(record.reason) for record in reasons), "")
    result.eager = _time(result.stage, copy.deepcopy(step), [], distinct, settings, backend)
    graphs: list[Callback] = [CUDAGraphCallback(backend=backend.name, report=False)]
    result.graphs = _time(result.stage, copy.deepcopy(step), graphs, distinct, settings, backend)
    return result


def _outputs(
    stage: str, step: ZooStep, distinct: list[Any], callback: Callback | None, backend: GraphBackend
) -> list[Any]:
    """Return all outputs and logged values of a run."""
    keeps = _Keeps()
    trainer = bare_trainer(backend, [keeps] if callback is None else [keeps, callback])
    data = batches_in_turn(distinct, _CHECKED_BATCHES)
    if stage == "validate":
        trainer.validate(step, data, verbose=False)
    else:
        trainer.predict(step, data, return_predictions=False)
    return [*keeps.outputs, dict(trainer.callback_metrics)]


def _first_difference(found: list[Any], expected: list[Any]) -> str:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        leaves, others = flatten(one)[0], flatten(other)[0]
        if len(leaves) != len(others):
            return f"batch {index}: {len(leaves)} leaves, eager has {len(others)}"
        for number, (leaf, wanted) in enumerate(zip(leaves, others, strict=True)):
            if isinstance(wanted, Tensor) and not same_leaf(leaf, wanted):
                return f"batch {index}, leaf {number}"
    return ""


def _time(
    stage: str,
    step: ZooStep,
    callbacks: list[Callback],
    distinct: list[Any],
    settings: Settings,
    backend: GraphBackend,
) -> float:
    measurement = Measurement([], [], {})
    data = batches_in_turn(distinct, settings.warmup + settings.batches)
    for _ in range(settings.rounds):
        run_once(stage, step, callbacks, data, settings, backend, measurement)
    return measurement.median


HEADER = """\
| model | stage | mode | equal | eager us | callback us | factor | reason |
|---|---|---|---|---|---|---|---|"""


def row(result: ZooResult) -> str:
    """Return a result as a line of a Markdown table."""
    reason = re.sub(r"[^\s(]*/site-packages/", "", result.reason).replace("|", r"\|")
    reason = " ".join(reason.split())
    if not result.mode:
        return f"| {result.model} | {result.stage} | - | - | | | | {reason} |"
    equal = f"**no**: {result.difference}" if result.difference else "yes"
    equal = equal if result.repeats else "eager does not repeat itself"
    return (
        f"| {result.model} | {result.stage} | {result.mode} | {equal} | {result.eager:.0f} | "
        f"{result.graphs:.0f} | {result.eager / result.graphs:.2f} | {reason} |"
    )


def counts(results: Sequence[ZooResult]) -> str:
    """Return how many runs there were of each kind."""
    ran = [result for result in results if result.mode]
    modes = ", ".join(
        f"{sum(result.mode == mode for result in ran)} {mode}"
        for mode in ("FULL", "PIECEWISE", "NONE")
    )
    wrong = sum(result.is_wrong for result in ran)
    slower = sum(result.graphs > 1.02 * result.eager for result in ran)
    lines = [f"{len(ran)} runs: {modes}; {wrong} differ from eager; {slower} slower by 2 %."]
    if others := sorted({result.model for result in results if not result.mode}):
        lines.append(f"{len(others)} models without a run: {', '.join(others)}.")
    return "\n".join(lines)


def zoo_table(results: Sequence[ZooResult]) -> str:
    """Return the results as a Markdown table, with counts."""
    return "\n".join([HEADER, *map(row, results), "", counts(results)])


def read_results(files: Iterable[Path]) -> list[ZooResult]:
    """Return the results of all files, by model and stage. The last one of each counts."""
    found: dict[tuple[str, str], ZooResult] = {}
    for file in files:
        for record in read_lines(file):
            result = ZooResult(**record)
            found[result.model, result.stage] = result
    return list(found.values())
