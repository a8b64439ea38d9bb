"""Obstacles to a graph, found before any capture."""

import contextlib
import copy
import functools
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError

from cg_lightning import CaptureError, CUDAGraphCallback, diagnose
from cg_lightning.core.causes import REMEDIES_OF_OPERATIONS, Cause
from cg_lightning.diagnosis.uses_of_argument import ArgumentUses
from cg_lightning.diagnosis.watcher import StepWatcher
from tests.harness import Harness, assert_same, features, images
from tests.models import Body, ConvNetClassifier, Predictor


class Runs(nn.Module):
    """A clean submodule, then any function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.trunk = Body()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, self.trunk(x))


def sets(module: nn.Module, name: str, value: Any) -> None:
    setattr(module, name, value if hasattr(module, name) else value * 2)


HOOKED = Body()
CASES = {
    "item": (lambda m, x: x.sum().item(), Cause.HOST_SYNC),
    "bool": (lambda m, x: bool(x.sum() > 0), Cause.HOST_SYNC),
    "tolist": (lambda m, x: x.tolist(), Cause.HOST_SYNC),
    "cpu": (lambda m, x: x.cpu() * 2, Cause.HOST_SYNC),
    "numpy": (lambda m, x: x.detach().numpy(), Cause.HOST_SYNC),
    "print a tensor": (lambda m, x: str(x), Cause.HOST_SYNC),
    "of tensors": (
        lambda m, x: x + torch.tensor([x.sum()], device=x.device),
        Cause.TENSOR_FROM_PYTHON,
    ),
    "new_tensor": (lambda m, x: x + x.new_tensor([x.sum()]), Cause.TENSOR_FROM_PYTHON),
    "nonzero": (lambda m, x: x.nonzero(), Cause.DATA_DEPENDENT_SHAPE),
    "mask": (lambda m, x: x[x > 0], Cause.DATA_DEPENDENT_SHAPE),
    "unique": (lambda m, x: x.unique(), Cause.DATA_DEPENDENT_SHAPE),
    "bincount": (lambda m, x: x.long().abs().flatten().bincount(), Cause.DATA_DEPENDENT_SHAPE),
    "repeat_interleave": (
        lambda m, x: x[0].repeat_interleave(x[0].long().abs()),
        Cause.DATA_DEPENDENT_SHAPE,
    ),
    "masked_select": (lambda m, x: x.masked_select(x > 0), Cause.DATA_DEPENDENT_SHAPE),
    "inverse": (
        lambda m, x: torch.linalg.inv(x.T @ x + torch.eye(8)),
        Cause.HOST_CHECKED_LINEAR_ALGEBRA,
    ),
    "Python randomness": (lambda m, x: x * random.random(), Cause.HOST_RANDOMNESS),
    "NumPy randomness": (lambda m, x: x * float(np.random.rand()), Cause.HOST_RANDOMNESS),
    "attribute": (lambda m, x: sets(m, "cache", x), Cause.STATE_REBOUND),
    "container": (lambda m, x: m.__dict__.setdefault("kept", []).append(x), Cause.STATE_REBOUND),
    "print": (lambda m, x: print("seen"), Cause.PRINTED),
}


@pytest.mark.parametrize("name", list(CASES))
def test_causes_operations_and_lines(name):
    function, cause = CASES[name]
    found = diagnose(Runs(function), torch.randn(4, 8))
    assert not found.capturable("")
    assert found.capturable("trunk")
    assert found.largest_capturable() == ["trunk"]
    finding = next(finding for finding in found.findings if finding.cause is cause)
    assert finding.operation
    assert finding.remedy == REMEDIES_OF_OPERATIONS.get(finding.operation, cause.remedy)
    if cause not in (Cause.STATE_REBOUND, Cause.HOST_RANDOMNESS):
        assert finding.location == f"{__file__}:{function.__code__.co_firstlineno}"
    assert cause.value in str(found)
    assert "<table>" in found._repr_html_()


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.softmax(x, -1).topk(2).values,
        lambda m, x: torch.where(x > 0, x, -x).masked_fill(x > 1, 0),
        lambda m, x: F.dropout(x, 0.5, training=True) + torch.rand_like(x),
        lambda m, x: F.cross_entropy(x, x.argmax(-1)),
        lambda m, x: x + torch.arange(8, device=x.device) + torch.ones(()),
    ],
)
def test_clean_ones(function):
    found = diagnose(Runs(function), (torch.randn(4, 8),))
    assert found.findings == []
    assert found.capturable()
    assert found.largest_capturable() == [""]
    assert str(found) == "Nothing stands in the way of one graph."


def test_inputs_mutated_in_place():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))
    found = diagnose(net, {"input": torch.randn(2, 8)})
    assert found.findings == []  # a graph of the whole call copies it back
    assert not found.capturable("0")
    assert found.capturable()
    (finding,) = diagnose(net, {"input": torch.randn(8, 2).t()}).findings
    assert finding.cause is Cause.INPUT_MUTATED


def test_hooks_also_global_ones():
    """Hazard 20."""
    net = Body()
    net[0].register_forward_hook(lambda *_: None)
    found = diagnose(net, torch.randn(2, 8))
    assert found.findings == []  # a graph of the whole call holds what the hook does
    assert found.capturable("")
    assert not found.capturable("0")
    assert found.largest_capturable() == ["2"]
    net[0].register_forward_hook(functools.partial(print, end=""))
    found = diagnose(net, torch.randn(2, 8))
    assert (Cause.FORWARD_HOOK, "0") in [(f.cause, f.module) for f in found.findings]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert diagnose(Body(), torch.randn(2, 8)).largest_capturable() == []
    finally:
        handle.remove()


def test_gradients_enabled_inside():
    def step(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return x.clone().requires_grad_().sum()

    assert Cause.GRADIENTS in {f.cause for f in diagnose(Runs(step), torch.randn(2, 8)).findings}


@pytest.mark.parametrize("asks_for", [torch.autograd.grad, lambda y, x: y.backward() or [x.grad]])
def test_gradients_that_need_no_inference_mode(asks_for):
    def step(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return asks_for(x.square().sum(), x)[0]

    module = Runs(step)
    found = diagnose(module, torch.randn(2, 8))
    assert {f.cause for f in found.findings} == {Cause.GRADIENTS}
    assert found.largest_capturable() == ["trunk"]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_an_error_of_the_step_stays_the_same():
    with pytest.raises(RuntimeError, match="mine"):
        diagnose(Runs(lambda m, x: (_ for _ in ()).throw(RuntimeError("mine"))), torch.randn(2, 8))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_stage_without_a_step(stage):
    class Validates(LightningModule):
        def validation_step(self, batch, batch_idx):
            return batch * 2

    if stage == "validate":
        assert diagnose(Validates(), torch.ones(2), stage=stage).capturable()
        return
    with pytest.raises(ValueError, match=f"stage='{stage}'.*choose .*: validate"):
        diagnose(Validates(), torch.ones(2), stage=stage)


def test_a_step_that_writes_a_file_runs_once(tmp_path):
    def step(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with open(tmp_path / "seen", "a") as file:
            file.write("x")
        return x

    found = diagnose(Runs(step), torch.randn(2, 8))
    assert Cause.WORLD in {f.cause for f in found.findings}
    assert (tmp_path / "seen").read_text() == "x"


def test_the_step_of_a_lightning_module_without_a_trainer():
    model = ConvNetClassifier(4)
    batch = (torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,)))
    before = copy.deepcopy(model.state_dict())
    found = diagnose(model, batch, stage="validate")
    assert found.findings == []
    assert found.capturable()
    assert found.capturable("net")
    assert diagnose(model, batch).capturable("")
    assert model.val_accuracy.update_count == 0
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_diagnosis_and_callback_decide_alike(harness, stage):
    """Issue 17: diagnose() and mode FULL with strict=True agree, and name the same cause."""

    class Reads(ConvNetClassifier):
        def on_step(self, batch: Any) -> Any:
            return self.net(batch[0]).mean().item()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", self.on_step(batch))

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", self.on_step(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.on_step(batch)

    data = images(40)
    batch = next(iter(data))
    settings = {} if stage == "predict" else {"verbose": False}

    def run(model: Any) -> CUDAGraphCallback:
        callback = harness.callback(mode="FULL", strict=True)
        getattr(harness.trainer(callback), stage)(model, data, **settings)
        return callback

    assert diagnose(ConvNetClassifier(4), batch, stage=stage).capturable()
    assert run(ConvNetClassifier(4)).stats.steps == {"NONE": 3, "PIECEWISE": 0, "FULL": 7}
    found = diagnose(Reads(4), batch, stage=stage)
    assert not found.capturable()
    with pytest.raises(CaptureError) as caught:
        run(Reads(4))
    assert caught.value.diagnosis.findings[0] == found.findings[0]
    assert str(found.findings[0]) in str(caught.value)


@pytest.mark.parametrize("job", ["validate", "fit"])
def test_an_operation_has_one_name_with_and_without_inference_mode(harness, job):
    class Waits(ConvNetClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            super().validation_step(batch, batch_idx)
            return float(self.net(batch[0]).sum().item())

    callback = harness.callback()
    trainer, module = harness.trainer(callback, max_epochs=1), Waits(4)
    if job == "fit":
        trainer.fit(module, images(8), images(43))
    else:
        trainer.validate(module, images(43), verbose=False)
    causes = [each.reason for each in callback.stats.reasons if each.reason.kind is Cause.HOST_SYNC]
    assert [reason.operation for reason in causes] == ["aten::item"]


def test_a_module_of_the_package_pytorch_lightning():
    """Both packages define LightningModule; the callback and diagnose() take either."""
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class Mine(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Body()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mean", self.net(batch[0]).mean())

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) * (1 + self.trainer.world_size)

    batch = (torch.randn(2, 8),)
    assert diagnose(Mine(), batch, stage="validate").capturable()
    assert "no Trainer" in diagnose(Mine(), batch).stopped


def test_uses_of_batch_idx():
    class Passes(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.test_step(batch, batch_idx)

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    class Uses(Passes):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return super().test_step(batch, batch_idx) + batch_idx

    batch = (torch.randn(2, 8),)
    assert diagnose(Passes(Body()), batch).findings == []
    (finding,) = diagnose(Uses(Body()), batch).findings
    assert finding.cause is Cause.BATCH_INDEX_USED
    assert finding.location.startswith(f"{__file__}:")


def test_a_generator_of_its_own():
    """A graph goes on with one generator, but each step has made a new one."""

    class Draws(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) + torch.rand(8, generator=torch.Generator())

    (finding,) = diagnose(Draws(Body()), (torch.randn(2, 8),)).findings
    assert finding.cause is Cause.HOST_RANDOMNESS


def passes_on(step):
    @functools.wraps(step)
    def decorated(*args, **kwargs):
        return step(*args, **kwargs)

    return decorated


def looks_at_it(step):
    @functools.wraps(step)
    def decorated(self, batch, batch_idx):
        return step(self, batch, batch_idx) if batch_idx else step(self, batch, 1)

    return decorated


def uses_batch_idx(module, step):
    return bool(ArgumentUses(module).find(step, position=1))


def takes_it_out(step):
    @functools.wraps(step)
    def decorated(self, *args):
        return step(self, *args) * args[1]

    return decorated


@pytest.mark.parametrize(
    ("decorator", "uses"),
    [
        (torch.no_grad(), False),
        (torch.autocast("cpu"), False),
        (passes_on, False),
        (lambda step: passes_on(torch.inference_mode()(step)), False),
        (looks_at_it, True),
        (takes_it_out, True),
        (lambda step: passes_on(looks_at_it(step)), True),
        (staticmethod, True),
    ],
)
def test_decorators_that_use_batch_idx(decorator, uses):
    def step(self, batch, batch_idx):
        return batch

    kind = type("Decorated", (Predictor,), {"predict_step": decorator(step)})
    assert uses_batch_idx(kind(Body()), "predict_step") == uses


@pytest.mark.parametrize(
    ("step", "uses"),
    [
        (LightningModule.predict_step, False),
        (lambda self, batch, *rest: self(batch), False),
        (lambda self, *args: self(args[0]), False),
        (lambda self, *args: self(args[1]), True),
        (lambda self, *args: self(args[-1]), True),
        (lambda self, *args: self(*args), True),
        (lambda self, *args: self(args[0]) * len(args), True),
        (lambda self, batch: self(batch), False),
    ],
)
def test_steps_that_take_anything(step, uses):
    """Lightning's own ``predict_step`` is one of them."""
    kind = type("TakesAnything", (Predictor,), {"predict_step": step})
    assert uses_batch_idx(kind(Body()), "predict_step") == uses


