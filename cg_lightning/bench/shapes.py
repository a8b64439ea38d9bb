"""Batches of text whose lengths vary: padded graphs against eager and ``torch.compile``.

``python -m cg_lightning.bench.shapes`` needs a GPU and transformers. With ``--backend recorder``
and ``--layers 1`` it runs without a GPU, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import statistics
import warnings
from time import perf_counter
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cg_lightning.backends import GraphBackend, resolve_backend
from cg_lightning.bench.cases import CASES, CLASSES, Logits
from cg_lightning.bench.contestants import Classifier
from cg_lightning.bench.measure import bare_trainer, batches_in_turn
from cg_lightning.callback import CUDAGraphCallback
from cg_lightning.core.shape_proposal import SeenShape, ShapeProposal

BATCH, SHORTEST, LONGEST, TOKENS = 8, 8, 128, 30522


class TextClassifier(Classifier):
    """Classifies texts; logs the loss and the accuracy.

    Its network maps ``input_ids`` and ``attention_mask`` to an object with ``logits``.
    """

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(batch["input_ids"], batch["attention_mask"]).logits
        return logits

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracy."""
        logits = self.predict_step(batch, batch_idx)
        self.accuracy.update(logits, batch["labels"])
        self.log("loss", nn.functional.cross_entropy(logits, batch["labels"]))
        self.log("accuracy", self.accuracy)


class Result(NamedTuple):
    """Times and results of one contestant."""

    seconds: float
    """For the whole run: warm-ups, captures and checks included, compilation not."""
    steady: float
    """For one batch of the last quarter."""
    batches: int
    values: list[Tensor]
    """Predictions or metrics."""

    @property
    def setup(self) -> float:
        """What the run took longer than if all batches were like those of the last quarter."""
        return self.seconds - self.batches * self.steady


class _LastQuarter(Callback):
    """Takes the time from the begin of a stage's last quarter on.

    Args:
        first: The number of the first batch of the quarter.
        backend: Knows the device.
    """

    def __init__(self, first: int, backend: GraphBackend) -> None:
        self._first = first
        self._backend = backend
        self.began = 0.0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the time.

        It is not taken when a batch starts: values of batches that a hook is given before the step
        are read on the device.
        """
        if batch_idx == self._first - 1:
            self._backend.synchronize()
            self.began = perf_counter()

    on_predict_batch_end = on_validation_batch_end


def texts(number: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Return batches of 8 texts with lengths uniform in 8..128, padded to the longest.

    Args:
        number: Number of batches.
        device: Where they are.
    """
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(number):
        lengths = torch.randint(SHORTEST, LONGEST + 1, (BATCH, 1), generator=generator)
        mask = (torch.arange(int(lengths.max())) < lengths).long()
        ids = torch.randint(1, TOKENS, mask.shape, generator=generator) * mask
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


