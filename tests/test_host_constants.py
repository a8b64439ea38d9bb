"""Tensors that a step makes of Python values: made before the capture, and cloned in the graph."""

from __future__ import annotations

import collections
import copy
import functools
import importlib
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn, tensor

from cg_lightning import graphed
from cg_lightning.backends.host_indices import answered_indices
from cg_lightning.backends.tensor_makers import MakerCall, answered_makers
from cg_lightning.capture.host_constants import HostConstants
from cg_lightning.core.causes import Cause
from cg_lightning.core.errors import CaptureError
from tests.harness import assert_same, features, predict
from tests.models import Body, Predictor

Use = Callable[[Any, Tensor], Any]
SETTINGS = [
    {"verify_replays": 0},
    {"verify_replays": 2},
    pytest.param({"mode": "FULL"}, marks=pytest.mark.exhaustive),
    {"mode": "PIECEWISE"},
]
WEIGHTS = [1.0, 2.0]


def by_default(x: Tensor, weights: list[float] = [3.0, 4.0]) -> Tensor:  # noqa: B006
    return x * torch.tensor(weights, device=x.device)


class Uses(Predictor):
    """Returns what ``use`` makes of its output."""

    def __init__(self, use: Use) -> None:
        super().__init__(nn.Linear(8, 2))
        self.use = use
        self.weights = [1.0, 2.0]
        self.tables = {"a": {"b": collections.deque([1.0, 2.0])}}
        self.array = np.array([1.0, 2.0])
        self.columns = [1, 0]
        self.many = [float(number) for number in range(1000)]
        self.tensor = torch.tensor([1.0, 2.0])
        self.count = 0
        self.numbers = iter(range(100))

    def predict_step(self, batch: Any) -> Any:
        return self.use(self, self.net(batch[0]))


class Changes(Callback):
    """Changes something in Python before each batch from the eighth on."""

    def __init__(self, change: Callable[[Any, int], Any]) -> None:
        self.change = change
        self.batches = 0

    def on_predict_batch_start(self, trainer, pl_module, *_: Any) -> None:
        self.batches += 1
        if self.batches > 7:
            self.change(pl_module, self.batches)


def run(harness, use: Use, change: Callable[[Any, int], Any], *callbacks: Any) -> Any:
    WEIGHTS[:] = [1.0, 2.0]
    by_default.__defaults__[0][:] = [3.0, 4.0]
    torch.manual_seed(1)
    random.seed(1)
    trainer = harness.trainer(*callbacks, Changes(change))
    return trainer.predict(Uses(use), features(48))


def compare(harness, use: Use, change: Any = lambda *_: None, **settings: Any) -> Any:
    callback = harness.callback(**settings)
    assert_same(run(harness, use, change, callback), run(harness, use, change))
    return callback


