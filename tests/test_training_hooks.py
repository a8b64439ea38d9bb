"""Training: hooks and memory of gradients that come or go after a graph was captured."""

import copy
import inspect
import signal

import pytest
import torch
from lightning.pytorch import Callback, callbacks
from torch import nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn import functional as F
from torch.nn import utils

from cg_lightning.backends import resolve_backend
from cg_lightning.backends.capture_scope import (
    STREAMS_OF_NODES,
    no_warning_of_other_streams,
    nodes_of_other_streams_allowed,
)
from cg_lightning.backends.cuda import CUDACapturedGraph
from cg_lightning.backends.recorder import RecordedGraph
from cg_lightning.trainer.node_hooks import can_notice_hooks
from cg_lightning.trainer.training_step import TrainingStep
from tests.conftest import modules_with_a_trace
from tests.harness import assert_same
from tests.test_training import Classifier, KeepAll, points, replayed

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*deterministic",
    "ignore:.*weight_norm. is deprecated",
)


GRAPHS = {"recorder": RecordedGraph, "cuda": CUDACapturedGraph}


def reasons(callback):
    """Return the reasons of training, without warm-up."""
    found = [str(each.reason) for each in callback.stats.reasons if each.stage == "train"]
    return {text for text in found if text != "warm-up"}


class Step(Classifier):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))

    def output(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.output(x), y)
        self.log("loss", loss)
        return loss


# gradients that become views of an older buffer


class KeepsGradients(torch.optim.SGD):
    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none=False)


class FlatLater(Step):
    """Moves all gradients to a buffer in the second epoch, which a hook reads in the backward.

    Lightning sets gradients to None before each validation, so they leave the buffer then.
    """

    def __init__(self):
        super().__init__()
        number = sum(parameter.numel() for parameter in self.net.parameters())
        self.register_buffer("flat", torch.zeros(number))
        self.is_flat = False

    def read(self):
        return self.flat.norm()

    def output(self, x):
        hidden = self.net[1](self.net[0](x))
        hidden.register_hook(lambda gradient: gradient * (1 + self.read()))
        return self.net[2](hidden)

    def on_before_optimizer_step(self, optimizer):
        if self.current_epoch == 0 or self.is_flat:
            return
        self.is_flat, start = True, 0
        for parameter in self.net.parameters():
            view = self.flat[start : start + parameter.numel()].view_as(parameter)
            view.copy_(parameter.grad)
            parameter.grad = view
            start += parameter.numel()

    def configure_optimizers(self):
        return KeepsGradients(self.parameters(), lr=0.1)


class FlatLaterInGroups(FlatLater):
    """Reads parts of it with a function for many tensors."""

    def read(self):
        return torch.stack(torch._foreach_norm(list(self.flat.split(50)))).max()


class FlatLaterInList(FlatLater):
    """The memory is in a list, and no buffer."""

    def on_fit_start(self):
        self.memory = [self.flat]

    def read(self):
        return self.memory[0].sum()


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + ctx.module.flat.norm()), None


class FlatLaterInFunction(FlatLater):
    def output(self, x):
        return self.net[2](_Scaled.apply(self.net[1](self.net[0](x)), self))


@pytest.mark.parametrize(
    "make", [FlatLater, FlatLaterInGroups, FlatLaterInList, FlatLaterInFunction]
)
def test_gradients_become_views_of_what_the_backward_reads(fit, make):
    """Hazard 43."""
    callback = fit(make())
    assert replayed(callback) > 10, callback.summary()
    assert any("reads memory of a gradient" in text for text in reasons(callback))


class FlatAtOnce(FlatLater):
    """Nothing in the backward reads it, as in most projects."""

    def output(self, x):
        return self.net(x)

    def on_after_backward(self):
        self.log("norm", self.flat.norm())


def test_gradients_in_a_flat_buffer_are_no_obstacle(fit):
    callback = fit(FlatAtOnce())
    assert replayed(callback) > 15, callback.summary()
    assert not reasons(callback)


