"""Further unusual trainings: optimizers, losses and Trainers that projects have."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning_callbacks
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils import checkpoint

from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from tests.harness import assert_same
from tests.test_training import Classifier, KeepAll, points, replayed
from tests.test_training_hunt import SETTINGS, Step

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
        "ignore:.*deterministic",
        "ignore:torch.utils.checkpoint:",
        "ignore:Swapping scheduler",
        "ignore:You are trying to `self.log",
    ),
]


class Groups(Step):
    """Two groups with rates of their own, and one that is frozen and thawed."""

    def configure_optimizers(self):
        first, second = list(self.net[0].parameters()), list(self.net[-1].parameters())
        groups = [
            {"params": first, "lr": 1e-2},
            {"params": list(self.net[1].parameters()), "lr": 0.0},
            {"params": second, "lr": 1e-3, "weight_decay": 0.3},
        ]
        return torch.optim.AdamW(groups)

    def on_train_batch_start(self, batch, batch_idx):
        for parameter in self.net[0].parameters():
            parameter.requires_grad = self.global_step % 7 < 4


class UnusedByBatch(Step):
    """The branch follows the values of the batch."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def output(self, x):
        return self.net(self.left(x) if x.sum() > 0 else self.right(x))


class UnusedByIndex(UnusedByBatch):
    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.left(x) if batch_idx % 3 else self.right(x)
        return F.cross_entropy(self.net(x), y)


class NeverUsed(Step):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(8, 8)


class Extras(Step):
    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.output(x)
        loss = F.cross_entropy(out, y)
        return {
            "loss": loss,
            "nothing": None,
            "nested": {"out": out, "loss": loss, "list": [loss * 2, None, 3, "four"]},
            "labels": y,
        }


class ByEpoch(Step):
    def loss(self, x, y):
        return super().loss(x, y) * (1.0 + self.current_epoch)


class SmoothedBySchedule(Step):
    def loss(self, x, y):
        smoothing = max(0.0, 0.2 - 0.01 * self.global_step)
        return F.cross_entropy(self.output(x), y, label_smoothing=smoothing)


class SmoothedInSteps(Step):
    def loss(self, x, y):
        return F.cross_entropy(
            self.output(x), y, label_smoothing=0.1 if self.global_step < 12 else 0.0
        )


class Mixup(Step):
    def loss(self, x, y):
        order = torch.randperm(len(x), device=x.device)
        part = torch.rand((), device=x.device)
        out = self.output(part * x + (1 - part) * x[order])
        losses = F.cross_entropy(out, y), F.cross_entropy(out, y[order])
        return part * losses[0] + (1 - part) * losses[1]


class MixupOfNumpy(Step):
    def on_train_start(self):
        np.random.seed(3)

    def loss(self, x, y):
        part = np.random.beta(0.4, 0.4)
        order = torch.randperm(len(x), device=x.device)
        out = self.output(part * x + (1 - part) * x[order])
        return part * F.cross_entropy(out, y) + (1 - part) * F.cross_entropy(out, y[order])


