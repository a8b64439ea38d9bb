"""Training steps that do something unusual: all that users see is eager's."""

import functools
import random

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning_callbacks
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils import checkpoint

from tests.harness import loader, newer_callback
from tests.test_training import Classifier, points

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
        "ignore:`training_step` returned `None`",
        "ignore:.*deterministic",
        "ignore:torch.utils.checkpoint:",
        "ignore:The ``compute`` method of metric MeanMetric was called before",
        "ignore:You requested to overfit",
    ),
]


class Step(Classifier):
    """Classifies; cases override one method."""

    def output(self, x):
        return self.net(x)

    def loss(self, x, y):
        return F.cross_entropy(self.output(x), y)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss(x, y)
        self.log("loss", loss)
        return loss


class FlagInTurn(Step):
    flag = 0

    def on_train_batch_start(self, batch, batch_idx):
        self.flag = batch_idx % 3

    def loss(self, x, y):
        return super().loss(x, y) * (1 + self.flag)


class Teacher(Step):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
        self.teacher = nn.Linear(8, 4).requires_grad_(False)
        self.student = nn.Linear(8, 4)

    def loss(self, x, y):
        with torch.no_grad():
            target = self.teacher(x)
        return super().loss(x, y) + F.mse_loss(self.student(x), target)

    def on_before_zero_grad(self, optimizer):
        with torch.no_grad():
            for mine, other in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                mine.mul_(0.9).add_(other, alpha=0.1)


class HostRandomness(Step):
    def on_train_start(self):
        random.seed(3)

    def loss(self, x, y):
        return super().loss(x, y) * random.random()


class Checkpointed(Step):
    reentrant = False
    keeps_state = True

    def output(self, x):
        return checkpoint.checkpoint(
            self.net, x, use_reentrant=self.reentrant, preserve_rng_state=self.keeps_state
        )


class CheckpointedWithoutState(Checkpointed):
    keeps_state = False

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))


class CheckpointedReentrant(CheckpointedWithoutState):
    reentrant = True

    def loss(self, x, y):
        return super().loss(x.clone().requires_grad_(), y)


CALLS = {"backward": 0, "scale": 1.0}


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * CALLS["scale"]


class GlobalInBackward(Step):
    def output(self, x):
        return Scaled.apply(super().output(x))

    def on_train_batch_start(self, batch, batch_idx):
        CALLS["scale"] = 1.0 + batch_idx % 2


class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        CALLS["backward"] += 1
        return gradient * CALLS["backward"]


class CounterInBackward(Step):
    def on_train_start(self):
        CALLS["backward"] = 0

    def output(self, x):
        return Counted.apply(super().output(x))


class HookOfActivation(Step):
    factor = 1.0

    def on_train_batch_start(self, batch, batch_idx):
        self.factor = 1.0 + batch_idx % 2

    def output(self, x):
        out = super().output(x)
        out.register_hook(lambda gradient: gradient * self.factor)
        return out


class HookThatKeeps(Step):
    def __init__(self):
        super().__init__()
        self.norms = []

    def output(self, x):
        out = super().output(x)
        out.register_hook(lambda gradient: self.norms.append(gradient.norm()))
        return out

    def on_train_epoch_end(self):
        self.log("norms", torch.stack(self.norms).sum())
        self.log("number", float(len(self.norms)))
        self.norms.clear()


class RetainedGradient(Step):
    def output(self, x):
        self.hidden = super().output(x)
        self.hidden.retain_grad()
        return self.hidden

    def on_after_backward(self):
        self.log("hidden", self.hidden.grad.norm())


class KeptActivation(Step):
    def output(self, x):
        self.hidden = super().output(x)
        return self.hidden

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("hidden", self.hidden.detach().norm())
        self.log("has graph", float(self.hidden.requires_grad))


class ClampedWeights(Step):
    def loss(self, x, y):
        with torch.no_grad():
            self.net[0].weight.clamp_(-0.2, 0.2)
        return super().loss(x, y)


def spectral():
    first = parametrizations.spectral_norm(nn.Linear(8, 16))
    return Step(nn.Sequential(first, nn.ReLU(), parametrizations.weight_norm(nn.Linear(16, 4))))


class Codebook(Step):
    def __init__(self):
        super().__init__(nn.Linear(8, 4))
        self.register_buffer("codes", torch.randn(5, 4))

    def output(self, x):
        out = super().output(x)
        nearest = torch.cdist(out, self.codes).argmin(1)
        with torch.no_grad():
            self.codes.index_add_(0, nearest, out.detach() - self.codes[nearest], alpha=0.1)
        return out + (self.codes[nearest] - out).detach()


class ReboundBuffer(Step):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, x, y):
        self.seen = self.seen + 1
        return super().loss(x, y) * self.seen


class Unfreezes(Step):
    def loss(self, x, y):
        self.net[0].weight.requires_grad_(self.global_step > 5)
        return super().loss(x, y)