def set_rows(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def add(module: Any) -> int:
    module.count += 1
    return module.count


CONSTANTS: dict[str, Use] = {
    "tensor": lambda m, x: x * torch.tensor([1.0, 2.0], device=x.device),
    "imported by name": lambda m, x: x * tensor([1.0, 2.0], device=x.device),
    "number": lambda m, x: x * torch.tensor(3.0, device=x.device),
    "as_tensor": lambda m, x: x * torch.as_tensor([1.0, 2.0], dtype=torch.float64, device=x.device),
    "asarray": lambda m, x: x * torch.asarray((1.0, 2.0), device=x.device),
    "new_tensor": lambda m, x: x * x.new_tensor([1, 2]),
    "array": lambda m, x: x * torch.tensor(np.array([1.0, 2.0]), device=x.device),
    "no elements": lambda m, x: torch.cat([torch.tensor([], device=x.device), x.flatten()]),
    "shape": lambda m, x: x.sum() * torch.tensor(x.shape, device=x.device),
    "index": lambda m, x: x[torch.tensor([0, 1, 0], device=x.device)],
    "booleans": lambda m, x: torch.where(torch.tensor([True, False], device=x.device), x, 7.0),
    "written in place": lambda m, x: torch.tensor([1.0, 2.0], device=x.device).add_(x.sum()),
    "a number of the host": lambda m, x: (x * torch.tensor(3.0), torch.tensor(0.5)),
    "a total": lambda m, x: torch.tensor(0.0, device=x.device).add_(x.sum()),
    "returned": lambda m, x: {"x": x, "weights": torch.tensor(m.weights, device=x.device)},
    "on the host": lambda m, x: x * torch.tensor([1.0, 2.0]).to(x.device),
    "an index on the host": lambda m, x: x[torch.tensor([1, 0])],
    "a list": lambda m, x: x[[1, 0]],
    "a list of booleans": lambda m, x: x[:, [True, False]],
    "two lists": lambda m, x: x[[0, 1, 2], [1, 0, 1]],
    "no index": lambda m, x: x[[]],
    "a range": lambda m, x: x[range(2)],
    "an array of indices": lambda m, x: x[..., np.array([1, 0])],
    "a mask of the host": lambda m, x: x[:, np.array([True, False])],
    "a tuple in a tuple": lambda m, x: x[:, (1, 0, 0)],
    "an axis and a list": lambda m, x: x[None, :, [1]],
    "an attribute": lambda m, x: x[:, m.columns],
    "set": lambda m, x: set_rows(x, [0, 2], 7.0),
    "set to a tensor": lambda m, x: set_rows(x, [1, 0], x[[0, 1]]),
    "set by booleans": lambda m, x: set_rows(x, (slice(None), [False, True]), 1.5),
    "a list in a loop": lambda m, x: [x[[i]] for i in range(3)],
    "two": lambda m, x: by_default(x) + torch.tensor([[1, 2], [3, 4]], device=x.device).sum(),
}
CHANGES: dict[str, tuple[Use, Callable[[Any, int], Any]]] = {
    "an attribute in place": (
        lambda m, x: x * torch.tensor(m.weights, device=x.device),
        lambda m, n: m.weights.__setitem__(0, float(n % 3)),
    ),
    "another list": (
        lambda m, x: x * x.new_tensor(m.weights),
        lambda m, n: setattr(m, "weights", [float(n % 2), 1.0]),
    ),
    "another length": (
        lambda m, x: x.sum() * torch.tensor(m.weights, device=x.device),
        lambda m, n: m.weights.append(float(n)),
    ),
    "the sign of zero": (
        lambda m, x: x / torch.tensor([0.0 * m.weights[0], 1.0], device=x.device),
        lambda m, n: m.weights.__setitem__(0, -1.0 if n % 2 else 1.0),
    ),
    "nested": (
        lambda m, x: x * torch.tensor(list(m.tables["a"]["b"]), device=x.device),
        lambda m, n: m.tables["a"]["b"].__setitem__(1, float(n)),
    ),
    "an array": (
        lambda m, x: x * torch.tensor(m.array, device=x.device),
        lambda m, n: m.array.__setitem__(0, n),
    ),
    "an element of an array": (
        lambda m, x: x * torch.tensor([m.array[0]], device=x.device),
        lambda m, n: m.array.__setitem__(0, n),
    ),
    "shared memory": (
        lambda m, x: x * torch.as_tensor(m.array, device=x.device),
        lambda m, n: m.array.__setitem__(0, n),
    ),
    "a global": (
        lambda m, x: x * torch.tensor(WEIGHTS, device=x.device),
        lambda m, n: WEIGHTS.__setitem__(0, float(n)),
    ),
    "a default": (
        lambda m, x: by_default(x),
        lambda m, n: by_default.__defaults__[0].__setitem__(0, float(n)),
    ),
    "one of many": (
        lambda m, x: x.sum() * torch.tensor(m.many, device=x.device),
        lambda m, n: m.many.__setitem__(567, float(n)),
    ),
    "a list of indices": (
        lambda m, x: x[:, m.columns],
        lambda m, n: m.columns.__setitem__(0, n % 2),
    ),
    "another list of indices": (
        lambda m, x: x[m.columns],
        lambda m, n: setattr(m, "columns", [n % 2] * (1 + n % 3)),
    ),
    "many indices": (
        lambda m, x: x[:, [int(m.many[567]) % 2] * 300],
        lambda m, n: m.many.__setitem__(567, float(n)),
    ),
    "indices of the network": (
        lambda m, x: x[[int(x[0].argmax()), 0]],
        lambda m, n: None,
    ),
    "tensors as indices": (
        lambda m, x: x[:, [x[0].argmax(), x[1].argmax()]],
        lambda m, n: None,
    ),
    "a tensor in a list of indices": (
        lambda m, x: x[:, [0, x[1].argmax()]],
        lambda m, n: None,
    ),
    "random indices": (lambda m, x: x[[random.randrange(2)]], lambda m, n: None),
    "a counter as index": (lambda m, x: x[[add(m) % 2]], lambda m, n: None),
    "a list that the step changes": (
        lambda m, x: x[[m.columns.pop(0) if len(m.columns) > 1 else 0]],
        lambda m, n: m.columns.extend([1, 0, 1]),
    ),
    "a tensor on the host": (
        lambda m, x: x * torch.tensor([float(m.tensor[0]), 1.0], device=x.device),
        lambda m, n: m.tensor.data.__setitem__(0, float(n)),
    ),
    "a tensor in a list": (
        lambda m, x: x * torch.tensor([m.tensor[0], 1.0], device=x.device),
        lambda m, n: m.tensor.data.__setitem__(0, float(n)),
    ),
    "a counter": (lambda m, x: x * torch.tensor([add(m)], device=x.device), lambda m, n: None),
    "an iterator": (
        lambda m, x: x * torch.tensor([next(m.numbers)], device=x.device),
        lambda m, n: None,
    ),
    "random numbers": (
        lambda m, x: x * torch.tensor([random.random()], device=x.device),
        lambda m, n: None,
    ),
    "numbers of the network": (
        lambda m, x: x * torch.tensor(x[0].tolist(), device=x.device),
        lambda m, n: None,
    ),
    "tensors of the network": (
        lambda m, x: x * torch.tensor([x.sum(), 1.0], device=x.device),
        lambda m, n: None,
    ),
}


@pytest.mark.parametrize("name", list(CONSTANTS))
def test_constants_are_part_of_the_graph(harness, name):
    """Hazard 12."""
    callback = compare(harness, CONSTANTS[name], verify_replays=0)
    assert callback.stats.steps["FULL"] == 9, callback.summary()


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "name",
    [
        *("returned", "written in place", "two", "on the host", "a list", "two lists", "set"),
        *("a list of booleans", "an array of indices", "an index on the host"),
    ],
)
def test_constants_in_each_mode(harness, name, settings):
    compare(harness, CONSTANTS[name], **settings)


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS[:2])
@pytest.mark.parametrize("name", list(CHANGES))
def test_values_that_change_are_never_frozen(harness, name, settings):
    """Hazard 7."""
    compare(harness, *CHANGES[name], **settings)


