"""A graph freezes globals like attributes."""

from __future__ import annotations

import functools
import gc
import logging
import sys
import types
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from cg_lightning import CUDAGraphCallback
from cg_lightning.backends.recorder import RecorderBackend
from cg_lightning.diagnosis.watcher import StepWatcher
from tests import models
from tests.harness import Harness, assert_same, features, predict
from tests.models import Body, Predictor
from tests.processes import run_python

FACTOR = 1.0
TABLE: dict[str, float] = {"factor": 1.0}
KEPT: list[Any] = []
STEPS = 0
logger = logging.getLogger("user")


class Config:
    factor = 1.0
    factors: ClassVar[list[float]] = [1.0]


def helper(x):
    return x * FACTOR


class Inherits(Config):
    pass


class Refuses(dict):
    """A mapping that cannot be read, such as that of a closed file."""

    def __iter__(self):
        raise OSError("closed")


REFUSES = Refuses(a=1)


class Helped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return helper(self.linear(x))


class ReadsThem(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        scaled = [self.net(batch[0]) * factor for factor in Config.factors]
        return (
            scaled[0]
            * FACTOR
            * TABLE["factor"]
            * Inherits.factor
            * models.FACTOR
            * torch.ones(8, device=self.device)
        )


def reset() -> None:
    global FACTOR, STEPS
    FACTOR, STEPS, TABLE["factor"], Config.factor, Config.factors[0], models.FACTOR = (
        1.0,
        0,
        1.0,
        1.0,
        1.0,
        1.0,
    )
    KEPT.clear()


@pytest.fixture(autouse=True)
def as_they_were():
    reset()
    yield
    reset()


class Pair(NamedTuple):
    first: Any
    second: Any


class MakesPairs(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return Pair(self.net(batch[0]) * FACTOR, batch[0])


def test_a_constructor_of_named_tuples_costs_no_guard():
    module, x = MakesPairs(nn.Linear(8, 8)), torch.ones(2, 8)
    watcher = StepWatcher(module, RecorderBackend(x.device), effects=None)
    with torch.no_grad():
        _, watched = watcher.watch(lambda: module.predict_step([x], 0), [x])
    paths = {source.path for source in watched.sources()}
    assert "FACTOR" in paths
    assert not any("_tuple_new" in path for path in paths)


class Changes(Callback):
    def __init__(self, name: str) -> None:
        self.name = name

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        global FACTOR
        if batch_idx != 4:
            return
        if self.name == "global":
            FACTOR = 3.0
        if self.name == "dictionary":
            TABLE["factor"] = 3.0
        if self.name == "class":
            Config.factor = 3.0
        if self.name == "list of a class":
            Config.factors[0] = 3.0
        if self.name == "module":
            models.FACTOR = 3.0

    def on_predict_end(self, *_: Any) -> None:
        reset()


@pytest.mark.parametrize("name", ["global", "dictionary", "class", "list of a class", "module"])
def test_globals_that_change_between_two_batches(harness: Harness, name):
    """Hazards 7 and 8."""
    callback = harness.callback(warmup_steps=1, verify_replays=0)
    harness.compare(ReadsThem(Body()), predict(features(32)), callback, lambda: [Changes(name)])
    # the step is watched once, and once more after the change
    assert callback.stats.steps["FULL"] == 6, callback.summary()
    assert callback.stats.captures == 2


ANSWERS = types.ModuleType("answers")
"""A module that has every name: a function of its own answers."""
vars(ANSWERS)["__getattr__"] = lambda name: FACTOR


class Asks(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * ANSWERS.anything


def test_a_module_that_answers_with_a_global(harness: Harness):
    callback = harness.callback(warmup_steps=1, verify_replays=0)
    harness.compare(Asks(Body()), predict(features(32)), callback, lambda: [Changes("global")])
    assert callback.stats.steps["FULL"] == 6, callback.summary()


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_globals_of_functions_that_a_submodule_calls(harness: Harness, mode):
    callback = harness.callback(warmup_steps=1, verify_replays=0, mode=mode)
    harness.compare(
        Predictor(Helped()), predict(features(32)), callback, lambda: [Changes("global")]
    )
    assert callback.stats.captures == 2


def test_globals_are_seen_beside_a_profiler_of_the_users(harness: Harness):
    """It pauses in watched steps."""

    class Profiles(Callback):
        def on_predict_start(self, *_: Any) -> None:
            sys.setprofile(lambda *_: None)

        def on_predict_end(self, *_: Any) -> None:
            sys.setprofile(None)

    callback = harness.callback(warmup_steps=1, verify_replays=0)
    others = lambda: [Profiles(), Changes("global")]
    harness.compare(ReadsThem(Body()), predict(features(32)), callback, others)
    assert callback.stats.captures == 2


def test_a_profiler_of_the_users_goes_on(harness: Harness):
    called = []

    class Profiled(Predictor):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    net: Any = Body()
    net.compile(backend="eager")
    sys.setprofile(
        lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None
    )
    try:
        harness.trainer(harness.callback(warmup_steps=1)).predict(Profiled(net), features(32))
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    assert "predict_step" in called


class Appends(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        KEPT.append(self.net(batch[0]))
        return KEPT[-1] * len(KEPT)


class AppendsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        KEPT.append(self.linear(x))
        return KEPT[-1] * len(KEPT)


class AppendsInSubmodule(Predictor):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(AppendsInside())
        self.net.linear = net[0:1]
        self.out = nn.Linear(16, 8)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.out(self.net(batch[0]))


class Counts(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        global STEPS
        STEPS += 1
        return self.net(batch[0]) * STEPS


class NamesWhatCannotBeRead(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) * len(REFUSES)


class Logs(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        logger.warning("a step")
        return self.net(batch[0])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Appends, "module state rebound: global KEPT"),
        (AppendsInSubmodule, "module state rebound: global KEPT"),
        (Counts, "module state rebound: global STEPS"),
        (Logs, "logger or print used: logging"),
        (
            NamesWhatCannotBeRead,
            "module state rebound: global REFUSES cannot be looked into: OSError: closed",
        ),
    ],
)
def test_globals_that_a_step_changes(harness: Harness, caplog, kind, reason):
    """Hazard 6."""
    torch.manual_seed(3)
    net, seen, callback = Body(), [], harness.callback(warmup_steps=1)
    state = net.state_dict()
    for extra in ([callback], []):
        reset()
        caplog.clear()
        net.load_state_dict(state)
        torch.manual_seed(4)
        kept = harness.trainer(*extra).predict(kind(net), features(32))
        seen.append(
            (
                kept,
                list(KEPT),
                STEPS,
                [record.message for record in caplog.records if record.name == "user"],
            )
        )
    assert_same(*seen)
    assert callback.stats.steps["PIECEWISE"] >= 6
    full = harness.callback(warmup_steps=1, mode="FULL")
    harness.trainer(full).predict(kind(net), features(32))
    assert any(given.startswith(reason) for given in full.stats.eager_reasons), full.summary()


@functools.lru_cache(maxsize=2)
def _kept(number: int, device: torch.device) -> torch.Tensor:
    return torch.ones(8, device=device) * number


class AddsToKept(nn.Module):
    def forward(self, x):
        kept = _kept(2, x.device)
        kept += x.sum(0)
        return x + kept


class CountsComputed(nn.Module):
    def forward(self, x):
        return x + _kept(2, x.device), _kept.cache_info().misses


class Clears(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_):
        if batch_idx in (0, 6):
            _kept.cache_clear()


class Evicts(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_):
        if batch_idx in (0, 6):
            _kept(3 + batch_idx, pl_module.device)
            _kept(4 + batch_idx, pl_module.device)


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("others", [Clears, Evicts])
@pytest.mark.parametrize("kind", [AddsToKept, CountsComputed])
def test_results_that_a_function_keeps_are_dropped(harness, kind, others, verify_replays):
    """A graph would go on with a tensor that the function has computed before."""
    seen = []
    for extra in ([harness.callback(verify_replays=verify_replays)], []):
        _kept.cache_clear()
        trainer = harness.trainer(*extra, others())
        seen.append(trainer.predict(Predictor(kind()), features(40)))
    assert_same(*seen)


def scales_by_what_it_holds():
    """Return a function, and another one that changes what the first has closed over."""
    factor = 1.0

    def scale(x):
        return x * factor

    def change(to: float) -> None:
        nonlocal factor
        factor = to

    return scale, change


class ChangesTheClosure(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        _, change = KEPT[0]
        change(3.0 if batch_idx >= 5 else 1.0)


class CallsItsFirst(Predictor):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return KEPT[0][0](self.net(batch[0]))


def calls_a_function_that_changes(harness: Harness) -> CUDAGraphCallback:
    callback = harness.callback(warmup_steps=1, verify_replays=0)
    others = lambda: [ChangesTheClosure()]
    return harness.compare(CallsItsFirst(Body()), predict(features(40)), callback, others)


def test_closures_of_functions_that_only_the_garbage_collector_finds(harness: Harness):
    KEPT.append(scales_by_what_it_holds())
    assert calls_a_function_that_changes(harness).stats.steps["FULL"] == 8


def calls_a_hidden_function(backend: str, folder: str) -> None:
    KEPT.append(scales_by_what_it_holds())
    gc.freeze()
    stats = calls_a_function_that_changes(Harness(backend, Path(folder))).stats
    assert stats.steps["FULL"] == 0
    assert "gc.freeze hides what a function holds: scale" in str(stats.reasons)


def test_functions_that_are_hidden_from_the_garbage_collector(backend, tmp_path):
    """In a process of its own: what is frozen cannot be told from what was frozen before."""
    code = f"from tests import test_global_reads as tests; tests.{calls_a_hidden_function.__name__}"
    folder = Path(__file__).parent.parent
    done = run_python("-c", f"{code}({backend!r}, {str(tmp_path)!r})", folder=folder)
    assert done.returncode == 0, done.stderr