def run(
    model: TextClassifier,
    batches: list[Any],
    stage: str,
    callback: CUDAGraphCallback | None,
    backend: GraphBackend,
) -> Result:
    """Run one stage once.

    Args:
        model: The model.
        batches: The batches.
        stage: ``predict`` or ``validate``.
        callback: The callback; None: eager, or compiled.
        backend: Knows the device.
    """
    clock = _LastQuarter(3 * len(batches) // 4, backend)
    trainer = bare_trainer(backend, [clock] if callback is None else [clock, callback])
    loader = batches_in_turn(batches, len(batches))
    backend.synchronize()
    began = perf_counter()
    if stage == "predict":
        predictions: Any = trainer.predict(model, loader)
        values = list(predictions)
    else:
        (metrics,) = trainer.validate(model, loader, verbose=False)
        values = [torch.tensor(value) for value in metrics.values()]
    backend.synchronize()
    ended = perf_counter()
    if callback is not None:
        began += callback.stats.compile_seconds
    steady = (ended - clock.began) / (len(batches) - 3 * len(batches) // 4)
    return Result(ended - began, steady, len(batches), values)


def settings_for(batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return the proposed settings of the callback for these batches."""
    seen = [
        SeenShape(tuple(batch), tuple(tuple(tensor.shape) for tensor in batch.values()))
        for batch in batches
    ]
    return {"pad_dims": ShapeProposal(seen).pad_dims, "verify_tolerance": "close"}


def main() -> None:
    """Measure, and print one line for each stage and contestant, and what each callback did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=12, help="layers of the encoder")
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--matmul",
        default="highest",
        choices=["highest", "high", "medium"],
        help="torch.set_float32_matmul_precision",
    )
    parser.add_argument(
        "--batches-on",
        default="device",
        choices=["device", "host"],
        help="where batches are before each step; values of batches on the host are read there",
    )
    parser.add_argument("--auto", action="store_true", help="pad_dims='auto': nothing is known")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-ours", action="store_true", help="padded graphs of compiled code as well"
    )
    parser.add_argument("--stages", nargs="+", default=["predict", "validate"])
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_float32_matmul_precision(given.matmul)
    backend = resolve_backend(given.backend)
    if backend is None:
        raise SystemExit("There is no CUDA device; --backend recorder runs without one.")
    net = CASES["bert_hf"].network()
    assert isinstance(net, Logits)
    classifier: Any = net.net
    encoder = classifier.bert.encoder
    encoder.layer = encoder.layer[: given.layers]
    model = TextClassifier(classifier).to(backend.device).eval()
    is_on_host = given.batches_on == "host"
    batches = texts(given.batches, torch.device("cpu") if is_on_host else backend.device)
    settings = settings_for(batches)
    if given.auto:
        settings["pad_dims"] = "auto"
    print(f"{given.batches} batches, float32 matmul {given.matmul!r}, {settings}")
    for stage in given.stages:
        run(model, batches[:20], stage, None, backend)
        model.to(backend.device)
        contestants = {"eager": run(model, batches, stage, None, backend)}
        if not given.no_compile:
            compiled = copy.deepcopy(model).to(backend.device)
            compiled.net = torch.compile(compiled.net, dynamic=True)  # type: ignore[assignment]
            run(compiled, batches[:200], stage, None, backend)
            compiled.to(backend.device)
            contestants["compile(dynamic)"] = run(compiled, batches, stage, None, backend)
        callbacks = {
            name: CUDAGraphCallback(backend=given.backend, report=False, compile=how, **settings)
            for name, how in _OURS.items()
            if given.compile_ours or not how
        }
        for name, callback in callbacks.items():
            model.to(backend.device)
            contestants[name] = run(model, batches, stage, callback, backend)
        _print_times(stage, contestants)
        for name, callback in callbacks.items():
            _print_counts(stage, name, callback)


_OURS = {"padded graphs": False, "padded, compiled": True}
"""Our contestants, and their ``compile``."""


def _print_times(stage: str, contestants: dict[str, Result]) -> None:
    eager = contestants["eager"]
    for name, result in contestants.items():
        difference = max(
            float((one.cpu() - other.cpu()).abs().max())
            for one, other in zip(result.values, eager.values, strict=True)
        )
        print(
            f"{stage:9} {name:17} {1e6 * result.seconds / result.batches:8.0f} us a batch, "
            f"{eager.seconds / result.seconds:.2f} x eager; last quarter "
            f"{1e6 * result.steady:.0f} us a batch, {eager.steady / result.steady:.2f} x; "
            f"set-up {result.setup:.2f} s; differs by {difference:.1e}"
        )
    compiled = contestants.get("compile(dynamic)")
    for name in _OURS.keys() & contestants.keys() if compiled is not None else ():
        assert compiled is not None
        ours = contestants[name]
        print(
            f"{stage:9} {name} against compile(dynamic): {compiled.seconds / ours.seconds:.2f} x, "
            f"last quarter {compiled.steady / ours.steady:.2f} x"
        )


def _print_counts(stage: str, name: str, callback: CUDAGraphCallback) -> None:
    padded = callback.stats.padding
    elements = sum(record.elements for record in padded)
    share = 1 - elements / max(1, sum(record.padded_elements for record in padded))
    graphs = sum(entry.captures for entry in callback.stats.entries)
    times: dict[str, list[float]] = {}
    for _, ran, seconds, _ in callback.stats.timeline.rows:
        times.setdefault(ran.name.lower(), []).append(seconds)
    print(f"{stage:9} {name}: {graphs} graphs, {share:.1%} padding")
    for how, seconds_of_steps in times.items():
        each = 1e6 * statistics.median(seconds_of_steps)
        print(
            f"  {len(seconds_of_steps)} steps {how}: {sum(seconds_of_steps):.2f} s on the host, "
            f"median {each:.0f} us"
        )
    print(callback.summary(), flush=True)


if __name__ == "__main__":
    # a callback of ``__main__`` would count as the user's
    importlib.import_module("cg_lightning.bench.shapes").main()
