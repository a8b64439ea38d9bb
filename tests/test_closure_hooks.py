"""Training: hooks between a step and its backward run in the graph, or keep closures eager."""

import collections
import functools

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F

from cg_lightning.trainer.training_step import TrainingStep
from tests.harness import assert_same
from tests.test_training import Classifier, Fit, points, replayed

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*deterministic",
)


def reasons(callback):
    """Return the reasons of training, without warm-up."""
    found = [str(each.reason) for each in callback.stats.reasons if each.stage == "train"]
    return [text for text in found if text != "warm-up"]


# hooks that a graph holds


class Step(Classifier):
    """Logs in the step as well, and draws random numbers in its dropout."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "mean": x.mean()}


class LogsLoss(Step):
    def on_before_backward(self, loss):
        self.log("scaled", loss, on_step=True, on_epoch=True)


class LogsOnlyInHook(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_backward(self, loss):
        self.log("loss", loss)  # on_step by default, as Lightning has it for this hook


class LogsInBothHooks(Step):
    """The same name in the step and in both hooks, and a number of the host."""

    def on_before_zero_grad(self, *_):
        self.log("loss", self.net[0].weight.norm(), on_step=False, on_epoch=True)

    def on_before_backward(self, loss):
        self.log_dict({"loss": loss * 2, "one": 1.0}, on_step=True, on_epoch=True)

    def on_after_backward(self):
        self.log("after", self.net[0].weight.grad.norm(), on_epoch=True)


class Accumulates(Step):
    """Counters and lists of the module."""

    def __init__(self):
        super().__init__()
        self.count, self.losses, self.norms = 0, [], collections.deque(maxlen=4)

    def on_before_zero_grad(self, *_):
        self.count += 1
        self.norms.append(self.net[0].weight.detach().norm())

    def on_before_backward(self, loss):
        self.losses.append(loss.detach())
        self.latest = loss.detach()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("count", float(self.count + len(self.losses) + len(self.norms)))
        self.log("sum", torch.stack(self.losses).sum() + self.norms[-1] + self.latest)


class Teacher(Step):
    """The weights of the teacher follow those of the student."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(8, 4).requires_grad_(False)
        self.student = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        with torch.no_grad():
            target = self.teacher(batch[0])
        return loss + F.mse_loss(self.student(batch[0]), target)

    @torch.no_grad()
    def on_before_zero_grad(self, *_):
        for mine, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.mul_(0.9).add_(other, alpha=0.1)


