"""Replacements for functions that wait for the device. Only captures use them.

===============================================  =================================================
function                                         in a capture
===============================================  =================================================
``_bincount`` with a known ``minlength``         adds ones at the indices; refuses other indices
``_cast_and_nan_check_input`` of aggregators     refuses NaN, or skips it if there is one value
``normalize_logits_if_needed`` (on the CPU)      selects on the device
``_*_stat_scores_tensor_validation``             counts or compares values on the device
``_*_confusion_matrix_tensor_validation``        likewise
``_*_precision_recall_curve_tensor_validation``  likewise
``ignore_index`` in counts and confusion matrices counts nothing for it (:mod:`.fixed_shapes`)
R2, Pearson, explained variance, Matthews        chooses on the device (likewise)
``MinMaxMetric``                                 likewise
``torch.linalg.cholesky``, ``gaussian_nll_loss`` check on the device (:mod:`.argument_checks`)
``torch.distributions``: parameters and samples  likewise
===============================================  =================================================

"Refuses" means that eager's error is raised later (:mod:`~cg_lightning.metrics.deferred_checks`).
The validations also check shapes and dtypes. These are part of the key, and the eager steps before
the capture have checked them. ``tests/test_sync_free.py`` compares each replacement with its
original.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import pkgutil
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, MinMetric, SumMetric

from cg_lightning.backends.imported_functions import put_back_in_others
from cg_lightning.metrics import argument_checks, fixed_shapes
from cg_lightning.metrics.argument_checks import RepeatedCall
from cg_lightning.metrics.deferred_checks import CheckedCalls


@dataclasses.dataclass(frozen=True)
class SyncFree:
    """One replacement."""

    run: Callable[..., Any]
    """The replacement: ``run(checked, original, *args, **kwargs)``."""
    condition: Callable[..., bool] | None = None
    """Returns True if the replacement can be used. It is given the arguments as ``run`` names them.

    None: it can always be used.
    """
    repeat: Callable[..., RepeatedCall] | None = None
    """Returns the call that raises eager's error: ``repeat(original, *args, **kwargs)``.

    None: the call itself. It must be given if the tensors are no arguments of the call.
    """

    def applies(self, *args: Any, **kwargs: Any) -> bool:
        """Return True if the replacement can be used for these arguments of the original."""
        if self.condition is None:
            return True
        try:
            given = inspect.signature(self.run).bind(None, None, *args, **kwargs)
        except TypeError:  # arguments that only the original may know
            return False
        given.apply_defaults()
        del given.arguments["checked"], given.arguments["original"]
        return self.condition(**given.arguments)


def _is_other_than(values: Tensor, *allowed: int | None) -> Tensor:
    other = torch.ones_like(values, dtype=torch.bool)
    for value in allowed:
        if value is not None:
            other &= values != value
    return other.any()


def _has_more_values_than(values: Tensor, limit: int) -> Tensor:
    ordered = values.flatten().sort().values
    return (ordered[1:] != ordered[:-1]).sum() + min(1, ordered.numel()) > limit


def bincount(
    checked: CheckedCalls, original: Any, x: Tensor, minlength: int | None = None
) -> Tensor:
    """Count equal integers of shape ``(values,)``; return counts of shape ``(minlength,)``.

    Those that :mod:`.fixed_shapes` has left out are not counted.

    With deterministic algorithms the original does not wait for the device, so it is called.
    """
    if minlength is None or torch.are_deterministic_algorithms_enabled():
        counted: Tensor = original(x, minlength)
        return counted
    outside = (x < 0) | (x >= minlength)
    refused = outside & (x > fixed_shapes.LEFT_OUT) if x.dtype is torch.int64 else outside
    checked.refuse_if(refused.any())
    index = torch.where(outside, minlength, x).to(torch.int64)
    counts = torch.zeros(minlength + 1, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))[:minlength]


def normalize_logits_if_needed(
    checked: CheckedCalls, original: Any, tensor: Tensor, normalization: str | None
) -> Tensor:
    """Apply sigmoid or softmax, unless all values are between 0 and 1."""
    if not normalization or tensor.device.type != "cpu":
        chosen: Tensor = original(tensor, normalization)
        return chosen
    normalized = tensor.sigmoid() if normalization == "sigmoid" else torch.softmax(tensor, dim=1)
    return torch.where(torch.all((tensor >= 0) * (tensor <= 1)), tensor, normalized)


def _named(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def two_values(checked: CheckedCalls, original: Any, *args: Any, **kwargs: Any) -> None:
    """Check that targets and label predictions are 0 or 1. A target may be ``ignore_index``."""
    given = _named(original, args, kwargs)
    checked.refuse_if(_is_other_than(given["target"], 0, 1, given["ignore_index"]), given["target"])
    if not given["preds"].is_floating_point():
        checked.refuse_if(_is_other_than(given["preds"], 0, 1), given["preds"])


def as_many_values_as_classes(
    checked: CheckedCalls, original: Any, *args: Any, **kwargs: Any
) -> None:
    """Check that label predictions and targets have no more distinct values than classes."""
    given = _named(original, args, kwargs)
    if given["num_classes"] is None or given["preds"].is_floating_point():
        return
    limit = given["num_classes"] + (given["ignore_index"] is not None)
    for values in (given["target"], given["preds"]):
        checked.refuse_if(_has_more_values_than(values, limit), values)


def as_many_targets_as_classes(
    checked: CheckedCalls, original: Any, *args: Any, **kwargs: Any
) -> None:
    """Check that targets have no more distinct values than classes."""
    given = _named(original, args, kwargs)
    limit = given["num_classes"] + (given["ignore_index"] is not None)
    checked.refuse_if(_has_more_values_than(given["target"], limit), given["target"])


_NEUTRAL: dict[type, float] = {
    MeanMetric: 0.0,
    SumMetric: 0.0,
    MaxMetric: -math.inf,
    MinMetric: math.inf,
}
"""The neutral value of each aggregation."""


def has_one_value(metric: nn.Module, x: Any, weight: Any) -> bool:
    """Return True if NaN is refused, or can be skipped without a change of shape."""
    if not isinstance(x, Tensor) or not (weight is None or isinstance(weight, Tensor)):
        return False
    left_out = (
        metric.nan_strategy in ("warn", "ignore")
        and metric.__class__ in _NEUTRAL
        and x.numel() == 1
    )
    return metric.nan_strategy == "error" or left_out


def without_nan(
    checked: CheckedCalls, original: Any, metric: Any, x: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Refuse NaN (``error``), or replace it by the neutral value.

    With ``warn``, eager's warning is given when the state is read.
    """
    nans = torch.isnan(x) if weight is None else torch.isnan(x) | torch.isnan(weight)
    weight = torch.ones_like(x) if weight is None else weight
    if metric.nan_strategy == "error":
        checked.refuse_if(nans.any())
    else:
        if metric.nan_strategy == "warn":
            checked.repeat_if(nans.any())
        weight = weight.masked_fill(nans, 0)
        x = x.masked_fill(nans, _NEUTRAL[metric.__class__]) if x.is_floating_point() else x
    return x.to(metric.dtype), weight.to(metric.dtype)