class ReadsBufferInBackward(FlatLater):
    """No gradient is ever in the buffer."""

    def on_before_optimizer_step(self, optimizer):
        self.flat.add_(0.1)


def test_a_buffer_that_the_backward_reads_is_no_obstacle(fit):
    callback = fit(ReadsBufferInBackward())
    assert replayed(callback) > 15, callback.summary()
    assert not reasons(callback)


# hooks of autograd's nodes


def _halved(gradients):
    return (gradients[0] * 0.5,)


class NodeHook(Step):
    """In the second epoch, the node that sets a gradient has a hook."""

    method = "register_prehook"
    first, last = 1, 2

    def hook(self):
        return _halved

    def on_fit_start(self):
        self.hook_of(0)

    def on_train_epoch_start(self):
        if self.current_epoch:
            self.hook_of(self.current_epoch)

    def hook_of(self, epoch):
        if epoch == self.first:
            self.node = get_gradient_edge(self.net[0].weight).node
            self.handle = getattr(self.node, self.method)(self.hook())
        if epoch == self.last:
            self.handle.remove()


class NodeHookFromTheStart(NodeHook):
    first, last = 0, 1


class NodeHookAfterwards(NodeHook):
    """It changes a gradient that was set before."""

    method = "register_hook"

    def hook(self):
        other = self.net[2].weight

        def halve(*_):
            other.grad.mul_(0.5)

        return halve


class NodeHookUntilItsNodeGoes(NodeHook):
    def hook_of(self, epoch):
        if epoch == self.last:
            del self.node
        else:
            super().hook_of(epoch)