class TeacherInGraph(Teacher):
    """The backward reads the weights that the hook writes, and autograd does not notice."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.student(x).repeat(1, 2)
        return F.cross_entropy(self.net(x), y) + self.teacher(hidden).square().mean()

    def on_before_zero_grad(self, *_):
        for mine, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.data.mul_(0.9).add_(other.data, alpha=0.1)


class CountsInMetric(Step):
    """A metric of torchmetrics, which a hook updates."""

    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def on_before_backward(self, loss):
        self.mean(loss)
        self.log("mean", self.mean, on_step=True, on_epoch=True)


class ClosureTwice(Step):
    """Sharpness-aware minimization: the closure runs again at other weights, hooks included."""

    def on_before_zero_grad(self, *_):
        self.log("weight", self.net[0].weight.norm(), on_step=True, on_epoch=True)

    def on_before_backward(self, loss):
        self.log("loss", loss, on_step=True, on_epoch=True)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        with torch.no_grad():
            moves = [p.grad * 0.05 for p in self.parameters()]
            torch._foreach_add_(list(self.parameters()), moves)
        optimizer_closure()
        with torch.no_grad():
            torch._foreach_sub_(list(self.parameters()), moves)
        optimizer.optimizer.step()


class DoublesLoss(Step):
    """Lightning has copied the loss before, but its backward sees the change."""

    def on_before_backward(self, loss):
        loss.mul_(2)


class HooksOfLoss(Step):
    def on_before_backward(self, loss):
        loss.register_hook(lambda gradient: gradient * 3)


class GradientsOfActivations(Step):
    """Asks autograd for a gradient of its own."""

    def on_before_backward(self, loss):
        (gradient,) = torch.autograd.grad(loss, self.net[0].weight, retain_graph=True)
        self.log("norm", gradient.norm(), on_step=True)


class DrawsInHook(Step):
    def on_before_zero_grad(self, *_):
        self.log("noise", torch.randn((), device=self.device), on_step=True)


class ByEpoch(Step):
    """Does more in the second epoch."""

    def on_before_backward(self, loss):
        if self.current_epoch == 1:
            self.log("second", loss, on_step=True, on_epoch=True)
            loss.mul_(0.5)


class CallbackLogs(Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pl_module.log("weight", pl_module.net[0].weight.norm(), on_step=True)

    def on_before_backward(self, trainer, pl_module, loss):
        self.log("of_callback", loss, on_step=True, on_epoch=True)
        self.log("number", 3.0, on_step=True)


class CallbackWrites(Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        with torch.no_grad():
            for parameter in pl_module.net[0].parameters():
                parameter.data.clamp_(-0.3, 0.3)


def logs_by_function():
    return LambdaCallback(on_before_backward=lambda _, module, loss: module.log("by", loss))


ALONE = {
    each.__name__: (each, list)
    for each in (LogsLoss, LogsOnlyInHook, LogsInBothHooks, Accumulates, Teacher, TeacherInGraph)
}
ALONE |= {each.__name__: (each, list) for each in (CountsInMetric, ByEpoch)}
ALONE |= {ClosureTwice.__name__: (ClosureTwice, list)}
ALONE |= {
    each.__name__: (each, list)
    for each in (
        DoublesLoss,
        HooksOfLoss,
        GradientsOfActivations,
        DrawsInHook,
        ByEpoch,
        ClosureTwice,
    )
}
CASES = {
    **ALONE,
    "callback logs": (Step, lambda: [CallbackLogs()]),
    "callback logs before the module": (LogsInBothHooks, lambda: [CallbackLogs()]),
    "callback writes": (Step, lambda: [CallbackWrites()]),
    "a function logs": (Step, lambda: [logs_by_function()]),
}


class ScaledFit(Fit):
    """Lightning has 16-mixed on GPUs only; the first factors here are too large, as on a GPU."""

    def _run(self, module, extra, others, train, settings):
        if self.harness.backend == "recorder":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=6)
            settings = {**settings, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        else:
            settings = {**settings, "precision": "16-mixed"}
        return super()._run(module, extra, others, train, settings)


@pytest.mark.in_turn("batches")
@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_hooks_in_the_graph(fit, case, batches):
    """With accumulation, the first batch is of another key if a hook runs only there."""
    make, others = CASES[case]
    callback = fit(make(), others=others, accumulate_grad_batches=batches, max_epochs=4)
    assert replayed(callback) > 8, callback.summary()
    assert not [text for text in reasons(callback) if "changed" not in text], callback.summary()


@pytest.mark.parametrize("case", CASES)
def test_hooks_without_verification(fit, case):
    make, others = CASES[case]
    settings = {"verify_replays": 0, "warmup_steps": 1}
    callback = fit(make(), others=others, settings=settings)
    assert replayed(callback) > 8, callback.summary()


@pytest.mark.parametrize("case", CASES)
def test_hooks_with_scaled_losses(harness, case):
    """A hook is given the loss times the factor, and each step has another factor at first."""
    make, others = CASES[case]
    callback = ScaledFit(harness)(make(), others=others, max_epochs=4)
    assert replayed(callback) > 8, callback.summary()


@pytest.mark.parametrize("warmup_steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("make", [LogsInBothHooks, LogsOnlyInHook, ByEpoch])
def test_logged_values_start_anew_in_each_epoch(fit, make, warmup_steps):
    """Also if the first step of an epoch is captured, where ``self.log`` of each hook resets."""
    settings = {"warmup_steps": warmup_steps, "verify_replays": 0}
    callback = fit(
        make(), settings=settings, max_epochs=6, limit_train_batches=3, others=lambda: []
    )
    assert replayed(callback) > 8, callback.summary()


def test_a_graph_without_the_hook_would_be_noticed(fit, monkeypatch):
    """The comparisons of this file can fail."""
    monkeypatch.setattr(TrainingStep, "_run_hooks", lambda *_: "")
    with pytest.raises(AssertionError):
        fit(TeacherInGraph(), settings={"verify_replays": 0})


# hooks that keep closures eager


class ReadsGradients(Step):
    def on_before_zero_grad(self, *_):
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        if norms:
            self.log("norm", torch.stack(norms).norm(), on_step=True)


class Clips(Step):
    def on_before_zero_grad(self, *_):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ClipsByAddress(Step):
    """Keeps the gradients, which the last batch of a run then shows."""

    def on_before_zero_grad(self, *_):
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.clamp_(-1e-3, 1e-3)


class ReadsClearedGradients(Step):
    """They are cleared for it, in a watched step as well."""

    def on_before_backward(self, loss):
        grads = [p.grad for p in self.parameters()]
        self.log("none", float(sum(each is None for each in grads)), on_step=True)


class SetsGradients(Step):
    def on_before_backward(self, loss):
        for parameter in self.net[0].parameters():
            parameter.grad = torch.ones_like(parameter)


class OwnBackward(Step):
    """Adds gradients twice, one after the other."""

    def on_before_backward(self, loss):
        (loss * 0.3).backward(retain_graph=True)


class ClearsItself(Step):
    def on_before_zero_grad(self, *_):
        self.zero_grad()


class ReadsThemLater(Step):
    """In the second epoch, where the closure has run from a graph before."""

    def on_before_backward(self, loss):
        if self.current_epoch > 0:
            grads = [p.grad for p in self.parameters()]
            self.log("none", float(sum(each is None for each in grads)), on_step=True)


class AsksForOptimizer(Step):
    def on_before_zero_grad(self, *_):
        group = self.optimizers().param_groups[0]
        group["lr"] *= 0.9
        self.log("lr", group["lr"], on_step=True)


class ReadsMetrics(Step):
    def on_before_backward(self, loss):
        loss.mul_(1 + float(self.trainer.callback_metrics.get("loss", 0.0)))


class Freezes(Step):
    def on_before_zero_grad(self, *_):
        self.net[0].weight.requires_grad_(self.current_epoch == 1)


class Waits(Step):
    def on_before_backward(self, loss):
        if loss.item() > 1.3:
            loss.mul_(0.5)


class UsesOptimizer(Step):
    def on_before_zero_grad(self, optimizer):
        self.log("lr", optimizer.param_groups[0]["lr"] * 1.0, on_step=True)


class UsesAll(Step):
    def on_before_zero_grad(self, *args):
        self.log("lr", args[0].param_groups[0]["lr"] * 1.0, on_step=True)


class OwnState(Callback):
    """A watched step does not see what a callback holds."""

    def __init__(self):
        self.losses, self.count = [], 0

    def on_before_backward(self, trainer, pl_module, loss):
        self.count += 1
        self.losses.append(loss.detach() * self.count)


class ByTrainer(Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step > 4:
            loss.mul_(0.5)


class ByOptimizer(Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        optimizer.param_groups[0]["params"][0].data.mul_(0.9)


class Inherits(OwnState):
    def on_before_backward(self, trainer, pl_module, loss):
        super().on_before_backward(trainer, pl_module, loss)


class BySuper(OwnState):
    """In Python 3.11, ``super()`` names no argument."""

    def halve(self):
        self.count += 1

    def on_before_backward(self, trainer, pl_module, loss):
        super().__init__()


class ByLocals(Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        loss.mul_(0.5 if locals()["trainer"].global_step % 2 else 1)


class InFunction(Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        (lambda: loss.mul_(0.5 if trainer.global_step % 2 else 1))()


class LogsItself(OwnState):
    """Its ``log`` is its own."""

    def log(self, name, value):
        self.losses.append(value.detach())

    def on_before_backward(self, trainer, pl_module, loss):
        self.log("x", loss)


class Static(Callback):
    @staticmethod
    def on_before_backward(trainer, pl_module, loss):
        loss.mul_(0.5 if trainer.global_step % 2 else 1)


COUNTS = {"zero": 0}


def counts_in_closure():
    seen = []

    def append(trainer, module, loss):
        seen.append(loss)
        loss.mul_(1.0 / len(seen))

    return LambdaCallback(on_before_backward=append)


class CountsInGlobal(Callback):
    def on_train_start(self, trainer, pl_module):
        COUNTS["zero"] = 0

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        COUNTS["zero"] += 1
        pl_module.log("count", float(COUNTS["zero"]), on_step=True)


def partial():
    return LambdaCallback(on_before_backward=functools.partial(_halve, 3))


def _halve(number, trainer, module, loss):
    loss.mul_(0.5 if trainer.global_step % number else 1)


EAGER = {
    "on_before_zero_grad": [
        *(ReadsGradients, Clips, ClipsByAddress, UsesOptimizer, UsesAll, ByOptimizer),
        *(ClearsItself, AsksForOptimizer),
    ],
    "on_before_backward": [
        *(ReadsClearedGradients, SetsGradients, Waits, OwnState, ByTrainer, Inherits),
        *(BySuper, ByLocals, InFunction, LogsItself, Static, partial),
        *(OwnBackward, ReadsMetrics),
    ],
    "closure seen of append": [counts_in_closure],
    "global COUNTS": [CountsInGlobal],
}


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("make", [each for found in EAGER.values() for each in found])
def test_hooks_that_keep_closures_eager(fit, make, verify_replays, batches):
    """They are named, or what they change is, and all is as in eager from the first step on."""
    made = []

    def others():
        made.append(make())
        return [made[-1]]

    is_module = isinstance(make, type) and issubclass(make, Step)
    settings = {"verify_replays": verify_replays}
    callback = fit(
        make() if is_module else Step(),
        others=list if is_module else others,
        settings=settings,
        accumulate_grad_batches=batches,
    )
    name = next(name for name, found in EAGER.items() if make in found)
    ran = callback.stats.steps_of("train").get("FULL", 0)
    assert any(name in text for text in reasons(callback)), callback.summary()
    if batches == 1 or name not in ("on_before_zero_grad", "global COUNTS"):
        assert ran == 0, callback.summary()
    if isinstance(made and made[0], OwnState):
        assert_same(*[(each.losses, each.count) for each in made])


# hooks that come, go or change during training


class ForOneEpoch(Step):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.callbacks.append(CallbackWrites())
        if self.current_epoch == 2:
            self.trainer.callbacks.pop()


class Replaced(Step):
    """Its hook is replaced in the object, as a wrapper may do it."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.on_before_backward = lambda loss: loss.mul_(0.5)
        if self.current_epoch == 2:
            del self.on_before_backward


