"""Settings that functions of PyTorch read in Python: graphs freeze them, so guards compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.distributions import Distribution, Exponential, HalfNormal, Laplace, Normal

from tests.harness import assert_same, features, loader, predict
from tests.models import Predictor

MODES = ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"]


@pytest.fixture(autouse=True)
def fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(before)


class Sets(Callback):
    """Calls a function with a value before the first batch, and with another before the sixth."""

    def __init__(self, set_value: Callable[[Any], None], first: Any, then: Any) -> None:
        self._set_value = set_value
        self._values = {0: first, 5: then}

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx in self._values:
            self._set_value(self._values[batch_idx])


class Checks(nn.Module):
    """What PyTorch checks in a submodule."""

    def __init__(self, check: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.layer.weight)
        self.check = check

    def forward(self, x: Tensor) -> Any:
        return self.check(self.layer(x))


class Calls(Predictor):
    def predict_step(self, batch: Any) -> Any:
        return self.net(batch[0])


class Own(Normal):
    """A distribution of the user's."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return -((value - self.loc) ** 2)


KEPT = Exponential(torch.ones(8))
CHECKS: dict[str, Callable[[Tensor], Any]] = {
    "scale": lambda x: Normal(x, x).log_prob(x),
    "loc": lambda x: Laplace(x.sqrt(), 1.0).log_prob(x),
    "sample": lambda x: Exponential(torch.ones_like(x)).log_prob(x),
    "half": lambda x: HalfNormal(x).log_prob(x.abs()),
    "own": lambda x: Own(x, 1.0).log_prob(x.sqrt()),
}


def outcomes(harness, check: Callable[[Tensor], Any], values: tuple[bool, bool], **settings: Any):
    x = torch.rand(40, 8, generator=torch.Generator().manual_seed(3)) + 0.1
    x[24:28] = -x[24:28]
    found = []
    for extra in ([harness.callback(**settings)], []):
        sets = Sets(Distribution.set_default_validate_args, *values)
        try:
            found.append(predict(loader(x))(harness.trainer(*extra, sets), Calls(Checks(check))))
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", [(True, False), (False, True)])
@pytest.mark.parametrize("name", list(CHECKS))
def test_distributions_check_when_eager_does(harness, name, values, mode, verify_replays):
    """The first call of compiled code turns the checks off, for the process."""
    settings = {"mode": mode, "verify_replays": verify_replays}
    with_callback, eager = outcomes(harness, CHECKS[name], values, **settings)
    assert isinstance(eager, str) is values[1]
    assert_same(with_callback, eager)


@pytest.mark.parametrize("values", [(True, False), (False, True)])
def test_a_distribution_that_was_made_before(harness, values):
    if harness.backend == "cuda":
        pytest.skip("its parameters are on the host")
    with_callback, eager = outcomes(harness, lambda x: KEPT.log_prob(x), values, verify_replays=0)
    assert isinstance(eager, str) is values[1]
    assert_same(with_callback, eager)


def test_without_a_change_the_guard_costs_no_graph(harness):
    callback = harness.callback()
    model = Calls(Checks(lambda x: Normal(x, x.exp()).log_prob(x)))
    harness.compare(model, predict(features(32)), callback)
    assert callback.stats.steps["FULL"] == 5, callback.summary()


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", [(True, False), (False, True)])
def test_the_fast_path_of_attention(harness, values, mode, verify_replays):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    callback = harness.callback(mode=mode, verify_replays=verify_replays)
    sets = lambda: [Sets(torch.backends.mha.set_fastpath_enabled, *values)]
    data = loader(torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(3)))
    harness.compare(Calls(layer), predict(data), callback, sets)
