"""Tensors and operators that few people use: a watched step gives what eager gives."""

from __future__ import annotations

import io
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from cg_lightning import diagnose
from tests.harness import Batches, assert_same, features


class Wraps(torch.Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wraps:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [each.inner if isinstance(each, Wraps) else each for each in args]
        return func(*plain, **(kwargs or {}))


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def _nested(module: Any, x: Tensor) -> Tensor:
    jagged = torch.nested.nested_tensor([x[0, :2, None], x[1, :3, None]], layout=torch.jagged)
    return module.doubles(jagged).values()


def _tangent(module: Any, x: Tensor) -> Any:
    with torch.inference_mode(False), forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone(), torch.ones_like(x))
        return forward_ad.unpack_dual(module.net(dual)).tangent


def _jacobian(module: Any, x: Tensor) -> Tensor:
    with torch.inference_mode(False):  # torch 2.11 has no rule for it in inference mode
        return torch.func.jacfwd(module.net)(x.clone())


UNUSUAL = {
    "jvp": lambda module, x: torch.func.jvp(module.net, (x,), (torch.ones_like(x),)),
    "jacfwd": _jacobian,
    "forward mode": _tangent,
    "jagged": _nested,
    "wrapper": lambda module, x: module.doubles(Wraps(module.net(x))),
    "cond": lambda module, x: torch.cond(
        x.sum() > 0, lambda y: module.net(y) + 1, lambda y: module.net(y) - 1, (x,)
    ),
}


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("name", list(UNUSUAL))
def test_unusual_tensors_and_operators_in_a_watched_step(harness, name, mode):
    class Runs(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.doubles = nn.Linear(8, 3), Doubles()

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return UNUSUAL[name](self, batch[0])

    harness.compare(
        Runs(),
        lambda trainer, module: trainer.predict(module, features(48)),
        harness.callback(mode=mode, warmup_steps=1),
    )


def _lists(index: int, layout: torch.layout) -> Tensor:
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(index))
    return torch.nested.nested_tensor([x[0][:1], x[1][: 1 + index % 3]], layout=layout)


NESTED = {
    "reads": lambda module, b: module.net(b.to_padded_tensor(0.0)),
    "writes": lambda module, b: module.net(b.mul_(2).to_padded_tensor(0.0)),
    "parts": lambda module, b: [module.net(part) for part in b.unbind()],
    "whole": lambda module, b: module.net(b).to_padded_tensor(0.0),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("step", NESTED)
def test_nested_tensors_in_a_batch(harness, step, layout, mode):
    class Runs(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 3)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return NESTED[step](self, batch["x"])

    def job(trainer, module):
        given = Batches(lambda index: {"x": _lists(index, layout)}, 9)
        return trainer.predict(module, DataLoader(given, batch_size=None))  # type: ignore[arg-type]

    harness.compare(Runs(), job, harness.callback(mode=mode, warmup_steps=1))
    assert diagnose(Runs(), {"x": _lists(1, layout)}, backend="recorder").unkeyable


@pytest.mark.parametrize("make", [lambda y: y.requires_grad_(), nn.Parameter])
def test_an_output_that_was_made_to_require_gradients(harness, make):
    class Makes(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 3)
            self.seen: list[Any] = []

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"y": make(self.net(batch[0]))}

        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            self.seen.append((type(outputs["y"]).__name__, outputs["y"].requires_grad))

    def job(trainer, module):
        trainer.validate(module, features(48), verbose=False)
        return module.seen

    harness.compare(Makes(), job, harness.callback(warmup_steps=1, verify_replays=0))


