"""What is compared: ways to run the same evaluation."""

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


class Step(LightningModule):
    """Forward, cross entropy, accuracy, two logs.

    Args:
        net: Maps inputs to logits.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.accuracy = MulticlassAccuracy(CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``loss`` and ``accuracy``."""
        inputs, labels = batch
        logits = self.net(inputs)
        self.accuracy.update(logits, labels)
        self.log("loss", cross_entropy(logits, labels))
        self.log("accuracy", self.accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Gives the logits."""
        logits: Tensor = self.net(batch[0])
        return logits


class Nothing(Step):
    """Lightning's loop alone."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Does nothing."""


class _Holds(nn.Module):
    """Calls a function that is no module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


Made = tuple[LightningModule, list[Callback]]


def _graphs(mode: str) -> Callable[[nn.Module, Tensor, str], Made]:
    def make(net: nn.Module, _: Tensor, backend: str) -> Made:
        return Step(net), [CUDAGraphCallback(mode=mode, backend=backend, report=False)]

    return make


def _compiled(mode: str | None) -> Callable[[nn.Module, Tensor, str], Made]:
    return lambda net, _, backend: (Step(torch.compile(net, mode=mode)), [])  # type: ignore[arg-type]


def _compiled_in_a_graph(net: nn.Module, sample: Tensor, backend: str) -> Made:
    return _graphs("FULL_AND_PIECEWISE")(torch.compile(net), sample, backend)  # type: ignore[arg-type]


class _GraphsTheNetwork(Callback):
    """Graphs the network once it is on its device, for one evaluation."""

    def __init__(self, sample: Tensor) -> None:
        self._sample = sample

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Graphs it."""
        assert isinstance(pl_module, Step)
        self._net = pl_module.net
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
        ):  # it captures a backward pass as well
            # of a copy: PyTorch replaces the ``forward`` of what it is given, for good
            pl_module.net = _Holds(
                make_graphed_callable(copy.deepcopy(self._net), self._sample.clone())
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts back the network."""
        pl_module.net = self._net

    on_predict_start, on_predict_end = on_validation_start, on_validation_end


def _graphed_callable(net: nn.Module, sample: Tensor, backend: str) -> Made:
    return Step(net), [_GraphsTheNetwork(sample)]


CONTESTANTS: dict[str, Callable[[nn.Module, Tensor, str], Made]] = {
    "loop": lambda net, _, backend: (Nothing(nn.Identity()), []),
    "eager": lambda net, _, backend: (Step(net), []),
    "piecewise": _graphs("PIECEWISE"),
    "full": _graphs("FULL"),
    "full_and_piecewise": _graphs("FULL_AND_PIECEWISE"),
    "compile": _compiled(None),
    "reduce_overhead": _compiled("reduce-overhead"),
    "make_graphed_callables": _graphed_callable,
    "compiled_full": _compiled_in_a_graph,
}
PEERS = ("compile", "reduce_overhead", "make_graphed_callables")
"""What users would otherwise take."""
OTHER_ORDER = (*PEERS, "compiled_full")
"""Who may compute the same in another order."""


def make(name: str, net: nn.Module, sample: Tensor, backend: str) -> Made:
    """Gives the module to evaluate, with weights of its own, and the callbacks that it needs."""
    return CONTESTANTS[name](copy.deepcopy(net), sample, backend)
