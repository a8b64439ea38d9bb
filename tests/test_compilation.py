"""``compile=True``: networks are compiled for a stage, and the result is graphed."""

from __future__ import annotations

import copy
import inspect
import time
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch._dynamo.callback import callback_handler
from torchmetrics import MeanMetric

from cg_lightning import CUDAGraphCallback, graphed
from cg_lightning.core.settings import COMPILE_ARGUMENTS
from tests.harness import assert_same, features
from tests.models import Body, Predictor


class Counted:
    """A compiler that counts its graphs and does nothing else, or changes the results."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        if self.factor == 1:
            return graph.forward
        return lambda *args: tuple(out * self.factor for out in graph.forward(*args))


class Evaluates(LightningModule):
    """A list of blocks, a loss without parameters, and a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Body(), Body()])
        self.head = nn.Linear(8, 4)
        self.loss = nn.MSELoss()
        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx):
        out = self.head(sum(block(batch[0]) for block in self.blocks))
        loss = self.loss(out, torch.ones_like(out))
        self.mean(loss)
        self.log("mean", self.mean)
        return out

    def training_step(self, batch, batch_idx):
        return self.head(sum(block(batch[0]) for block in self.blocks)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class LooksAtCompiled(Callback):
    def __init__(self, compiler: Counted) -> None:
        self.compiler = compiler
        self.seen: dict[str, list[str]] = {}
        self.graphs: list[int] = []

    def _look(self, when: str, module: nn.Module) -> None:
        self.seen[when] = [
            name for name, child in module.named_modules() if child._compiled_call_impl is not None
        ]

    def on_train_batch_start(self, trainer, pl_module, *_: Any) -> None:
        self._look("train", pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._look("validate", pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.graphs.append(self.compiler.graphs)

    def on_fit_end(self, trainer, pl_module) -> None:
        self._look("end", pl_module)


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize("verify_replays", [0, 2])
def test_results_are_those_of_eager(harness, mode, verify_replays):
    module = Evaluates()
    trainer = harness.trainer()
    expected = trainer.validate(copy.deepcopy(module), features(40), verbose=False)
    compiler = Counted()
    callback = harness.callback(
        mode=mode, compile={"backend": compiler}, verify_replays=verify_replays
    )
    found = harness.trainer(callback).validate(module, features(40), verbose=False)
    assert_same(found, expected)
    # two blocks and the head; blocks once more if a loader's batch is no inference tensor
    assert 3 <= compiler.graphs <= 6
    assert callback.stats.replays >= 5, callback.summary()
    assert not [child for child in module.modules() if "_compiled_call_impl" in vars(child)]


def test_the_time_of_compilation_is_told_apart(harness):
    """Private: the compiler tells by callbacks when it begins and ends."""
    handler = callback_handler
    before = list(handler.start_callbacks), list(handler.end_callbacks)
    callback = harness.callback(compile={"backend": "eager"})
    for _ in range(2):
        harness.trainer(callback).validate(Evaluates(), features(12), verbose=False)
    seconds = callback.stats.compile_seconds
    assert 0 < seconds == callback.stats.to_dict()["compile_seconds"]
    assert f"compiled in {seconds:.1f} s, compared as 'close'" in callback.summary()
    assert before == (handler.start_callbacks, handler.end_callbacks)
    plain = harness.callback()
    harness.trainer(plain).validate(Evaluates(), features(12), verbose=False)
    assert plain.stats.compile_seconds == 0
    assert "compiled" not in plain.summary()


class SlowCompiler(Counted):
    def __call__(self, graph: Any, inputs: Any) -> Any:
        time.sleep(0.5)
        return super().__call__(graph, inputs)


def test_the_time_of_eager_steps_is_without_compilation(harness):
    """The only eager step that was timed had compiled, so it took a hundred times too long."""
    callback = harness.callback(compile={"backend": SlowCompiler()}, warmup_steps=2)
    harness.trainer(callback).predict(Predictor(Body()), features(40))
    assert callback.stats.compile_seconds >= 0.5
    assert 0 < callback.stats.host_times("predict").eager < 0.5


def test_training_and_what_comes_after_run_as_written(harness):
    compiler, module = Counted(), Evaluates()
    looks = LooksAtCompiled(compiler)
    eager = copy.deepcopy(module)
    callback = harness.callback(mode="FULL", compile={"backend": compiler}, warmup_steps=1)
    runs = [(eager, []), (module, [callback, looks])]
    for model, callbacks in runs:
        harness.trainer(*callbacks, max_epochs=3).fit(model, features(16), features(24))
    assert_same(module.state_dict(), eager.state_dict())
    assert looks.seen["validate"] == ["blocks.0", "blocks.1", "head"]
    assert looks.seen["train"] == looks.seen["end"] == []
    assert looks.graphs[0] == looks.graphs[1] == looks.graphs[2] > 0, "compiled anew"
    assert callback.stats.steps["FULL"] >= 12, callback.summary()


def test_training_keeps_its_graph_while_the_validation_is_compiled(harness):
    """To compile set the code of a function, so the closure was watched and captured again."""
    module = Evaluates()
    eager = copy.deepcopy(module)
    callback = harness.callback(stages=["train", "validate"], compile={"backend": Counted()})
    for model, callbacks in ((eager, []), (module, [callback])):
        harness.trainer(*callbacks, max_epochs=3).fit(model, features(48), features(24))
    assert_same(module.state_dict(), eager.state_dict())
    assert callback.stats.steps_of("train")["FULL"] > 24
    assert callback.stats.steps_of("validate")["FULL"] > 10
    assert "again" not in callback.summary()


class ChangesOnce(Predictor):
    def on_predict_batch_start(self, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 8:
            self.net[1].approximate = "tanh"


def test_a_setting_that_changes_is_named_and_not_that_it_was_compiled_again(harness):
    """The step was watched twice, and a reason named the compiled function."""
    module = ChangesOnce(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)))
    expected = harness.trainer().predict(copy.deepcopy(module), features(80))
    callback = harness.callback(compile={"backend": Counted()})
    found = harness.trainer(callback).predict(module, features(80))
    assert_same(found, expected)
    changes = [str(each.reason) for each in callback.stats.reasons if "changed" in str(each.reason)]
    assert len(changes) == 1
    assert "approximate" in changes[0]
    assert "_compiled_call_impl" not in callback.summary()
    assert callback.stats.captures == 2


@pytest.mark.parametrize("factor", [1 + 1e-7, 1.1])
def test_verification_compares_with_the_uncompiled_step(harness, factor):
    if factor == 1.1 and harness.backend == "recorder":
        pytest.skip("the recorder captures uncompiled code")
    module = Predictor(Body())
    expected = harness.trainer().predict(copy.deepcopy(module), features(40))
    callback = harness.callback(compile={"backend": Counted(factor)}, warmup_steps=1)
    trainer = harness.trainer(callback)
    if factor == 1.1:
        with pytest.warns(UserWarning, match="from eager"):
            trainer.predict(module, features(40))
        assert "FULL" not in [entry.mode for entry in callback.stats.entries if entry.replays > 2]
    else:
        found = trainer.predict(module, features(40))
        torch.testing.assert_close(found, expected)
        assert callback.stats.steps["FULL"] >= 8


def test_what_the_user_compiled_stays(harness):
    module = Predictor(Body())
    module.net.compile(backend="eager")
    own = module.net._compiled_call_impl
    harness.trainer(harness.callback(compile={"backend": Counted()})).predict(module, features(24))
    assert module.net._compiled_call_impl is own


def test_without_a_trainer(device, backend):
    net, compiler = Body().to(device).eval(), Counted()
    with torch.inference_mode():
        xs = [torch.randn(4, 8, device=device) for _ in range(8)]
        expected = [net(x) for x in xs]
        with graphed(nn.Sequential(net), backend=backend, compile={"backend": compiler}) as run:
            found = [run(x) for x in xs]
    assert_same(found, expected)
    assert 1 <= compiler.graphs <= 2
    assert net._compiled_call_impl is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:(?s).*TensorFloat32 tensor cores")
def test_inductor(harness):
    if harness.backend != "cuda":
        pytest.skip("inductor needs minutes on two cores")
    module = Evaluates()
    expected = harness.trainer().validate(copy.deepcopy(module), features(40), verbose=False)
    callback = harness.callback(mode="FULL", compile=True)
    found = harness.trainer(callback).validate(module, features(40), verbose=False)
    torch.testing.assert_close(found, expected)
    assert callback.stats.steps["FULL"] >= 5, callback.summary()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "must be True, False or arguments of torch.compile"),
        ({"mod": "default"}, "'mod' is unknown; choose from fullgraph"),
        ({"mode": "reduce-overhead"}, "max-autotune-no-cudagraphs"),
        ({"mode": "max-autotune"}, "max-autotune-no-cudagraphs"),
        ({"options": {"triton.cudagraphs": True}}, "CUDA graphs"),
        ({"backend": "cudagraphs"}, "CUDA graphs"),
        ({"options": 3}, "options=3 must be a dictionary"),
        ({"mode": 3}, "mode=3 must be the name of a mode"),
        ({"backend": 3}, "backend=3 must be a name or a function"),
        ({"dynamic": "yes"}, "dynamic='yes' must be True, False or None"),
        ({"mode": "default", "options": {"max_autotune": True}}, "a mode or options, not both"),
        ({"mode": "fastest"}, "'fastest'} is refused by torch.compile: .*fastest.*default"),
        ({"backend": "inductr"}, "inductr'} is refused by torch.compile.*Backends are .*inductor"),
        ({"options": {"max_autotun": True}}, "max_autotun, known options are .* [.]{3}$"),
    ],
)
def test_bad_arguments(value, message):
    with pytest.raises(ValueError, match=message):
        CUDAGraphCallback(compile=value)


def test_a_mode_without_graphs_compiles_nothing():
    with pytest.raises(ValueError, match="mode='NONE' has none; choose another mode"):
        CUDAGraphCallback(mode="NONE", compile=True)


def test_training_alone_compiles_nothing():
    """The setting was ignored in silence."""
    with pytest.raises(ValueError, match=r"compile=True is for validate.*leave compile out"):
        CUDAGraphCallback(stages=["train"], compile=True)
    CUDAGraphCallback(stages=["train"], compile=False)
    CUDAGraphCallback(stages=["train", "test"], compile=True)


def test_the_names_of_arguments_are_those_of_torch():
    assert set(COMPILE_ARGUMENTS) <= set(inspect.signature(torch.compile).parameters)