class Outputs(Step):
    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        loss = F.cross_entropy(out, y)
        return {
            "loss": loss,
            "same": loss,
            "out": out,
            "part": out[:, 1:],
            "labels": y,
            "weight": self.net[0].weight,
            "nested": [out.detach(), {"x": x[:2]}],
            "epoch": self.current_epoch,
        }


class LogsWithGraph(Step):
    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        self.log("with graph", loss * 2, enable_graph=True)
        self.log("largest", loss, reduce_fx="max", on_step=False, on_epoch=True)
        self.log("number", 3.5, batch_size=2, on_epoch=True)
        return loss


class ReadsMetrics(Step):
    def loss(self, x, y):
        last = self.trainer.callback_metrics.get("loss", torch.ones(()))
        return super().loss(x, y) * float(last)


class ReadsRate(Step):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 0.9


class ReadsGradientOfOptimizer(Step):
    def loss(self, x, y):
        gradient = self.optimizers().param_groups[0]["params"][0].grad
        weight = 0.0 if gradient is None else gradient.sum()
        return super().loss(x, y) + weight


class Reparameterized(Step):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            with torch.no_grad():
                self.net[0].weight.data = self.net[0].weight.data.clone()
        if self.current_epoch == 2:
            self.net[3] = nn.Dropout(0.6)


class FrozenNorm(Step):
    def on_train_batch_start(self, batch, batch_idx):
        self.net[1].train(batch_idx % 4 < 2)


class Seeds(Step):
    def loss(self, x, y):
        torch.manual_seed(7)
        return super().loss(x, y)


class OwnGenerator(Step):
    def on_train_start(self):
        self.generator = torch.Generator(self.device).manual_seed(3)

    def loss(self, x, y):
        noise = torch.randn(x.shape, generator=self.generator, device=x.device)
        return super().loss(x + 0.1 * noise, y)


class Running(Step):
    def __init__(self):
        super().__init__()
        self.running = None

    def on_train_start(self):
        self.running = torch.zeros((), device=self.device)

    def loss(self, x, y):
        loss = super().loss(x, y)
        self.running = 0.9 * self.running + 0.1 * loss.detach()
        return loss + self.running


class Carried(Step):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(8, 8)
        self.hidden = None

    def output(self, x):
        hidden = self.hidden if self.hidden is not None and len(self.hidden) == len(x) else None
        hidden = self.cell(x, hidden)
        self.hidden = hidden.detach()
        return self.net(hidden)


class Queue(Step):
    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(12, 8))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def loss(self, x, y):
        place = int(self.place)
        self.queue[place : place + len(x)] = x
        self.place.fill_((place + 4) % 12)
        return super().loss(x, y) + self.net(self.queue).abs().mean()


class Condition(Step):
    def loss(self, x, y):
        loss = super().loss(x, y)
        return loss * 2 if loss.item() > 1.3 else loss


class Mixed(Step):
    def loss(self, x, y):
        share = torch.distributions.Beta(0.4, 0.4).sample().to(x.device)
        order = torch.randperm(len(x), device=x.device)
        return super().loss(share * x + (1 - share) * x[order], y)


class NoisyGradients(Step):
    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad += 0.01 * torch.randn_like(parameter.grad)


class SkipsSteps(Step):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx % 3 == 2:
            optimizer_closure()
        else:
            optimizer.step(optimizer_closure)


class NeverZero(Step):
    def optimizer_zero_grad(self, *_):
        pass


class OwnBackward(Step):
    def backward(self, loss):
        (loss * 2).backward(retain_graph=True)
        loss.backward()


class Branches(Step):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def loss(self, x, y):
        x = self.left(x) if self.global_step % 5 < 3 else self.right(x)
        return super().loss(x, y)


class Bilevel(Step):
    def loss(self, x, y):
        weights = list(self.net[4].parameters())
        inner = F.cross_entropy(self.net(x), y)
        gradients = torch.autograd.grad(inner, weights, create_graph=True)
        return super().loss(x, y) + sum(g.pow(2).sum() for g in gradients)


class NotANumber(Step):
    def loss(self, x, y):
        return super().loss(x, y) * torch.where(x.sum() > 6, torch.nan, 1.0)


class MetricsOfTraining(Step):
    def __init__(self):
        super().__init__()
        self.metrics = torchmetrics.MetricCollection(
            [torchmetrics.classification.MulticlassF1Score(4), torchmetrics.MeanMetric()]
        )
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        loss = F.cross_entropy(out, y)
        self.mean(loss)
        self.accuracy.update(out, y)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        return {"loss": loss, "count": self.mean.compute()}

    def on_train_epoch_end(self):
        self.log("accuracy", self.accuracy.compute())
        self.accuracy.reset()

    def validation_step(self, batch, batch_idx):
        self.mean.update(batch[0].sum())
        self.log("val_mean", self.mean)


class ChangesBatch(Step):
    def on_train_batch_start(self, batch, batch_idx):
        batch[0].mul_(1 + batch_idx % 2)


