"""Contexts of PyTorch that a user has entered around steps, or around a whole run."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cg_lightning.core.reasons import Status
from tests.harness import assert_same, features, predict
from tests.models import Body, Predictor
from tests.test_training import Fit, points, replayed
from tests.test_training_hunt import Step

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*deterministic",
)


class CountsOperations(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten.addmm.default
        return function(*args, **(kwargs or {}))


class CountsFunctions(TorchFunctionMode):
    number = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.number += function is nn.functional.linear or function is torch._C._nn.linear
        return function(*args, **(kwargs or {}))


class CountsLookUps(TorchFunctionMode):
    number = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.number += getattr(function, "__self__", None) in _OF_HOOKS
        return function(*args, **(kwargs or {}))


_OF_HOOKS = (torch.Tensor._backward_hooks, torch.Tensor._post_accumulate_grad_hooks)


class CountsFlops(FlopCounterMode):
    def __init__(self):
        super().__init__(display=False)

    @property
    def number(self):
        return self.get_total_flops()


class CountsNothing:
    """No mode: a context of PyTorch that changes how the step is computed."""

    number = 0

    def __init__(self, context):
        self._context = context

    def __enter__(self):
        self._context.__enter__()
        return self

    def __exit__(self, *error):
        return self._context.__exit__(*error)


def casts(kind):
    return CountsNothing(torch.autocast(kind, torch.bfloat16))


# PyTorch cannot shuffle on the host while the default device is another one, so nothing is shuffled
CONTEXTS = {
    "dispatch mode": (lambda _: CountsOperations(), True),
    "function mode": (lambda _: CountsFunctions(), True),
    "look-ups": (lambda _: CountsLookUps(), True),
    "flop counter": (lambda _: CountsFlops(), True),
    "mutations allowed": (
        lambda _: CountsNothing(torch.autograd.graph.allow_mutation_on_saved_tensors()),
        True,
    ),
    "autocast": (casts, True),
    "autocast without a cache": (
        lambda kind: CountsNothing(torch.autocast(kind, torch.bfloat16, cache_enabled=False)),
        False,
    ),
    "device": (lambda kind: CountsNothing(torch.device(kind)), False),
}
"""The context, and whether steps in it are eager."""


class MakesTensors(Step):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)))

    def loss(self, x, y):
        return super().loss(x, y) * torch.tensor(2.0, device=x.device)


class InSecondEpoch(Callback):
    """Enters a context for one epoch."""

    def __init__(self, context, kept):
        self._context = context
        self._kept = kept

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self._kept.append(self._context.__enter__())

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self._context.__exit__(None, None, None)

    def on_exception(self, trainer, pl_module, exception):
        if trainer.current_epoch == 1:
            self._context.__exit__(None, None, None)


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_of_one_epoch(harness, device, name, verify_replays):
    """Autocast keeps the weights that it has cast until it ends, so eager trains with old ones."""
    make, is_eager = CONTEXTS[name]
    counts = []
    callback = Fit(harness, shuffle=False)(
        MakesTensors(),
        others=lambda: [InSecondEpoch(make(device.type), counts)],
        settings={"verify_replays": verify_replays},
    )
    assert counts[0].number == counts[1].number
    assert replayed(callback) > 5
    statuses = {each.reason.kind for each in callback.stats.reasons if each.stage == "train"}
    eager = {Status.CONTEXT, Status.CLOSURE_HOOK}
    assert bool(statuses & eager) == is_eager, callback.summary()


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_around_a_run(harness, device, name):
    make, is_eager = CONTEXTS[name]
    callback = harness.callback(stages=["train", "validate"])
    start, seen = MakesTensors(), []
    for ours in ([callback], []):
        torch.manual_seed(1)
        model = copy.deepcopy(start)
        trainer = harness.trainer(*ours, max_epochs=3)
        with make(device.type) as context:
            trainer.fit(model, points(shuffle=False), points(12, shuffle=False))
        metrics = dict(trainer.callback_metrics)
        seen.append((dict(model.state_dict()), metrics, context.number))
    assert_same(*seen)
    assert (replayed(callback) == 0) == is_eager, callback.summary()


class ChangesWeights(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1.5)


class Constants(Predictor):
    def predict_step(self, batch, batch_idx):
        return super().predict_step(batch, batch_idx) * torch.tensor(3.0)


# PyTorch allows no mutations of inference tensors there
@pytest.mark.parametrize("name", [name for name in CONTEXTS if name != "mutations allowed"])
def test_contexts_around_prediction(harness, device, name):
    """The weights change between batches."""
    make, is_eager = CONTEXTS[name]
    counts = []

    def job(trainer, module):
        with make(device.type) as context:
            counts.append(context)
            return predict(features(40))(trainer, module)

    callback = harness.compare(Constants(Body()), job, others=lambda: [ChangesWeights()])
    assert counts[0].number == counts[1].number
    assert (callback.stats.steps["FULL"] == 0) == is_eager, callback.summary()


def test_default_device(harness, device):
    """``torch.get_default_device`` makes a tensor itself, which a watch answers."""
    torch.set_default_device(device.type)
    try:
        assert replayed(Fit(harness, shuffle=False)(MakesTensors())) > 15
    finally:
        torch.set_default_device(None)


def test_strict_names_the_context(harness):
    callback = harness.callback(stages=["train"], strict=True)
    trainer = harness.trainer(callback, max_epochs=1)
    with (
        pytest.raises(RuntimeError, match="CountsOperations sees what the step calls"),
        CountsOperations(),
    ):
        trainer.fit(MakesTensors(), points())
    harness.trainer(callback, max_epochs=1).fit(MakesTensors(), points(number=32))
    assert replayed(callback) > 3
