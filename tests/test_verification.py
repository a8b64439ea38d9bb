"""A replay that differs is noticed, and its result never reaches the user."""

import _ctypes
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cg_lightning import VerificationError
from tests.harness import assert_same, features, predict
from tests.models import Body, Predictor

MODES = ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"]


class _Holder:
    value: Any


def unseen(value: Any) -> tuple[Any, Any]:
    """Gives what reads and what writes a value that nobody sees: it is reached by its address."""
    holder = _Holder()
    HOLDERS.append(holder)
    address = id(holder)

    def put(new: Any) -> None:
        _ctypes.PyObj_FromPtr(address).value = new

    put(value)
    return lambda: _ctypes.PyObj_FromPtr(address).value, put


HOLDERS: list[_Holder] = []
get_scale, put_scale = unseen(1.0)


class ReadsUnseen(nn.Module):
    """A graph freezes the value, and nothing guards it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) * get_scale()


class ChangesUnseen(Predictor):
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        put_scale(1.0 if batch_idx < 4 else 2.0)

    def on_predict_end(self) -> None:
        put_scale(1.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_value_that_nobody_sees_is_caught_by_sampling(harness, mode):
    """Hazard 8, and the stated limit: without sampling it is not seen."""
    callback = harness.callback(mode=mode, warmup_steps=1, verify_every=1)
    with pytest.warns(UserWarning, match="a replay differed from eager") as caught:
        harness.compare(ChangesUnseen(ReadsUnseen()), predict(features(32)), callback)
    (message,) = {str(w.message) for w in caught if "differed from eager" in str(w.message)}
    for part in ("stage 'predict'", "shapes 4x8", "from the graph", "from eager", "output"):
        assert part in message
    assert callback.stats.captures >= 1
    assert sum(reason.startswith("verification: ") for reason in callback.stats.eager_reasons) >= (
        mode != "FULL_AND_PIECEWISE"
    )
    without = harness.callback(mode=mode, warmup_steps=1)
    with pytest.raises(AssertionError):
        harness.compare(ChangesUnseen(ReadsUnseen()), predict(features(32)), without)


def test_strict_raises(harness):
    callback = harness.callback(warmup_steps=1, verify_every=1, strict=True)
    with pytest.raises(VerificationError, match="from the graph"):
        harness.trainer(callback).predict(ChangesUnseen(ReadsUnseen()), features(32))
    ChangesUnseen.on_predict_end(None)


class Moving(nn.Module):
    """Draws random numbers, counts in a buffer, and updates running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.norm.train()
        self.steps += 1
        return nn.functional.dropout(self.linear(self.norm(x)), 0.5) * self.steps


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings", [{"verify_replays": 0}, {"verify_replays": 2}, {"verify_every": 1}]
)
def test_a_user_sees_one_step(harness, mode, settings):
    """Hazards 9 and 10: buffers and random numbers are eager's after any number of comparisons."""
    callback = harness.callback(mode=mode, warmup_steps=1, **settings)
    harness.compare(Predictor(Moving()), predict(features(40)), callback)
    assert (
        callback.stats.replays == 8
    )  # the first step turns training on, so the second step has another key


TOTAL: dict[torch.device, torch.Tensor] = {}


