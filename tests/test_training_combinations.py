"""What issue 13 says must be equal: models, precisions and options, with a run that is resumed.

Each case trains 3 epochs with validation in between, a schedule of each step, checkpoints within
the epochs and early stopping. Then a new Trainer goes on from a checkpoint of the second epoch,
until early stopping ends it.
"""

import contextlib
import copy

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cg_lightning.bench.cases import _Block
from tests.harness import assert_same
from tests.test_training import (
    NETS,
    Autoencoder,
    Classifier,
    KeepAll,
    RecordingLogger,
    Unfreeze,
    points,
    replayed,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*deterministic",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Detected call of `lr_scheduler.step",
    "ignore:TF32 acceleration on top of oneDNN",
)


def resnet18():
    """It has the layers of a ResNet-18, with few channels."""
    layers = [nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    blocks = [
        _Block(4 if stage == 0 else 4 * 2 ** (stage - (index == 0)), 4 * 2**stage, stride, False)
        for stage in range(4)
        for index, stride in enumerate((2 if stage else 1, 1))
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    return nn.Sequential(
        nn.Unflatten(1, (3, 16, 16)), *layers, nn.MaxPool2d(3, 2, 1), *blocks, *head
    )


class OneCycle:
    """AdamW with a schedule that changes the rate and the momentum of each step."""

    steps_of_epoch = 9

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        steps = 6 * self.steps_of_epoch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class OfNet(OneCycle, Classifier):
    pass


class Samples(OneCycle, Autoencoder):
    pass


MODELS = {
    "mlp": OfNet,
    "resnet18": lambda: OfNet(resnet18()),
    "lstm": lambda: OfNet(NETS["lstm"]()),
    "vit": lambda: OfNet(NETS["vit"]()),
    "bert": lambda: OfNet(NETS["bert"]()),
    "vae": Samples,
    "frozen half": OfNet,
    "tied": lambda: OfNet(NETS["tied"]()),
}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
OPTIONS = {
    "plain": {},
    "accumulation 2": {"accumulate_grad_batches": 2},
    "accumulation 3": {"accumulate_grad_batches": 3},
    "clipped norm": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "norm"},
    "clipped values": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}
SLOW = ("resnet18", "vit", "bert")
CASES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
SETTINGS = [(PRECISIONS[index % 3], list(OPTIONS)[index % 5]) for index in range(15)]
"""All pairs. The first eight have each precision and each option."""


class KeepMore(KeepAll):
    """Keeps what the progress bar gets as well, and what is logged at the end of epochs."""

    def __init__(self):
        super().__init__()
        self.shown = []
        self.of_epochs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.shown.append(dict(trainer.progress_bar_metrics))

    def on_train_epoch_end(self, trainer, pl_module):
        self.of_epochs.append((dict(trainer.callback_metrics), dict(trainer.logged_metrics)))

    def seen(self):
        return (
            *(self.outputs, self.kept_gradients, self.metrics, self.weights, self.rates),
            *(self.shown, self.of_epochs),
        )


class Runs:
    """Two runs of one case: one from the start, and one from a checkpoint of the first one."""

    def __init__(self, harness, folder, precision, options, others):
        self._harness = harness
        self._folder = folder
        self._precision = precision
        self._options = options
        self._others = others

    def __call__(self, model, train, validation, callbacks):
        resumed = copy.deepcopy(model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._harness.backend == "recorder":  # which has no LSTM with 16 bits
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            first = self._run(model, train, validation, callbacks[:1], 3, None)
            files = sorted(self._folder.glob("step=*.ckpt"), key=lambda file: file.stat().st_mtime)
            file = next(
                each for each in files if torch.load(each, weights_only=False)["epoch"] == 1
            )
            second = self._run(resumed, train, validation, callbacks[1:], 9, file)
        names = sorted(each.name for each in self._folder.iterdir())
        saved = [torch.load(self._folder / name, weights_only=False) for name in names]
        for each in saved:
            each.pop("callbacks", None)  # their paths differ
        return first, second, names, saved

    def _run(self, module, train, validation, ours, max_epochs, checkpoint):
        torch.manual_seed(1)
        kept, logger = KeepMore(), RecordingLogger()
        stopping = EarlyStopping("val_loss", patience=3, min_delta=10.0)
        trainer = self._harness.trainer(
            *(*ours, kept, *self._others(), LearningRateMonitor("step", log_momentum=True)),
            ModelCheckpoint(self._folder, "{step}", every_n_train_steps=4, save_top_k=-1),
            ModelCheckpoint(self._folder, "best", monitor="val_loss", save_weights_only=True),
            stopping,
            **{**self._options, **self._precision(), "max_epochs": max_epochs},
            **{"logger": logger, "log_every_n_steps": 2, "enable_checkpointing": True},
        )
        trainer.fit(module, train, validation, ckpt_path=checkpoint, weights_only=False)
        assert trainer.current_epoch == (3 if checkpoint is None else 4)
        return (
            *(kept.seen(), logger.calls, dict(trainer.callback_metrics), trainer.global_step),
            *(trainer.optimizers[0].state_dict(), stopping.state_dict(), torch.get_rng_state()),
            *([p.grad for p in module.parameters()], dict(module.state_dict())),
        )


def _scaled_on_cpu():
    """Lightning has 16-mixed on GPUs only; the first factors here are too large, as on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=6)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.in_turn("setting")
@pytest.mark.parametrize("setting", SETTINGS, ids=", ".join)
@pytest.mark.parametrize("name", CASES)
def test_combinations(harness, tmp_path, name, setting):
    precision, options = setting

    def settings():
        if precision == "16-mixed" and harness.backend == "recorder":
            return _scaled_on_cpu()
        return {"precision": precision}

    torch.manual_seed(0)
    model = MODELS[name]()
    size = 768 if name == "resnet18" else 8
    train, validation = points(size=size, shuffle=False), points(12, size=size, shuffle=False)
    callbacks = [harness.callback(stages=["train", "validate"]) for _ in range(2)]
    others = (lambda: [Unfreeze()]) if name == "frozen half" else list
    seen = []
    for ours in (callbacks, []):
        folder = tmp_path / ("graphs" if ours else "eager")
        runs = Runs(harness, folder, settings, OPTIONS[options], others)
        seen.append(runs(copy.deepcopy(model), train, validation, ours))
    assert_same(*seen)
    assert all(replayed(each) > 5 for each in callbacks), [each.summary() for each in callbacks]
