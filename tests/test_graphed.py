"""Graphs without a Trainer: plain loops and Lightning Fabric."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import cg_lightning
from cg_lightning import CUDAGraphOptions
from cg_lightning.core.reasons import Status
from tests.harness import assert_same
from tests.models import Body

# graphs of small models do not always pay, and no test depends on times
graphed = functools.partial(cg_lightning.graphed, min_saving=0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.accuracy = MulticlassAccuracy(8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        return {"logits": self.body(x) * scale, "scale": scale}

    def evaluate(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.body(x)
        self.accuracy.update(logits, labels)
        return logits


def inputs(device: torch.device, number: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator).to(device) for _ in range(number)]


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
def test_a_module(backend, device, mode):
    net = Net().to(device).eval()
    reference = copy.deepcopy(net)
    attributes = sorted(vars(net))
    with torch.inference_mode(), graphed(net, mode=mode, backend=backend) as run:
        kept = [run(x, scale=2.0) for x in inputs(device)]
        assert_same(kept, [reference(x, scale=2.0) for x in inputs(device)])
        assert type(net.body) is nn.Sequential
    ran = "PIECEWISE" if mode == "PIECEWISE" else "FULL"
    assert run.stats.steps[ran] == 5, run.summary()
    assert sorted(vars(net)) == attributes
    assert "call: 5 steps" in run.summary()


def test_a_method_with_metrics(backend, device):
    net = Net().to(device).eval()
    reference = copy.deepcopy(net)
    labels = torch.arange(4, device=device)
    run = graphed(net.evaluate, backend=backend)
    with torch.inference_mode():
        for x in inputs(device):
            assert_same(run(x, labels), reference.evaluate(x, labels))
        assert_same(net.accuracy.compute(), reference.accuracy.compute())
        run.close()
        assert_same(net.accuracy.compute(), reference.accuracy.compute())
        assert net.accuracy.update_count == 8
        assert run.stats.steps["FULL"] == 5
        for x in inputs(device):  # it starts again
            assert_same(run(x, labels), reference.evaluate(x, labels))
    run.close()
    assert run.stats.steps["FULL"] == 10


def test_a_metric_that_a_container_calls(backend, device):
    model = nn.Sequential(nn.Linear(4, 4), MeanMetric()).to(device)
    reference = copy.deepcopy(model)
    batches = [torch.randn(2, 4, device=device) for _ in range(8)]
    with torch.inference_mode(), graphed(model, backend=backend, warmup_steps=1) as step:
        assert_same([step(x) for x in batches], [reference(x) for x in batches])
        assert_same(model[1].compute(), reference[1].compute())
    assert step.stats.replays > 3


def test_a_function_with_its_module(backend, device):
    net = Body().to(device)

    def double(x: Tensor) -> Tensor:
        return net(x) * 2

    with torch.no_grad(), graphed(double, module=net, backend=backend, warmup_steps=1) as run:
        assert_same([run(x) for x in inputs(device)], [double(x) for x in inputs(device)])
        with torch.no_grad():
            net[0].weight.data = net[0].weight.data * 3
        assert_same([run(x) for x in inputs(device)], [double(x) for x in inputs(device)])
    assert run.stats.captures == 2
    assert run.stats.steps["FULL"] == 15


def test_fabric(backend, device):
    fabric = Fabric(accelerator="cuda" if backend == "cuda" else "cpu", devices=1)
    net = Body()
    reference = copy.deepcopy(net).to(device)
    model = fabric.setup(net)
    with torch.inference_mode(), graphed(model, backend=backend) as run:
        assert_same([run(x) for x in inputs(device)], [reference(x) for x in inputs(device)])
    assert run.stats.steps["FULL"] == 5, run.summary()


def test_under_gradients_it_is_eager_with_that_reason(backend, device):
    net = Body().to(device)
    with graphed(net, backend=backend) as run:
        run(torch.ones(4, 8, device=device)).sum().backward()
    assert net[0].weight.grad is not None
    (record,) = run.stats.reasons
    assert record.reason.kind is Status.GRADIENTS


def test_an_exception_comes_through_and_leaves_nothing(backend, device):
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.runs = nn.Linear(8, 8), 0

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 3:
                raise KeyError("mine")
            return self.linear(x)

    net = Fails().to(device)

    def loop() -> None:
        with torch.no_grad(), run:
            for x in [*inputs(device), torch.ones(3, 8, device=device)]:
                run(x)

    run = graphed(net, backend=backend, mode="PIECEWISE")
    with pytest.raises(KeyError, match="mine"):
        loop()
    assert run.stats.steps["PIECEWISE"] == 5


def test_without_cuda_it_is_eager_and_says_so_once():
    net = Body()
    run = graphed(net)
    with torch.no_grad(), pytest.warns(UserWarning, match="backend='recorder'") as caught:
        outputs = [run(x) for x in inputs(torch.device("cpu"))]
    assert len(caught) == 1
    with torch.no_grad():
        assert_same(outputs, [net(x) for x in inputs(torch.device("cpu"))])
    assert run.stats.steps["NONE"] == 8
    (record,) = run.stats.reasons
    assert record.reason.kind is Status.INERT


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((lambda x: x,), ["module=...", "no method of a module"]),
        ((torch.relu,), ["module=..."]),
    ],
)
def test_functions_without_a_module(arguments, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        graphed(*arguments)
    for part in parts:
        assert part in str(caught.value)


def test_options_are_those_of_the_callback():
    parameters = inspect.signature(cg_lightning.graphed).parameters
    of_callback = inspect.signature(cg_lightning.CUDAGraphCallback).parameters
    options = list(parameters)[2:]  # after the function and its module
    assert options == [name for name in of_callback if name in options]
    for name in options:
        for field in ("kind", "default", "annotation"):
            assert getattr(parameters[name], field) == getattr(of_callback[name], field), name
    with pytest.raises(TypeError, match="unexpected keyword argument 'stages'"):
        graphed(Body(), stages=["test"])
    with pytest.raises(ValueError, match="max_graphs=0"):
        graphed(Body(), max_graphs=0)
    with pytest.raises(ValueError, match="matches no submodule"), torch.no_grad():
        graphed(Body(), targets=["nothing"], backend="recorder")(torch.ones(1, 8))
    graphed(Body(), options=CUDAGraphOptions(capture_error_mode="relaxed"))


def test_the_examples_of_the_page_run(capsys):
    page = Path(__file__).parent.parent / "docs" / "without-a-trainer.md"
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 3
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert printed.count("call: ") == 2
    assert "{'NONE': 3, 'PIECEWISE': 0, 'FULL': 7}" in printed