class WithOtherCode(Step):
    def on_before_backward(self, loss):
        loss.mul_(0.5)

    def on_train_epoch_start(self):
        if self.current_epoch:
            code = _triple if self.current_epoch == 1 else _keep
            WithOtherCode.on_before_backward.__code__ = code.__code__


def _triple(self, loss):
    loss.mul_(3.0)


def _keep(self, loss):
    loss.mul_(0.5)


class ByClosure(Step):
    """What the hook's closure and its defaults hold changes."""

    def on_train_epoch_start(self):
        factor = 1.0 + self.current_epoch

        def halve(loss, other=self.current_epoch):
            loss.mul_(factor + other)

        self.on_before_backward = halve


FACTOR = [1.0]


class ByGlobal(Step):
    def on_before_backward(self, loss):
        loss.mul_(FACTOR[0])

    def on_train_epoch_start(self):
        FACTOR[0] = 1.0 + self.current_epoch


class ByDefault(Step):
    """The default of an argument that Lightning does not give."""

    def on_before_backward(self, loss, factor=0.5, *, other=1.0):
        loss.mul_(factor * other)

    def on_train_epoch_start(self):
        ByDefault.on_before_backward.__defaults__ = (0.5 + self.current_epoch,)
        ByDefault.on_before_backward.__kwdefaults__["other"] = 1.0 + self.current_epoch % 2


