"""The contestants of training, and how far weights are from eager's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cg_lightning.backends import CapturedGraph, resolve_backend
from cg_lightning.backends.cuda import make_graphed_callable
from cg_lightning.bench.contestants import Classifier, Contestant, Make, compiled, two_samples
from cg_lightning.bench.records import OURS
from cg_lightning.callback import CUDAGraphCallback
from cg_lightning.core.equality import same_leaf
from cg_lightning.core.settings import BackendName


class TrainedStep(Classifier):
    """The step to train: forward, cross entropy, accuracy, and two logs; AdamW steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the loss, and log it with the accuracy."""
        inputs, labels = batch
        logits = self.net(inputs)
        loss = cross_entropy(logits, labels)
        self.accuracy.update(logits, labels)
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW, whose step is one kernel for many parameters."""
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=True)


class OptimizerAlone(TrainedStep):
    """No step and no backward: Lightning's loop, clipping and the optimizer alone."""

    def on_train_start(self) -> None:
        """Give the optimizer gradients."""
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Do nothing."""
        return None

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Keep the gradients, because no backward makes new ones."""


class OptimizerAndLogs(OptimizerAlone):
    """As above, with the logs of the step and Lightning's closure around a loss that is ready."""

    def on_train_start(self) -> None:
        """Make what is logged; the metric has been updated once."""
        super().on_train_start()
        self._loss = torch.zeros((), device=self.device, requires_grad=True)
        self.accuracy.update(*two_samples(self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log the same loss and accuracy each time, and return the loss."""
        self.log("loss", self._loss)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return self._loss

    def backward(self, *_: Any) -> None:
        """Compute no gradients."""


class OptimizerGraph(Callback):
    """Captures clipping and the optimizer's step, so that the device's time for them is known.

    Args:
        name: The name of the backend.
    """

    def __init__(self, name: BackendName) -> None:
        self._name = name
        self._graphs: list[CapturedGraph] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Capture them, after the iterations that count."""
        backend = resolve_backend(self._name)
        (optimizer,) = trainer.optimizers
        assert backend is not None and trainer.gradient_clip_val is not None  # noqa: PT018
        most = trainer.gradient_clip_val
        for group in optimizer.param_groups:
            group["capturable"] = True  # or else the optimizer refuses a capture

        def clip_and_step() -> None:
            nn.utils.clip_grad_norm_(pl_module.parameters(), most)
            optimizer.step()

        with backend.capture_stream():
            graph, _ = backend.capture(
                clip_and_step, collect_garbage=False, capture_error_mode="thread_local"
            )
        self._graphs = [graph]

    def graphs(self, mode: str) -> list[CapturedGraph]:
        """Return the graph, whatever the mode."""
        return self._graphs


def _graphs(net: nn.Module, _: Tensor, backend: BackendName) -> Contestant:
    return TrainedStep(net), [CUDAGraphCallback(stages=["train"], backend=backend, report=False)]


class _MakeGraphedCallables(Callback):
    """Graphs forward and backward of the network by PyTorch's own function, for one training."""

    def __init__(self, sample: Tensor) -> None:
        self._sample = sample

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Capture the network, which is on its device and has its optimizer now."""
        assert isinstance(pl_module, TrainedStep)
        before = copy.deepcopy(pl_module.net.state_dict())
        # PyTorch runs the network to warm up: statistics of batch norm and generators move
        with isolate_rng(), torch.enable_grad():
            make_graphed_callable(pl_module.net, self._sample.clone())
        pl_module.net.load_state_dict(before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore ``forward``, because the module leaves the device."""
        assert isinstance(pl_module, TrainedStep)
        vars(pl_module.net).pop("forward", None)


def _graphed_callable(net: nn.Module, sample: Tensor, _: BackendName) -> Contestant:
    return TrainedStep(net), [_MakeGraphedCallables(sample)]


TRAINERS: dict[str, Make] = {
    "loop": lambda net, _, backend: (OptimizerAlone(net), [OptimizerGraph(backend)]),
    "loop_and_logs": lambda net, *_: (OptimizerAndLogs(net), []),
    "eager": lambda net, *_: (TrainedStep(net), []),
    OURS: _graphs,
    "compile": compiled(TrainedStep),
    "reduce_overhead": compiled(TrainedStep, "reduce-overhead"),
    "make_graphed_callables": _graphed_callable,
}
"""The contestants that train. The others only evaluate."""


def make_trained(name: str, net: nn.Module, sample: Tensor, backend: BackendName) -> Contestant:
    """Return the module to train, with its own copy of the weights, and its callbacks."""
    return TRAINERS[name](copy.deepcopy(net).train(), sample, backend)


def begin_again(module: TrainedStep, net: nn.Module) -> None:
    """Give a module the weights of ``net``, which has never been trained; seed all generators."""
    pairs = zip(module.net.state_dict().values(), net.state_dict().values(), strict=True)
    for own, first in pairs:
        own.copy_(first)
    seed_everything(0, verbose=False)


def compared_weights(own: Sequence[Tensor], eager: Sequence[Tensor]) -> dict[str, Any]:
    """Return whether weights are eager's in every bit, and the largest difference."""
    pairs = list(zip(own, eager, strict=True))
    return {
        "equal": all(same_leaf(mine, other) for mine, other in pairs),
        "difference": max(
            float((mine.double() - other.double()).abs().max()) for mine, other in pairs
        ),
    }
