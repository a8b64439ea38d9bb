"""Steps as projects write them: numbers are eager's, and a reason names the line in the way."""

import copy
import inspect
import math
import random

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F

from cg_lightning.core.causes import Cause
from cg_lightning.core.reasons import Status
from tests.test_training import Fit, replayed
from tests.test_training_hunt import Step

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*deterministic",
    "ignore:You are trying to `self.log",
)


class VAE(Step):
    """Its weight is annealed."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 6), nn.Linear(3, 8)
        self.anneal_steps = 20

    def weight(self):
        return min(1.0, self.global_step / self.anneal_steps)  # named

    def training_step(self, batch, batch_idx):
        x, _ = batch
        mean, log_variance = self.encode(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        parts = {
            "rebuilt": F.mse_loss(self.decode(z), x),
            "kl": -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean(),
        }
        weight = self.weight()
        loss = parts["rebuilt"] + weight * parts["kl"]
        self.log_dict({**parts, "weight": weight, "loss": loss}, prog_bar=True)
        return loss


class AnnealedInBuffer(VAE):
    """The remedy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kl_weight", torch.zeros(()))

    def on_train_batch_start(self, batch, batch_idx):
        self.kl_weight.fill_(super().weight())

    def weight(self):
        return self.kl_weight


class ScaledByStep(Step):
    def training_step(self, batch, batch_idx):
        self.step_scale = 1 / (self.global_step + 1)  # named
        self.log("scale", self.step_scale)
        return self.loss(*batch) * self.step_scale


class Temperature(Step):
    """A hook sets the number."""

    def on_train_batch_start(self, batch, batch_idx):
        self.tau = max(0.3, math.exp(-0.05 * self.global_step))

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = F.gumbel_softmax(self.net(x), tau=self.tau)  # named
        return F.nll_loss((out + 1e-6).log(), y)


class WeightInList(Step):
    def __init__(self):
        super().__init__()
        self.weights = [1.0, 0.5]

    def on_train_batch_start(self, batch, batch_idx):
        self.weights[1] = self.global_step / 40

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        weights = self.weights  # named
        return weights[0] * F.cross_entropy(out, y) + weights[1] * out.square().mean()


class TeacherForcing(Step):
    ratio = 0.5

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(1, 8), nn.Linear(8, 1)

    def on_train_start(self):
        random.seed(5)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        hidden, given, outs = x.new_zeros(len(x), 8), x[:, :1], []
        for place in range(1, 4):
            hidden = self.cell(given, hidden)
            outs.append(self.head(hidden))
            forced = random.random() < self.ratio  # named
            given = x[:, place : place + 1] if forced else outs[-1]
        loss = F.mse_loss(torch.cat(outs, 1), x[:, 1:4])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.ratio *= 0.7


class MomentumTeacher(Step):
    def __init__(self):
        super().__init__()
        self.student = nn.Linear(8, 8)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        step = self.global_step  # named
        momentum = 1 - 0.01 * (math.cos(math.pi * step / 60) + 1) / 2
        with torch.no_grad():
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for mine, other in pairs:
                other.data.mul_(momentum).add_((1 - momentum) * mine.detach().data)
            target = self.teacher(x)
        self.log("momentum", momentum)
        return F.mse_loss(self.student(x + torch.randn_like(x)), target) + self.loss(x, y)


class Curriculum(Step):
    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        share = min(1, 0.5 + 0.02 * self.global_step)  # named
        return losses.topk(max(1, int(len(x) * share)), largest=False).values.mean()


class Cutmix(Step):
    def on_train_start(self):
        np.random.seed(4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        part = np.random.beta(1.0, 1.0)  # named
        order = torch.randperm(len(x), device=x.device)
        begin = np.random.randint(8)
        end = min(8, begin + int(8 * np.sqrt(1 - part)))
        x = x.clone()
        x[:, begin:end] = x[order][:, begin:end]
        part = 1 - (end - begin) / 8
        out = self.net(x)
        self.log("part", part)
        return part * F.cross_entropy(out, y) + (1 - part) * F.cross_entropy(out, y[order])


class LearnedWeights(Step):
    def __init__(self):
        super().__init__()
        self.logs = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in "ab"})
        self.factors = {"a": 1.0, "b": 0.5}

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        losses = {"a": F.cross_entropy(out, y), "b": out.square().mean()}
        logs, factors = self.logs, self.factors
        total = sum(
            factors[name] * (torch.exp(-logs[name]) * loss + logs[name])
            for name, loss in losses.items()
        )
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, sync_dist=True)
        self.log("total", total, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(x))
        return {"loss": total, **{name: loss.detach() for name, loss in losses.items()}}