class CallbackByGlobal(Callback):
    """What a callback's hook reads of the module and of globals is compared."""

    def on_train_epoch_start(self, trainer, pl_module):
        FACTOR[0] = 1.0 + trainer.current_epoch
        pl_module.factor = 3.0 - trainer.current_epoch

    def on_before_backward(self, trainer, pl_module, loss):
        loss.mul_(FACTOR[0] * pl_module.factor)


def test_what_a_hook_of_a_callback_reads(fit):
    callback = fit(Step(), others=lambda: [CallbackByGlobal()], settings={"verify_replays": 0})
    assert replayed(callback) > 8, callback.summary()


@pytest.mark.parametrize("batches", [1, 3])
def test_gradients_that_a_hook_reads_later(fit, batches):
    callback = fit(ReadsThemLater(), max_epochs=4, accumulate_grad_batches=batches)
    assert replayed(callback) > 2, callback.summary()
    assert any("ReadsThemLater.on_before_backward" in text for text in reasons(callback))


CHANGING = [ForOneEpoch, Replaced, WithOtherCode, ByClosure, ByGlobal, ByDefault]


@pytest.mark.parametrize("make", CHANGING)
def test_hooks_that_change_during_training(fit, make):
    callback = fit(make(), settings={"verify_replays": 0})
    assert replayed(callback) > 8, callback.summary()


class SetByStep(Step):
    """The hook that its step sets or removes counts for the same iteration."""

    def training_step(self, batch, batch_idx):
        vars(self).pop("on_before_backward", None)
        if self.current_epoch == 1:
            self.on_before_backward = _halve_loss
        return super().training_step(batch, batch_idx)


class SetByHook(Step):
    """Its first hook sets the second one."""

    def on_before_zero_grad(self, *_):
        self.on_before_backward = _halve_loss if self.current_epoch == 1 else _keep_loss


