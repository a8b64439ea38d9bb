"""Training: closures from graphs, and everything that users see of them, compared with eager."""

import collections
import copy
import functools

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from cg_lightning import CUDAGraphCallback
from cg_lightning.core.causes import Cause
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from tests.harness import assert_same, loader, newer_callback

# Lightning's advice on loaders and loops without validation
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*deterministic",
)


class RecordingLogger(Logger):
    """Keeps every call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name = "recording"
    version = 0

    def log_metrics(self, metrics, step=None):
        self.calls.append(({name: repr(value) for name, value in metrics.items()}, step))

    def log_hyperparams(self, *_, **__):
        pass


class KeepAll(Callback):
    """Keeps what users see after each batch: some of it without a copy, as a user might."""

    def __init__(self):
        self.outputs = []
        self.kept_gradients = []
        self.metrics = []
        self.weights = []
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.kept_gradients.append([p.grad for p in pl_module.parameters()])
        self.kept_gradients.append(
            [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(outputs)
        self.metrics.append(dict(trainer.callback_metrics))
        self.weights.append([t.detach().clone() for t in pl_module.state_dict().values()])
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class Fit:
    """Trains one model with the callback, and an untouched copy without it."""

    def __init__(self, harness, shuffle=True):
        self.harness = harness
        self._shuffle = shuffle

    def __call__(self, model, *, others=list, settings=None, train=None, **trainer_settings):
        model, reference = copy.deepcopy(model), copy.deepcopy(model)
        callback = self.harness.callback(**{"stages": ["train", "validate"], **(settings or {})})
        # the backward of the other kernels does not repeat itself on a GPU
        with sdpa_kernel(SDPBackend.MATH):
            self.seen = [
                self._run(module, extra, others, train, trainer_settings)
                for module, extra in ((model, [callback]), (reference, []))
            ]
        assert_same(*self.seen)
        return callback

    def _run(self, module, extra, others, train, settings):
        torch.manual_seed(1)
        kept, logger = KeepAll(), RecordingLogger()
        settings = {"max_epochs": 3, "logger": logger, "log_every_n_steps": 2, **settings}
        trainer = self.harness.trainer(*extra, kept, *others(), **settings)
        train = train or points(shuffle=self._shuffle)
        trainer.fit(module, train, points(12, shuffle=self._shuffle))
        optimizer = trainer.optimizers[0].state_dict()["state"]
        return (
            *(kept.outputs, kept.kept_gradients, kept.metrics, kept.weights, kept.rates),
            *(logger.calls, dict(trainer.callback_metrics), optimizer, trainer.global_step),
            [p.grad for p in module.parameters()],
        )


def points(number=34, batch_size=4, size=8, shuffle=True):
    generator = torch.Generator().manual_seed(3)
    # a test may have entered another default device
    return loader(
        torch.randn(number, size, generator=generator, device="cpu"),
        torch.randint(0, 4, (number,), generator=generator, device="cpu"),
        batch_size=batch_size,
        shuffle=shuffle,
    )


def replayed(callback):
    """Return the number of closures that ran from a graph."""
    return callback.stats.steps_of("train").get("FULL", 0)


class Classifier(LightningModule):
    def __init__(self, net=None, optimizer=None):
        super().__init__()
        self.net = net or nn.Sequential(
            nn.Linear(8, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(16, 4),
        )
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.optimizer = optimizer or functools.partial(torch.optim.AdamW, lr=1e-2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        loss = F.cross_entropy(out, y)
        self.log("loss", loss, prog_bar=True)
        self.log("both", loss * 2, on_step=True, on_epoch=True)
        self.accuracy(out, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return F.relu(x + self.body(x), inplace=True)


def resnet():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 4)),
        nn.Conv2d(1, 6, 3, padding=1),
        Residual(6),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        Residual(6),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 6, num_layers=2, batch_first=True)
        self.dropout = nn.Dropout(0.2)  # that of cuDNN has states of its own
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        out, _ = self.lstm(x.unflatten(1, (4, 2)))
        return self.head(self.dropout(out[:, -1]))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.embed = nn.Linear(1, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.unsqueeze(-1))).mean(1))


class Bert(nn.Module):
    """BERT of transformers, with its dropout, on tokens made of numbers."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "num_labels": 4}
        config = transformers.BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
        self.net = transformers.BertForSequenceClassification(config)

    def forward(self, x):
        tokens = (x.abs() * 15).long().clamp(1, 49)
        return self.net(input_ids=tokens, attention_mask=(x > -1).long()).logits


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


def synchronized():
    """It synchronizes nothing here, because there is one process."""
    return nn.Sequential(nn.Linear(8, 16), nn.SyncBatchNorm(16), nn.ReLU(), nn.Linear(16, 4))