def _sparse(module: Any, x: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(module.indices, module.net(x)[0, :2], (2, 2))


def _quantized(module: Any, x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(module.net(x), 0.1, 0, torch.qint8)


def _conjugate(module: Any, x: Tensor) -> Any:
    y = torch.complex(module.net(x), x[:, :3])
    return y, y.conj()


@pytest.mark.filterwarnings("ignore:.*(quantize_per_tensor|invariant checks).*:UserWarning")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        pytest.param(_sparse, "torch.sparse_coo tensor", id="sparse"),
        pytest.param(_quantized, "output is a quantized tensor, which a replay", id="quantized"),
        pytest.param(_conjugate, "as a lazy conjugate or negative", id="conjugate"),
    ],
)
def test_an_output_that_a_replay_cannot_make(harness, function, reason):
    class Makes(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 3)
            self.register_buffer("indices", torch.tensor([[0, 1], [1, 0]]))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return function(self, batch[0])

    def job(trainer, module):
        kept = trainer.predict(module, features(40))
        return [y.dequantize() if function is _quantized else y for y in kept]

    callback = harness.callback(warmup_steps=1)
    harness.compare(Makes(), job, callback)
    assert callback.stats.steps["PIECEWISE"], callback.summary()
    assert any(reason in str(record.reason) for record in callback.stats.reasons)


class _Plain:
    """An object."""


class _NoAttribute:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class _NoClass:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no class")


class _NoDictionary:
    @property
    def __dict__(self) -> Any:
        raise RuntimeError("no dictionary")


class _NoItems(list[Any]):
    def __iter__(self) -> Any:
        raise RuntimeError("no items")


class _NoKeys(dict[str, Any]):
    def __iter__(self) -> Any:
        raise RuntimeError("no keys")


def _proxy_of_what_is_gone() -> Any:
    return weakref.proxy(_Plain())


def _closed() -> Any:
    file = io.StringIO("text")
    file.close()
    return file


UNREADABLE = {
    "attributes": _NoAttribute,
    "class": _NoClass,
    "dictionary": _NoDictionary,
    "items": lambda: _NoItems([1]),
    "keys": lambda: _NoKeys(a=1),
    "a proxy": _proxy_of_what_is_gone,
    "a closed file": _closed,
}
"""Values that raise an error if they are read."""


class HasUnreadable(LightningModule):
    def __init__(self, name: str, is_inside: bool) -> None:
        super().__init__()
        self.net, self.mean = nn.Linear(8, 3), MeanMetric()
        self.arguments = (name, is_inside)
        value = UNREADABLE[name]()
        if is_inside:
            value, inside = _Plain(), value
            value.held = [inside]
        vars(self)["thing"] = value  # torch itself reads what is set
        self.seen: list[Any] = []

    def __deepcopy__(self, memo: Any) -> HasUnreadable:
        new = HasUnreadable(*self.arguments)
        new.load_state_dict(self.state_dict())
        return new

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        output: Tensor = self.net(batch[0])
        self.mean.update(output.mean())
        self.seen.append(output)
        self.log("mean", self.mean)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.validation_step(batch, batch_idx).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("is_inside", [False, True], ids=["attribute", "inside"])
@pytest.mark.parametrize("name", list(UNREADABLE))
@pytest.mark.parametrize("stage", ["validate", "train"])
def test_values_that_cannot_be_read_and_that_no_step_reads(harness, stage, name, is_inside):
    """Eager does not read them, so nothing of ours may raise their errors."""
    data = features(40)

    def job(trainer, module):
        if stage == "validate":
            trainer.validate(module, data, verbose=False)
        else:
            trainer.fit(module, data, data)
        return dict(trainer.callback_metrics), module.seen

    callback = harness.callback(stages=[stage], warmup_steps=1)
    harness.compare(HasUnreadable(name, is_inside), job, callback, max_epochs=1)
    assert callback.stats.steps["FULL"] > 5, callback.summary()


class LooksWhetherItIsNone(HasUnreadable):
    def __deepcopy__(self, memo: Any) -> LooksWhetherItIsNone:
        new = LooksWhetherItIsNone(*self.arguments)
        new.load_state_dict(self.state_dict())
        return new

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[0] if self.thing is None else super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("is_inside", [False, True], ids=["attribute", "inside"])
@pytest.mark.parametrize("name", ["attributes", "items", "a proxy", "a closed file"])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_values_that_cannot_be_read_and_whose_inside_no_step_reads(harness, mode, name, is_inside):
    def job(trainer, module):
        trainer.validate(module, features(40), verbose=False)
        return dict(trainer.callback_metrics), module.seen

    callback = harness.callback(mode=mode, warmup_steps=1)
    harness.compare(LooksWhetherItIsNone(name, is_inside), job, callback)


