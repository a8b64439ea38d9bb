"""Trains on several ranks, on the CPU or on GPUs: run by test_training_ddp.py in processes."""

import copy
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint

from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.trainer.ddp_buckets import DDPBuckets
from tests.harness import Harness, assert_same
from tests.test_closure_hooks import CASES as HOOKS
from tests.test_closure_hooks import DoublesLoss, Step, Teacher
from tests.test_training import Classifier, Fit, KeepAll, LogsGradients, Tied, points, replayed


class OneRankWaits(Classifier):
    """Its second rank does what no graph can hold."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1:
            batch[0].sum().item()
        return super().training_step(batch, batch_idx)


class OneRankHasOtherShapes(Classifier):
    """Its second rank has a smaller batch now and then."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.seen = getattr(self, "seen", 0) + 1
        if self.global_rank == 1 and self.seen % 3 == 1:
            return [each[:3] for each in batch]
        return batch


class UsesOneHead(Classifier):
    """Each batch reaches one of two heads; which one, its rank and index decide."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        head = self.heads[1 if batch_idx % 2 == self.global_rank else 0]
        loss = nn.functional.cross_entropy(head(self.net(x)), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "x": x}


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class ReachesWithoutGradient(Classifier):
    """The backward reaches a parameter that it gives no gradient."""

    def __init__(self):
        super().__init__()
        self.ignored = nn.Parameter(torch.ones(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(NoGradient.apply(x, self.ignored)), y)


class Checkpointed(Classifier):
    """Its backward runs the step again, and a backward of its own."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[:2](x)
        out = checkpoint(self.net[2], hidden, use_reentrant=True)
        return nn.functional.cross_entropy(out, y)


class MeanOverRanks(torch.autograd.Function):
    """Like SyncBatchNorm: a collective in the forward, and another one in the backward."""

    @staticmethod
    def forward(ctx, x):
        mean = x.mean(0)
        torch.distributed.all_reduce(mean)
        return x - mean / torch.distributed.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        mean = gradient.mean(0)
        torch.distributed.all_reduce(mean)
        return gradient - mean / torch.distributed.get_world_size()


class ReducedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        mean = gradient.mean(0)
        torch.distributed.all_reduce(mean)
        return gradient + mean


class NormalizesOverRanks(OneRankHasOtherShapes):
    """Its ranks are not watched in the same steps. The order of collectives must be equal."""

    function = MeanOverRanks

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.function.apply(self.net[:2](x))
        return nn.functional.cross_entropy(self.net[2](hidden), y)


class ReducesInBackward(NormalizesOverRanks):
    function = ReducedBackward


def plus_mean_over_ranks(gradient):
    mean = gradient.mean(0)
    torch.distributed.all_reduce(mean)
    return gradient + mean


class ReducesInHook(NormalizesOverRanks):
    """A hook of an activation runs a collective."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[:2](x)
        hidden.register_hook(plus_mean_over_ranks)
        return nn.functional.cross_entropy(self.net[2](hidden), y)


def plus_mean_of_input(module, gradients, _):
    return (plus_mean_over_ranks(gradients[0]),)


def before_plus_mean(module, gradients):
    return (plus_mean_over_ranks(gradients[0]),)


class ReducesInHookOfModule(NormalizesOverRanks):
    """A backward hook of a module in a list, which is no submodule, runs a collective."""

    is_pre = False

    def __init__(self):
        super().__init__()
        self.others = [nn.Tanh()]
        if self.is_pre:
            self.others[0].register_full_backward_pre_hook(before_plus_mean)
        else:
            self.others[0].register_full_backward_hook(plus_mean_of_input)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net[2](self.others[0](self.net[0](x))), y)


class ReducesInPreHookOfModule(ReducesInHookOfModule):
    is_pre = True


class LogsOverRanks(Classifier):
    """Logs values that are reduced over the ranks, after the step and at the end of an epoch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("reduced", outputs["loss"], sync_dist=True)

    def on_train_epoch_end(self):
        self.log("rank", float(self.global_rank), sync_dist=True)