class Varargs(LightningModule):
    """Steps that hand on all that they are given."""

    def forward(self, batch):
        return batch

    def ignores(self, batch, batch_idx):
        return batch

    def uses(self, batch, batch_idx):
        return batch * batch_idx

    def takes_all(self, *args, **kwargs):
        return self.ignores(*args, **kwargs)

    def takes_rest(self, batch, *rest):
        return self.takes_all(batch, *rest)

    def takes_all_and_uses(self, *args):
        return self.uses(*args)

    def shifts(self, batch, *rest):
        return self.uses(*rest, batch)

    def looks(self, *args):
        return self.ignores(*args) * args[1]

    def both(self, batch, *rest):
        return self.ignores(batch, *rest) + self.uses(batch, *rest)

    def unknown(self, *args):
        ignores = self.ignores
        return ignores(*args)

    def later(self, *args):
        return lambda: self.ignores(*args)

    def rebinds(self, *args):
        args = args[::-1]
        return self.ignores(*args)

    def twice(self, *args):
        return self.ignores(*args, *args)

    def itself(self, *args):
        return self.itself(*args)


class SuperVarargs(Varargs):
    def ignores(self, *args, **kw):
        return super().ignores(*args, **kw)

    def uses(self, batch, *args):
        return super().uses(batch, *args)