class ChangesBatchInside(Step):
    def loss(self, x, y):
        x.mul_(0.5)
        return super().loss(x, y)


class Prints(Step):
    def loss(self, x, y):
        loss = super().loss(x, y)
        print("step")
        return loss


class WithoutIndex(Step):
    def training_step(self, batch):
        return self.loss(*batch)


class SameLossTwice(Step):
    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        return {"loss": loss.sum() + self.net[4].bias.sum() * 0, "parts": (loss, loss)}


class Silent(Step):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 5:
            return -1
        return None


MODELS = [
    *(FlagInTurn, Teacher, HostRandomness, Checkpointed, CheckpointedWithoutState),
    *(CheckpointedReentrant, GlobalInBackward, CounterInBackward, HookOfActivation, HookThatKeeps),
    *(RetainedGradient, KeptActivation, ClampedWeights, spectral, Codebook, ReboundBuffer),
    *(Unfreezes, Outputs, LogsWithGraph, ReadsMetrics, ReadsRate, ReadsGradientOfOptimizer),
    *(Reparameterized, FrozenNorm, Seeds, OwnGenerator, Running, Carried, Queue, Condition),
    *(Mixed, NoisyGradients, SkipsSteps, NeverZero, OwnBackward, Branches, Bilevel, NotANumber),
    *(MetricsOfTraining, ChangesBatch, ChangesBatchInside, Prints, WithoutIndex, SameLossTwice),
    Silent,
]
SETTINGS = {
    "default": ({}, {}),
    "unverified": ({"verify_replays": 0, "warmup_steps": 1}, {"accumulate_grad_batches": 2}),
    "verified": ({"verify_every": 3, "mode": "FULL"}, {"gradient_clip_val": 0.1}),
}


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize(
    "settings",
    ["default", "unverified", pytest.param("verified", marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_steps(fit, make, settings):
    own, of_trainer = SETTINGS[settings]
    callback = fit(make(), settings=own, **of_trainer)
    assert "verification" not in str(callback.stats.eager_reasons), callback.stats.eager_reasons


class Accumulate(lightning_callbacks.GradientAccumulationScheduler):
    def __init__(self):
        super().__init__({0: 1, 1: 3})


OTHERS = {
    "accumulation by epoch": (Accumulate, {}),
    "averaged weights": (
        functools.partial(lightning_callbacks.StochasticWeightAveraging, 0.01, 1),
        {"max_epochs": 4},
    ),
    "moving average": (functools.partial(newer_callback, "EMAWeightAveraging"), {}),
    "early stopping": (
        functools.partial(lightning_callbacks.EarlyStopping, "val_loss", patience=0),
        {},
    ),
    "rates": (lightning_callbacks.LearningRateMonitor, {}),
    "validation within the epoch": (Callback, {"val_check_interval": 3}),
    "few batches": (Callback, {"limit_train_batches": 5}),
    "few steps": (Callback, {"max_steps": 11}),
    "deterministic batches": (Callback, {"overfit_batches": 3}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_callbacks_and_settings(fit, name):
    make, settings = OTHERS[name]
    fit(Classifier(), others=lambda: [make()], **settings)


class OfDictionaries(Step):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch["a"]["x"], batch["y"])
        if batch["kind"] == 1:
            loss = loss * 2
        return loss


def test_nested_batches_with_values(fit):
    torch.manual_seed(4)
    rows = [
        {"a": {"x": torch.randn(4, 8)}, "y": torch.randint(0, 4, (4,)), "kind": index % 2}
        for index in range(14)
    ]
    rows[0] = {"a": {"x": torch.randn(3, 8)}, "y": torch.randint(0, 4, (3,)), "kind": 5}
    train = torch.utils.data.DataLoader(rows, batch_size=None)
    fit(OfDictionaries(), train=train)


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. all graphs of max_graphs")
def test_shapes_in_turn_and_few_graphs(fit):
    torch.manual_seed(4)
    rows = [
        (torch.randn(4 + index % 2, 8), torch.randint(0, 4, (4 + index % 2,)))
        for index in range(20)
    ]
    train = torch.utils.data.DataLoader(rows, batch_size=None)
    fit(Classifier(), train=train, settings={"max_graphs": 1})
    fit(Classifier(), train=train)


def test_a_batch_of_the_whole_set(fit):
    fit(Classifier(), train=points(number=4), max_epochs=12)


def test_images_and_channels_last(fit):
    class Images(Step):
        def __init__(self):
            net = nn.Sequential(
                nn.Conv2d(3, 6, 3),
                nn.BatchNorm2d(6),
                nn.ReLU(inplace=True),
                nn.Flatten(),
                nn.Linear(96, 4),
            )
            super().__init__(net.to(memory_format=torch.channels_last))

        def validation_step(self, batch, batch_idx):
            pass

    generator = torch.Generator().manual_seed(3)
    train = loader(
        torch.randn(22, 3, 6, 6, generator=generator),
        torch.randint(0, 4, (22,), generator=generator),
    )
    fit(Images(), train=train)
