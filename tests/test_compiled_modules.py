"""Modules, methods and functions under ``torch.compile``, whose code cannot be watched."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torchmetrics import MeanMetric

from cg_lightning import CUDAGraphCallback
from cg_lightning.modules import attributes
from cg_lightning.modules.compilation import Compilation
from cg_lightning.modules.compiled import is_graphed_by_compiler
from cg_lightning.modules.interception import Interception, ModuleHandler
from cg_lightning.report.stats import CUDAGraphStats
from tests.conftest import modules_with_a_trace
from tests.harness import Harness, assert_same, features, predict
from tests.models import Body, Predictor


@pytest.fixture(autouse=True)
def leaves_no_trace_in_place():
    yield
    assert not modules_with_a_trace(), "a module is still intercepted"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = 1.0
        self.settings = {"scale": 1.0}
        self.calls = 0
        self.kept: list[Any] = []
        self.memory = torch.zeros(())

    def forward(self, x):
        return self.linear(x)


class ChangesItsInput(Layer):
    def forward(self, x):
        return self.linear(x.relu_())


class ReadsAttributes(Layer):
    def forward(self, x):
        return self.linear(x) * self.scale * self.settings["scale"]


class Counts(Layer):
    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class Keeps(Layer):
    def forward(self, x):
        self.kept.append(self.linear(x))
        return self.kept[-1]


class Remembers(Layer):
    def forward(self, x):
        self.memory = self.memory * 0.5 + self.linear(x).sum()
        return self.linear(x) + self.memory


class Hooked(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.linear.register_forward_hook(lambda module, args, output: self.kept.append(output))


class GetsAHookLater(Layer):
    pass


LAYERS = [ChangesItsInput, ReadsAttributes, Counts, Keeps, Remembers, Hooked, GetsAHookLater]


def layer_of(module: LightningModule) -> Layer:
    return getattr(module.layer, "_orig_mod", module.layer)


class Residual(LightningModule):
    """Uses the input of a layer again."""

    def __init__(self, layer: Layer, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layer = layer
        if how == "wrapped":
            self.layer = torch.compile(layer, backend="eager")
        if how == "in place":
            layer.compile(backend="eager")

    def predict_step(self, batch):
        x = self.first(batch[0])
        return x, self.layer(x)


MODES = ["PIECEWISE", "FULL_AND_PIECEWISE"]


class Changes(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 5:
            layer = layer_of(pl_module)
            layer.scale, layer.settings["scale"] = 3.0, 2.0
            if isinstance(layer, GetsAHookLater):
                layer.linear.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.in_turn("how")
@pytest.mark.parametrize(("how", "mode"), list(itertools.product(["wrapped", "in place"], MODES)))
@pytest.mark.parametrize("kind", LAYERS)
def test_what_nobody_can_watch_is_compared(harness, kind, how, mode):
    """Hazards 4, 6, 7 and 20, in code whose operations and reads cannot be observed."""
    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    seen = []
    for extra in ([callback], []):
        torch.manual_seed(3)
        torch.compiler.reset()
        module = Residual(kind(), how)
        kept = harness.trainer(*extra, Changes()).predict(module, features(32))
        layer = layer_of(module)
        seen.append((kept, layer.calls, list(layer.kept), layer.memory))
    assert_same(*seen)
    assert callback.stats.replays > 0


SCALES = {"global": 1.0, "in a dictionary": 1.0}
SCALE = 1.0


class Config:
    scale = 1.0


def scaled(x):
    return x * SCALE


def scaled_later(x):
    return x * 3.0


scales = scaled


class ReadsGlobal(Layer):
    def forward(self, x):
        return self.linear(x) * SCALE


class ReadsDictionary(Layer):
    def forward(self, x):
        return self.linear(x) * SCALES["in a dictionary"]


class ReadsClass(Layer):
    def forward(self, x):
        return self.linear(x) * Config.scale


class CallsHelper(Layer):
    def forward(self, x):
        return scaled(self.linear(x))


class CallsOther(Layer):
    def forward(self, x):
        return scales(self.linear(x))


class HasDefault(Layer):
    def forward(self, x, *, scale=[1.0]):  # noqa: B006
        return self.linear(x) * scale[0]


def set_default(value: float) -> None:
    HasDefault.forward.__kwdefaults__["scale"][0] = value


class ChangesScales(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 5:
            set_scales(3.0, scaled_later)


def set_scales(value: float, function: Any) -> None:
    global SCALE, scales
    SCALE = SCALES["in a dictionary"] = Config.scale = value
    set_default(value)
    scales = function


@pytest.fixture
def first_scales():
    set_scales(1.0, scaled)
    yield lambda: set_scales(1.0, scaled)
    set_scales(1.0, scaled)


@pytest.mark.in_turn("how")
@pytest.mark.parametrize(
    ("how", "mode"), list(itertools.product(["option", "wrapped", "in place"], MODES))
)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ReadsGlobal, "SCALE: now 3.0"),
        (ReadsDictionary, "SCALES['in a dictionary']: now 3.0"),
        (ReadsClass, "Config.scale: now 3.0"),
        (CallsHelper, "SCALE: now 3.0"),
        (CallsOther, "scales: now"),
        (HasDefault, "keyword defaults of forward['scale'][0]: now 3.0"),
    ],
)
def test_values_that_compiled_code_reads_are_guarded(harness, first_scales, kind, name, how, mode):
    """Hazard 7: compiled code is compiled again for another value, which a graph has frozen."""
    compiles = {"compile": {"backend": "eager"}} if how == "option" else {}
    callback = harness.callback(mode=mode, warmup_steps=1, **compiles)
    seen = []
    for extra in ([callback], []):
        torch.manual_seed(3)
        torch.compiler.reset()
        first_scales()
        module = Residual(kind(), how)
        seen.append(harness.trainer(*extra, ChangesScales()).predict(module, features(48)))
    assert_same(*seen)
    assert any(name in reason for reason in callback.stats.eager_reasons) or mode == "PIECEWISE"
    assert callback.stats.replays > 3, callback.summary()


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_a_class_constant_that_changes_after_the_warm_up(harness, first_scales, mode):
    """Dynamo does not guard it with torch 2.11, and runs the old code in eager steps as well."""
    callback = harness.callback(mode=mode, warmup_steps=3, compile={"backend": "eager"})
    seen = []
    for extra in ([callback], []):
        torch.manual_seed(3)
        torch.compiler.reset()
        first_scales()
        module = Residual(ReadsClass(), "option")
        seen.append(harness.trainer(*extra, ChangesScales()).predict(module, features(96)))
    assert_same(*seen)
    assert callback.stats.replays > 3, callback.summary()


@torch.no_grad()
def test_compiling_again_takes_the_values_of_now(first_scales):
    torch.compiler.reset()
    compiled = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    module, batch = Residual(ReadsClass(), "option"), [torch.ones(2, 8)]
    compilation = Compilation({"backend": compiler}, CUDAGraphStats())
    compilation.install(module)
    for number in (2, 4):  # the two layers
        for _ in range(3):
            module.predict_step(batch)
            assert len(compiled) == number
        compilation.compile_again()
    compilation.remove()
    module.predict_step(batch)
    assert len(compiled) == 4


class CountsGlobally(Layer):
    def forward(self, x):
        global SCALE
        SCALE += 1.0
        return self.linear(x) * SCALE


@pytest.mark.filterwarnings("ignore:(?s).*recompile_limit")
def test_a_network_to_compile_that_changes_a_global_runs_eagerly(harness, first_scales):
    callback = harness.callback(warmup_steps=1, compile={"backend": "eager"})
    seen = []
    for extra in ([callback], []):
        torch.manual_seed(3)
        torch.compiler.reset()
        first_scales()
        module = Residual(CountsGlobally(), "option")
        seen.append((harness.trainer(*extra).predict(module, features(32)), SCALE))
    assert_same(*seen)
    assert not callback.stats.steps["FULL"]
    assert any("global SCALE" in str(record.reason) for record in callback.stats.reasons)


SINK = io.StringIO()


class ReadsOpaque(Layer):
    def forward(self, x):
        return self.linear(x) if SINK is not None else x


@pytest.mark.parametrize("how", ["option", "wrapped", "in place"])
def test_compiled_code_that_reads_what_cannot_be_compared_runs_eagerly(harness, how):
    compiles = {"compile": {"backend": "eager"}} if how == "option" else {}
    callback = harness.callback(warmup_steps=1, **compiles)
    torch.compiler.reset()
    harness.trainer(callback).predict(Residual(ReadsOpaque(), how), features(32))
    assert not callback.stats.steps["FULL"]
    captured = [entry.target for entry in callback.stats.entries if entry.captures]
    assert captured == ["first"], callback.summary()
    assert any("SINK" in str(record.reason) for record in callback.stats.reasons)


def test_marks_of_the_compiler_on_outputs_are_none_of_ours(harness):
    class Marked(Layer):
        def forward(self, x):
            output = self.linear(x)
            torch._dynamo.maybe_mark_dynamic(output, 0)  # compiled code does it by itself
            return output

    callback = harness.callback(mode="PIECEWISE", warmup_steps=1)
    harness.compare(Residual(Marked(), "as it is"), predict(features(32)), callback)
    assert [entry.target for entry in callback.stats.entries] == ["first", "layer"]


class CompiledMethods(Predictor):
    """Compiles a callee, and optionally waits for the device."""

    def __init__(self, backend: Any, waits: bool) -> None:
        super().__init__(Body())
        self.waits = waits
        self.method = torch.compile(self.helper, backend=backend)

    def helper(self, x):
        return self.net(x).sin()

    def predict_step(self, batch):
        output = self.method(batch[0])
        return output * output.sum().item() if self.waits else output

    def validation_step(self, batch):
        self.log("mean", self.predict_step(batch).mean())

    def training_step(self, batch):
        return self.method(batch[0]).sum()


class CompiledNet(CompiledMethods):
    def __init__(self, backend: Any, waits: bool) -> None:
        super().__init__(backend, waits)
        net = self.net
        self.net = torch.compile(net, backend=backend)
        self.method = self.helper


class NetCompiledInPlace(CompiledMethods):
    def __init__(self, backend: Any, waits: bool) -> None:
        super().__init__(backend, waits)
        self.net.compile(backend=backend)
        self.method = self.helper


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("kind", [CompiledMethods, CompiledNet, NetCompiledInPlace])
def test_nothing_is_compiled_anew_in_each_epoch(harness, kind, waits):
    """Compiled code guards on the classes of its modules, which must stay the same."""

    def compiled(epochs: int, *callbacks: Callback) -> int:
        compilations = []

        def backend(graph: Any, inputs: Any) -> Any:
            compilations.append(graph)
            return graph

        torch.compiler.reset()
        module = kind(backend, waits)
        harness.trainer(*callbacks, max_epochs=epochs).fit(module, features(16), features(32))
        return len(compilations)

    def settings() -> CUDAGraphCallback:
        return harness.callback(warmup_steps=1)

    assert compiled(8, settings()) == compiled(2, settings()) <= compiled(2) + 2


class WithMetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.mean = Body(), MeanMetric()

    def forward(self, x):
        y = self.net(x)
        self.mean.update(y.mean())
        return y


class MetricInside(Predictor):
    """Compiles a method or a submodule that updates a metric."""

    def __init__(self, how: str) -> None:
        super().__init__(WithMetric())
        self.mean = self.net.mean
        self.run = self.net.forward
        if how == "method":
            self.run = torch.compile(self.run, backend="eager")
        elif how == "in place":
            self.net.compile(backend="eager")
            self.run = self.net
        else:
            self.run = self.net = torch.compile(self.net, backend="eager")

    def validation_step(self, batch, batch_idx):
        self.log("output", self.run(batch[0]).mean())

    def on_validation_epoch_end(self):
        self.log("mean", self.mean.compute())
        self.mean.reset()


@pytest.mark.filterwarnings("ignore:(?s).*Dynamo")  # about torchmetrics
@pytest.mark.parametrize(
    "how", ["method", "wrapped", pytest.param("in place", marks=pytest.mark.exhaustive)]
)
def test_metrics_that_compiled_code_updates(harness, how):
    """States may be in static tensors, where compiled code does not find them."""
    callback, seen = harness.callback(mode="FULL", warmup_steps=1), []
    for extra in ([callback], []):
        torch.manual_seed(3)
        torch.compiler.reset()
        trainer, module = harness.trainer(*extra), MetricInside(how)
        seen.append([trainer.validate(module, features(32), verbose=False) for _ in range(2)])
    assert_same(*seen)


@pytest.mark.parametrize("kind", [CompiledMethods, CompiledNet, NetCompiledInPlace])
def test_what_is_compiled_is_compiled_before_the_capture(harness, kind):
    """The compiler may wait for the device or compute a value, which a capture cannot do."""

    def backend(graph: Any, inputs: Any) -> Any:
        device = next(value.device for value in inputs if isinstance(value, torch.Tensor))
        constant = torch.tensor([1.0], device=device)  # no graph can contain this
        return lambda *args: tuple(constant * output for output in graph(*args))

    callback, seen = harness.callback(mode="FULL", warmup_steps=1), []
    for extra in ([callback], []):
        torch.manual_seed(3)
        torch.compiler.reset()
        seen.append(harness.trainer(*extra).predict(kind(backend, False), features(32)))
    assert_same(*seen)
    assert callback.stats.steps["FULL"] > 0, callback.summary()


def test_a_module_that_is_also_called_uncompiled(harness):
    class Both(Predictor):
        def __init__(self) -> None:
            super().__init__(Body())
            self.compiled = torch.compile(self.net, backend="eager")

        def predict_step(self, batch):
            return self.net(batch[0]) + self.compiled(batch[0])

    torch.compile(nn.Identity(), backend="eager")(torch.ones(1))  # changes nn.Module, once
    callback = harness.callback(warmup_steps=1)
    harness.compare(Both(), lambda trainer, module: trainer.predict(module, features(32)), callback)
    assert callback.stats.steps["FULL"] == 7


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback is inert")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_lightning_module_that_is_compiled_as_a_whole(harness, in_place):
    """Its steps are compiled code, which must not contain functions of ours."""
    callback, seen = harness.callback(), []
    for extra in ([callback], []):
        torch.manual_seed(3)
        torch.compiler.reset()
        module: Any = Predictor(Body())
        if in_place:
            module.compile(backend="eager")
        else:
            module = torch.compile(module, backend="eager")
        seen.append(harness.trainer(*extra).predict(module, features(32)))
    assert_same(*seen)
    (reason,) = callback.stats.eager_reasons
    assert "compile its submodules instead: self.net = torch.compile(self.net)" in reason
    assert callback.stats.eager == 8


class SeesCalls(ModuleHandler):
    def on_call(self, original, args, kwargs):
        return original(*args, **kwargs)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
)
def test_whether_the_compiler_graphs_a_module(in_place, mode):
    net: Any = Body()
    if in_place:
        net.compile(mode=mode)
    else:
        net = torch.compile(net, mode=mode)
    assert is_graphed_by_compiler(net) == (mode in ("reduce-overhead", "max-autotune"))
    if in_place:
        interception = Interception(net, SeesCalls())
        assert modules_with_a_trace() == ["Sequential"]
        assert is_graphed_by_compiler(net) == (mode in ("reduce-overhead", "max-autotune"))
        interception.remove()
    assert is_graphed_by_compiler(copy.deepcopy(net)) == (
        is_graphed_by_compiler(net) and not in_place
    )


def test_a_module_compiled_in_place_has_no_trace_of_us(harness):
    class Looks(Callback):
        def on_predict_batch_end(self, trainer, pl_module, *_: Any) -> None:
            self.copied = copy.deepcopy(pl_module.net)

    net = Body()
    net.compile(backend="eager")
    compiled, looks = net._compiled_call_impl, Looks()
    harness.trainer(harness.callback(mode="PIECEWISE"), looks).predict(Predictor(net), features(32))
    assert net._compiled_call_impl is compiled
    assert looks.copied._compiled_call_impl is None


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "ignore:(?s).*TensorFloat32 tensor cores"
)  # PyTorch warns when it compiles
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
@pytest.mark.parametrize("kind", [CompiledNet, NetCompiledInPlace])
def test_inductor(tmp_path, kind, mode):
    """Every batch, watched or not, equals that of the compiled module without graphs."""
    harness = Harness("cuda", tmp_path)
    callback, seen = harness.callback(mode=mode, warmup_steps=1), []
    for extra in ([callback], []):
        torch.manual_seed(3)
        module = kind("inductor", False)
        kept = harness.trainer(*extra).predict(module, features(34))
        seen.append((kept, harness.trainer(*extra).validate(module, features(34), verbose=False)))
    assert_same(*seen)
    assert callback.stats.replays > 8, callback.summary()


def test_layers_have_no_more_attributes_of_users_once_dynamo_has_run():
    """Dynamo replaces ``nn.Module.__init__``, so names in it are unknown from then on."""
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    # no other test has one, so its names were not looked up before
    assert not attributes.has_attributes_of_users(nn.Bilinear(2, 2, 2))


TOTAL = 0
SEEN: list[int] = []
TICKS = [itertools.count()]


class CountsInClass(nn.Module):
    calls = 0


class CountsOutside(Layer):
    """Counts its calls in a global, a list, a class and an iterator."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x):
        global TOTAL
        if self.where == "global":
            TOTAL += 1
        if self.where == "list":
            SEEN.append(1)
        if self.where == "class":
            CountsInClass.calls += 1
        y = self.linear(x)
        if self.where == "iterator":
            torch._dynamo.graph_break()
            y = y * float(next(TICKS[0]))
        return y


class Reports(Predictor):
    """Returns what was counted so far."""

    def predict_step(self, batch: Any) -> Any:
        return self.net(batch[0]), TOTAL, len(SEEN), CountsInClass.calls


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("where", ["global", "list", "class", "iterator"])
def test_what_compiled_code_counts_outside_of_modules(harness: Harness, where: str, mode: str):
    """It is run once more, as it is written, to see what it reads."""
    global TOTAL
    results = []
    net = CountsOutside(where)
    for extra in ([harness.callback(mode=mode)], []):
        TOTAL, CountsInClass.calls, TICKS[0] = 0, 0, itertools.count()
        SEEN.clear()
        torch.compiler.reset()
        model = Reports(copy.deepcopy(net))
        model.net.compile(backend="eager")
        results.append(predict(features(32))(harness.trainer(*extra), model))
    assert_same(*results)