@pytest.mark.parametrize("kind", [Varargs, SuperVarargs])
@pytest.mark.parametrize(
    ("step", "uses"),
    [
        *(("ignores", False), ("takes_all", False), ("takes_rest", False), ("uses", True)),
        *(("takes_all_and_uses", True), ("shifts", True), ("looks", True), ("both", True)),
        *(("unknown", True), ("later", True), ("rebinds", True), ("twice", True), ("itself", True)),
    ],
)
def test_steps_that_hand_on_all_arguments(kind, step, uses):
    assert uses_batch_idx(kind(), step) == uses


def test_full_runs_lower_where_batch_idx_is_used(harness):
    """Hazard 7."""
    from tests.harness import features, predict

    class Uses(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) * (batch_idx + 1)

    for mode, ran in (("FULL", "NONE"), ("FULL_AND_PIECEWISE", "PIECEWISE")):
        callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
        harness.compare(Uses(Body()), predict(features(32)), callback)
        assert callback.stats.steps[ran] >= 7
    assert callback.stats.replays == 7


def test_a_batch_without_a_key():
    found = diagnose(Predictor(Body()), (torch.randn(2, 8), {1, 2}))
    assert found.unkeyable.startswith("batch[1]")
    assert not found.capturable()
    assert found.unkeyable in str(found)


