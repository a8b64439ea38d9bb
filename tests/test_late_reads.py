"""Values that a step reads from a tensor and only passes on: each replay reads its own."""

from __future__ import annotations

import collections
import copy
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cg_lightning import diagnose
from cg_lightning.core.causes import Cause
from cg_lightning.core.errors import CaptureError
from cg_lightning.diagnosis.uses_of_read import ReadUse
from cg_lightning.effects.late_reads import LateRead
from tests.harness import Harness, loader, predict, validate
from tests.models import Body

Step = Callable[..., Any]
SETTINGS = [("FULL", 2), ("FULL_AND_PIECEWISE", 0), ("PIECEWISE", 0)]


class Meter:
    """The object that much public code has."""

    def __init__(self) -> None:
        self.val, self.sum, self.count = 0.0, 0.0, 0

    def update(self, val: Any, n: int = 1) -> None:
        self.val = val
        self.sum += val * n
        self.count += n


class Watchful(Meter):
    def update(self, val: Any, n: int = 1) -> None:
        super().update(val if type(val) is float else 0.0, n)


class Listed(list):
    """May do anything when something is appended."""


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Body()
        self.losses: Any = []
        self.arrays: list[Any] = []
        self.queue: Any = collections.deque(maxlen=7)
        self.by_name: Any = {"a": [], "sums": {"loss": 0.0}}
        self.total: Any = 0
        self.last: Any = None
        self.listed = Listed()
        self.meter, self.watchful = Meter(), Watchful()
        self.tensor = torch.zeros(())
        self.seen: list[Any] = []

    def on_validation_epoch_end(self) -> None:
        self.seen.append(repr((self.losses, self.queue, self.by_name, self.total, self.last)))
        self.seen.append(repr((vars(self.meter), vars(self.watchful))))
        self.losses.clear()


def net(step: Step, base: type[Net] = Net) -> Net:
    """Return a module with a step, which is validated and predicted."""
    kind = type("Kind", (base,), {"validation_step": step, "predict_step": step})
    return kind()


def appends(self, batch, batch_idx):
    (x,) = batch
    loss = self.net(x).square().mean()
    self.losses.append(loss.item())
    self.queue.append({"loss": loss.item(), "rows": [len(x), x.sum().item()]})
    self.by_name["a"].append(loss.item())