class Totals(Predictor):
    """Adds to an attribute, a container, a parameter, a hidden module and a global."""

    def __init__(self) -> None:
        super().__init__(Body())
        self.weight = nn.Parameter(torch.zeros(8))
        self.totals: dict[str, torch.Tensor] = {}
        self.hidden = [nn.BatchNorm1d(8)]

    def on_predict_epoch_start(self) -> None:
        self.total = torch.zeros(8, device=self.device)  # another tensor in each epoch
        self.totals["bank"] = torch.zeros(16, 8, device=self.device)
        self.hidden[0].to(self.device)
        TOTAL[self.device] = TOTAL.get(self.device, torch.zeros(8, device=self.device)).zero_()

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        self.total += output.sum(0)
        self.totals["bank"][:4].add_(output.mean())
        self.weight.data.mul_(0.5).add_(output.mean(0))
        TOTAL[self.device].add_(output.sum(0))
        kept = (self.total, self.totals["bank"], self.weight, TOTAL[self.device])
        return (
            output,
            self.hidden[0](output),
            self.hidden[0].running_mean.clone(),
            *[tensor.detach().clone() for tensor in kept],
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings", [{"verify_replays": 0}, {"verify_replays": 2}, {"verify_every": 1}]
)
def test_what_a_step_writes_to_is_written_to_once(harness, mode, settings):
    """Hazard 10: a compared step runs twice, but its sums are those of one run."""
    callback = harness.callback(mode=mode, warmup_steps=1, **settings)
    twice = lambda trainer, module: [trainer.predict(module, features(40)) for _ in range(2)]
    harness.compare(Totals(), twice, callback)
    assert callback.stats.replays > 15, callback.summary()


@pytest.mark.parametrize("mode", MODES)
def test_what_ran_eagerly_for_a_capture_that_failed_is_the_step(harness, mode):
    """A compared step does not run again for its result: hidden counters would count twice."""

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            count_up(count() + 1)
            return self.linear(x) + (
                count() if count() < 2 else torch.ones(1, device=x.device).mul(count()).item()
            )

    callback, seen = harness.callback(mode=mode, warmup_steps=1), []
    for extra in ([callback], []):
        count, count_up = unseen(0)
        torch.manual_seed(3)
        seen.append(harness.trainer(*extra).predict(Predictor(Waits()), features(8)))
    assert_same(*seen)
    assert callback.stats.captures == 0
    assert any("The capture failed" in reason for reason in callback.stats.eager_reasons), (
        callback.summary()
    )