NETS = {
    "mlp": lambda: None,
    "resnet": resnet,
    "lstm": Recurrent,
    "vit": Attending,
    "bert": Bert,
    "tied": Tied,
    "synchronized": synchronized,
}


@pytest.mark.parametrize("net", NETS)
def test_models(fit, net):
    callback = fit(Classifier(NETS[net]()))
    assert replayed(callback) > 15, callback.summary()


class Autoencoder(Classifier):
    def __init__(self):
        super().__init__(nn.Linear(8, 4))
        self.decoder = nn.Linear(2, 8)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        mean, log_variance = self.net(x).chunk(2, dim=1)
        sample = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        rebuilt = F.mse_loss(self.decoder(sample), x)
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()
        self.log_dict({"rebuilt": rebuilt, "divergence": divergence}, on_epoch=True)
        return {"loss": rebuilt + divergence, "sample": sample, "input": x, "name": "vae"}


class OfDistributions(Autoencoder):
    """Samples with ``torch.distributions``, which check their arguments on the host."""

    checks: bool | None = None

    def training_step(self, batch, batch_idx):
        mean, scale = self.net(batch[0]).chunk(2, dim=1)
        scale = F.softplus(scale) + 1e-3
        posterior = torch.distributions.Normal(mean, scale, validate_args=self.checks)
        normal = torch.zeros_like(mean), torch.ones_like(mean)
        prior = torch.distributions.Normal(*normal, validate_args=self.checks)
        divergence = torch.distributions.kl_divergence(posterior, prior).mean()
        return F.mse_loss(self.decoder(posterior.rsample()), batch[0]) + divergence


class OfUncheckedDistributions(OfDistributions):
    checks = False


@pytest.mark.parametrize("make", [OfDistributions, OfUncheckedDistributions])
def test_distributions(fit, make):
    callback = fit(make())
    assert (replayed(callback) > 15) == (make.checks is False), callback.summary()


def test_samples_and_further_outputs(fit):
    assert replayed(fit(Autoencoder())) > 15


class ManyKinds(Classifier):
    """Returns tensors of several types and layouts besides its loss, and logs some."""

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        loss = F.cross_entropy(out, batch[1])
        found = out.argmax(-1)
        self.log_dict({"loss": loss, "twice": loss * 2})
        views = {"first": out[:2], "turned": out.t(), "half": out.half(), "all": out.double()}
        return {"loss": loss, "found": found, "hit": found == batch[1], **views}


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_outputs_of_several_types(fit, verify_replays):
    callback = fit(ManyKinds(), settings={"verify_replays": verify_replays})
    assert replayed(callback) > 15, callback.summary()


