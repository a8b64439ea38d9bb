"""The metrics of a module, and which of their attributes a replay can bring up to date."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_mean

from cg_lightning.modules.kinds import is_metric


def metrics_of(module: nn.Module) -> list[nn.Module]:
    """Gives all metrics and collections in ``module``, inner ones too."""
    return [child for child in module.modules() if is_metric(child)]


@functools.cache
def bookkeeping() -> frozenset[str]:
    """Attributes that torchmetrics and Lightning keep for each metric.

    What a step sets them to does not depend on what they were, except for ``_update_count``, which
    it counts up. ``_dtype`` is set when a metric is moved to a device, which ``self.log`` does, to
    torch's default dtype at that time.
    """
    return frozenset(
        {
            "_computed",
            "_dtype",
            "_forward_cache",
            "_update_count",
            "_to_sync",
            "_should_unsync",
            "_is_synced",
            "_cache",
            "_enable_grad",
        }
        | {"compute_on_cpu", "_state_is_copy", "has_reset"}
    )


def state_names(module: nn.Module) -> set[str]:
    """Gives the names of the states that ``module`` answers for; a collection has none."""
    return set(module._defaults) if isinstance(module, Metric) else set()


def states_of(module: nn.Module) -> Mapping[str, object]:
    """Gives the default of each state that ``module`` itself holds; a wrapper may only pass on those of its metric."""
    if not isinstance(module, Metric):
        return {}
    passes_on = any(
        isinstance(child, Metric) and child._defaults is module._defaults
        for child in module.children()
    )
    return {} if passes_on else module._defaults


def averages_by_count(module: nn.Module) -> bool:
    """Whether ``forward`` divides a state by the number of updates, which is a Python number (``Metric._reduce_states``)."""
    if (
        not isinstance(module, Metric)
        or module.full_state_update is not False
        or module.dist_sync_on_step
    ):
        return False
    return any(reduction is dim_zero_mean for reduction in module._reductions.values())