@pytest.mark.parametrize("name", ["tensors of the network", "a tensor in a list", "one of many"])
def test_what_is_no_constant_is_named(harness, name):
    callback = compare(harness, *CHANGES[name])
    kinds = {record.reason.kind for record in callback.stats.reasons}
    assert callback.stats.steps["FULL"] == 0
    assert kinds & {Cause.TENSOR_FROM_PYTHON, Cause.HOST_SYNC}, callback.summary()


def test_a_logged_number(harness):
    class Logs(Predictor):
        def validation_step(self, batch):
            self.log_dict({"rate": 0.1, "mean": self.net(batch[0]).mean()})

    seen = []
    callback = harness.callback(verify_replays=0)
    torch.manual_seed(2)
    module = Logs(Body())
    for one, extra in ((copy.deepcopy(module), [callback]), (module, [])):
        trainer = harness.trainer(*extra)
        seen.append([trainer.validate(one, features(40), verbose=False) for _ in range(2)])
    assert_same(*seen)
    assert callback.stats.steps["FULL"] > 0, callback.summary()


def test_constants_of_a_submodule(harness):
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 2)

        def forward(self, x):
            return self.linear(x) * torch.tensor([2.0, 3.0], device=x.device)

    class Steps(Predictor):
        def predict_step(self, batch):
            out = self.net(batch[0])
            return out * float(out.sum())  # the step is no graph

    callback = harness.callback(verify_replays=0)
    harness.compare(Steps(Scales()), lambda t, m: t.predict(m, features(40)), callback)
    assert {entry.target for entry in callback.stats.entries} == {"net"}, callback.summary()