UNCOPIED = {
    "negated": torch._neg_view,
    **{
        str(dtype): lambda numbers, dtype=dtype: numbers.to(torch.uint8).view(dtype)
        for dtype in (torch.uint4, torch.bits8)
    },
}
"""Tensors that PyTorch cannot view as bytes, or neither copies nor compares."""


def _inside(tensor: Tensor) -> Tensor:
    """Return what can be computed with, in the same memory."""
    return tensor if tensor.is_floating_point() else tensor.view(torch.uint8)


class HasUncopied(LightningModule):
    def __init__(self, kind: str, where: str) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)
        self.where = where
        kept = self.make(kind, 0)
        if "buffer" in where:
            self.register_buffer("kept", kept)
        elif where == "parameter":
            self.kept = nn.Parameter(kept, requires_grad=False)
        elif where == "in a list":
            self.listed = [kept]
        else:
            self.kept = kept

    @staticmethod
    def make(kind: str, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return UNCOPIED[kind](torch.randint(1, 15, (8, 8), generator=generator).float())

    def read(self, batch: Any) -> Tensor:
        if self.where == "in the batch":
            return batch[1]
        return self.listed[0] if self.where == "in a list" else self.kept

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        kept = self.read(batch)
        output = self.net(batch[0]) @ _inside(kept).float()
        self.log("mean", output.mean())
        if self.where == "a buffer that is written to":
            _inside(kept).add_(1)
        if self.where == "in the output":
            return output, (_inside(kept) + 1).view(kept.dtype)
        if self.where == "on the way":
            return output @ _inside((_inside(kept) * 2).view(kept.dtype)).float()
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) @ _inside(self.read(batch)).float()).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 1e-5)


class KeepsInside(Callback):
    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_: Any) -> None:
        leaves = outputs if isinstance(outputs, tuple) else (outputs,)
        self.kept.append([_inside(leaf) for leaf in leaves])


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize(
    ("mode", "verify_replays"),
    [("FULL_AND_PIECEWISE", 2), ("FULL_AND_PIECEWISE", 0), ("PIECEWISE", 2)],
)
@pytest.mark.parametrize(
    "where",
    [
        *("a buffer", "a buffer that is written to", "parameter", "attribute", "in a list"),
        *("on the way", "in the batch", "in the output"),
    ],
)
@pytest.mark.parametrize("kind", list(UNCOPIED))
def test_tensors_that_pytorch_does_not_copy_or_compare(harness, kind, where, mode, verify_replays):
    if harness.backend == "cuda":
        pytest.skip("PyTorch moves them to no GPU with deterministic algorithms, which tests use")

    def batch(index: int) -> tuple[Tensor, ...]:
        x = torch.full((4, 8), 0.1 * index)
        return (x, HasUncopied.make(kind, index)) if where == "in the batch" else (x,)

    data, seen = Batches(batch, 8), []
    stages = ["validate"] if mode == "PIECEWISE" else ["train", "validate"]
    callback = harness.callback(mode=mode, verify_replays=verify_replays, stages=stages)
    for extra in ([callback], []):
        torch.manual_seed(1)
        module, keeps = HasUncopied(kind, where), KeepsInside()
        trainer = harness.trainer(*extra, keeps)
        loader = DataLoader(data, batch_size=None, collate_fn=lambda each: each)
        result = trainer.validate(module, loader, verbose=False)
        trainer.fit(module, loader, loader)
        held = [] if where == "in the batch" else [_inside(module.read(None))]
        seen.append((result, keeps.kept, held, module.net.state_dict()))
    assert_same(*seen)
    if where not in ("in the batch", "in the output") and mode != "PIECEWISE" and kind != "negated":
        assert callback.stats.steps["FULL"] > 10, callback.summary()
