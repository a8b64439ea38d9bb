"""Verification of closures: each thing that a replay gets wrong is found, and training goes on."""

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F

from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import Status
from tests.test_training import Fit, points, replayed
from tests.test_training_hunt import Step
from tests.test_verification import noise, put_noise

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*deterministic",
    "ignore:CUDAGraphCallback",
)


def is_capture():
    context = current_forward_context()
    return context is not None and context.cudagraph_runtime_mode is CUDAGraphMode.FULL


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.001 if is_capture() else gradient


class GoesWrong(Step):
    """In a capture, one thing is computed otherwise, as by a cause that no detector knows."""

    def __init__(self, wrong):
        super().__init__(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 4)))
        self.wrong = wrong
        self.mean = torchmetrics.MeanMetric()
        self.register_buffer("seen", torch.zeros(()))

    def factor(self, kind):
        return 1.001 if kind == self.wrong and is_capture() else 1.0

    def training_step(self, batch, batch_idx):
        x, labels = batch
        out = self.net(x)
        bias = self.net[2].bias
        loss = F.cross_entropy(
            out + (WrongGradient.apply(bias) if self.wrong == "gradient" else bias), labels
        )
        loss = loss * self.factor("loss")
        self.seen.add_(loss.detach() * self.factor("buffer"))
        self.mean(loss.detach() * self.factor("metric"))
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log("logged", loss.detach() * self.factor("log"), on_step=True, on_epoch=True)
        return {"loss": loss, "out": out.detach() * self.factor("output")}


KINDS = ("loss", "output", "gradient", "buffer", "metric", "log")


@pytest.mark.parametrize("kind", [*KINDS, "nothing"])
def test_what_a_replay_gets_wrong_is_found(harness, kind):
    """Weights, logs and random states are eager's: one iteration is seen, and that is eager's."""
    callback = Fit(harness)(GoesWrong(kind))
    found = [each.reason.kind for each in callback.stats.reasons if each.stage == "train"]
    assert (Status.VERIFICATION in found) == (kind != "nothing"), callback.summary()
    assert (replayed(callback) > 5) == (kind == "nothing"), callback.summary()


@pytest.mark.parametrize("kind", KINDS)
def test_without_verification_it_is_not_found(harness, kind):
    """The check above can fail."""
    with pytest.raises(AssertionError):
        Fit(harness)(GoesWrong(kind), settings={"verify_replays": 0})


class NoisyGradient(torch.autograd.Function):
    """Two backwards differ in the last bits, as with atomic additions."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        put_noise((noise() + 1) % 3)
        return gradient * 0 + 1 + noise() / 2**20


class Noisy(Step):
    def training_step(self, batch, batch_idx):
        return NoisyGradient.apply(self.net[4].bias).sum()


def test_what_eager_differs_from_itself_is_let_pass_and_said(harness):
    callback = harness.callback(stages=["train"])
    harness.trainer(callback).fit(Noisy(), points())
    assert replayed(callback) > 5, callback.summary()
    assert any(entry.within_spread for entry in callback.stats.entries)
    assert "within the difference between eager runs" in callback.summary()