def test_a_module_that_the_step_imports(harness, tmp_path, monkeypatch):
    """It keeps no function of ours, and its constants are part of the graph."""
    code = """
from torch import as_tensor, tensor

def scale(x):
    return x * tensor(2.0, device=x.device)
"""
    (tmp_path / "imported_by_a_step.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    def use(module: Any, x: Tensor) -> Tensor:
        return importlib.import_module("imported_by_a_step").scale(x)

    callback = harness.callback()
    try:
        harness.compare(Uses(use), predict(features(40)), callback)
        imported = sys.modules["imported_by_a_step"]
        assert (imported.tensor, imported.as_tensor) == (torch.tensor, torch.as_tensor)
    finally:
        sys.modules.pop("imported_by_a_step", None)
    assert callback.stats.steps["FULL"] == 7, callback.summary()


def test_without_a_trainer(backend, device):
    net = nn.Linear(8, 2).to(device).requires_grad_(False)

    def forward(x):
        return net(x) * torch.tensor([2.0, 3.0], device=x.device)

    batches = [torch.randn(4, 8, device=device) for _ in range(8)]
    with torch.no_grad():
        expected = [forward(x) for x in batches]
        with graphed(forward, module=net, backend=backend) as fast:
            found = [fast(x) for x in batches]
        assert_same(found, expected)
        assert fast.stats.steps["FULL"] > 0, fast.stats.reasons


def test_a_capture_that_asks_for_other_constants(device):
    """The second capture of a call must ask for what the first one did."""
    values = iter([[1.0], [1.0], [-0.0], [2.0, 3.0]])
    constants = HostConstants(device)

    def ask(times: int = 1) -> list[Tensor]:
        with constants.answered() as asked_for:
            for _ in range(times):
                torch.tensor(next(values), device=device)
        return asked_for

    first = ask()
    assert not constants.are_made(first)
    constants.make(first)
    assert constants.are_made(ask())
    for times in (1, 1, 0):
        with pytest.raises(CaptureError, match="other tensors of Python values"):
            ask(times)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_attention_keeps_its_fast_path_beside_a_list(backend, device, context):
    """A ``TorchFunctionMode`` would take it away, and with it the bits."""
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().to(device)
    reference = copy.deepcopy(net)

    def forward(x: Tensor, used: nn.Module = net) -> Any:
        rows = x[:, [2, 0, 1]]
        y = used(rows)
        return (
            y[[0, -1]],
            used.layers[0].self_attn(y, y, y, need_weights=False)[0],
            y.split([1, 2], 1),
        )

    batches = [torch.randn(4, 3, 8, device=device) for _ in range(8)]
    for settings in SETTINGS[:2]:
        with context(), graphed(forward, module=net, backend=backend, **settings) as fast:
            found = [fast(x) for x in batches]
        with context():
            assert_same(found, [forward(x, reference) for x in batches])
        assert fast.stats.steps["FULL"] > 0, fast.summary()


def test_other_threads_see_no_mode(device):
    seen: list[Any] = []

    def ask() -> None:
        seen.append(torch.overrides.has_torch_function((torch.ones(2),)))
        seen.append(torch.ones(3)[[0, 1]].shape)

    with answered_indices(device, lambda value: value.to(device)):
        assert not torch.overrides.has_torch_function((torch.ones(2),))
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        with torch.device("cpu"):  # a mode of the user's
            assert torch.overrides.has_torch_function((torch.ones(2),))
    assert seen == [False, (2,)]


def test_other_threads_and_other_devices_are_left_alone(device):
    calls: list[MakerCall] = []

    def answer(call: MakerCall) -> Tensor:
        calls.append(call)
        return call.run()

    originals = torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor
    with answered_makers(answer):
        thread = threading.Thread(target=functools.partial(torch.tensor, [1.0]))
        thread.start()
        thread.join()
        assert not calls
        torch.tensor([1.0], device="meta")
        assert not calls[0].is_constant_on(device)
        torch.ones(2, device=device).new_tensor([1])
        assert calls[1].is_constant_on(device)
        assert calls[1].on_host().dtype is torch.float32
    assert (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor) == originals


OF_THE_BATCH: dict[str, Callable[[Tensor, Any], Any]] = {
    "a number": lambda x, b: x[[b["n"], 0]],
    "after a list": lambda x, b: x[[0, 1]][:, [b["n"] % 2]],
    "a number in a tensor": lambda x, b: x * torch.tensor([b["n"]]).to(x.device),
    "a list": lambda x, b: x[b["l"]],
    "a tuple": lambda x, b: x[:, tuple(b["l"])],
    "passed on": lambda x, b: (x[[0, 2]], b["n"], b["l"]),
    "used and passed on": lambda x, b: (x[b["l"]], b["l"]),
    "a tensor of a list": lambda x, b: x[torch.tensor(b["l"])],
    "made of a number": lambda x, b: x[[i for i in range(3) if i != b["n"]]],
}


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS[:2])
@pytest.mark.parametrize("name", list(OF_THE_BATCH))
def test_values_of_the_batch_in_an_index(backend, device, name, settings):
    torch.manual_seed(0)
    net = nn.Linear(4, 4).eval().to(device)
    reference = copy.deepcopy(net)
    batches = [
        {
            "x": torch.randn(3, 4, device=device),
            "n": index % 3 if index > 4 else 1,
            "l": [index % 3 if index > 6 else 0, 1],
        }
        for index in range(30)
    ]

    def forward(batch: Any) -> Any:
        return OF_THE_BATCH[name](net(batch["x"]), batch)

    with torch.inference_mode(), graphed(forward, module=net, backend=backend, **settings) as fast:
        found = [fast(batch) for batch in batches]
        expected = [OF_THE_BATCH[name](reference(batch["x"]), batch) for batch in batches]
    assert_same(found, expected)
    assert fast.stats.steps["FULL"] > 0, fast.summary()