class LogsOverRanksInStep(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("reduced", loss, sync_dist=True)
        return loss


class LogsOverRanksInHook(Step):
    def on_before_backward(self, loss):
        self.log("reduced", loss, sync_dist=True)


class TeacherOfOtherShapes(OneRankHasOtherShapes, Teacher):
    """Its second rank is watched and captures in other steps."""


class ReadsClearedGradients(Step):
    """They are cleared, as in eager, if its first step is watched."""

    def on_before_backward(self, loss):
        gradients = [p.grad for p in self.parameters()]
        self.log("none", float(sum(each is None for each in gradients)), on_step=True)


class NeedsMemory(torch.autograd.Function):
    """Needs too much memory in captures of the second rank: of its forward, or its backward."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        _take_memory(place == "forward")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        _take_memory(ctx.place == "backward")
        return gradient, None


def _take_memory(is_here):
    context = current_forward_context()
    is_capture = context is not None and context.cudagraph_runtime_mode is CUDAGraphMode.FULL
    if is_here and is_capture and torch.distributed.get_rank() == 1:
        raise torch.OutOfMemoryError("out of memory")


class OneRankLacksMemory(Classifier):
    place = "forward"

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(NeedsMemory.apply(self.net(x), self.place), y)


class OneRankLacksMemoryInBackward(OneRankLacksMemory):
    place = "backward"


class Interrupted(Classifier):
    """A key is pressed in both processes, as a terminal does it."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 12:
            signal.raise_signal(signal.SIGINT)


class OneRankIsInterrupted(Classifier):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 12 and self.global_rank == 1:
            signal.raise_signal(signal.SIGINT)


class OneRankStops(Classifier):
    """Its second rank raises an error when steps run from graphs."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == 12:
            raise RuntimeError("the second rank stops")


class Freezes(Callback):
    """Freezes a layer in the second epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net[0].requires_grad_(False)


def halved(state, bucket):
    """Reduces half of the gradients."""
    group = torch.distributed.group.WORLD
    future = torch.distributed.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    return future.then(lambda done: done.value()[0] / 2 / torch.distributed.get_world_size())


READ = []
"""What the hook of the communication has read in one run."""


def that_reads_gradients(state, bucket):
    """Reads the gradients of its bucket, which the reducer has not written yet."""
    gradients = [parameter.grad for parameter in bucket.parameters()]
    READ.append([None if each is None else each.clone() for each in gradients])
    return halved(state, bucket)


def unused():
    return DDPStrategy(find_unused_parameters=True)


def small_buckets():
    return DDPStrategy(bucket_cap_mb=1e-4, gradient_as_bucket_view=True, broadcast_buffers=False)


def several_buckets():
    return DDPStrategy(bucket_cap_mb=1e-4)


class Hooked(DDPStrategy):
    """Has a hook of the communication, which Lightning's own strategy ignores on a CPU."""

    def __init__(self, hook, **settings):
        super().__init__(**settings)
        self.hook = hook

    def _register_ddp_hooks(self):
        self.model.register_comm_hook(None, self.hook)


def with_hook_that_reads():
    return Hooked(that_reads_gradients, bucket_cap_mb=1e-4)


def with_hook():
    return Hooked(halved)


class HalvesLater(Callback):
    """Registers a hook of the communication when steps run from graphs already."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8:
            trainer.strategy.model.register_comm_hook(None, halved)


class Compresses(DDPStrategy):
    """Reduces in another precision, by a hook that DDP's own list of hooks does not have."""

    def _register_ddp_hooks(self):
        self.model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)


def compressed():
    return Compresses()


class WithConvolution(Classifier):
    """Its weights are dense, and not contiguous."""

    def __init__(self):
        layers = nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(4, 4)
        super().__init__(nn.Sequential(*layers).to(memory_format=torch.channels_last))