def test_bad_input():
    with pytest.raises(ValueError, match="validate, test, predict"):
        diagnose(Body(), torch.randn(2, 8), stage="fit")
    with pytest.raises(ValueError, match="auto, cuda, recorder"):
        diagnose(Body(), torch.randn(2, 8), backend="rocm")
    with pytest.raises(ValueError, match=r"an nn\.Module, not a builtin_function"):
        diagnose(torch.sin, torch.randn(2, 8))
    with pytest.raises(ValueError, match="No submodule '9' was called; these were: 0, 1, 2"):
        diagnose(Body(), torch.randn(2, 8)).capturable("9")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        diagnose(Body(), torch.randn(2, 3))


def test_what_was_found_is_what_the_recorder_refuses():
    """Diagnosis and recorder use one table. Both find what only Python code shows."""
    from tests.test_recorder import SYNCS

    for name, function in SYNCS.items():
        if name in ("from Python", "cpu"):  # the callback makes them outside the graph
            continue
        module = Runs(lambda m, x, f=function: f(x[0, :3] * 0 + m.pattern))
        module.register_buffer("pattern", torch.tensor([1.0, 0.0, 1.0]))
        found = diagnose(module, torch.randn(2, 8))
        assert not found.capturable(), name


def test_our_own_comparisons_are_no_findings():
    """On a GPU, the CPU's generator is also compared around each call."""
    model = Body()
    backend: Any = types.SimpleNamespace(
        device=torch.device("cuda"),
        event_types=(),
        noticing_host_syncs=lambda on_call: contextlib.nullcontext(),
        ignoring_host_syncs=contextlib.nullcontext,
    )
    watcher = StepWatcher(model, backend, effects=None)
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert watcher.watch(lambda: model(x), (x,))[1].findings == []
        drew = watcher.watch(lambda: model(x) + torch.randn(8), (x,))[1]
    assert [finding.cause for finding in drew.findings] == [Cause.HOST_RANDOMNESS]