class MixupBeforeTheStep(Step):
    """Where projects mostly do it."""

    def on_train_start(self):
        self.random = np.random.default_rng(4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        if self.trainer.training:
            part = self.random.beta(0.4, 0.4)
            x = part * x + (1 - part) * x.flip(0)
        return x, y


class Inplace(Step):
    def __init__(self):
        layers = [nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Dropout(0.3)]
        super().__init__(nn.Sequential(*layers, nn.Linear(16, 4), nn.Dropout(0.1, inplace=True)))

    def output(self, x):
        x = x * 2
        x.add_(1).relu_()
        return self.net(x)


class CheckpointedParts(Step):
    def output(self, x):
        return checkpoint.checkpoint_sequential(self.net, 2, x, use_reentrant=False)


def weight_norm():
    layers = [parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU()]
    return Step(nn.Sequential(*layers, parametrizations.orthogonal(nn.Linear(16, 4))))


class OwnClipping(Step):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        limit = 0.05 if self.current_epoch else 0.2
        self.clip_gradients(optimizer, limit, "norm" if self.global_step % 2 else "value")


class OwnOptimizerStep(Step):
    """Warms the rate up, closes the closure itself, and steps twice now and then."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (self.global_step + 1) / 10)
        optimizer.step(closure=optimizer_closure)
        if batch_idx == 4:
            optimizer.optimizer.step()


class ClosureTwice(Step):
    """Sharpness-aware minimization: the closure runs again at other weights."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        with torch.no_grad():
            moves = [p.grad * 0.05 for p in self.parameters()]
            for parameter, move in zip(self.parameters(), moves, strict=True):
                parameter.add_(move)
        optimizer_closure()
        with torch.no_grad():
            for parameter, move in zip(self.parameters(), moves, strict=True):
                parameter.sub_(move)
        optimizer.optimizer.step()


class Toggled(Step):
    """Alternates which half is trained, through the module's own method."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx % 4 == 1:
            for parameter in self.net[0].parameters():
                parameter.requires_grad_(False)
        if batch_idx % 4 == 3:
            self.net[0].requires_grad_(True)


class TogglesInside(Step):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        loss = super().training_step(batch, batch_idx)
        self.untoggle_optimizer(optimizer)
        return loss


class AlternatesDetached(Step):
    """Each third batch has no gradient for the first layer."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[:3](x)
        hidden = hidden if batch_idx % 3 else hidden.detach()
        return F.cross_entropy(self.net[3:](hidden), y)


class TwoLossesAndWeights(Step):
    """Learned weights of losses, and a weight that the user sets between epochs."""

    def __init__(self):
        super().__init__()
        self.balance = nn.Parameter(torch.zeros(2))
        self.factor = 1.0

    def on_train_epoch_start(self):
        self.factor = [1.0, 0.3, 2.0][self.current_epoch % 3]

    def loss(self, x, y):
        out = self.output(x)
        losses = torch.stack([F.cross_entropy(out, y), out.square().mean() * self.factor])
        return (losses * (-self.balance).exp() + self.balance).sum()


class FirstUnlikeOthers(Step):
    def training_step(self, batch, batch_idx):
        if self.global_step == 0:
            return super().training_step(batch, batch_idx) * 0.0
        return super().training_step(batch, batch_idx)


class AlternatesAccumulation(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.accumulate_grad_batches = 1 + (batch_idx // 3) % 2


class ReplacesParameter(Step):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            with torch.no_grad():
                self.net[0].weight.data = self.net[0].weight.data.clone() * 0.5


class ResetsHead(Step):
    """A new head in a new optimizer's group, in the middle of a run."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            torch.manual_seed(9)
            self.net[4] = nn.Linear(16, 4).to(self.device)
            self.trainer.optimizers[0].add_param_group({"params": self.net[4].parameters()})


class SchedulesByMetric(Step):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"},
        }


class Skips(Step):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 1 and batch_idx == 5 else None


class Freezes(Step):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.net[0].requires_grad_(batch_idx % 2 == 0)
        return loss


class TeacherInList(Step):
    """The teacher is no submodule; its weights follow."""

    def on_train_start(self):
        self.teachers = [copy.deepcopy(self.net).eval()]

    def loss(self, x, y):
        with torch.no_grad():
            target = self.teachers[0](x)
        return super().loss(x, y) + F.mse_loss(self.output(x), target)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for mine, other in zip(
                self.teachers[0].parameters(), self.net.parameters(), strict=True
            ):
                mine.lerp_(other, 0.3)


class TeacherReplaced(TeacherInList):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx % 3 == 2:
            self.teachers[0] = copy.deepcopy(self.net).eval()


class ScaledByGradients(Step):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def loss(self, x, y):
        return super().loss(x, y) * self.scale

    def on_after_backward(self):
        self.scale.copy_(1 / (1 + self.net[0].weight.grad.norm()))


class MeanOfGradients(Step):
    def on_train_start(self):
        self.kept = []

    def on_after_backward(self):
        self.kept = [*self.kept[-2:], [p.grad for p in self.parameters()]]
        for parameter, gradients in zip(
            self.parameters(), zip(*self.kept, strict=True), strict=True
        ):
            parameter.grad = torch.stack(gradients).mean(0)


class ChangesWhatItReturned(Step):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.kept = loss.detach()
        rows = {"weight": self.net[0].weight, "row": self.net[0].weight[0]}
        return {"loss": loss, "view": loss.detach().view(1), **rows}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("kept", self.kept)
        outputs["view"].add_(1)
        self.kept.mul_(2)


class LossIsParameter(Step):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def training_step(self, batch, batch_idx):
        return self.weight if batch_idx % 2 else self.weight * 1


class EvalInTurn(Step):
    def on_train_batch_start(self, batch, batch_idx):
        self.net.train(batch_idx % 3 != 1)


class EvalStays(Step):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.net.train(batch_idx % 3 != 1)
        return loss


def _halve(parameter):
    parameter.grad.mul_(0.5)


class HookForTwoBatches(Step):
    def on_train_batch_start(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 4:
            weight = self.net[0].weight
            self.handle = weight.register_post_accumulate_grad_hook(_halve)
        if self.current_epoch == 1 and batch_idx == 6:
            self.handle.remove()


class Shrinks(Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():
            parameter.data.mul_(0.9)


class HookForOneEpoch(Step):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.callbacks.append(Shrinks())
        if self.current_epoch == 2:
            self.trainer.callbacks.pop()


STEPS = [
    *(Groups, UnusedByBatch, UnusedByIndex, NeverUsed, Extras, ByEpoch, SmoothedBySchedule),
    *(SmoothedInSteps, Mixup, MixupOfNumpy, MixupBeforeTheStep, Inplace, CheckpointedParts),
    *(weight_norm, OwnClipping, OwnOptimizerStep, ClosureTwice, Toggled, TogglesInside),
    *(AlternatesDetached, TwoLossesAndWeights, FirstUnlikeOthers, ReplacesParameter, ResetsHead),
    *(SchedulesByMetric, Skips, Freezes, TeacherInList, TeacherReplaced, ScaledByGradients),
    *(MeanOfGradients, ChangesWhatItReturned, LossIsParameter, EvalInTurn, EvalStays),
    *(HookForTwoBatches, HookForOneEpoch),
]


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", ["default", "unverified"])
@pytest.mark.parametrize("make", STEPS, ids=lambda make: make.__name__)
def test_steps(fit, make, settings):
    own, of_trainer = SETTINGS[settings]
    if make is OwnClipping:
        of_trainer = {**of_trainer, "gradient_clip_val": None}
    callback = fit(make(), settings=own, **of_trainer)
    assert "verification" not in str(callback.stats.eager_reasons), callback.stats.eager_reasons


TRAINERS = {
    "weights averaged late": (
        lambda: [lightning_callbacks.StochasticWeightAveraging(0.01, 2, 1)],
        {"max_epochs": 5},
    ),
    "accumulation in turn": (lambda: [AlternatesAccumulation()], {}),
    "a step limit within an epoch": (list, {"max_steps": 14, "max_epochs": -1}),
    "validation within, few batches": (list, {"val_check_interval": 2, "limit_train_batches": 7}),
    "a share of the batches": (list, {"limit_train_batches": 0.6}),
    "a time limit": (list, {"max_time": "00:01:00:00"}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(fit, name):
    others, settings = TRAINERS[name]
    fit(Classifier(), others=others, **settings)


def test_barebones(harness):
    seen = []
    callbacks = [harness.callback(stages=["train"])]
    for extra in (callbacks, []):
        torch.manual_seed(1)
        model, kept = Step(), KeepAll()
        trainer = harness.trainer(
            *extra, kept, max_epochs=3, barebones=True, **dict.fromkeys(_OF_BAREBONES)
        )
        trainer.fit(model, points())
        seen.append((kept.outputs, kept.weights, dict(model.state_dict())))
    assert_same(*seen)
    assert replayed(callbacks[0]) > 10


_OF_BAREBONES = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


def test_two_runs_of_one_trainer(harness):
    seen = []
    callback = harness.callback(stages=["train"])
    start = Classifier()
    for extra in ([callback], []):
        torch.manual_seed(1)
        model, kept = copy.deepcopy(start), KeepAll()
        trainer = harness.trainer(*extra, kept, max_epochs=2)
        trainer.fit(model, points(), points(number=12))
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, points(), points(number=12))
        trainer.validate(model, points(number=12), verbose=False)
        seen.append((kept.outputs, kept.weights, kept.kept_gradients, dict(model.state_dict())))
    assert_same(*seen)
    assert replayed(callback) > 15


class MisusesManualBackward(Step):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        return loss


class RaisesLate(Step):
    def training_step(self, batch, batch_idx):
        if self.global_step == 9:
            raise ValueError("a batch that is wrong")
        return super().training_step(batch, batch_idx)


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("a batch that is wrong")


class RaisesInBackward(Step):
    """Some gradients are there when it raises: of the last layers, for its partial batch."""

    def output(self, x):
        hidden = self.net[:3](x)
        return self.net[3:](hidden if len(x) == 4 else _Raises.apply(hidden))


@pytest.mark.parametrize(
    "make", [MisusesManualBackward, RaisesLate, RaisesInBackward], ids=lambda make: make.__name__
)
def test_exceptions_are_those_of_eager(harness, make):
    seen = []
    start = make()
    for extra in ([harness.callback(stages=["train"])], []):
        torch.manual_seed(1)
        model, kept = copy.deepcopy(start), KeepAll()
        trainer = harness.trainer(*extra, kept, max_epochs=3)
        with pytest.raises(Exception, match=r"manual_backward|a batch that is wrong") as raised:
            trainer.fit(model, points())
        gradients = [p.grad for p in model.parameters()]
        seen.append(
            (str(raised.value), type(raised.value).__name__, kept.weights, kept.outputs, gradients)
        )
        assert trainer.interrupted or trainer.global_step in (0, 9)
    assert_same(*seen)


def by_ctc(out):
    rows = len(out)
    log_probs = out.log_softmax(-1).unsqueeze(0).expand(4, -1, -1)
    targets = torch.ones(rows, 1, dtype=torch.long, device=out.device)
    lengths = torch.full((rows,), 4), torch.full((rows,), 1)  # on the host, as people write it
    return F.ctc_loss(log_probs, targets, *lengths)


GRADIENTS_OF = {
    "prod": lambda out: out.mul(3).relu().prod(),
    "prod of rows": lambda out: out.mul(3).prod(1).sum(),
    "prod of rows with zeros": lambda out: out.mul(3).relu().prod(1).sum(),
    "cumprod": lambda out: out.mul(3).relu().cumprod(1).sum(),
    "masked_fill": lambda out: out.masked_fill(out > 0, out.mean()).square().sum(),
    "masked.prod": lambda out: torch.masked.prod(out.mul(3), 1, mask=out > 0).sum(),
    "vander": lambda out: torch.linalg.vander(out.mul(1.3)).mean(),
    "ctc_loss": by_ctc,
}


class Differentiates(Step):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def loss(self, x, y):
        return GRADIENTS_OF[self.name](self.output(x))


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", GRADIENTS_OF)
def test_gradients_that_pytorch_computes_otherwise_while_it_is_watched(fit, name, settings):
    ours, trainers = SETTINGS[settings]
    callback = fit(Differentiates(name), settings=ours, **trainers)
    assert not replayed(callback)
    assert any("gradient of aten::" in r or "ctc_loss" in r for r in callback.stats.eager_reasons)


class Watches(EagerDispatchMode):
    def dispatch(self, function, args, kwargs):
        return self.call(function, args, kwargs)


def test_what_pytorch_differentiates_otherwise_under_a_mode():
    """Without such a difference, ``detectors/mode_dependent.py`` is not needed."""
    differ = set()
    for name, function in GRADIENTS_OF.items():
        for seed in range(20):
            x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            (eager,) = torch.autograd.grad(function(x), x)
            with Watches("cpu").watching():
                (watched,) = torch.autograd.grad(function(x), x)
            if not torch.equal(eager, watched):
                differ.add(name)
    assert {"prod of rows", "masked.prod", "masked_fill"} <= differ
