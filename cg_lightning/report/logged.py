"""The counts as numbers for loggers."""

from __future__ import annotations

import re
from collections import Counter

from cg_lightning.report.counts import Counts


def numbers_to_log(stats: Counts, stage: str) -> dict[str, float]:
    """Return what ``log_stats=True`` sends to the loggers at the end of a stage.

    Args:
        stats: The counts of the run so far.
        stage: The stage.

    Returns:
        Numbers by key. A time that was not taken has no key.

        - ``cuda_graph/<stage>/replays``: replays that made a result; PIECEWISE counts those of each
          submodule.
        - ``cuda_graph/<stage>/eager/<cause>``: steps that ran no graph, by the name of their cause
          or status: ``warm_up``, ``host_sync``, ...
        - ``cuda_graph/<stage>/us_per_replay``: mean host time of a step from graphs, in
          microseconds, without those that captured or compared.
        - ``cuda_graph/<stage>/us_per_eager_step``: the same of the fastest eager warm-up step of
          each shape.
        - ``cuda_graph/<stage>/graph_mib``: graph memory and static inputs, in MiB.
    """
    entries = [entry for entry in stats.entries if entry.stage == stage]
    numbers: dict[str, float] = {"replays": sum(entry.replays for entry in entries)}
    eager: Counter[str] = Counter()
    for record in stats.reasons:
        if (record.stage, record.mode) == (stage, "NONE"):
            assert record.reason is not None, "records of reasons have one"
            eager[re.sub(r"\W+", "_", record.reason.kind.value)] += record.steps
    numbers.update({f"eager/{cause}": steps for cause, steps in sorted(eager.items())})
    times = stats.host_times(stage)
    if times.graph is not None:
        numbers["us_per_replay"] = times.graph * 1e6
    if times.eager is not None:
        numbers["us_per_eager_step"] = times.eager * 1e6
    numbers["graph_mib"] = sum(entry.bytes for entry in entries) / 2**20
    return {f"cuda_graph/{stage}/{name}": float(number) for name, number in numbers.items()}