class NodeHookWithinAnEpoch(NodeHook):
    def on_train_epoch_start(self):
        pass

    def on_train_batch_start(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx in (2, 5):
            self.hook_of(1 if batch_idx == 2 else 2)


NODE_HOOKS = [
    *(NodeHook, NodeHookFromTheStart, NodeHookAfterwards),
    *(NodeHookUntilItsNodeGoes, NodeHookWithinAnEpoch),
]


OTHER_STREAM = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
"""PyTorch warns if a node outlives the capture, or was made before it on the default stream."""


@OTHER_STREAM
@pytest.mark.parametrize("make", NODE_HOOKS)
def test_hooks_of_nodes(fit, make):
    before = vars(torch.autograd.function._HookMixin)["_register_hook"]
    callback = fit(make())
    assert vars(torch.autograd.function._HookMixin)["_register_hook"] is before
    _check_captures(fit, callback, keeps_node=make is NodeHookFromTheStart)
    left = {text for text in reasons(callback) if "The capture failed" not in text}
    assert left == {"hook inside the closure: a hook of a node of autograd"}


def _check_captures(fit, callback, keeps_node):
    """Check that there are graphs, also if the module keeps a node of the default stream."""
    if keeps_node and fit.harness.backend == "cuda" and not _HAS_OVERRIDE:
        assert "The capture failed" in str(reasons(callback))
    else:
        assert replayed(callback) > 10, callback.summary()


_HAS_OVERRIDE = hasattr(torch.autograd.graph, "set_override_stale_capture_stream")


class KeepsNodes(Step):
    """Holds a tensor with an autograd graph from before training, as for a report of its own."""

    def on_fit_start(self):
        with torch.enable_grad():
            self.kept = [parameter.view_as(parameter) for parameter in self.parameters()]


def test_nodes_of_another_stream(fit):
    """No error and no warning, which an eager step does not have."""
    _check_captures(fit, fit(KeepsNodes()), keeps_node=True)


def test_settings_for_nodes_of_other_streams():
    """Shouts if PyTorch renames them: captures fail then, and training warns."""
    for public, private in STREAMS_OF_NODES.items():
        if torch.__version__ >= "2.13":
            assert hasattr(torch.autograd.graph, public), public
            assert hasattr(torch._C, private), private
    for scope, private, inside in (
        (nodes_of_other_streams_allowed, "_override_stale_capture_stream", True),
        (no_warning_of_other_streams, "_warn_on_accumulate_grad_stream_mismatch", False),
    ):
        if not hasattr(torch._C, private):
            continue
        before = getattr(torch._C, private)()
        with pytest.raises(ValueError), scope, scope:  # noqa: PT011, PT012
            assert getattr(torch._C, private)() is inside
            raise ValueError
        assert getattr(torch._C, private)() is before


def test_another_pytorch_that_adds_hooks_in_another_way(fit, monkeypatch):
    """Training is eager then, with a reason. Shouts if this is such a PyTorch."""
    assert can_notice_hooks(), "PyTorch adds hooks of nodes otherwise: see trainer/node_hooks.py"
    monkeypatch.delattr(torch.autograd.function._HookMixin, "_register_hook")
    with pytest.warns(UserWarning, match="adds hooks of autograd's nodes in a way"):
        callback = fit(Step(), max_epochs=1)
    assert replayed(callback) == 0
    assert "adds hooks of autograd's nodes" in str(callback.stats.eager_reasons)


class HookOfOtherNode(Step):
    """A node of another computation, which is gone before the next closure."""

    def on_train_batch_start(self, batch, batch_idx):
        out = self.net(batch[0]).sum()
        out.grad_fn.register_hook(lambda *_: None)
        out.backward()


def test_hooks_of_nodes_that_are_gone_are_no_obstacle(fit):
    callback = fit(HookOfOtherNode())
    assert replayed(callback) > 15, callback.summary()


# hooks of tensors that are older than the step


def _doubled(gradient):
    return gradient * 2


class HookOfKept(Step):
    """A tensor with an autograd graph is kept, and gets a hook in the second epoch."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def on_train_start(self):
        with torch.enable_grad():
            self.keep(self.bias + 0)

    def keep(self, tensor):
        self.kept = tensor

    def read(self):
        return self.kept

    def output(self, x):
        return super().output(x) + self.read()

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.read().register_hook(_doubled)


class HookOfKeptInList(HookOfKept):
    def keep(self, tensor):
        self.kept = [tensor]

    def read(self):
        return self.kept[0]


class HookOfKeptInLongList(HookOfKeptInList):
    def keep(self, tensor):
        self.kept = [tensor, *[tensor * 2 for _ in range(300)]]


class HookOfKeptInBuffer(HookOfKept):
    def keep(self, tensor):
        self.register_buffer("kept", tensor, persistent=False)


class HookOfKeptGoes(HookOfKept):
    """It has the hook from the start."""

    def keep(self, tensor):
        super().keep(tensor)
        self.handle = tensor.register_hook(_doubled)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.handle.remove()


class KeptRetainsGradient(HookOfKept):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.kept.retain_grad()

    def on_after_backward(self):
        self.log("of kept", 0.0 if self.current_epoch == 0 else self.kept.grad.sum())


HOOKS_OF_KEPT = [
    *(HookOfKept, HookOfKeptInList, HookOfKeptInLongList, HookOfKeptInBuffer, HookOfKeptGoes),
    KeptRetainsGradient,
]


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("make", HOOKS_OF_KEPT)
def test_hooks_of_tensors_that_are_older_than_the_step(fit, make, verify_replays):
    callback = fit(make(), settings={"verify_replays": verify_replays})
    assert replayed(callback) == 0
    line = f"{__file__}:{1 + inspect.getsourcelines(make.read)[1]}"
    line = "not in your code" if make is HookOfKeptInBuffer else line
    words = "self.kept brings an autograd graph from before the step"
    assert reasons(callback) == {f"backward outside the graph: {words} ({line})"}


class LearnsToTransform(Step):
    """A layer of its own changes each third batch before the step."""

    def __init__(self):
        super().__init__()
        self.transform = nn.Linear(8, 8)
        self.number = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.number += 1
        if not self.trainer.training or self.number % 3:
            return batch
        with torch.enable_grad():
            return [self.transform(batch[0]), batch[1]]


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_batches_with_an_autograd_graph(fit, verify_replays):
    callback = fit(LearnsToTransform(), settings={"verify_replays": verify_replays})
    assert replayed(callback) > 10, callback.summary()
    words = "the batch brings an autograd graph from before the step"
    assert words in str(reasons(callback))


# hooks of modules that are no submodules


class HookOfModuleInList(Step):
    """A layer without parameters is in a list, and gets a hook in the second epoch."""

    name = "register_full_backward_hook"

    def __init__(self):
        super().__init__()
        self.others = [nn.Tanh()]

    def output(self, x):
        return self.others[0](super().output(x))

    def hook(self, module, gradients, *_):
        return (gradients[0] * 2,)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.handle = getattr(self.others[0], self.name)(self.hook)
        elif self.current_epoch == 2:
            self.handle.remove()


class PreHookOfModuleInList(HookOfModuleInList):
    name = "register_full_backward_pre_hook"


class HookFromTheStart(HookOfModuleInList):
    def on_train_epoch_start(self):
        if self.current_epoch == 0:
            self.handle = self.others[0].register_full_backward_hook(self.hook)
        elif self.current_epoch == 1:
            self.handle.remove()


HOOKS_OF_MODULES = [HookOfModuleInList, PreHookOfModuleInList, HookFromTheStart]


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("make", HOOKS_OF_MODULES)
def test_backward_hooks_of_modules_that_are_no_submodules(fit, make, verify_replays):
    callback = fit(make(), settings={"verify_replays": verify_replays}, max_epochs=4)
    assert replayed(callback) > 4 or make is HookFromTheStart, callback.summary()
    assert "a backward hook of Tanh" in str(reasons(callback))


class PacksTensors(Step):
    """In the second epoch, the backward gets other tensors than the step has saved."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.packing = saved_tensors_hooks(
                lambda tensor: tensor,
                lambda tensor: tensor * 2 if tensor.is_floating_point() else tensor,
            )
            self.packing.__enter__()

    def on_train_epoch_end(self):
        if self.current_epoch == 1:
            self.packing.__exit__()


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_hooks_of_saved_tensors_outside_of_the_step(fit, verify_replays):
    callback = fit(PacksTensors(), settings={"verify_replays": verify_replays})
    assert replayed(callback) > 10, callback.summary()
    assert reasons(callback) == {"hook inside the closure: saved_tensors_hooks"}


