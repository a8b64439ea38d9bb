"""Runs a task with graphs and without, and compares all numbers of the two runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from cg_lightning.app.jobs import JobResult
from cg_lightning.app.run import Results, choose_backend, report_at_the_end, run
from cg_lightning.app.tables import print_sentence, print_table
from cg_lightning.backends import resolve_backend
from cg_lightning.core.equality import close_leaf, same_leaf
from cg_lightning.core.tree import flatten, leaf_paths
from cg_lightning.report.summary import print_summary


def _differing_leaf(one: Any, other: Any, root: str, same: Callable[[Any, Any], bool]) -> str:
    leaves, structure = flatten(one)
    others, other_structure = flatten(other)
    if structure != other_structure:
        return f"{root} is built differently"
    for path, leaf, other_leaf in zip(leaf_paths(one, root), leaves, others, strict=True):
        if not same(leaf, other_leaf):
            return f"{path} is {leaf} with graphs, {other_leaf} without"
    return ""


def describe_difference(
    with_graphs: Results, without: Results, same: Callable[[Any, Any], bool] = same_leaf
) -> str:
    """Return the first metric or prediction that differs, with both values.

    The string is empty if all of them are equal.

    Args:
        with_graphs: The results of the run with graphs.
        without: The results of the eager run.
        same: What counts as equal: every bit, or :func:`~cg_lightning.core.equality.close_leaf`.
    """
    return _differing_leaf(
        with_graphs.metrics, without.metrics, "metrics", same
    ) or _differing_leaf(with_graphs.predictions, without.predictions, "predictions", same)


def _print_numbers(with_graphs: Results, without: Results) -> None:
    """Print each metric of both runs; on a GPU the time of a batch as well."""
    rows = [
        [name, f"{float(value):.8g}", f"{float(without.metrics[name]):.8g}"]
        for name, value in with_graphs.metrics.items()
        if name in without.metrics
    ]
    if resolve_backend("auto") is not None:  # the recorder's times mean nothing
        for stage, time in with_graphs.microseconds.items():
            eager = without.microseconds[stage]
            factor = f"{time:.0f} ({eager / time:.1f} times faster)"
            rows.append([f"microseconds a batch, {stage}", factor, f"{eager:.0f}"])
    if rows:
        print_table("Compared with eager", ["", "with graphs", "eager"], rows)


def _counted(results: Results) -> str:
    metrics, batches = len(results.metrics), results.num_predictions
    counts = {
        f"metric{'' if metrics == 1 else 's'}": metrics,
        f"predicted batch{'' if batches == 1 else 'es'}": batches,
    }
    return " and ".join(f"{number} {what}" for what, number in counts.items() if number) or "none"


def run_and_compare(config: DictConfig) -> JobResult:
    """Run a task with graphs, print the summary, run it without, and print the comparison.

    Args:
        config: A config of the schema :class:`~cg_lightning.app.config.AppConfig`.

    Returns:
        The numbers of the run with graphs. It has failed if one of them differs from eager's.
    """
    task: str = config.task.value
    choose_backend(config)
    reports = report_at_the_end(config)
    with_graphs, callback = run(config)
    metrics = {name: float(value) for name, value in with_graphs.metrics.items()}
    result = JobResult("", with_graphs.microseconds, metrics)
    if callback is None:
        if metrics:
            rows = [[name, f"{value:.8g}"] for name, value in metrics.items()]
            print_table("Metrics", ["", "without graphs"], rows)
        print_sentence(
            f"The {task} ran without CUDAGraphCallback, so there is nothing to compare: "
            f"{_counted(with_graphs)}."
        )
        return result
    words = {"NONE": "eager"}
    steps = {words.get(mode, mode): n for mode, n in callback.stats.steps.items() if n}
    result = dataclasses.replace(result, steps=steps)
    if reports:
        print_summary(callback.summary())
    if not config.compare:
        return result
    without, _ = run(config, graphs=False)
    _print_numbers(with_graphs, without)
    # compiled networks and "close" promise less than equal bits
    is_exact = not config.cuda_graph.compile and config.cuda_graph.verify_tolerance == "exact"
    difference = describe_difference(with_graphs, without, same_leaf if is_exact else close_leaf)
    if difference:
        failed = f"The same {task} without graphs differs: {difference}"
        return dataclasses.replace(result, failed=failed)
    print_sentence(
        f"The same {task} without graphs gives {'identical' if is_exact else 'close'} metrics and "
        f"predictions: {_counted(without)}, "
        f"compared {'bit for bit' if is_exact else 'within rounding'} after "
        f"{callback.stats.replays} graph replays."
    )
    return result
