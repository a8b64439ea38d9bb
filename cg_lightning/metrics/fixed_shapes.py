"""Replacements for functions of torchmetrics that leave values out, so that shapes depend on data.

They compute the same from all values: what is left out counts as nothing, or is chosen at the end.
Counts are integers, and the rest is computed for each element alone, so every bit is equal. Sums of
other numbers would be added in another order: such functions are not replaced.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import data

from cg_lightning.metrics.deferred_checks import CheckedCalls

LEFT_OUT = -(2**40)
"""An integer of this size or below is not counted. A label that is left out becomes this."""
_LOWEST_LABEL = -(2**20)
"""Eager refuses negative labels. Lower ones become this, which is refused as well."""
_LABELS = (torch.int64, torch.int32, torch.bool)


def _with_left_out(target: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, target.to(torch.int64).clamp(min=_LOWEST_LABEL), LEFT_OUT)


def count_multiclass(
    checked: CheckedCalls,
    original: Any,
    preds: Tensor,
    target: Tensor,
    num_classes: int,
    top_k: int = 1,
    average: str | None = "macro",
    multidim_average: str = "global",
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count true and false positives and negatives of labels other than ``ignore_index``."""
    assert ignore_index is not None
    preds, target = preds.flatten(), target.flatten()
    kept = torch.ne(target, ignore_index)
    if average == "micro":
        correct, wrong = (preds == target) & kept, (preds != target) & kept
        tp, fp, fn = correct.sum(), wrong.sum(), wrong.sum()
        return tp, fp, num_classes * kept.sum() - (fp + fn + tp), fn
    pairs = target.to(torch.int64) * num_classes + preds.to(torch.int64)
    counts = data._bincount(torch.where(kept, pairs, LEFT_OUT), minlength=num_classes**2)
    confmat = counts.reshape(num_classes, num_classes)
    tp = confmat.diag()
    fp = confmat.sum(0) - tp
    fn = confmat.sum(1) - tp
    return tp, fp, confmat.sum() - (fp + fn + tp), fn


def ignores_one_label(
    top_k: int, multidim_average: str, ignore_index: int | None, **_: Any
) -> bool:
    """Return True if labels are left out of one count of all values."""
    return ignore_index is not None and top_k == 1 and multidim_average == "global"


