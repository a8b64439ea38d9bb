"""The contestants: ways to run the same evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from cg_lightning.backends.cuda import make_graphed_callable
from cg_lightning.bench.cases import CLASSES
from cg_lightning.callback import CUDAGraphCallback
from cg_lightning.core.settings import BackendName, ModeName


class Classifier(LightningModule):
    """A network and its accuracy.

    Args:
        net: Maps inputs to logits.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.accuracy = MulticlassAccuracy(CLASSES)


class BenchmarkStep(Classifier):
    """The step to measure: forward, cross entropy, accuracy, and two logs."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``loss`` and ``accuracy``."""
        inputs, labels = batch
        logits = self.net(inputs)
        self.accuracy.update(logits, labels)
        self.log("loss", cross_entropy(logits, labels))
        self.log("accuracy", self.accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(batch[0])
        return logits


class EmptyStep(BenchmarkStep):
    """A step that does nothing, to measure Lightning's loop alone."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Do nothing."""


class LoggingStep(EmptyStep):
    """A step that only logs, to measure what Lightning takes for the logs of the step."""

    def on_validation_start(self) -> None:
        """Make what is logged; the metric has been updated once."""
        self._loss = torch.zeros((), device=self.device)
        self.accuracy.update(*two_samples(self.device))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the same loss and accuracy each time."""
        self.log("loss", self._loss)
        self.log("accuracy", self.accuracy)


def two_samples(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return logits ``(2, classes)`` and labels ``(2,)``."""
    labels = torch.zeros(2, dtype=torch.long, device=device)
    return torch.zeros(2, CLASSES, device=device), labels


class _FunctionModule(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


Contestant = tuple[LightningModule, list[Callback]]
"""The module to evaluate and the callbacks that it needs."""
Make = Callable[[nn.Module, Tensor, BackendName], Contestant]


def _graphs(mode: ModeName) -> Make:
    def make(net: nn.Module, _: Tensor, backend: BackendName) -> Contestant:
        return BenchmarkStep(net), [CUDAGraphCallback(mode=mode, backend=backend, report=False)]

    return make


def compiled(kind: type[Classifier], mode: str | None = None) -> Make:
    """Return what makes a contestant whose network ``torch.compile`` compiles."""
    return lambda net, *_: (kind(torch.compile(net, mode=mode)), [])  # type: ignore[arg-type]


def _compiled_in_a_graph(net: nn.Module, sample: Tensor, backend: BackendName) -> Contestant:
    compiled: Any = torch.compile(net)
    return _graphs("FULL_AND_PIECEWISE")(compiled, sample, backend)


class _MakeGraphedCallables(Callback):
    """Replaces the network by PyTorch's graphed callable for the time of one evaluation."""

    def __init__(self, sample: Tensor) -> None:
        self._sample = sample

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Capture the network, which is on its device now."""
        assert isinstance(pl_module, BenchmarkStep)
        self._net = pl_module.net
        # PyTorch captures a backward pass as well, so gradients must be enabled. It replaces
        # ``forward`` of its argument for good, so it gets a copy.
        with torch.inference_mode(False), torch.enable_grad():
            graphed = make_graphed_callable(copy.deepcopy(self._net), self._sample.clone())
        pl_module.net = _FunctionModule(graphed)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the network."""
        pl_module.net = self._net

    on_predict_start, on_predict_end = on_validation_start, on_validation_end


def _graphed_callable(net: nn.Module, sample: Tensor, backend: BackendName) -> Contestant:
    return BenchmarkStep(net), [_MakeGraphedCallables(sample)]


CONTESTANTS: dict[str, Make] = {
    "loop": lambda net, _, backend: (EmptyStep(nn.Identity()), []),
    "loop_and_logs": lambda net, _, backend: (LoggingStep(nn.Identity()), []),
    "eager": lambda net, _, backend: (BenchmarkStep(net), []),
    "piecewise": _graphs("PIECEWISE"),
    "full": _graphs("FULL"),
    "full_and_piecewise": _graphs("FULL_AND_PIECEWISE"),
    "compile": compiled(BenchmarkStep),
    "reduce_overhead": compiled(BenchmarkStep, "reduce-overhead"),
    "make_graphed_callables": _graphed_callable,
    "compiled_full": _compiled_in_a_graph,
}
LOOPS = ("loop", "loop_and_logs")
"""Contestants that compute nothing."""
PEERS = ("compile", "reduce_overhead", "make_graphed_callables")
"""Alternatives to this package."""
OTHER_ORDER = (*PEERS, "compiled_full")
"""Contestants that may compute in another order, so that their last bits may differ."""


def make(name: str, net: nn.Module, sample: Tensor, backend: BackendName) -> Contestant:
    """Return the module to evaluate, with its own copy of the weights, and its callbacks."""
    return CONTESTANTS[name](copy.deepcopy(net), sample, backend)