def sets(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    self.last = y.mean().item()
    self.by_name["last"] = y.max().item()
    return y


def adds(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x).mean()
    self.total += y.item()
    self.by_name["sums"]["loss"] += y.item()


def to_meters(self, batch, batch_idx):
    (x,) = batch
    loss = self.net(x).square().mean()
    self.meter.update(loss.item(), len(x))
    self.meter.update(val=loss.sqrt().item())


def arrays(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    self.arrays.append(y.detach().cpu().numpy())
    self.arrays.append({"rows": y.argmax(1).cpu().numpy(), "x": x.cpu().numpy()})
    y.mul_(2)
    return y.mean(), y.cpu().numpy()


def lists(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    self.losses.append(y.tolist())
    self.losses.extend(y.argmax(1).cpu().tolist())
    self.losses += y.max(1).values.tolist()
    rows = y.sum(1).tolist()
    return {"rows": rows, "y": y}


def returns(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    return {"y": y, "mean": y.mean().item(), "both": (y.sum().item(), y.argmax().item())}


def returns_one(self, batch, batch_idx):
    (x,) = batch
    return self.net(x).mean().item()


def returns_bool(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    return y, (y.mean() > 0).item(), y.double().sum().item(), y.argmin().int().item()


def logs(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    self.log("mean", y.mean().item(), on_step=True, on_epoch=True, prog_bar=True)
    self.log("row", value=y.sum(1).argmax().item())
    self.log("is_positive", (y.mean() > 0).item())
    self.log("double", y.double().square().sum().item(), reduce_fx="max")
    self.log("half", y.bfloat16().sum().item())


def logs_dict(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    self.log_dict({"mean": y.mean().item(), "most": y.max().item(), "tensor": y.min()})


def names(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    mean = y.mean().item()
    most: float = y.max().item()
    values = {"mean": mean, "most": most}
    self.log("mean", mean)
    self.log_dict(values)
    self.losses.append(values)
    self.total += mean
    self.last = first = mean
    return {"first": first, "pair": [mean, most]}


def branches(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    value = 0.0
    if len(x) == 4:
        value = y.mean().item()
    self.log("value", value)


def loops(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    for row in y:
        self.losses.append(row.mean().item())
        self.log("row", row.sum().item())


def changed_later(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x).mean()
    self.log("y", y.item())
    self.losses.append(y.item())
    y.mul_(2)
    self.log("doubled", y.item())


def by_the_host(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    copy = y.mean().detach().cpu()
    self.losses.append(y.max().detach().cpu().item())
    self.log("mean", copy.item())


def not_numbers(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    self.log("nan", (y.mean() * float("nan")).item())
    self.log("infinite", y.abs().sum().div(0).item())
    self.losses.append((y.sum() * 0).neg().item())
    self.losses.append(y.log().sum().item())


def of_the_batch(self, batch, batch_idx):
    """Another number in each batch, and no key has it."""
    (x,) = batch
    self.log("batch", x.sum().item())
    self.log("rows", (x > 0).sum().item())
    return self.net(x)


def beside_a_host_value(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    self.losses.append(y.mean().item())
    y = y * 2 if (x[0, 0] > 0).item() else y
    self.log("mean", y.mean().item())
    return y


def nothing_yet(self, batch, batch_idx):
    """The watched step adds zero to all sums, nothing to the list, and sets what is there."""
    (x,) = batch
    high = self.net(x) > 1.8
    self.total += high.sum().item()
    self.by_name["sums"]["loss"] += high.any().item()
    self.losses.extend(high.nonzero_static(size=0).tolist())
    self.last = high.all().item()


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.norms: list[float] = []

    def forward(self, x):
        y = self.body(x)
        self.norms.append(y.norm().item())
        return y


FULL = [
    *(appends, sets, adds, to_meters, arrays, lists, returns, returns_one, returns_bool, logs),
    *(logs_dict, names, branches, loops, changed_later, by_the_host, not_numbers, of_the_batch),
    *(beside_a_host_value, nothing_yet),
]


def data() -> Any:
    return loader(torch.randn(64, 8, generator=torch.Generator().manual_seed(3)))


def state(model: Net) -> Any:
    """Return what the steps have left; NaN equals NaN, and 0.0 is not -0.0."""
    return (
        model.seen,
        model.arrays,
        repr((model.losses, model.queue, model.by_name, model.total, model.last)),
    )


def job(trainer, model):
    results = [trainer.validate(model, data(), verbose=False) for _ in range(2)]
    return repr(results), state(model)


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("step", FULL)
def test_numbers_that_are_passed_on(harness: Harness, step: Step, settings: Any):
    mode, verify = settings
    callback = harness.callback(mode=mode, verify_replays=verify)
    harness.compare(net(step), job, callback)
    if mode != "PIECEWISE":
        assert callback.stats.steps["FULL"] >= 12, callback.summary()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(harness: Harness, precision: Any):
    for step in (logs, returns, by_the_host):
        callback = harness.compare(net(step), job, precision=precision)
        assert callback.stats.steps["FULL"] >= 12, callback.summary()


def test_predictions(harness: Harness):
    callback = harness.compare(net(returns), predict(data()))
    assert callback.stats.steps["FULL"] >= 10, callback.summary()


def of_the_first_row(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x)
    return {"y": y, "first": y[0].sum().item()}


@pytest.mark.parametrize(("step", "is_padded"), [(of_the_first_row, True), (returns_one, False)])
def test_padded_batches(harness: Harness, step: Step, is_padded: bool):
    """The padding is in the number of all rows, so such a step is not padded."""
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn([8, 5, 7][i % 3], 8, generator=generator) for i in range(60)]
    callback = harness.callback(capture_sizes=[8], verify_tolerance="close")
    model = net(step)
    reference = copy.deepcopy(model)
    found = harness.trainer(callback).predict(model, DataLoader([(x,) for x in given], None))
    expected = harness.trainer().predict(reference, DataLoader([(x,) for x in given], None))
    for one, other in zip(found, expected, strict=True):
        numbers = (one, other) if not is_padded else (one["first"], other["first"])
        assert [type(each) for each in numbers] == [float, float]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5)
    assert (len({entry.shapes for entry in callback.stats.entries}) == 1) is is_padded


def test_a_submodule_that_keeps_a_number(harness: Harness):
    """A graph of the whole step holds it, and none of the submodule."""
    model = net(lambda self, batch, batch_idx: self.net(batch[0]))
    model.net = Inside()
    run = lambda trainer, module: (job(trainer, module), list(module.net.norms))
    for mode in ("FULL", "PIECEWISE"):
        callback = harness.callback(mode=mode)
        harness.compare(model, run, callback)
        targets = {entry.target for entry in callback.stats.entries}
        assert targets == ({"validation_step"} if mode == "FULL" else {"net.body"})


def test_validation_in_fit(harness: Harness):
    class Fits(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.net(batch[0]).square().mean()
            self.losses.append(loss.item())
            self.log("train", loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    run = lambda trainer, module: (trainer.fit(module, data(), data()), state(module))
    for stages in (["validate"], ["train", "validate"]):
        callback = harness.callback(stages=stages)
        harness.compare(net(names, Fits), run, callback)
        assert callback.stats.steps_of("validate")["FULL"] >= 25, callback.summary()
        assert not callback.stats.steps_of("train").get("FULL")


# ----------------------------------------------------------------------------- what is read


def compared(self, batch, batch_idx):
    (x,) = batch
    y = self.net(x).mean()
    return y if y.item() > 0 else -y


def multiplied(self, batch, batch_idx):
    (x,) = batch
    self.total += self.net(x).mean().item() * len(x)


def printed(self, batch, batch_idx):
    (x,) = batch
    text = f"{self.net(x).mean().item():.3f}"
    return {"length": torch.tensor(float(len(text)), device=x.device)}


def converted(self, batch, batch_idx):
    (x,) = batch
    self.log("y", float(self.net(x).mean()))


def typed(self, batch, batch_idx):
    (x,) = batch
    value = self.net(x).mean().item()
    return value if type(value) is float else None


def asked(self, batch, batch_idx):
    (x,) = batch
    value = self.net(x).mean().item()
    self.losses.append(value)
    return isinstance(value, float)


def local_list(self, batch, batch_idx):
    (x,) = batch
    values = []
    for row in self.net(x):
        values.append(row.mean().item())
    return sum(values)


def local_name(self, batch, batch_idx):
    (x,) = batch
    value = self.net(x).mean().item()
    value += 1
    self.log("value", value)


def in_a_dictionary(self, batch, batch_idx):
    (x,) = batch
    values = {"a": self.net(x).mean().item()}
    return values["a"] + 1


def by_locals(self, batch, batch_idx):
    (x,) = batch
    value = self.net(x).mean().item()
    return locals()["value"] + 1


def by_its_frame(self, batch, batch_idx):
    (x,) = batch
    value = self.net(x).mean().item()
    self.losses.append(value)
    return type(sys._getframe().f_locals["value"]) is float


def to_a_function(self, batch, batch_idx):
    (x,) = batch
    return round(self.net(x).mean().item(), 3)


def of_a_helper(self, batch, batch_idx):
    (x,) = batch

    def mean() -> float:
        return self.net(x).mean().item()

    value = mean()
    return value if type(value) is float else None


def to_a_list_of_ones_own(self, batch, batch_idx):
    (x,) = batch
    self.listed.append(self.net(x).mean().item())


def to_a_meter_that_looks(self, batch, batch_idx):
    (x,) = batch
    self.watchful.update(self.net(x).mean().item())


def reads_the_meter(self, batch, batch_idx):
    (x,) = batch
    self.meter.update(self.net(x).mean().item())
    return x * self.meter.sum


def uses_the_result(self, batch, batch_idx):
    (x,) = batch
    return self.meter.update(self.net(x).mean().item())


def from_the_list(self, batch, batch_idx):
    (x,) = batch
    self.losses.append(self.net(x).mean().item())
    return self.losses[-1]


def sets_an_array(self, batch, batch_idx):
    (x,) = batch
    self.last = self.net(x).detach().cpu().numpy()


def works_with_an_array(self, batch, batch_idx):
    (x,) = batch
    array = self.net(x).detach().cpu().numpy()
    self.losses.append(array.mean())


def extends_by_an_array(self, batch, batch_idx):
    (x,) = batch
    self.losses.extend(self.net(x).argmax(1).cpu().numpy())


def logs_a_list(self, batch, batch_idx):
    (x,) = batch
    self.log("first", self.net(x).sum(1).tolist()[0])


def adds_lists(self, batch, batch_idx):
    (x,) = batch
    self.losses.append(self.net(x)[0].tolist() * 2)


def what_was_set(self, batch, batch_idx):
    (x,) = batch
    self.last = self.net(x).mean().item()
    return self.last * 2


def adds_to_a_tensor(self, batch, batch_idx):
    (x,) = batch
    self.tensor += self.net(x).mean().item()


def reads_the_total(self, batch, batch_idx):
    (x,) = batch
    self.total += self.net(x).mean().item()
    return x * self.total


def asks_for_what_was_set(self, batch, batch_idx):
    (x,) = batch
    self.last = self.net(x).mean().item()
    return x if type(self.last) is float else x * 2


def asks_for_an_entry(self, batch, batch_idx):
    (x,) = batch
    self.by_name["rows"] = self.net(x).detach().cpu().numpy()
    return x if hasattr(self.by_name["rows"], "shape") else x * 2


def takes_out_an_entry(self, batch, batch_idx):
    (x,) = batch
    self.by_name["mean"] = self.net(x).mean().item()
    return type(self.by_name.pop("mean")) is float


def takes_out_an_item(self, batch, batch_idx):
    (x,) = batch
    self.losses.append(self.net(x).mean().item())
    return type(self.losses.pop()) is float


def by_another_name(self, batch, batch_idx):
    (x,) = batch
    entries = self.by_name
    value = self.net(x).mean().item()
    self.by_name["mean"] = value
    return type(entries.pop("mean")) is float


def asks_elsewhere(self, batch, batch_idx):
    (x,) = batch
    self.last = [self.net(x).mean().item()]
    return has_number(self)


def has_number(module):
    return type(module.last[0]) is float


def of_a_function_inside(self, batch, batch_idx):
    (x,) = batch
    value = self.net(x).mean().item()

    def same() -> float:
        return value

    return x if type(same()) is float else x * 2


def of_a_class_inside(self, batch, batch_idx):
    (x,) = batch
    value = self.net(x).mean().item()

    class Inside:
        number = value

    return x if type(Inside.number) is float else x * 2


def of_a_cell(self, batch, batch_idx):
    (x,) = batch
    value = self.net(x).mean().item()

    def keep():
        self.losses.append(value)

    keep()
    return [type(cell.cell_contents) is float for cell in keep.__closure__]


LOWER = [
    *(asks_for_what_was_set, asks_for_an_entry, takes_out_an_entry, asks_elsewhere),
    *(of_a_class_inside, of_a_cell, of_a_function_inside, takes_out_an_item, by_another_name),
    *(compared, multiplied, printed, converted, typed, asked, local_list, local_name),
    *(in_a_dictionary, by_locals, by_its_frame, to_a_function, of_a_helper, to_a_list_of_ones_own),
    *(works_with_an_array, extends_by_an_array, logs_a_list, adds_lists, to_a_meter_that_looks),
    *(reads_the_meter, uses_the_result, from_the_list, what_was_set, adds_to_a_tensor),
    *(reads_the_total, sets_an_array),
]


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", [*SETTINGS, ("FULL", 0)], ids=str)
@pytest.mark.parametrize("step", LOWER)
def test_numbers_that_are_read(harness: Harness, step: Step, settings: Any):
    mode, verify = settings
    callback = harness.callback(mode=mode, verify_replays=verify)
    run = lambda trainer, module: (job(trainer, module), list(module.listed))
    harness.compare(net(step), run, callback)
    assert not callback.stats.steps["FULL"], callback.summary()


@pytest.mark.parametrize("step", LOWER[:4])
def test_the_reason_names_the_line(harness: Harness, step: Step):
    callback = harness.callback()
    harness.compare(net(step), job, callback)
    (reason,) = {record.reason for record in callback.stats.reasons if record.mode == "PIECEWISE"}
    assert reason.kind is Cause.HOST_SYNC
    assert "test_late_reads.py" in reason.location


class OwnLog(Net):
    """Doubles what is logged."""

    def log(self, name: str, value: Any, **more: Any) -> None:
        super().log(name, value * 2 if type(value) is float else value, **more)


class OwnSetattr(Net):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value + 1 if type(value) is float else value)


class Property(Net):
    @property
    def newest(self) -> Any:
        return self.last

    @newest.setter
    def newest(self, value: Any) -> None:
        self.last = value if type(value) is float else None


class Common(Net):
    """A step whose result is used by the one that calls it."""

    def common_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).mean().item()


def calls_common(self, batch, batch_idx):
    value = self.common_step(batch, batch_idx)
    return value if type(value) is float else None


def calls_super(self, batch, batch_idx):
    value = Common.common_step(self, batch, batch_idx)
    return value if type(value) is float else None


def decorated(step: Step) -> Step:
    def run(self: Any, batch: Any, batch_idx: int) -> Any:
        return [each for each in step(self, batch, batch_idx) if type(each) is float]

    return run


LIBRARY = """
def checked(step):
    def run(self, batch, batch_idx):
        output = step(self, batch, batch_idx)
        return {"is_float": type(output["mean"]) is float}

    return run
"""


def checked(step: Step) -> Step:
    """Decorate a step by code of an installed library."""
    names: dict[str, Any] = {}
    file = f"{sysconfig.get_path('purelib')}/library_of_checks.py"
    exec(compile(LIBRARY, file, "exec"), names)
    return names["checked"](step)


def sets_newest(self, batch, batch_idx):
    (x,) = batch
    self.newest = self.net(x).mean().item()


OWN = [
    *((OwnLog, logs), (OwnLog, logs_dict), (OwnSetattr, sets), (Property, sets_newest)),
    *((Common, calls_common), (Common, calls_super), (Net, decorated(returns_bool))),
    (Net, checked(returns)),
]


@pytest.mark.parametrize("settings", [*SETTINGS, ("FULL", 0)], ids=str)
@pytest.mark.parametrize(("kind", "step"), OWN)
def test_code_that_gets_the_number(harness: Harness, kind: Any, step: Any, settings: Any):
    mode, verify = settings
    callback = harness.callback(mode=mode, verify_replays=verify)
    harness.compare(net(step, kind), job, callback)
    assert not callback.stats.steps["FULL"], callback.summary()


def test_offline():
    found = diagnose(net(returns), (torch.randn(4, 8),))
    assert found.capturable(), found
    found = diagnose(net(compared), (torch.randn(4, 8),))
    assert [finding.operation for finding in found.findings] == ["aten::item"]


@pytest.mark.parametrize(
    "use",
    [
        *(float, int, bool, str, repr, hash, abs, round, lambda x: f"{x}", lambda x: x + 1),
        *(lambda x: 1 - x, lambda x: x > 1, lambda x: x == 1, lambda x: [0][x]),
    ],
)
def test_what_stands_for_a_number_supports_nothing(use):
    with pytest.raises(CaptureError, match="only passed on"):
        use(LateRead(torch.ones(()), "item"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "source",
    [
        *(torch.tensor(0.1, dtype=kind) for kind in (torch.float16, torch.bfloat16)),
        *(torch.tensor(0.1, dtype=kind) for kind in (torch.float32, torch.float64)),
        *(torch.tensor(value) for value in (True, 3, 2**24 + 1, 2**53 + 1, 2**62 + 2**38 + 1)),
        *(torch.tensor(value) for value in (float("inf"), -0.0, 1e-45)),
    ],
    ids=repr,
)
def test_the_logged_tensor_is_that_of_the_number(source, dtype):
    expected = torch.tensor(source.item(), dtype=dtype)
    found = LateRead(source, "item").as_logged(dtype, torch.device("cpu"))
    assert found.dtype is expected.dtype
    assert found.shape == ()
    integers = torch.int32 if dtype is torch.float32 else torch.int64
    assert found.view(integers) == expected.view(integers)


def test_validate_runs_with_the_harness_alone(harness: Harness):
    """The shortest way, as a user would have it."""
    callback = harness.compare(net(logs), validate(data()))
    assert callback.stats.steps["FULL"] >= 10


def test_a_use_that_nobody_sees_would_be_a_difference(harness: Harness, monkeypatch):
    """If every number counted as passed on, a step that asks for its type would do otherwise."""
    name = "cg_lightning.diagnosis.detectors.host_copies.use_of_read"
    monkeypatch.setattr(name, lambda *_: ReadUse((), False))
    with pytest.raises(AssertionError):
        harness.compare(net(typed), job, harness.callback(mode="FULL", verify_replays=0))
