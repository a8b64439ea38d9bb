"""Checks of arguments by PyTorch: made on the device in a graph, with eager's error later."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Cauchy,
    Exponential,
    HalfNormal,
    Independent,
    Laplace,
    Normal,
    kl_divergence,
)
from torch.nn import functional as F

from cg_lightning.metrics.argument_checks import checks_sample
from cg_lightning.metrics.caught_errors import may_be_caught
from tests.harness import features, loader, predict
from tests.models import Body, Predictor

Use = Callable[[Tensor], Any]


class Uses(Predictor):
    def __init__(self, use: Use, net: nn.Module | None = None) -> None:
        super().__init__(net or Body())
        self.use = use

    def predict_step(self, batch: Any) -> Any:
        return self.use(self.net(batch[0]))


def identity() -> nn.Module:
    """Return a layer that returns what it is given, so that no value is known before the step."""
    layer = nn.Linear(8, 8, bias=False)
    nn.init.eye_(layer.weight)
    return layer


def spd(x: Tensor) -> Tensor:
    return x.T @ x + torch.eye(8, device=x.device)


def variational(x: Tensor) -> tuple[Tensor, ...]:
    posterior = Normal(x, x.exp())
    drawn = posterior.rsample()
    prior = Normal(torch.zeros_like(x), torch.ones_like(x))
    return drawn, posterior.log_prob(drawn), kl_divergence(posterior, prior).sum()


def catches(x: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(x.diagonal().diag_embed())
    except torch.linalg.LinAlgError:
        return x * 2


def suppresses(x: Tensor) -> Tensor:
    with contextlib.suppress(ValueError):
        return Normal(x, x).log_prob(x)
    return x * 3


def catches_around_a_handler(x: Tensor) -> Tensor:
    try:
        try:
            raise KeyError
        except KeyError:
            return Normal(x, x).log_prob(x)
    except ValueError:
        return x * 4


def catches_around_a_comprehension(x: Tensor) -> Tensor:
    try:
        (found,) = [Normal(scale, scale).log_prob(scale) for scale in (x,)]
    except ValueError:
        return x * 5
    return found


USES: dict[str, Use] = {
    "a variational step": variational,
    "numbers": lambda x: kl_divergence(Normal(x, 2.0), Normal(x * 2, 1.0)),
    "Independent": lambda x: Independent(Normal(x, x.exp()), 1).log_prob(x + 1),
    "Laplace": lambda x: Laplace(x, x.exp()).log_prob(x + 1),
    "Cauchy": lambda x: Cauchy(x, x.exp()).cdf(x + 1),
    "Exponential": lambda x: Exponential(x.exp()).log_prob(x.abs()),
    "HalfNormal": lambda x: HalfNormal(x.exp()).log_prob(x.abs()),
    "cholesky": lambda x: torch.linalg.cholesky(spd(x)),
    "cholesky, upper": lambda x: torch.linalg.cholesky(spd(x), upper=True),
    "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, 2 * x, x.exp()),
    "one variance a row": lambda x: nn.GaussianNLLLoss(full=True, reduction="none")(
        x, 2 * x, x[:, 0].exp()
    ),
}
ERRORS: dict[str, Use] = {
    "scale": lambda x: Normal(x, x).log_prob(x),
    "loc": lambda x: Laplace(x.sqrt(), 1.0).log_prob(x),
    "sample": lambda x: Exponential(torch.ones_like(x)).log_prob(x),
    "half": lambda x: HalfNormal(x).log_prob(x.abs()),
    "cholesky": lambda x: torch.linalg.cholesky(x.mean() * torch.eye(8, device=x.device)),
    "variance": lambda x: F.gaussian_nll_loss(x, 2 * x, x),
}


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", list(USES))
def test_checked_calls_are_part_of_the_graph(harness, name, verify_replays):
    callback = harness.callback(verify_replays=verify_replays)
    harness.compare(Uses(USES[name]), predict(features(32)), callback)
    assert callback.stats.steps["FULL"] == 5, callback.summary()


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("name", list(ERRORS))
def test_the_error_is_eagers(harness, name, verify_replays):
    """The seventh batch is refused; the graph notices, and eager's error comes at the latest at
    the end of the stage.
    """
    x = torch.rand(40, 8, generator=torch.Generator().manual_seed(3)) + 0.1
    x[24:28] = -x[24:28]
    raised = []
    for extra in ([harness.callback(verify_replays=verify_replays)], []):
        with pytest.raises((ValueError, torch.linalg.LinAlgError)) as caught:
            predict(loader(x))(harness.trainer(*extra), Uses(ERRORS[name], identity()))
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]


class Replace(Callback):
    """Replaces the step after a graph has noticed an error."""

    def on_predict_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 8:
            module.predict_step = functools.partial(type(module).predict_step, module)


@pytest.mark.parametrize("verify_replays", [0, 2])
def test_an_error_that_waits_when_the_step_is_replaced(harness, verify_replays):
    x = torch.rand(40, 8, generator=torch.Generator().manual_seed(3)) + 0.1
    x[24:28] = -x[24:28]
    raised = []
    for extra in ([harness.callback(verify_replays=verify_replays)], []):
        trainer = harness.trainer(*extra, Replace())
        with pytest.raises(ValueError, match="within the support") as caught:
            predict(loader(x))(trainer, Uses(ERRORS["sample"], identity()))
        raised.append(str(caught.value))
    assert raised[0] == raised[1]


@pytest.mark.parametrize(
    "use", [catches, suppresses, catches_around_a_handler, catches_around_a_comprehension]
)
def test_an_error_that_the_step_catches(harness, use):
    x = torch.rand(40, 8, generator=torch.Generator().manual_seed(3))[:, None] + 0.1
    x = x.expand(-1, 8, -1).contiguous()
    x[24:28] = -x[24:28]
    callback = harness.callback(verify_replays=0)
    harness.compare(Uses(use, identity()), predict(loader(x)), callback)
    assert callback.stats.steps["FULL"] == 0, callback.summary()


def test_a_distribution_that_would_read_out_of_bounds(harness):
    callback = harness.callback()
    use: Use = lambda x: Categorical(logits=x).log_prob(x.argmax(1))
    harness.compare(Uses(use), predict(features(32)), callback)
    assert callback.stats.steps["FULL"] == 0


def test_a_class_of_the_users_own_is_left_alone(harness):
    class Own(Normal):
        pass

    callback = harness.callback()
    harness.compare(Uses(lambda x: Own(x, x.exp()).log_prob(x)), predict(features(32)), callback)
    assert callback.stats.steps["FULL"] == 0


def test_who_catches():
    namespace: dict[str, Any] = {"__name__": "cg_lightning.runtime.step_runner"}
    exec("def run(step): return step()", namespace)
    run = namespace["run"]

    def inside_try() -> bool:
        try:
            return may_be_caught()
        except ValueError:
            return False

    def after_try() -> bool:
        with contextlib.suppress(ValueError):
            run(lambda: None)
        return may_be_caught()

    def inside_with() -> bool:
        with torch.no_grad():
            return may_be_caught()

    def calls(function: Callable[[], bool]) -> bool:
        try:
            return function()
        finally:
            pass

    assert run(inside_try)
    assert run(inside_with)
    assert run(lambda: calls(may_be_caught))
    assert not run(after_try)
    assert not run(may_be_caught)


def test_with_gradients_nothing_is_deferred():
    """An optimizer would make a step with what eager refuses."""
    distribution = Normal(torch.zeros(2), torch.ones(2))
    run = "def run(step): return step()"
    namespace: dict[str, Any] = {"__name__": "cg_lightning.runtime.step_runner"}
    exec(run, namespace)
    applies = lambda: checks_sample(distribution, torch.ones(2))
    assert not namespace["run"](applies)
    with torch.no_grad():
        assert namespace["run"](applies)