def scaled_on_cpu():
    """Lightning has 16-mixed on GPUs only; the first factors here are too large, as on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=6)
    return [MixedPrecision("16-mixed", "cpu", scaler)]


CASES = {
    "plain": (Classifier, {}),
    "accumulation": (Classifier, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "hooks": (LogsGradients, {}),
    "several buckets": (Classifier, {"strategy": several_buckets}),
    "channels last": (WithConvolution, {"max_epochs": 4}),
    "hook of the communication, later": (Classifier, {"others": lambda: [HalvesLater()]}),
    "built-in hook of the communication": (Classifier, {"strategy": compressed}),
    "bf16": (Classifier, {"precision": "bf16-mixed"}),
    "tied": (lambda: Classifier(Tied()), {}),
    "unused": (UsesOneHead, {"strategy": unused, "max_epochs": 6}),
    "static": (Classifier, {"strategy": lambda: DDPStrategy(static_graph=True)}),
    "buckets": (Classifier, {"strategy": small_buckets}),
    "hook of the communication": (Classifier, {"strategy": with_hook}),
    "hook that reads gradients": (Classifier, {"strategy": with_hook_that_reads}),
    "without gradient": (ReachesWithoutGradient, {}),
    "checkpoint": (Checkpointed, {}),
    "logged over ranks": (LogsOverRanks, {}),
    "other shapes": (OneRankHasOtherShapes, {"max_epochs": 6}),
    "freezes": (Classifier, {"others": lambda: [Freezes()], "strategy": unused, "max_epochs": 4}),
    "one rank waits": (OneRankWaits, {}),
    "one rank lacks memory": (OneRankLacksMemory, {}),
    "one rank lacks memory in its backward": (OneRankLacksMemoryInBackward, {}),
    "logs over ranks in the step": (LogsOverRanksInStep, {}),
    "normalized over ranks": (NormalizesOverRanks, {"strategy": small_buckets}),
    "reduced in the backward": (ReducesInBackward, {"strategy": small_buckets}),
    "reduced in a hook": (ReducesInHook, {"strategy": small_buckets}),
    "reduced in a hook of a module": (ReducesInHookOfModule, {"strategy": small_buckets}),
    "reduced in a pre-hook of a module": (ReducesInPreHookOfModule, {"strategy": small_buckets}),
    "teacher, other shapes": (TeacherOfOtherShapes, {"max_epochs": 6}),
    "logs over ranks in a hook": (LogsOverRanksInHook, {"strategy": small_buckets}),
    "reads cleared gradients": (ReadsClearedGradients, {"strategy": small_buckets}),
    "doubles a scaled loss": (DoublesLoss, {"plugins": scaled_on_cpu, "max_epochs": 6}),
}
OF_HOOKS = ("LogsInBothHooks", "TeacherInGraph", "DrawsInHook", "callback logs before the module")
TWO_BATCHES = {"accumulate_grad_batches": 2, "max_epochs": 5}
CASES |= {
    f"closure hooks, {name}": (HOOKS[name][0], {"others": HOOKS[name][1], **TWO_BATCHES})
    for name in OF_HOOKS
}


SYNCHRONIZED = {
    "synchronized norm": (Classifier, {"sync_batchnorm": True}),
    "synchronized norm, other shapes": (
        OneRankHasOtherShapes,
        {"sync_batchnorm": True, "strategy": small_buckets},
    ),
}
"""They need GPUs."""


class FitOnRanks(Fit):
    ranks = 2

    def _run(self, module, extra, others, train, settings):
        strategy = settings.get("strategy", DDPStrategy)()
        settings = {**settings, "strategy": strategy, "devices": self.ranks}
        if "plugins" in settings:
            settings["plugins"] = settings["plugins"]()
        READ.clear()
        return (*super()._run(module, extra, others, train, settings), list(READ))


ON_THREE = (
    "accumulation",
    "several buckets",
    "channels last",
    "buckets",
    "hook that reads gradients",
    "other shapes",
)
"""The cases in which sums over three ranks show another order."""


def stop(backend: str, folder: Path) -> None:
    """One rank raises an error."""
    harness = Harness(backend, folder)
    callback = harness.callback(stages=["train"])
    torch.manual_seed(0)
    trainer = harness.trainer(callback, strategy="ddp", devices=2, max_epochs=9)
    try:
        trainer.fit(OneRankStops(), points(number=36))
    except RuntimeError:
        if backend != "cuda":
            raise
        error = traceback.format_exc()
    finally:
        print("replays", replayed(callback), flush=True)
    # NCCL waits for the other rank at exit, without graphs too
    print(error, file=sys.stderr, flush=True)
    os._exit(1)


def end(backend: str, folder: Path) -> None:
    """The script ends after ``fit``, with its process group, as most scripts do."""
    _fit_and_end(backend, folder, Classifier())


def interrupt(backend: str, folder: Path) -> None:
    """Ctrl-C reaches both processes."""
    _fit_and_end(backend, folder, Interrupted())


def interrupt_one(backend: str, folder: Path) -> None:
    """A signal reaches one process."""
    _fit_and_end(backend, folder, OneRankIsInterrupted())


def _fit_and_end(backend: str, folder: Path, model: Classifier) -> None:
    harness = Harness(backend, folder)
    callback = harness.callback(stages=["train"])
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        trainer = harness.trainer(callback, strategy="ddp", devices=2, max_epochs=3)
        trainer.fit(model, points(number=36))
    finally:
        print("replays", replayed(callback), flush=True)


class Moves(Classifier):
    def configure_model(self):
        """A strategy that moves parameters asks for it. One device needs nothing."""


def moved(backend: str, folder: Path) -> None:
    """A strategy that moves parameters between steps: training is as without the callback."""
    harness, start, seen = Harness(backend, folder), Moves(), []
    callback = harness.callback(stages=["train", "validate"])
    for own in ([callback], [], [harness.callback(stages=["train"], strict=True)]):
        torch.manual_seed(1)
        model, kept = copy.deepcopy(start), KeepAll()
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
        trainer = harness.trainer(*own, kept, strategy=strategy)
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                trainer.fit(model, points(), points(12))
        except RuntimeError as error:
            print("strict:", error)
            break
        said = [str(each.message) for each in warned if "CUDAGraphCallback" in str(each.message)]
        print("said:", *said)
        assert len(said) == len(own)
        seen.append((kept.outputs, kept.weights, kept.metrics, dict(trainer.callback_metrics)))
    assert_same(*seen)
    print("modes:", *callback.stats.steps_of("train"))
    torch.distributed.destroy_process_group()


def three(backend: str, folder: Path) -> None:
    """The same for a few cases on three ranks."""
    main(backend, folder, 3, ON_THREE)


def main(backend: str, folder: Path, ranks: int = 2, names: Sequence[str] = tuple(CASES)) -> None:
    """Each rank writes how many steps it replayed, and reduced itself: a line for each case."""
    reduce, reduced = DDPBuckets.reduce, []

    def counted(buckets: DDPBuckets) -> None:
        reduced.append(buckets)
        reduce(buckets)

    DDPBuckets.reduce = counted
    fit = FitOnRanks(Harness(backend, folder))
    fit.ranks = ranks
    cases = {name: CASES[name] for name in names}
    if backend == "cuda":
        cases.pop("doubles a scaled loss", None)
    if backend == "cuda" and ranks == 2:
        cases["16-mixed"] = (Classifier, {"precision": "16-mixed"})
        cases |= SYNCHRONIZED
    lines = []
    for name, (make, settings) in cases.items():
        torch.manual_seed(0)
        print(name, flush=True)  # the test shows it if this case fails
        reduced.clear()
        callback = fit(make(), train=points(number=18 * ranks), **settings)
        reasons = [str(each.reason) for each in callback.stats.reasons if each.stage == "train"]
        numbers = str(replayed(callback)), str(len(reduced))
        lines.append("\t".join((name, *numbers, *reasons)))
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}").write_text("\n".join(lines))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    job, backend, folder = sys.argv[1:]
    jobs = (main, stop, three, end, interrupt, interrupt_one, moved)
    {each.__name__: each for each in jobs}[job](backend, Path(folder))