class Noisy(nn.Module):
    """Two runs differ in the last bits, as with atomic additions."""

    def __init__(self, values: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.values = values

    def forward(self, x):
        put_noise((noise() + 1) % self.values)
        return self.linear(x) * 0 + 1 + noise() / 2**20


noise, put_noise = unseen(2.0)
in_place, put_in_place = unseen(0)


class Rectifies(nn.Module):
    """Overwrites its input from the second call on. The result stays the same."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        put_in_place(in_place() + 1)
        return nn.functional.relu(x, inplace=in_place() > 1) * self.scale


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. a replay differed")
@pytest.mark.parametrize("mode", MODES)
def test_an_input_that_is_overwritten_unseen(harness, mode):
    """A custom kernel whose writes are unknown."""

    class Residual(Predictor):
        def predict_step(self, batch, batch_idx):
            return self.net(batch[0]), batch[0]

    callback, seen = harness.callback(mode=mode, warmup_steps=1), []
    for extra in ([callback], []):
        put_in_place(0)
        seen.append(harness.trainer(*extra).predict(Residual(Rectifies()), features(32)))
    assert_same(*seen)
    assert any(
        "it changes a tensor that it is given" in reason for reason in callback.stats.eager_reasons
    )


@pytest.mark.parametrize("values", [3, 7])
def test_what_eager_differs_from_itself_is_let_pass_and_said(values, harness):
    """Also if the next eager run differs by less than the replay."""
    callback = harness.callback(mode="FULL", warmup_steps=1)
    outputs = harness.trainer(callback).predict(Predictor(Noisy(values)), features(32))
    assert len(outputs) == 8
    assert callback.stats.replays == 7
    assert any(entry.within_spread for entry in callback.stats.entries)
    assert "within the difference between eager runs" in callback.summary()


class Counts(nn.Module):
    """Runs differ from each other by what nobody sees, and by more than a rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        put_noise(noise() + 1)
        return self.linear(x) * 0 + noise() % 2


@pytest.mark.filterwarnings("ignore:CUDAGraphCallback. a replay differed")
def test_more_than_a_rounding_is_not_excused(harness):
    callback = harness.callback(mode="FULL", warmup_steps=1)
    harness.trainer(callback).predict(Predictor(Counts()), features(32))
    assert callback.stats.replays <= 1
    assert any("from the graph" in reason for reason in callback.stats.eager_reasons), (
        callback.summary()
    )


class OfAnyLength(nn.Module):
    """Two runs give outputs of other lengths, by a value that nobody sees."""

    def forward(self, x):
        put_noise((noise() + 1) % 3)
        return x[:, : 2 + int(noise())]


@pytest.mark.filterwarnings("ignore:.*a replay differed.*")
def test_eager_runs_of_other_shapes_are_a_difference(harness):
    callback = harness.callback(mode="FULL", warmup_steps=1)
    outputs = harness.trainer(callback).predict(Predictor(OfAnyLength()), features(32))
    assert len(outputs) == 8
    assert callback.stats.steps["FULL"] == 0, callback.summary()


def test_close_lets_small_differences_pass(harness):
    class Slightly(ChangesUnseen):
        def on_predict_batch_start(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            put_scale(1.0 if batch_idx < 4 else 1.0 + 1e-7)

    callback = harness.callback(warmup_steps=1, verify_every=1, verify_tolerance="close")
    one = harness.trainer(callback).predict(Slightly(ReadsUnseen()), features(32))
    assert callback.stats.replays == 7
    assert len(one) == 8


def test_nan_equals_nan(harness):
    class Nan(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]) / (batch[0] * 0)

    callback = harness.callback(mode="FULL", warmup_steps=1, verify_every=1)
    harness.compare(Nan(Body()), predict(features()), callback)
    assert callback.stats.replays == 4


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.mode, self.mask = 1.0, "mul", None
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(x)
        if self.mask is not None:
            x = x * self.mask
        return x * self.temperature if self.mode == "mul" else x / self.temperature


@pytest.mark.parametrize("settings", [*[{"mode": mode} for mode in MODES], {"targets": ["net"]}])
def test_attributes_that_a_graph_has_frozen_are_watched(harness, settings):
    """Hazard 7: changes in mid-epoch, by the module and from outside, without sampling."""

    class Changes(Predictor):
        def on_predict_batch_start(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if batch_idx == 3:
                self.net.temperature = 3.0
            if batch_idx == 5:
                self.net.mode = "div"
            if batch_idx in (6, 7):
                self.net.mask = torch.full((8,), float(batch_idx), device=self.device)

    callback = harness.callback(**settings, warmup_steps=1, verify_replays=0)
    harness.compare(Changes(Tempered()), predict(features(48)), callback)
    # with each new value the step is watched once more, since it may take another way; in pieces a
    # step runs eagerly before that, because the submodule finds the change; from the third value
    # on, the layer inside it has a graph
    expected = (3, 6) if settings.get("mode") == "PIECEWISE" else (3, 7)
    assert (callback.stats.captures, callback.stats.replays) == expected
    changed = [str(record.reason) for record in callback.stats.reasons]
    assert any("self.net.temperature: now 3.0, before 1.0" in text for text in changed), changed


def test_an_attribute_that_moves_outside_the_graphs_does_not_drop_them(harness):
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.body = 0, Body()

        def forward(self, x):
            self.count += 1
            return self.body(x) * self.count

    callback = harness.callback(warmup_steps=2)
    harness.compare(Predictor(Counts()), predict(features(40)), callback)
    assert callback.stats.captures == 1


def test_an_exception_of_the_compared_step_comes_through(harness):
    class Fails(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if get_scale() == 2.0:
                raise KeyError("mine")
            return self.net(batch[0])

    model = type("Both", (ChangesUnseen, Fails), {})(Body())
    with pytest.raises(KeyError, match="mine"):
        harness.trainer(harness.callback(mode="FULL", warmup_steps=1, verify_every=1)).predict(
            model, features(32)
        )
    ChangesUnseen.on_predict_end(None)


def test_equal_meanssame_leaf():
    from cg_lightning.core.equality import same_leaf

    x = torch.tensor([1.0, float("nan")])
    assert same_leaf(x, x.clone())
    assert not same_leaf(x, x.double())
    assert not same_leaf(x, torch.tensor([1.0, 2.0]))
    assert not same_leaf(torch.tensor([1]), torch.tensor([2]))
    assert same_leaf(float("nan"), float("nan"))
    assert not same_leaf(1, 1.0)
    assert not same_leaf(torch.tensor(0.0), torch.tensor(-0.0))
    assert same_leaf(
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t(), torch.tensor([[1.0, 3.0], [2.0, 4.0]])
    )
    assert not same_leaf(torch.tensor(1j), torch.tensor(-1j))
    assert not same_leaf(torch.tensor(1.0).bfloat16(), torch.tensor(2.0).bfloat16())
    assert_same((x, 1), (x.clone(), 1))


class Configured(nn.Module):
    """Stores settings in a private attribute, in containers, and in an object."""

    def __init__(self) -> None:
        super().__init__()
        self._temperature, self.config, self.steps = 1.0, {"scale": 1.0}, [1.0]
        self.settings = SimpleNamespace(shift=0.0)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return (
            self.linear(x) * self._temperature * self.config["scale"] * self.steps[-1]
            + self.settings.shift
        )


@pytest.mark.parametrize("mode", MODES)
def test_private_attributes_and_containers_are_watched_too(harness, mode):
    """Hazard 7, including hyperparameters of the LightningModule."""

    class Changes(Predictor):
        def __init__(self, net: nn.Module, factor: float = 1.0) -> None:
            super().__init__(net)
            self.save_hyperparameters("factor")

        def forward(self, x):
            return self.net(x) * self.hparams.factor

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

        def on_predict_batch_start(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if batch_idx == 3:
                self.net._temperature = 3.0
            if batch_idx == 5:
                self.net.config["scale"] = 5.0
            if batch_idx == 7:
                self.net.steps.append(7.0)
            if batch_idx == 9:
                self.hparams.factor = 9.0
            if batch_idx == 10:
                self.net.settings.shift = 10.0

    callback = harness.callback(mode=mode, warmup_steps=1, verify_replays=0)
    harness.compare(Changes(Configured()), predict(features(48)), callback)
    # in the default mode, submodules have graphs where the whole step does not pay
    expected = {"PIECEWISE": (3, 5), "FULL": (3, 4), "FULL_AND_PIECEWISE": (4, 5)}[mode]
    assert (callback.stats.captures, callback.stats.replays) == expected
    changed = [str(record.reason) for record in callback.stats.reasons]
    assert any("self.net._temperature: now 3.0, before 1.0" in text for text in changed), changed


class ShrinksUnseen(nn.Module):
    """Its output has one leaf less from the run ``shrinks_at`` on, which nobody sees."""

    def __init__(self, shrinks_at: int) -> None:
        super().__init__()
        self.linear, self.shrinks_at = nn.Linear(8, 8), shrinks_at
        self.read, self.write = unseen(0)

    def forward(self, x):
        self.write(self.read() + 1)
        first = self.linear(x)
        return [first, first * self.read()][: 1 + (self.read() < self.shrinks_at)]


@pytest.mark.parametrize("shrinks_at", range(2, 9))
def test_eager_runs_that_give_different_numbers_of_leaves(harness, shrinks_at):
    callback = harness.callback(mode="FULL", warmup_steps=1, verify_every=1)
    module = Predictor(ShrinksUnseen(shrinks_at))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a replay differed from eager
        outputs = harness.trainer(callback).predict(module, features(32))
    assert len(outputs) == 8
    assert callback.stats.eager_reasons