def format_multiclass(
    checked: CheckedCalls,
    original: Any,
    preds: Tensor,
    target: Tensor,
    ignore_index: int | None = None,
    convert_to_labels: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return labels, with :data:`LEFT_OUT` instead of the targets to ignore."""
    assert ignore_index is not None
    preds, target = original(preds, target, None, convert_to_labels)
    kept = torch.ne(target, ignore_index)
    return preds.masked_fill(~kept, 0), _with_left_out(target, kept)


def are_labels_ignored(
    target: Tensor, ignore_index: int | None, convert_to_labels: bool, **_: Any
) -> bool:
    """Return True if the result is labels, and some are left out."""
    return ignore_index is not None and convert_to_labels and target.dtype in _LABELS


def format_binary(
    checked: CheckedCalls,
    original: Any,
    preds: Tensor,
    target: Tensor,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    convert_to_labels: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return labels, with :data:`LEFT_OUT` instead of the targets to ignore.

    Whether predictions are logits depends on those that are not left out. 0 decides nothing.
    """
    assert ignore_index is not None
    preds, target = preds.flatten(), target.flatten()
    kept = torch.ne(target, ignore_index)
    preds = preds.masked_fill(~kept, 0)
    preds, target = original(preds, target, threshold, None, convert_to_labels)
    return preds, _with_left_out(target, kept)


def count_multilabel(
    checked: CheckedCalls, original: Any, preds: Tensor, target: Tensor, num_labels: int
) -> Tensor:
    """Count pairs of labels. Those to ignore are negative."""
    pairs = ((2 * target + preds) + 4 * torch.arange(num_labels, device=preds.device)).flatten()
    pairs = torch.where(pairs >= 0, pairs, LEFT_OUT)
    return data._bincount(pairs, minlength=4 * num_labels).reshape(num_labels, 2, 2)


def are_labels(preds: Tensor, target: Tensor, **_: Any) -> bool:
    """Return True if predictions and targets are labels."""
    return target.dtype in _LABELS and not preds.is_floating_point()


def _explained(numerator: Tensor, denominator: Tensor, has_error: Tensor, varies: Tensor) -> Tensor:
    """Return 1 without an error, 0 if only the target does not vary, else what is explained."""
    scores = torch.where(has_error & varies, 1 - (numerator / denominator), 1.0)
    return scores.masked_fill(has_error & ~varies, 0.0)


def _averaged(scores: Tensor, weights: Tensor, multioutput: str) -> Tensor:
    if multioutput == "raw_values":
        return scores
    if multioutput == "uniform_average":
        return torch.mean(scores)
    return torch.sum(weights / torch.sum(weights) * scores)


def r2_score(
    checked: CheckedCalls,
    original: Any,
    sum_squared_obs: Tensor,
    sum_obs: Tensor,
    rss: Tensor,
    num_obs: Tensor,
    adjusted: int = 0,
    multioutput: str = "uniform_average",
) -> Tensor:
    """Compute R2, and refuse fewer than two observations."""
    checked.refuse_if(num_obs < 2)
    tss = sum_squared_obs - sum_obs * (sum_obs / num_obs)
    has_error = ~torch.isclose(rss, torch.zeros_like(rss), atol=1e-4)
    varies = ~torch.isclose(tss, torch.zeros_like(tss), atol=1e-4)
    return _averaged(_explained(rss, tss, has_error, varies), tss, multioutput)


def is_not_adjusted(num_obs: Any, adjusted: int, multioutput: str, **sums: Tensor) -> bool:
    """Return True for plain R2 of sums of one dtype, whose count is on the device."""
    is_plain = type(adjusted) is int and adjusted == 0 and multioutput in _MULTIOUTPUTS
    return is_plain and isinstance(num_obs, Tensor) and _are_alike(**sums)


_MULTIOUTPUTS = ("raw_values", "uniform_average", "variance_weighted")


def _are_alike(**values: Tensor) -> bool:
    dtypes = {value.dtype for value in values.values()}
    return len(dtypes) == 1 and dtypes.pop().is_floating_point


def explained_variance(
    checked: CheckedCalls,
    original: Any,
    num_obs: Any,
    sum_error: Tensor,
    sum_squared_error: Tensor,
    sum_target: Tensor,
    sum_squared_target: Tensor,
    multioutput: str = "uniform_average",
) -> Tensor:
    """Compute the explained variance."""
    mean_error, mean_target = sum_error / num_obs, sum_target / num_obs
    numerator = sum_squared_error / num_obs - (mean_error * mean_error)
    denominator = sum_squared_target / num_obs - (mean_target * mean_target)
    scores = _explained(numerator, denominator, numerator != 0, denominator != 0)
    return _averaged(scores, denominator, multioutput)


def has_sums_of_one_dtype(num_obs: Any, multioutput: str, **sums: Tensor) -> bool:
    """Return True if all sums have one dtype."""
    return _are_alike(**sums)


def pearson(
    checked: CheckedCalls,
    original: Any,
    max_abs_dev_x: Tensor,
    max_abs_dev_y: Tensor,
    var_x: Tensor,
    var_y: Tensor,
    corr_xy: Tensor,
    nb: Tensor,
) -> Tensor:
    """Compute the correlation: NaN, and a warning, where a variance is close to zero."""
    var_x, var_y, corr_xy = var_x / (nb - 1), var_y / (nb - 1), corr_xy / (nb - 1)
    var_x = var_x * torch.pow(max_abs_dev_x, -2)
    var_y = var_y * torch.pow(max_abs_dev_y, -2)
    corr_xy = corr_xy / (max_abs_dev_x * max_abs_dev_y)
    bound = math.sqrt(torch.finfo(var_x.dtype).eps)
    small = (var_x < bound) | (var_y < bound)
    finite_x, finite_y, finite = map(torch.isfinite, (var_x, var_y, corr_xy))
    checked.repeat_if(small.any() | ~finite_x.any() | ~finite_y.any() | ~finite.any())
    valid = ~small & finite_x & finite_y & finite
    correlation = (corr_xy / (var_x * var_y).sqrt()).clamp(-1.0, 1.0)
    return torch.where(valid, correlation, float("nan")).squeeze()


def has_float_variances(nb: Tensor, **values: Tensor) -> bool:
    """Return True if nothing is cast: half precision is, on the CPU."""
    is_known = values["var_x"].dtype in (torch.float32, torch.float64)
    return is_known and _are_alike(**values)


def matthews(checked: CheckedCalls, original: Any, confmat: Tensor) -> Tensor:
    """Compute the coefficient of more than two classes; 0 where it is not defined."""
    confmat = confmat.float()
    tk, pk = confmat.sum(dim=-1), confmat.sum(dim=-2)
    correct, total = torch.trace(confmat), confmat.sum()
    numerator = correct * total - sum(tk * pk)
    denominator = (total**2 - sum(pk * pk)) * (total**2 - sum(tk * tk))
    return torch.where(denominator == 0, 0.0, numerator / torch.sqrt(denominator))


def has_many_classes(confmat: Tensor) -> bool:
    """Return True for more than two classes. For two, the dtype of the result depends on data."""
    return confmat.ndim == 2 and confmat.numel() > 4


def min_max(checked: CheckedCalls, original: Any, metric: Any) -> dict[str, Tensor]:
    """Compute the value of ``MinMaxMetric``, and keep the lowest and the highest.

    What it returns may become the output of a graph, so it is not what the metric keeps.
    """
    value = metric._base_metric.compute()
    highest, lowest = metric.max_val.to(value.device), metric.min_val.to(value.device)
    highest = torch.where(highest < value, value, highest)
    lowest = torch.where(lowest > value, value, lowest)
    metric.max_val, metric.min_val = highest.clone(), lowest.clone()
    return {"raw": value, "max": highest, "min": lowest}


def has_one_kind_of_value(metric: Any) -> bool:
    """Return True if the value is like what is kept. Its metric computes it here, and keeps it."""
    value = metric._base_metric.compute()
    return isinstance(value, Tensor) and all(
        (kept.dtype, kept.shape, kept.requires_grad) == (value.dtype, value.shape, False)
        for kept in (metric.max_val, metric.min_val, value)
    )