# layers that compute their weights in hooks


class OldNorm(Step):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def configure_model(self):
        if isinstance(self.norm, str):
            name, self.norm = self.norm, None
            getattr(utils, name)(self.net[0])


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_the_reason_names_the_hook_that_computes_a_weight(fit, name):
    callback = fit(OldNorm(name))
    (reason,) = reasons(callback)
    of = {"weight_norm": "WeightNorm", "spectral_norm": "SpectralNorm"}[name]
    assert reason.startswith(f"forward hook: {of} of Linear in net.0"), reason


@OTHER_STREAM
def test_the_reason_names_the_hook_after_pruning(fit):
    def others():
        return [callbacks.ModelPruning("l1_unstructured", amount=0.3)]

    callback = fit(Step(), others=others, max_epochs=4)
    assert any("PruningMethod" in text or "of Linear" in text for text in reasons(callback))


class SetsDropout(Step):
    """Its step changes a setting of a layer, each time."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def output(self, x):
        self.drop.p = 0.1 if self.drop.p == 0.3 else 0.3
        return self.drop(self.net(x))


def test_the_reason_names_the_setting_that_the_step_changes(fit):
    callback = fit(SetsDropout())
    assert not replayed(callback)
    assert all(text.startswith("module state rebound: p in drop") for text in reasons(callback)), (
        reasons(callback)
    )


class TurnsDropout(Step):
    """A hook sets a setting of a layer to one of two values."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def output(self, x):
        return self.drop(self.net(x))

    def on_train_batch_start(self, batch, batch_idx):
        self.drop.p = 0.1 if batch_idx % 2 else 0.3