class WeightsByLastLosses(Step):
    def __init__(self):
        super().__init__()
        self.history = [1.0, 1.0]

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        other = out.abs().mean()
        weight = self.history[-1] / self.history[-2]
        self.history.append(other.item())  # named
        return F.cross_entropy(out, y) + weight * other


class Collections(Step):
    def __init__(self):
        super().__init__()
        classification = torchmetrics.classification
        of_both = torchmetrics.MetricCollection(
            {
                "accuracy": classification.MulticlassAccuracy(4),
                "f1": classification.MulticlassF1Score(4),
            }
        )
        self.of_training, self.of_validation = of_both.clone("train_"), of_both.clone("val_")

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        self.log_dict(self.of_training(out, y), on_step=True, on_epoch=False)
        return F.cross_entropy(out, y)

    def on_train_epoch_end(self):
        values = self.of_training.compute()
        self.log_dict({f"{name}_epoch": value for name, value in values.items()})
        self.of_training.reset()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.of_validation.update(self.net(x), y)
        self.log_dict(self.of_validation)


class LogsRate(Step):
    def training_step(self, batch, batch_idx):
        self.log("rate", self.trainer.optimizers[0].param_groups[0]["lr"])  # named
        return self.loss(*batch)


class Alternates(Step):
    """Two players with one optimizer."""

    def __init__(self):
        super().__init__()
        self.maker, self.judge = nn.Linear(4, 8), nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        noise = torch.randn(len(x), 4, device=x.device)
        if batch_idx % 2 == 0:
            return -self.judge(self.maker(noise)).mean()
        return self.judge(self.maker(noise).detach()).mean() - self.judge(x).mean()


class NowAndThen(Step):
    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        if self.global_step % 4 == 0:
            loss = loss + 0.1 * self.net[0].weight.abs().sum()
        if batch_idx % 3 == 0:
            self.log("now and then", loss, on_step=True, on_epoch=True)
        return loss


class ScheduleObject(Step):
    class Schedule:
        step = 0

        def advance(self):
            self.step += 1
            return min(1.0, self.step / 15)

    def __init__(self):
        super().__init__()
        self.schedule = self.Schedule()

    def training_step(self, batch, batch_idx):
        return self.loss(*batch) * self.schedule.advance()


class DropoutByStep(Step):
    """A setting of a layer is new in each step."""

    def on_train_batch_start(self, batch, batch_idx):
        self.net[3].p = min(0.5, 0.01 * self.global_step)


VARIES = (Status.CHANGED, Status.UNPROFITABLE)
PROGRAMS = {
    # what is in the way of a graph; none: there are graphs
    VAE: VARIES,
    AnnealedInBuffer: (),
    ScaledByStep: VARIES,
    Temperature: VARIES,
    WeightInList: VARIES,
    TeacherForcing: (Cause.HOST_RANDOMNESS,),
    MomentumTeacher: VARIES,
    Curriculum: VARIES,
    Cutmix: (Cause.HOST_RANDOMNESS,),
    LearnedWeights: (),
    WeightsByLastLosses: (Cause.HOST_SYNC,),
    Collections: (),
    LogsRate: (Cause.TRAINER_READ,),
    Alternates: (),
    NowAndThen: (),
    ScheduleObject: (Cause.STATE_REBOUND,),
    DropoutByStep: VARIES,
}


OF_A_KIND = (MomentumTeacher, Curriculum, Cutmix, WeightsByLastLosses, ScheduleObject)
"""Others are like them."""
CASES = [
    pytest.param(make, marks=pytest.mark.exhaustive if make in OF_A_KIND else ())
    for make in PROGRAMS
]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_programs(harness, make):
    callback = Fit(harness)(make(), max_epochs=2)
    kinds, line = PROGRAMS[make], _named_line(make)
    if not kinds:
        assert replayed(callback) > 5, callback.summary()
        return
    found = [each.reason for each in callback.stats.reasons if each.reason.kind in kinds]
    assert {each.kind for each in found} == set(kinds), callback.summary()
    assert all(each.remedy for each in found)
    if line:
        assert {each.location for each in found} == {f"{__file__}:{line}"}
        assert all(f"{__file__}:{line}" in each.text for each in found)


def _named_line(make):
    """Return the number of the line that a reason must name; 0 if it names none."""
    lines, first = inspect.getsourcelines(make)
    return next((first + i for i, text in enumerate(lines) if text.endswith("# named\n")), 0)