class Meter:
    def __init__(self) -> None:
        self.total = torch.zeros(())


class KeepsElsewhere(Predictor):
    """Changes a value that is neither a buffer nor its own attribute."""

    def __init__(self, how: str) -> None:
        super().__init__(Body())
        self.how = how
        self.meter, self.cache, self.metrics = (
            Meter(),
            {"last": None},
            {"error": MeanSquaredError()},
        )

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        if self.how == "object":
            self.meter.total = self.meter.total + output.sum()
        if self.how == "dict":
            self.cache["last"] = output if self.cache else None
        if self.how == "metric":
            self.metrics["error"].update(output, output + 1)
        if self.how == "trainer":
            output = output + len(self.trainer.optimizers)
        return output


@pytest.mark.parametrize("how", ["", "object", "dict", "metric", "trainer"])
def test_what_is_kept_elsewhere_is_noticed(tmp_path, how):
    harness = Harness("recorder", tmp_path)
    callback = harness.callback(mode="FULL", warmup_steps=1)
    model = KeepsElsewhere(how)
    harness.compare(model, lambda trainer, module: trainer.predict(module, features()), callback)
    assert (callback.stats.steps["FULL"] > 0) is (how in ("", "metric"))
    if how == "metric":  # updated after each replay
        assert model.metrics["error"].update_count == 5
    elif how:
        words = {"trainer": "Trainer read"}
        assert any(
            reason.startswith(words.get(how, "module state rebound"))
            for reason in callback.stats.eager_reasons
        )


def test_what_compiling_does_is_done_once(harness):
    """The first watched step compiles and may wait for the device, so the next is watched too."""

    def compiler(graph: Any, inputs: Any) -> Any:
        torch.ones(1, device=inputs[0].device).tolist()
        return graph

    net, callback, kept = Body(), harness.callback(mode="FULL", warmup_steps=1), []
    for extra in ([callback], []):
        module = Predictor(torch.compile(copy.deepcopy(net), backend=compiler))
        kept.append(harness.trainer(*extra).predict(module, features(32)))
    assert_same(*kept)
    assert callback.stats.steps["FULL"] == 6, callback.summary()