class AppendedByHook(Step):
    def on_before_zero_grad(self, *_):
        callbacks = self.trainer.callbacks
        if self.current_epoch == 1 and not any(isinstance(each, Halves) for each in callbacks):
            callbacks.append(Halves())


class Halves(Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        loss.mul_(0.5)


def _halve_loss(loss):
    loss.mul_(0.5)


def _keep_loss(loss):
    loss.mul_(1.0)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("make", [SetByStep, SetByHook, AppendedByHook])
def test_hooks_that_change_inside_the_closure(fit, make, batches):
    settings = {"verify_replays": 0}
    callback = fit(make(), settings=settings, max_epochs=4, accumulate_grad_batches=batches)
    assert make is not SetByHook or replayed(callback) > 8, callback.summary()


class FreezesLate(Step):
    """Autograd asks for it again when it has computed the gradient."""

    def on_before_backward(self, loss):
        self.net[0].weight.requires_grad_(self.current_epoch == 1)


@pytest.mark.parametrize(
    ("make", "name"), [(Freezes, "on_before_zero_grad"), (FreezesLate, "on_before_backward")]
)
def test_a_hook_that_freezes(fit, make, name):
    """Only the closures in which it changes something are eager, and say why."""
    callback = fit(make(), settings={"verify_replays": 0})
    assert replayed(callback) > 8, callback.summary()
    words = f"{make.__name__}.{name} changes requires_grad"
    assert any(words in text for text in reasons(callback)), callback.summary()


class Raises(Step):
    """Its hook raises an error in the ninth batch."""

    def on_before_backward(self, loss):
        self.log("scaled", loss)
        if self.global_step == 8:
            raise ValueError("the ninth batch")


def test_an_error_of_a_hook_is_that_of_eager(fit):
    with pytest.raises(ValueError, match="the ninth batch"):
        fit(Raises())


# Lightning makes DDP on its own stream
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_gradients_after_an_error_of_a_hook(harness, strategy):
    """They have been set to zero before ``on_before_backward``, in a watched step as well."""
    left = []
    try:
        for extra in ([harness.callback(stages=["train"], strict=True)], []):
            torch.manual_seed(0)
            module = RaisesInSecond()
            trainer = harness.trainer(*extra, max_epochs=1, strategy=strategy, devices=1)
            with pytest.raises(ValueError, match="the second batch"):
                trainer.fit(module, points(shuffle=False))
            left.append([p.grad for p in module.parameters()])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert_same(*left)


class RaisesInSecond(Step):
    def on_train_batch_start(self, batch, batch_idx):
        self.is_second = batch_idx == 1

    def on_before_backward(self, loss):
        if self.is_second:
            raise ValueError("the second batch")


class Seen(Step):
    """Its two hooks tell what they see of the run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_before_zero_grad(self, *_):
        self.see("zero", None)

    def on_before_backward(self, loss):
        self.see("backward", loss)

    def see(self, name, loss):
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        autocast = torch.is_autocast_enabled("cpu")
        required = None if loss is None else (loss.requires_grad, loss.grad_fn is not None)
        self.seen.append((name, self._current_fx_name, modes, autocast, required))


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}])
def test_what_a_hook_sees(harness, settings):
    """In watched, captured and verified steps as in eager."""
    found = []
    for extra in ([harness.callback(stages=["train"])], []):
        torch.manual_seed(0)
        module = Seen()
        harness.trainer(*extra, max_epochs=1, **settings).fit(module, points(shuffle=False))
        found.append(module.seen)
    assert found[0] == found[1]
    assert len(found[0]) == 18


def test_progress_of_a_resumed_run(harness, tmp_path):
    """Lightning counts calls of ``zero_grad`` in checkpoints, and goes on from there."""
    found = []
    for extra in ([harness.callback(stages=["train"])], []):
        torch.manual_seed(0)
        first = harness.trainer(*extra, max_epochs=2)
        first.fit(Teacher(), points(shuffle=False))
        file = tmp_path / "checkpoint.ckpt"
        first.save_checkpoint(file)
        model, others = (
            Teacher(),
            [type(each)(stages=["train"], backend=harness.backend) for each in extra],
        )
        second = harness.trainer(*others, max_epochs=4)
        second.fit(model, points(shuffle=False), ckpt_path=file, weights_only=False)
        loops = torch.load(file, weights_only=False)["loops"]
        progress = second.fit_loop.epoch_loop.automatic_optimization.optim_progress
        found.append((loops, progress.state_dict(), model.state_dict(), second.callback_metrics))
        if extra:
            assert min(map(replayed, (*extra, *others))) > 8
    assert_same(*found)
