"""Compares each replacement of a torchmetrics function with its original."""

import copy
import importlib
import inspect
import pkgutil
import warnings
from typing import Any

import pytest
import torch
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MinMetric, SumMetric

from cg_lightning.metrics.deferred_checks import CheckedCalls, DeferredCheck, DeferredChecks
from cg_lightning.metrics.sync_free import SYNC_FREE, sync_free
from tests.harness import assert_same


def original(path: str) -> Any:
    return pkgutil.resolve_name(path)


def outcome(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, str]:
    try:
        return function(*args, **kwargs), ""
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def deferred(path: str, *args: Any, **kwargs: Any) -> tuple[Any, str]:
    """Return the result of the replacement, and the error of its deferred checks."""
    function = original(path)
    checks: list[DeferredCheck] | None = None
    for _ in range(2):  # as in two captures, neither of which changes the arguments
        checked = CheckedCalls(checks)
        copies = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
        with checked.during(function, copies, kwargs):
            result = SYNC_FREE[path].run(checked, function, *copies, **kwargs)
        checks = checks or [DeferredCheck.of(*seen) for seen in checked.seen]
    every = DeferredChecks()
    every.add(checks)
    _, error = outcome(every.raise_if_met)
    return result, error


NAN = "torchmetrics.aggregation.BaseAggregator._cast_and_nan_check_input"
BINCOUNT = "torchmetrics.utilities.data._bincount"
LOGITS = "torchmetrics.utilities.compute.normalize_logits_if_needed"
CURVE = "precision_recall_curve"


def both(device: torch.device, path: str, *args: Any, **kwargs: Any) -> str:
    """Assert that both return or raise the same. Return the error."""
    args = tuple(arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args)
    expected, error = outcome(original(path), *args, **kwargs)
    result, deferred_error = deferred(path, *args, **kwargs)
    assert deferred_error == error
    if not error and expected is not None:
        assert_same(result, expected)
    return error


@pytest.mark.parametrize("seed", range(20))
def test_bincount(device, seed):
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 50, (), generator=generator))
    x = torch.randint(
        0, length, (int(torch.randint(0, 400, (), generator=generator)),), generator=generator
    )
    assert both(device, BINCOUNT, x, length) == ""
    assert both(device, BINCOUNT, x.int(), minlength=length) == ""


def test_bincount_rejects(device):
    assert "non-negative" in both(device, BINCOUNT, torch.tensor([0, -1]), 4)
    checked = CheckedCalls()
    x = torch.tensor([0, 7], device=device)
    with checked.during(torch.bincount, (x,), {}):
        SYNC_FREE[BINCOUNT].run(checked, original(BINCOUNT), x, 4)
    assert checked.seen, (
        "what is too large is noted: eager's result would be longer, and its caller raise"
    )


@pytest.mark.parametrize("normalization", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_logits(device, normalization, scale):
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(6, 4, generator=generator)
    for x in (
        probabilities,
        probabilities - scale,
        probabilities * float("inf"),
        probabilities * float("nan"),
    ):
        assert both(device, LOGITS, x, normalization) == ""


VALIDATIONS = [path for path in SYNC_FREE if path.endswith("validation")]


def arguments(
    path: str, preds: torch.Tensor, target: torch.Tensor, ignore_index: int | None
) -> list[Any]:
    values = {"preds": preds, "target": target, "ignore_index": ignore_index}
    values.update(num_classes=3, num_labels=2, multidim_average="global")
    return [values[name] for name in inspect.signature(original(path)).parameters]


@pytest.mark.parametrize("path", VALIDATIONS)
def test_validations(device, path):
    generator = torch.Generator().manual_seed(2)
    raised = set()
    for ignore_index in (None, -1, 2):
        for highest in range(1, 7):
            for lowest in (0, -1):
                target = torch.randint(lowest, highest, (8, 2), generator=generator)
                labels = torch.randint(lowest, highest, (8, 2), generator=generator)
                scores = (
                    torch.rand(8, 3, 2, generator=generator)
                    if "multiclass" in path
                    else torch.rand(8, 2, generator=generator)
                )
                for preds in (labels, scores):
                    if CURVE in path and preds is labels:
                        continue  # refused for its dtype, which is part of the key
                    given = arguments(path, preds, target, ignore_index)
                    raised.add(bool(both(device, path, *given)))
    assert raised == {True, False}  # the check can fail, and can pass


def test_the_functions_are_replaced_everywhere_and_put_back():
    users = importlib.import_module("torchmetrics.functional.classification.stat_scores")
    before = users._bincount
    with sync_free(CheckedCalls()):
        assert users._bincount is not before
        assert users._bincount is importlib.import_module("torchmetrics.utilities.data")._bincount
    assert users._bincount is before


def test_every_function_of_the_table_exists_in_this_torchmetrics():
    """This fails if torchmetrics changes. Metrics that need the functions then run eagerly."""
    for path in SYNC_FREE:
        assert callable(original(path)), path


def test_a_count_of_unknown_length_still_waits(device):
    x = torch.tensor([1], device=device)
    assert not SYNC_FREE[BINCOUNT].applies(x)
    assert SYNC_FREE[BINCOUNT].applies(x, 3)
    assert SYNC_FREE[BINCOUNT].applies(x, minlength=3)


AGGREGATORS = {"mean": MeanMetric, "sum": SumMetric, "max": MaxMetric, "min": MinMetric}


@pytest.mark.parametrize("strategy", ["warn", "ignore", "error"])
@pytest.mark.parametrize("kind", list(AGGREGATORS))
def test_aggregators_of_one_value(device, kind, strategy):
    values = [0.5, -0.0, float("nan"), float("-inf"), 3.0, float("nan"), 7.0]
    expected, found = (AGGREGATORS[kind](nan_strategy=strategy).to(device) for _ in range(2))
    for value in values:
        x = torch.tensor(value, device=device)
        checks: list[DeferredCheck] | None = None
        before = found.metric_state
        for _ in range(2):
            found.__dict__.update({name: state.clone() for name, state in before.items()})
            checked = CheckedCalls(checks)
            with sync_free(checked), checked.during(copy.deepcopy(found).update, (x,), {}):
                found.update(x)
            checks = checks or [DeferredCheck.of(*seen) for seen in checked.seen]
        every = DeferredChecks()
        every.add(checks)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            error = outcome(every.raise_if_met)[1]
        with warnings.catch_warnings(record=True) as expected_warned:
            warnings.simplefilter("always")
            assert outcome(expected.update, x)[1] == error
        assert [str(w.message) for w in warned] == [str(w.message) for w in expected_warned]
        assert bool(error or warned) is (value != value and strategy != "ignore")
        if error:
            return  # eager's state is unchanged; ours is never read
        assert_same(found.metric_state, expected.metric_state)


def test_aggregators_of_several_values_still_wait(device):
    mean, several = MeanMetric().to(device), torch.ones(3, device=device)
    applies = SYNC_FREE[NAN].applies
    assert not applies(mean, several)
    assert applies(mean, several[0])
    assert applies(MeanMetric(nan_strategy="error"), several)
    assert not applies(CatMetric(), several[0])