class KeepsGradients(torch.optim.SGD):
    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none=False)


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=1e-2),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-3),
    "keeps gradients": functools.partial(KeepsGradients, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(fit, name):
    assert replayed(fit(Classifier(optimizer=OPTIMIZERS[name]))) > 15


@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize("verify_replays", [0, 2])
def test_accumulation(fit, batches, verify_replays):
    settings = {"verify_replays": verify_replays}
    callback = fit(Classifier(), accumulate_grad_batches=batches, settings=settings)
    assert replayed(callback) > 15, callback.summary()


class SharesGradient(Classifier):
    """Two parameters have one gradient from the end of each optimizer step on."""

    def __init__(self):
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4, bias=False))
        super().__init__(net, OPTIMIZERS["keeps gradients"])
        self.one, self.other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.empty = nn.ParameterList(nn.Parameter(torch.zeros(0)) for _ in range(2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x) + self.one * 2 + self.other * 3
        return F.cross_entropy(out, y) + sum(each.sum() for each in self.empty)

    def on_before_optimizer_step(self, optimizer):
        self.one.grad = self.other.grad.view(-1)


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("batches", [1, 2])
def test_parameters_that_share_a_gradient(fit, batches, verify_replays):
    settings = {"verify_replays": verify_replays}
    callback = fit(SharesGradient(), accumulate_grad_batches=batches, settings=settings)
    assert replayed(callback) > 15 or batches == 2, callback.summary()
    said = "two parameters share the memory of a gradient" in str(callback.stats.eager_reasons)
    assert said == (batches == 2)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(fit, algorithm):
    callback = fit(Classifier(), gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    assert replayed(callback) > 15, callback.summary()


@pytest.mark.parametrize("batches", [1, 2])
def test_bfloat16(fit, batches):
    callback = fit(Classifier(), precision="bf16-mixed", accumulate_grad_batches=batches)
    assert replayed(callback) > 15, callback.summary()


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_own_autocast_around_a_layer_that_is_used_twice(fit, device, verify_replays):
    """Eager casts its weight once, so it adds two gradients in 16 bits."""

    class Twice(Classifier):
        def training_step(self, batch, batch_idx):
            x, labels = batch
            with torch.autocast(device.type, torch.bfloat16):
                one, other = self.net(x), self.net(x + 1)
            criterion = nn.functional.cross_entropy
            return criterion(one.float(), labels) + criterion(other.float(), labels)

    callback = fit(Twice(), settings={"verify_replays": verify_replays})
    assert replayed(callback) > 15, callback.summary()


def test_options_that_pad_are_those_of_other_stages(fit):
    settings = {"capture_sizes": [4], "verify_tolerance": "close"}
    callback = fit(Classifier(), settings=settings)
    assert replayed(callback) > 15, callback.summary()


@pytest.mark.gpu
@pytest.mark.parametrize("net", ["mlp", "vit"])
def test_scaled_float16(tmp_path, net):
    from tests.harness import Harness

    fit = Fit(Harness("cuda", tmp_path))
    for batches in (1, 2):
        callback = fit(
            Classifier(NETS[net]()),
            precision="16-mixed",
            gradient_clip_val=1.0,
            accumulate_grad_batches=batches,
        )
        assert replayed(callback) > 15, callback.summary()


class Scheduled(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=60)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_schedule_of_each_step(fit):
    assert replayed(fit(Scheduled())) > 15


class Unfreeze(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        is_frozen = trainer.current_epoch < 1
        pl_module.net[0].requires_grad_(not is_frozen)


def test_a_frozen_half(fit):
    callback = fit(Classifier(), others=lambda: [Unfreeze()], max_epochs=4)
    assert replayed(callback) > 15, callback.summary()
    assert callback.stats.captures >= 2


@pytest.mark.parametrize("settings", [{}, {"max_steps": 13}], ids=["an epoch", "within one"])
def test_resumed_training(harness, tmp_path, settings):
    seen = []
    callbacks = [harness.callback(stages=["train"]) for _ in range(2)]
    for name, (before, after) in {"graphs": callbacks, "eager": ([], [])}.items():
        file = tmp_path / f"{name}.ckpt"
        torch.manual_seed(1)
        first = harness.trainer(*_list(before), **{"max_epochs": 2, **settings})
        first.fit(Classifier(), points(shuffle=False))
        first.save_checkpoint(file)
        kept, logger = KeepAll(), RecordingLogger()
        second = harness.trainer(*_list(after), kept, max_epochs=4, logger=logger)
        torch.manual_seed(2)
        resumed = Classifier()
        second.fit(resumed, points(shuffle=False), ckpt_path=file)
        checkpoints = [torch.load(file, weights_only=False)[key] for key in _OF_CHECKPOINTS]
        seen.append(
            (
                *(kept.outputs, kept.kept_gradients, kept.metrics, kept.weights, kept.rates),
                *(logger.calls, dict(second.callback_metrics), checkpoints, second.global_step),
                second.fit_loop.state_dict()["epoch_loop.automatic_optimization.optim_progress"],
                second.optimizers[0].state_dict()["state"],
            )
        )
    assert_same(*seen)
    assert all(replayed(callback) > 5 for callback in callbacks)


_OF_CHECKPOINTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


def _list(callback):
    return [callback] if callback else []


class ExponentialAverage(Callback):
    """Keeps an average of the weights, as many projects do."""

    def on_fit_start(self, trainer, pl_module):
        self.average = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > 3:
            torch._foreach_lerp_(self.average, [p.detach() for p in pl_module.parameters()], 0.1)


def test_callbacks_of_a_project_together(fit, tmp_path):
    """Averages, early stopping, checkpoints, rates and accumulation, all at once."""
    folders = [tmp_path / "graphs", tmp_path / "eager"]
    averages, remaining = [], iter(folders)

    def others():
        averages.append(ExponentialAverage())
        return [
            averages[-1],
            newer_callback("EMAWeightAveraging"),
            EarlyStopping("val_loss", patience=1),
            ModelCheckpoint(next(remaining), "{step}", every_n_train_steps=2, save_top_k=-1),
            LearningRateMonitor("step"),
            GradientAccumulationScheduler({0: 1, 2: 2, 4: 3}),
        ]

    callback = fit(Scheduled(), others=others, max_epochs=6, enable_checkpointing=True)
    assert replayed(callback) > 10, callback.summary()
    assert_same(*(each.average for each in averages))
    names = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert len(names[0]) > 5
    for name in names[0]:
        saved = [torch.load(folder / name, weights_only=False) for folder in folders]
        assert_same(*([each[key] for key in _OF_CHECKPOINTS] for each in saved))


# what is between iterations


class BetweenIterations(Callback):
    """Does what users do to gradients, each in its turn."""

    def __init__(self):
        self.count = 0

    def on_after_backward(self, trainer, pl_module):
        self.count += 1
        parameters = list(pl_module.parameters())
        kind = self.count % 5
        if kind == 0:
            parameters[0].grad = None
        elif kind == 1:
            parameters[1].grad = parameters[1].grad * 0.5
        elif kind == 2:
            parameters[0].grad.mul_(2)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.count % 3 == 0:
            for parameter in pl_module.parameters():
                parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize("batches", [1, 2])
def test_gradients_that_others_change(fit, batches):
    """Hazard 43."""
    callback = fit(
        Classifier(), others=lambda: [BetweenIterations()], accumulate_grad_batches=batches
    )
    assert replayed(callback) > 15, callback.summary()


class LogsGradients(Classifier):
    def on_after_backward(self):
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.log("norm", torch.stack(norms).norm(), on_step=True)

    def on_before_optimizer_step(self, optimizer):
        self.log("before", torch.ones(()), on_step=True)


def test_hooks_after_the_backward(fit):
    assert replayed(fit(LogsGradients())) > 15


class LooksAtLoss(Callback):
    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(loss.detach())


def test_a_hook_inside_the_closure_is_named(fit):
    callback = fit(Classifier(), others=lambda: [LooksAtLoss()])
    assert replayed(callback) == 0
    assert "LooksAtLoss.on_before_backward" in str(callback.stats.eager_reasons)


def _shrink(module):
    for parameter in module.parameters():
        parameter.data.mul_(0.9)  # the backward that follows notices nothing


class ShrinksBeforeZeroGrad(Classifier):
    def on_before_zero_grad(self, optimizer):
        if self.global_step % 4 == 3:
            _shrink(self)


class ShrinksInZeroGrad(Classifier):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        _shrink(self)
        optimizer.zero_grad()


class ShrinksAsOptimizer(torch.optim.SGD):
    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.clamp_(-0.2, 0.2)


class Shrinks(Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        _shrink(pl_module)


IN_A_GRAPH = {
    "module": (ShrinksBeforeZeroGrad, list),
    "callback": (Classifier, lambda: [Shrinks()]),
}
SHRINKING = {
    "ShrinksInZeroGrad.optimizer_zero_grad": (ShrinksInZeroGrad, list),
    "ShrinksAsOptimizer.zero_grad": (
        functools.partial(Classifier, optimizer=functools.partial(ShrinksAsOptimizer, lr=1e-2)),
        list,
    ),
    "LambdaCallback.on_before_zero_grad": (
        Classifier,
        lambda: [LambdaCallback(on_before_zero_grad=Shrinks().on_before_zero_grad)],
    ),
}


def _fit_shrinking(fit, case, batches):
    make, others = case
    layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    settings = {"verify_replays": 0}
    return fit(make(layers), others=others, accumulate_grad_batches=batches, settings=settings)


@pytest.mark.parametrize("owner", IN_A_GRAPH)
@pytest.mark.parametrize("batches", [1, 2])
def test_weights_that_hooks_change_before_the_backward(fit, owner, batches):
    """The backward reads the new weights, and the activations of the old ones."""
    callback = _fit_shrinking(fit, IN_A_GRAPH[owner], batches)
    assert replayed(callback) > 10, callback.summary()


@pytest.mark.parametrize("hook", SHRINKING)
@pytest.mark.parametrize("batches", [1, 2])
def test_weights_that_change_between_the_step_and_its_backward(fit, hook, batches):
    callback = _fit_shrinking(fit, SHRINKING[hook], batches)
    assert replayed(callback) == 0
    assert hook in str(callback.stats.eager_reasons)


class ClearsAsUsual(Classifier):
    def on_before_zero_grad(self, optimizer):
        """Nothing yet."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=True)


class DoesNothing(Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pass

    def on_before_backward(self, trainer, pl_module, loss):
        return


@pytest.mark.parametrize("batches", [1, 2])
def test_hooks_that_do_nothing_but_clear_gradients(fit, batches):
    others = lambda: [DoesNothing(), LambdaCallback(on_before_backward=lambda *_: None)]
    assert replayed(fit(ClearsAsUsual(), others=others, accumulate_grad_batches=batches)) > 15


class ClearsEachSecond(Classifier):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 2:
            optimizer.zero_grad()


class ClearsItself(Classifier):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.zero_grad()


class AnotherBackward(Classifier):
    def backward(self, loss):
        pass

    def on_after_backward(self):
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize("make", [ClearsEachSecond, ClearsItself, AnotherBackward])
def test_hooks_that_do_more_are_named(fit, make):
    callback = fit(make())
    assert replayed(callback) == 0
    assert make.__name__ in str(callback.stats.eager_reasons)


class ReadsGradientInBackward(Classifier):
    def training_step(self, batch, batch_idx):
        x, labels = batch
        weight, logits = self.net[0].weight, self.net(x)

        def damp(gradient):
            return gradient if weight.grad is None else gradient / (1 + weight.grad.norm())

        logits.register_hook(damp)
        return nn.functional.cross_entropy(logits, labels)


class ClampsInBackward(Classifier):
    def on_train_start(self):
        weight = self.net[0].weight
        self.node = weight.view_as(weight).grad_fn.next_functions[0][0]

        @torch.no_grad()
        def clamp(*_):
            weight.grad.clamp_(-0.01, 0.01)

        self.node.register_hook(clamp)


# the hook's node belongs to the stream on which on_train_start ran
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (ReadsGradientInBackward, "the step reads a gradient"),
        (ClampsInBackward, "a hook of a node of autograd"),
    ],
)
def test_gradients_that_are_read_in_the_backward(fit, make, reason, batches, verify_replays):
    """In the watched closure as well, they are those of earlier micro-batches."""
    settings = {"verify_replays": verify_replays}
    callback = fit(make(), accumulate_grad_batches=batches, settings=settings)
    assert replayed(callback) == 0
    assert reason in str(callback.stats.eager_reasons)


class StepsAnotherOptimizer(Classifier):
    def on_train_start(self):
        self.others = [torch.optim.SGD(self.net[0].parameters(), 0.05)]

    def training_step(self, batch, batch_idx):
        self.others[0].step()
        return super().training_step(batch, batch_idx)


class ReadsByTorch(Classifier):
    def training_step(self, batch, batch_idx):
        norm = nn.utils.clip_grad_norm_(self.parameters(), 1e9)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1]) * (1 + norm)


class ClearsInStep(Classifier):
    def training_step(self, batch, batch_idx):
        self.net.zero_grad()
        return super().training_step(batch, batch_idx)


class SetsInStep(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for parameter in self.parameters():
            parameter.grad = None
        return loss


class DeletesInStep(Classifier):
    def training_step(self, batch, batch_idx):
        for parameter in self.parameters():
            del parameter.grad
        return super().training_step(batch, batch_idx)


class KeepsZeros(Classifier):
    """Its gradients are zero at the beginning of a backward, and not None."""

    def change(self, gradient):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        logits.register_hook(self.change)
        return nn.functional.cross_entropy(logits, batch[1])

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class ReadsByTorchInBackward(KeepsZeros):
    def change(self, gradient):
        return gradient * (1 + nn.utils.clip_grad_norm_(self.parameters(), 1e9))


class ClipsByTorchInBackward(ReadsByTorchInBackward):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad()


class ReadsFlatGradients(KeepsZeros):
    def on_train_start(self):
        parameters = list(self.parameters())
        self.flat = torch.ones(sum(map(torch.numel, parameters)), device=self.device)
        for parameter, part in zip(
            parameters, self.flat.split(list(map(torch.numel, parameters))), strict=True
        ):
            parameter.grad = part.view_as(parameter)

    def change(self, gradient):
        return gradient * (1 + self.flat.norm())


class LogsInBackward(KeepsZeros):
    def change(self, gradient):
        self.log("norm", gradient.norm(), on_step=True, on_epoch=True)
        return gradient


class ClearsAtWindow(Callback):
    """Has no gradients in the steps that are watched and captured first."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2:
            trainer.optimizers[0].zero_grad()


USES_OF_GRADIENTS = {
    StepsAnotherOptimizer: "the step reads a gradient",
    ReadsByTorch: "the step reads a gradient",
    ClearsInStep: "the step reads a gradient",
    SetsInStep: "the step sets a gradient",
    DeletesInStep: "the step sets a gradient",
    ReadsByTorchInBackward: "the step reads a gradient",
    ClipsByTorchInBackward: "the step reads a gradient",
    ReadsFlatGradients: "the backward reads memory of a gradient",
    LogsInBackward: "self.log in the backward",
}


@pytest.mark.in_turn("batches")
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("make", USES_OF_GRADIENTS)
def test_uses_of_gradients_by_torch_by_memory_and_by_logs(fit, make, batches):
    settings = {"warmup_steps": 2, "verify_replays": 0}
    others = {} if make is ReadsFlatGradients else {"others": lambda: [ClearsAtWindow()]}
    callback = fit(make(), accumulate_grad_batches=batches, settings=settings, **others)
    assert replayed(callback) == 0
    assert USES_OF_GRADIENTS[make] in str(callback.stats.eager_reasons)


class MovesInStep(Classifier):
    def training_step(self, batch, batch_idx):
        self.net.to(self.device)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_move_to_where_a_module_is_uses_no_gradient(fit, batches):
    assert replayed(fit(MovesInStep(), accumulate_grad_batches=batches)) > 10


class LooksForAnomalies(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        torch.autograd.set_detect_anomaly(trainer.current_epoch == 1)

    def on_train_end(self, trainer, pl_module):
        torch.autograd.set_detect_anomaly(False)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomalies_that_are_looked_for_in_one_epoch(fit):
    callback = fit(Classifier(), others=lambda: [LooksForAnomalies()])
    assert 0 < replayed(callback) <= 16
    assert "detect_anomaly=True" in str(callback.stats.eager_reasons)


def test_a_hook_of_a_parameter_is_named(fit):
    class Hooked(Classifier):
        def on_train_start(self):
            self.net[0].weight.register_hook(lambda gradient: gradient * 2)

    callback = fit(Hooked())
    assert replayed(callback) == 0
    assert "net.0.weight" in str(callback.stats.eager_reasons)


# what is no graph, and says why


class Sometimes(Classifier):
    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_loss_that_is_sometimes_none(fit):
    callback = fit(Sometimes())
    assert "returns no loss" in str(callback.stats.eager_reasons)


class ReadsGradients(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        gradient = self.net[0].weight.grad
        return loss if gradient is None else loss + gradient.abs().sum() * 0.1


def test_a_step_that_reads_gradients(fit):
    callback = fit(ReadsGradients())
    assert replayed(callback) == 0
    assert "reads a gradient" in str(callback.stats.eager_reasons)


class ComputesGradients(Classifier):
    def training_step(self, batch, batch_idx):
        F.cross_entropy(self.net(batch[0]), batch[1]).backward()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_with_a_backward_of_its_own(fit, batches):
    callback = fit(ComputesGradients(), accumulate_grad_batches=batches)
    assert replayed(callback) == 0
    assert "changes gradients itself" in str(callback.stats.eager_reasons)


class Penalized(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(self.net(x), y)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        self.log("penalty", gradient.norm())
        return loss + gradient.norm()


def test_a_gradient_penalty_is_no_graph(fit):
    callback = fit(Penalized(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))))
    assert replayed(callback) == 0


class OutsideLeaf(Classifier):
    def on_train_start(self):
        self.outside = [torch.ones(4, device=self.device, requires_grad=True)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x) * self.outside[0], y)


def test_a_leaf_that_is_no_parameter(fit):
    callback = fit(OutsideLeaf())
    assert replayed(callback) == 0


class Sparse(Classifier):
    def __init__(self):
        super().__init__(nn.EmbeddingBag(4, 4, sparse=True), torch.optim.SGD)
        self.optimizer = functools.partial(torch.optim.SGD, lr=0.1)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[1].unsqueeze(1)), batch[1])

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("batches", [1, 2])
def test_sparse_gradients(fit, batches):
    callback = fit(Sparse(), accumulate_grad_batches=batches)
    assert replayed(callback) == 0
    assert "is sparse" in str(callback.stats.eager_reasons)


# Python around the step


class Counting(Classifier):
    def __init__(self):
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss * (2 if self.global_step > 9 else 1) * (3 if batch_idx == 5 else 1)

    def on_train_epoch_end(self):
        self.log("mean", torch.stack(self.losses).mean())
        self.losses.clear()


def test_lists_and_numbers_of_the_trainer(fit):
    assert replayed(fit(Counting())) > 5


class KeepsGraphs(Classifier):
    """Keeps computed tensors as they are: from a graph they come without the autograd graph."""

    def __init__(self):
        super().__init__()
        self.losses, self.latest, self.last = [], collections.deque(maxlen=3), {}

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.losses.append({"loss": loss, "logits": logits[:2]})
        self.latest.append(loss)
        self.last["loss"] = loss
        return {"loss": loss, "mean": logits.mean()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("latest", torch.stack(list(self.latest)).mean())
        self.log("last", self.last["loss"])

    def on_train_epoch_end(self):
        kept = [each["logits"].sum() + each["loss"] for each in self.losses]
        self.log("mean", torch.stack(kept).mean())
        self.losses.clear()


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("batches", [1, 2])
def test_tensors_with_a_graph_that_are_kept(fit, batches, verify_replays):
    settings = {"verify_replays": verify_replays}
    assert replayed(fit(KeepsGraphs(), accumulate_grad_batches=batches, settings=settings)) > 10


class Kernel(torchmetrics.Metric):
    """Waits for the device, and computes another number under autocast."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values):
        values = values.float()
        self.total += (values @ values.T).sum().item()

    def compute(self):
        return self.total


class LateMetrics(Classifier):
    def __init__(self):
        super().__init__()
        self.kernel, self.kept = Kernel(), torchmetrics.CatMetric()

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.kernel(logits)
        self.kept.update(loss)
        self.log("kernel", self.kernel, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("kept", self.kept.compute().sum())
        self.kept.reset()


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_metrics_that_are_updated_after_the_step(fit, precision, verify_replays):
    settings = {"verify_replays": verify_replays}
    assert replayed(fit(LateMetrics(), precision=precision, settings=settings)) > 10


class DropoutSchedule(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 4:
            pl_module.net[3].p = 0.1 + 0.2 * (trainer.current_epoch % 2)


class Checkpointed(Classifier):
    keeps_random_state = False

    def training_step(self, batch, batch_idx):
        logits = checkpoint(
            self.net,
            batch[0],
            use_reentrant=False,
            preserve_rng_state=self.keeps_random_state,
        )
        return nn.functional.cross_entropy(logits, batch[1])


class CheckpointedWithState(Checkpointed):
    keeps_random_state = True


def test_a_checkpoint_that_keeps_no_random_state(fit):
    assert replayed(fit(Checkpointed())) > 10


def test_a_checkpoint_that_keeps_its_random_state(fit):
    callback = fit(CheckpointedWithState())
    assert replayed(callback) == 0
    reasons = [each.reason for each in callback.stats.reasons]
    reason = next(each for each in reasons if each.kind is Cause.HOST_RANDOMNESS)
    assert reason.text.startswith("randomness drawn on the host: a checkpoint that keeps random")
    line = Checkpointed.training_step.__code__.co_firstlineno + 1
    assert reason.location == f"{__file__}:{line}"
    assert reason.remedy == "checkpoint(..., preserve_rng_state=False), if nothing in it draws"


class ReentrantlyCheckpointed(Classifier):
    """Its backward runs another one, and reads gradients that this has made."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))

    def training_step(self, batch, batch_idx):
        x, labels = batch
        settings = {"use_reentrant": True, "preserve_rng_state": False}
        logits = checkpoint(self.net[1:], self.net[0](x), **settings)
        return nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_reentrant_checkpoint(fit, batches, verify_replays):
    settings = {"verify_replays": verify_replays}
    callback = fit(ReentrantlyCheckpointed(), accumulate_grad_batches=batches, settings=settings)
    assert replayed(callback) > 15, callback.summary()


def test_a_setting_that_changes_between_batches(fit):
    callback = fit(Classifier(), others=lambda: [DropoutSchedule()], max_epochs=5)
    assert replayed(callback) > 5


class Average(Callback):
    """Swaps weights by their data, as averages of weights do."""

    def on_validation_start(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        self.before = [p.data for p in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.data = parameter.data * 0.5

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        for parameter, data in zip(pl_module.parameters(), self.before, strict=True):
            parameter.data = data


def test_weights_that_are_swapped_for_validation(fit):
    assert replayed(fit(Classifier(), others=lambda: [Average()])) > 5


def test_the_closure_that_is_called_twice(fit):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            return super().step(closure)

    assert replayed(fit(Classifier(optimizer=functools.partial(Twice, lr=0.01)))) > 15


def test_an_exception_leaves_no_trace(harness):
    class Failing(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 6:
                raise RuntimeError("stop")

    trainer = harness.trainer(harness.callback(stages=["train"]))
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(Failing(), points())
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)


class CountsUnread(LightningModule):
    """Updates a metric that nobody reads."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)
        self.metric = torchmetrics.classification.BinaryAccuracy()

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])[:, 0]
        self.metric.update(output, batch[1])
        return output.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_an_error_of_a_metric_that_nobody_reads(harness, verify_replays):
    """It comes at the latest at the end of training."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(40, 8, generator=generator), torch.randint(0, 2, (40,), generator=generator)
    y[36] = 7
    callback = harness.callback(stages=["train"], verify_replays=verify_replays)
    raised = []
    for extra in ([callback], []):
        trainer = harness.trainer(*extra, max_epochs=1)
        with pytest.raises(RuntimeError, match="Detected the following values") as caught:
            trainer.fit(CountsUnread(), loader(x, y))
        raised.append(str(caught.value))
        assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    assert raised[0] == raised[1]
    assert replayed(callback) == 7


def test_another_run_and_a_copy(harness):
    model = Classifier()
    callback = harness.callback(stages=["train"])
    for _ in range(2):
        harness.trainer(callback).fit(model, points())
    assert not [name for name in vars(model) if "cuda_graph" in name]
    copy.deepcopy(model)
    assert replayed(callback) > 15, callback.summary()


# what can have no graph at all


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()


def lbfgs():
    net = nn.Linear(8, 4)
    return Classifier(net, functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=2))


UNSUPPORTED = {
    "automatic_optimization=False": (Manual, {}, {}),
    "LBFGS": (lbfgs, {}, {}),
    "detect_anomaly=True": (Classifier, {"detect_anomaly": True}, {}),
    "mode=PIECEWISE": (Classifier, {}, {"mode": "PIECEWISE"}),
}


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_what_can_have_no_graph_is_said_once(fit, words):
    make, trainer_settings, settings = UNSUPPORTED[words]
    with pytest.warns(UserWarning, match=words) as warned:
        callback = fit(make(), settings=settings, max_epochs=2, **trainer_settings)
    said = [each for each in warned if "'train' can have no graph" in str(each.message)]
    assert len(said) == 1
    assert "stages=['train', 'validate']" in str(said[0].message)
    assert callback.stats.steps_of("train").keys() == {"NONE"}
    assert words in str(callback.stats.eager_reasons)


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_with_strict_it_is_an_error(harness, words):
    make, trainer_settings, settings = UNSUPPORTED[words]
    callback = harness.callback(stages=["train"], strict=True, **settings)
    with pytest.raises(RuntimeError, match=words):
        harness.trainer(callback, **trainer_settings).fit(make(), points())


def test_with_strict_what_makes_the_callback_inert_is_an_error(harness):
    """As FSDP does, which needs a GPU."""
    callback = harness.callback(stages=["train"], strict=True)
    with pytest.raises(RuntimeError, match="compiled as a whole"):
        harness.trainer(callback).fit(torch.compile(Classifier()), points())
    harness.trainer(callback, max_epochs=1).fit(Classifier(), points(number=32))
    assert replayed(callback) > 3


class Greedy(torch.autograd.Function):
    """Needs too much memory in a capture."""

    place = "forward"

    @staticmethod
    def forward(ctx, x):
        _take_memory("forward")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        _take_memory("backward")
        return gradient


def _take_memory(place):
    context = current_forward_context()
    is_capture = context is not None and context.cudagraph_runtime_mode is CUDAGraphMode.FULL
    if is_capture and Greedy.place == place:
        raise torch.OutOfMemoryError("out of memory")


class NeedsMemory(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(Greedy.apply(self.net(batch[0])), batch[1])


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_out_of_memory_in_a_capture(fit, monkeypatch, place):
    monkeypatch.setattr(Greedy, "place", place)
    callback = fit(NeedsMemory())
    assert replayed(callback) == 0
    assert "OutOfMemoryError: out of memory" in str(callback.stats.eager_reasons)


class StrategyThatCounts(Callback):
    def on_fit_start(self, trainer, pl_module):
        pl_module.register_buffer("steps", torch.zeros((), device=pl_module.device))
        trainer.strategy.post_training_step = lambda: pl_module.steps.add_(1)


def test_a_strategy_that_does_more_after_each_step(fit):
    with pytest.warns(UserWarning, match="post_training_step is not Lightning's own"):
        callback = fit(Classifier(), others=lambda: [StrategyThatCounts()])
    assert replayed(callback) == 0


def test_training_is_not_graphed_by_default(harness):
    callback = CUDAGraphCallback(backend=harness.backend, report=False)
    harness.trainer(callback).fit(Classifier(), points(), points())
    assert callback.stats.steps_of("train") == {}


def test_strict(harness):
    callback = harness.callback(stages=["train"], strict=True)
    harness.trainer(callback, LooksAtLoss(), max_epochs=1)
    with pytest.raises(RuntimeError, match="on_before_backward"):
        harness.trainer(callback, LooksAtLoss(), max_epochs=1).fit(Classifier(), points())
    harness.trainer(callback, max_epochs=1).fit(Classifier(), points(number=32))
    assert replayed(callback) > 3


def test_the_summary(harness):
    callback, model = harness.callback(stages=["train"]), Classifier()
    harness.trainer(callback).fit(model, points())
    assert "train: " in callback.summary()
    row = next(each for each in callback.summary().splitlines() if "training_step" in each)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    # a device's memory is counted by blocks that graphs share
    assert callback.stats.graph_bytes >= (gradients if harness.backend == "recorder" else 1)
    assert float(row.split()[-1]) == pytest.approx(callback.stats.graph_bytes / 2**20, abs=0.1)