def test_settings_that_go_back_and_forth_have_graphs(fit):
    callback = fit(TurnsDropout())
    assert replayed(callback) > 15, callback.summary()
    entries = [each for each in callback.stats.entries if each.stage == "train"]
    assert sum(each.captures for each in entries) == 2


class Carries(Step):
    """Truncated backpropagation through time, with its state in a buffer."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.register_buffer("hidden", torch.zeros(1, 4, 8))

    def output(self, x):
        out, hidden = self.rnn(x.unsqueeze(1), self.hidden[:, : len(x)].clone())
        self.hidden[:, : len(x)] = hidden.detach()
        return self.net(out[:, 0])

    def on_train_epoch_start(self):
        self.hidden.zero_()


def test_state_that_is_carried_on_in_a_buffer(fit):
    callback = fit(Carries())
    assert replayed(callback) > 15, callback.summary()


# Ctrl-C


class Interrupts(Callback):
    """Presses Ctrl-C in one hook, at one step."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.press)

    def press(self, trainer, *_):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def keyboard():
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)  # Lightning ignores it from the first one on


def _interrupted(harness, callbacks_, model):
    hook = vars(torch.autograd.function._HookMixin)["_register_hook"]
    torch.manual_seed(1)
    kept = KeepAll()
    trainer = harness.trainer(*callbacks_, kept, max_epochs=3)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as end:
        trainer.fit(model, points(), points(number=12))
    assert trainer.interrupted
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    assert vars(torch.autograd.function._HookMixin)["_register_hook"] is hook
    names = [sorted(set(vars(module))) for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return (
        *(end.value.code, trainer.global_step, kept.outputs, kept.weights, kept.kept_gradients),
        *(names, hooks, [type(module).__qualname__ for module in model.modules()]),
        *([p.grad for p in model.parameters()], dict(model.state_dict())),
        *(trainer.optimizers[0].state_dict()["state"], torch.get_rng_state()),
    )


IN_HOOKS = [
    ("on_train_batch_start", 12),
    ("on_before_optimizer_step", 12),
    ("on_after_backward", 0),
    ("on_after_backward", 3),
    ("on_after_backward", 4),
    ("on_after_backward", 12),
    ("on_train_batch_end", 3),
    ("on_train_batch_end", 12),
    ("on_train_epoch_end", 18),
    ("on_validation_batch_end", 18),
]


@pytest.mark.parametrize(("hook", "step"), IN_HOOKS)
def test_an_interrupt_ends_training_as_in_eager(harness, keyboard, hook, step):
    seen = []
    callback = harness.callback(stages=["train", "validate"])
    for own in ([callback], []):
        torch.manual_seed(0)
        seen.append(_interrupted(harness, [*own, Interrupts(hook, step)], Step()))
    assert_same(*seen)
    assert callback._training is callback._installation is None
    assert replayed(callback) > 5 or step < 12


@pytest.mark.parametrize(
    ("place", "number"),
    [("step", 1), ("step", 2), ("step", 3), ("capture", 1), ("replay", 1), ("replay", 4)],
)
def test_an_interrupt_inside_training(harness, keyboard, monkeypatch, place, number):
    """Hazard 29: afterwards, the module trains as one that has never met the callback."""
    backend = resolve_backend(harness.backend)
    owner, name = {
        "step": (TrainingStep, "compute"),
        "capture": (type(backend), "capture"),
        "replay": (GRAPHS[harness.backend], "replay"),
    }[place]
    original, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        result = original(*args, **kwargs)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return result

    torch.manual_seed(0)
    model = Step()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        _interrupted(harness, [harness.callback(stages=["train"])], model)
    assert len(calls) == number
    assert modules_with_a_trace() == []
    seen = []
    for each in (model, copy.deepcopy(model)):
        torch.manual_seed(2)
        trainer = harness.trainer(max_epochs=1)
        trainer.fit(each, points())
        seen.append((dict(each.state_dict()), [p.grad for p in each.parameters()]))
    assert_same(*seen)
