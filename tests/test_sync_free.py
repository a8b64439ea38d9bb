"""Compares each replacement of a torchmetrics function with its original."""

import contextlib
import copy
import importlib
import inspect
import pkgutil
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MinMetric, SumMetric

from cg_lightning.metrics.deferred_checks import CheckedCalls, DeferredCheck, DeferredChecks
from cg_lightning.metrics.sync_free import SYNC_FREE, has_parameters_of, sync_free
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
        with sync_free(checked), checked.during(function, copies, kwargs):
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


def add_module(monkeypatch, name: str, code: str) -> types.ModuleType:
    """Do what an import does."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(code, vars(module))
    return module


def test_a_replacement_inside_another_finds_all_functions(monkeypatch):
    """A step may run another Trainer. More modules are imported by then."""
    users = importlib.import_module("torchmetrics.functional.classification.stat_scores")
    before = users._bincount, torch.linalg.cholesky
    with sync_free(CheckedCalls()):
        outer = users._bincount, torch.linalg.cholesky
        add_module(monkeypatch, "torchmetrics_of_a_test", "")
        with sync_free(CheckedCalls()):
            assert users._bincount not in (outer[0], before[0])
            assert torch.linalg.cholesky not in (outer[1], before[1])
        assert (users._bincount, torch.linalg.cholesky) == outer
    assert (users._bincount, torch.linalg.cholesky) == before
    with sync_free(CheckedCalls()):
        assert users._bincount is not before[0]
        assert torch.linalg.cholesky is not before[1]
    assert (users._bincount, torch.linalg.cholesky) == before


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["torchmetrics.of_a_test", "of_a_test"])
def test_a_module_that_is_imported_meanwhile_has_the_original(monkeypatch, name, depth):
    original_function = importlib.import_module("torchmetrics.utilities.data")._bincount
    code = "from torchmetrics.utilities.data import _bincount, _bincount as another"
    with contextlib.ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(sync_free(CheckedCalls()))
        module = add_module(monkeypatch, name, code)
        assert module._bincount is not original_function
    assert module._bincount is original_function
    assert module.another is original_function


def test_a_replacement_that_is_kept_becomes_the_original():
    data = importlib.import_module("torchmetrics.utilities.data")
    checked = CheckedCalls()
    with sync_free(checked):
        kept = data._bincount
    with pytest.raises(RuntimeError, match="non-negative"):
        kept(torch.tensor([-1]), 2)
    assert checked.seen == []


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


FIXED = "torchmetrics.functional.classification"
IGNORED = (-1, 0, 2, 7)


@pytest.mark.parametrize("ignore_index", IGNORED)
@pytest.mark.parametrize("average", ["micro", "macro", "none"])
def test_counts_without_a_label(device, average, ignore_index):
    path = f"{FIXED}.stat_scores._multiclass_stat_scores_update"
    generator = torch.Generator().manual_seed(3)
    for number in (0, 1, 50):
        preds, target = (torch.randint(0, 4, (number,), generator=generator) for _ in range(2))
        target[target == 3] = ignore_index
        assert both(device, path, preds, target, 4, 1, average, "global", ignore_index) == ""
    everything = torch.full((5,), ignore_index)
    assert both(device, path, everything, everything, 4, 1, average, "global", ignore_index) == ""


@pytest.mark.parametrize("ignore_index", IGNORED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_confusion_matrices_without_a_label(device, kind, dtype, ignore_index):
    """The functions that users call: the format of one replacement is read by the others."""
    call = original(f"{FIXED}.confusion_matrix.{kind}_confusion_matrix")
    generator = torch.Generator().manual_seed(4)
    settings = {"binary": {}, "multiclass": {"num_classes": 4}, "multilabel": {"num_labels": 3}}
    highest = 4 if kind == "multiclass" else 2
    for scale in (0.0, 1.0, 6.0):
        shape = (40, 3) if kind == "multilabel" else (40,)
        scores = (40, 4) if kind == "multiclass" else shape
        preds = (torch.rand(scores, generator=generator) - 0.2 * scale).to(device)
        target = torch.randint(0, highest, shape, generator=generator).to(dtype).to(device)
        target[:9] = ignore_index
        preds[:9] *= 9  # decides whether predictions are logits, unless it is left out
        given = {"ignore_index": ignore_index, "validate_args": False, **settings[kind]}
        with sync_free(CheckedCalls()):
            found = call(preds, target, **given)
        assert_same(found, call(preds, target, **given))


def test_a_label_that_is_refused_is_not_taken_for_one_to_ignore(device):
    metric = importlib.import_module("torchmetrics.classification").MulticlassConfusionMatrix(
        4, ignore_index=-1, validate_args=False
    )
    call = metric.to(device).update
    given = torch.tensor([0, 1], device=device), torch.tensor([-1, -5], device=device)
    assert "non-negative" in outcome(call, *given)[1]
    checks: list[DeferredCheck] | None = None
    for _ in range(2):
        checked = CheckedCalls(checks)
        with sync_free(checked), checked.during(call, given, {}):
            call(*given)
        checks = checks or [DeferredCheck.of(*seen) for seen in checked.seen]
    every = DeferredChecks()
    every.add(checks)
    assert "non-negative" in outcome(every.raise_if_met)[1]


REGRESSION = "torchmetrics.functional.regression"


@pytest.mark.parametrize("multioutput", ["raw_values", "uniform_average", "variance_weighted"])
@pytest.mark.parametrize("outputs", [(), (1,), (5,)])
def test_scores_of_regressions(device, outputs, multioutput):
    generator = torch.Generator().manual_seed(5)
    for seed in range(20):
        x, y = (torch.randn(9, *outputs, generator=generator).to(device) for _ in range(2))
        if outputs and seed % 2:
            x[:, 0], y[:, -1] = y[:, 0], 3.0  # no error, no variance
        if seed % 5 == 4:
            y = torch.full_like(y, 2.0)
        if seed == 9:
            x = y
        update = original(f"{REGRESSION}.r2._r2_score_update")
        count = torch.tensor(9, device=device)
        sums = update(x, y)[:3]
        path = f"{REGRESSION}.r2._r2_score_compute"
        assert both(device, path, *sums, count, 0, multioutput) == ""
        update = original(f"{REGRESSION}.explained_variance._explained_variance_update")
        path = f"{REGRESSION}.explained_variance._explained_variance_compute"
        assert both(device, path, count, *update(x, y)[1:], multioutput) == ""


def test_r2_of_one_observation(device):
    path = f"{REGRESSION}.r2._r2_score_compute"
    given = [torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.5), torch.tensor(1)]
    assert "at least two samples" in both(device, path, *given)
    given[3] = torch.tensor(2)
    assert both(device, path, *given) == ""


@pytest.mark.parametrize("kind", ["usual", "constant", "one constant", "infinite", "exact"])
@pytest.mark.parametrize("outputs", [1, 4])
def test_correlation(device, outputs, kind):
    path = f"{REGRESSION}.pearson._pearson_corrcoef_compute"
    generator = torch.Generator().manual_seed(6)
    x, y = (torch.randn(9, outputs, generator=generator) for _ in range(2))
    if kind == "constant":
        x, y = torch.ones(9, outputs), torch.ones(9, outputs)
    elif kind == "one constant":
        x[:, 0] = 2.0
    elif kind == "infinite":
        x[0] = float("inf")
    elif kind == "exact":
        y = x * 2
    zeros = [torch.zeros(outputs) for _ in range(8)]
    update = original(f"{REGRESSION}.pearson._pearson_corrcoef_update")
    if outputs == 1:
        x, y = x[:, 0], y[:, 0]
    states = update(x, y, *zeros, outputs)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert both(device, path, *states[2:]) == ""
    # eager's warning, and that of the check; eager gives none if other outputs are finite
    assert len(warned) in {"usual": [0], "exact": [0], "constant": [2]}.get(kind, [0, 2])


def test_matthews_of_many_classes(device):
    path = f"{FIXED}.matthews_corrcoef._matthews_corrcoef_reduce"
    generator = torch.Generator().manual_seed(8)
    for _ in range(20):
        assert both(device, path, torch.randint(0, 9, (4, 4), generator=generator)) == ""
    one_class = torch.zeros(3, 3, dtype=torch.int64)
    assert both(device, path, one_class) == ""
    one_class[1, 1] = 5
    assert both(device, path, one_class) == ""
    assert not SYNC_FREE[path].applies(torch.ones(2, 2))  # 1 of an integer, or a float
    assert not SYNC_FREE[path].applies(torch.ones(3, 2, 2))


def test_a_function_with_other_parameters_is_not_replaced():
    """torchmetrics 1.7.0 has ``_pearson_corrcoef_compute`` with four parameters instead of six."""
    entry = SYNC_FREE["torchmetrics.functional.regression.pearson._pearson_corrcoef_compute"]
    older = lambda var_x, var_y, corr_xy, nb: nb
    assert not has_parameters_of(older, entry.run)
    for path, each in SYNC_FREE.items():
        assert has_parameters_of(original(path), each.run), path