def repeat_count(original: Any, x: Tensor, minlength: int) -> argument_checks.RepeatedCall:
    """Return the call that refuses such values: eager counts only those that are not left out.

    The error is that of the caller, which arranges the counts: a larger value makes them too many.
    """
    side = math.isqrt(minlength)
    shape = (side, side) if side**2 == minlength else (minlength // 4, 2, 2)

    def count(x: Tensor) -> Tensor:
        given = x[x > fixed_shapes.LEFT_OUT] if x.dtype is torch.int64 else x
        counted: Tensor = original(given, minlength)
        return counted.reshape(shape)

    return argument_checks.RepeatedCall(count, (x,), {})


def _knows_length(minlength: int | None, **_: Any) -> bool:
    return minlength is not None


_CLASSIFICATION = "torchmetrics.functional.classification"
_CURVE = f"{_CLASSIFICATION}.precision_recall_curve"
_MATRIX = f"{_CLASSIFICATION}.confusion_matrix"
_SCORES = f"{_CLASSIFICATION}.stat_scores"
_REGRESSION = "torchmetrics.functional.regression"
_DISTRIBUTION = "torch.distributions.distribution.Distribution"
_TWO, _AS_MANY = SyncFree(two_values), SyncFree(as_many_values_as_classes)
SYNC_FREE: dict[str, SyncFree] = {
    "torchmetrics.utilities.data._bincount": SyncFree(bincount, _knows_length, repeat_count),
    "torchmetrics.utilities.compute.normalize_logits_if_needed": SyncFree(
        normalize_logits_if_needed
    ),
    "torchmetrics.aggregation.BaseAggregator._cast_and_nan_check_input": SyncFree(
        without_nan, has_one_value
    ),
    f"{_SCORES}._binary_stat_scores_tensor_validation": _TWO,
    f"{_SCORES}._multilabel_stat_scores_tensor_validation": _TWO,
    f"{_SCORES}._multiclass_stat_scores_tensor_validation": _AS_MANY,
    f"{_MATRIX}._binary_confusion_matrix_tensor_validation": _TWO,
    f"{_MATRIX}._multilabel_confusion_matrix_tensor_validation": _TWO,
    f"{_MATRIX}._multiclass_confusion_matrix_tensor_validation": _AS_MANY,
    f"{_CURVE}._binary_precision_recall_curve_tensor_validation": _TWO,
    f"{_CURVE}._multiclass_precision_recall_curve_tensor_validation": SyncFree(
        as_many_targets_as_classes
    ),
    f"{_SCORES}._multiclass_stat_scores_update": SyncFree(
        fixed_shapes.count_multiclass, fixed_shapes.ignores_one_label
    ),
    f"{_MATRIX}._multiclass_confusion_matrix_format": SyncFree(
        fixed_shapes.format_multiclass, fixed_shapes.are_labels_ignored
    ),
    f"{_MATRIX}._binary_confusion_matrix_format": SyncFree(
        fixed_shapes.format_binary, fixed_shapes.are_labels_ignored
    ),
    f"{_MATRIX}._multilabel_confusion_matrix_update": SyncFree(
        fixed_shapes.count_multilabel, fixed_shapes.are_labels
    ),
    f"{_REGRESSION}.r2._r2_score_compute": SyncFree(
        fixed_shapes.r2_score, fixed_shapes.is_not_adjusted
    ),
    f"{_REGRESSION}.explained_variance._explained_variance_compute": SyncFree(
        fixed_shapes.explained_variance, fixed_shapes.has_sums_of_one_dtype
    ),
    f"{_REGRESSION}.pearson._pearson_corrcoef_compute": SyncFree(
        fixed_shapes.pearson, fixed_shapes.has_float_variances
    ),
    f"{_CLASSIFICATION}.matthews_corrcoef._matthews_corrcoef_reduce": SyncFree(
        fixed_shapes.matthews, fixed_shapes.has_many_classes
    ),
    "torchmetrics.wrappers.minmax.MinMaxMetric.compute": SyncFree(
        fixed_shapes.min_max, fixed_shapes.has_one_kind_of_value
    ),
    "torch.linalg.cholesky": SyncFree(argument_checks.cholesky, argument_checks.may_come_later),
    "torch.nn.functional.gaussian_nll_loss": SyncFree(
        argument_checks.gaussian_nll_loss, argument_checks.takes_tensors
    ),
    f"{_DISTRIBUTION}.__init__": SyncFree(
        argument_checks.valid_parameters,
        argument_checks.checks_parameters,
        argument_checks.repeat_init,
    ),
    f"{_DISTRIBUTION}._validate_sample": SyncFree(
        argument_checks.valid_sample, argument_checks.checks_sample, argument_checks.repeat_sample
    ),
}


@functools.cache
def _original(path: str) -> Callable[..., Any] | None:
    try:
        found: Callable[..., Any] = pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None
    return found if has_parameters_of(found, SYNC_FREE[path].run) else None


def has_parameters_of(original: Callable[..., Any], replacement: Callable[..., Any]) -> bool:
    """Return True if a replacement takes what a function takes.

    Another version of torchmetrics may have a function of the same name with other parameters.
    """
    if not isinstance(original, types.FunctionType):  # a function of PyTorch that is written in C
        return True
    try:
        inspect.signature(replacement).bind(None, None, *inspect.signature(original).parameters)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def _places(number_of_modules: int) -> dict[str, list[tuple[Any, str]]]:
    """Return the modules that use each function, with its name in each, by its path.

    For a method, return its class and its name. A function of PyTorch may have another name only in
    torchmetrics: the diagnosis then finds it elsewhere.

    Args:
        number_of_modules: Number of imported modules. If it changes, they are searched again.
    """
    places: dict[str, list[tuple[Any, str]]] = {}
    paths: dict[int, str] = {}
    for path in SYNC_FREE:
        original = _original(path)
        owner, _, name = path.rpartition(".")
        if original is not None and isinstance(pkgutil.resolve_name(owner), type):
            places[path] = [(pkgutil.resolve_name(owner), name)]
        elif original is not None:
            paths[id(original)] = path
    names = {path.rpartition(".")[2] for path in paths.values()}
    for path, module in list(sys.modules.items()):
        members: dict[str, Any] = getattr(module, "__dict__", {})
        of_torchmetrics = path.split(".")[0] == "torchmetrics"
        for used in list(members) if of_torchmetrics else names & members.keys():
            found = paths.get(id(_behind(members[used])))
            if found is not None:
                places.setdefault(found, []).append((module, used))
    return places


_BEHIND = "_cg_lightning_original"
"""The attribute of a function of ours that has the function which it replaces."""


def _behind(value: Any) -> Any:
    """Return the function that a function of ours replaces. Other values are returned as such."""
    return vars(value).get(_BEHIND, value) if type(value) is types.FunctionType else value


class _Replacement:
    """What is called instead of a function, in this thread and until it is ended.

    A step can keep it, for example in a module that it imports. It is the original then.

    Args:
        original: The function; that of another replacement if they are nested.
        replacement: What is called instead.
    """

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        self._is_active = True
        thread = threading.get_ident()

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            is_replaced = self._is_active and threading.get_ident() == thread
            return (replacement if is_replaced else original)(*args, **kwargs)

        setattr(function, _BEHIND, _behind(original))
        self.original = original
        self.function = function

    def end(self) -> None:
        """Call the original from now on."""
        self._is_active = False


@contextlib.contextmanager
def replacing(
    make: Callable[[Callable[..., Any], SyncFree], Callable[..., Any]],
    metrics: Iterable[nn.Module] = (),
) -> Iterator[None]:
    """Replace each function of the table by ``make(original, sync_free)``, for this thread.

    Metrics have methods of their own, which ``Metric.__init__`` stores. Those of ``metrics`` are
    replaced as well.

    A function that this version of torchmetrics does not have is skipped. If its successor waits
    for the device, the diagnosis finds it.
    """
    places_of = _places(len(sys.modules))
    imported = list(sys.modules)
    replacements: list[_Replacement] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_end, replacements, imported)
        for path, sync_free in SYNC_FREE.items():
            places = places_of.get(path)
            if places:
                original = getattr(*places[0])
                replacement = _Replacement(original, make(original, sync_free))
                replacements.append(replacement)
                for owner, name in places:
                    stack.callback(setattr, owner, name, vars(owner)[name])
                    setattr(owner, name, replacement.function)
                for metric in metrics:
                    stored = vars(metric).get(name)
                    if isinstance(stored, types.MethodType) and stored.__func__ is original:
                        stack.callback(vars(metric).__setitem__, name, stored)
                        vars(metric)[name] = types.MethodType(replacement.function, metric)
        yield


def _end(replacements: list[_Replacement], imported: list[str]) -> None:
    """End replacements. Modules other than those ``imported`` before them get the originals."""
    for replacement in replacements:
        replacement.end()
    put_back_in_others(imported, [(each.original, each.function) for each in replacements])


def sync_free(
    checked: CheckedCalls, metrics: Iterable[nn.Module] = ()
) -> contextlib.AbstractContextManager[None]:
    """While this is entered, functions of the table do not wait for the device.

    Args:
        checked: Receives the calls that eager would refuse.
        metrics: The metrics of the step; see :func:`replacing`.
    """

    def make(original: Callable[..., Any], replacement: SyncFree) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            if not replacement.applies(*args, **kwargs):
                return original(*args, **kwargs)
            call = RepeatedCall(original, args, kwargs)
            if replacement.repeat is not None:
                call = replacement.repeat(original, *args, **kwargs)
            with checked.during(*call):
                return replacement.run(checked, original, *args, **kwargs)

        return function

    return replacing(make, metrics)
