"""The records of the benchmark, as lines of JSON, and the limit that follows from them."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import lightning
import torch
import torchmetrics

from cg_lightning.backends import cuda
from cg_lightning.bench.contestants import LOOPS, OTHER_ORDER

Record = dict[str, Any]

OURS = "full_and_piecewise"
"""The contestant that tables and charts call "callback": its default mode."""


def environment() -> Record:
    """Return versions, GPU and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "gpu": cuda.device_name() if cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "lightning": lightning.__version__,
        "torchmetrics": torchmetrics.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


def by_case(records: list[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """Return the records by stage and case, then by contestant."""
    cases: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        if "contestant" not in record:  # the record of costs
            continue
        cases.setdefault((record["stage"], record["case"]), {})[record["contestant"]] = record
    return cases


def contestants_of(records: list[Record]) -> list[str]:
    """Return the names of all contestants, in the order of their first records."""
    return list(dict.fromkeys(record["contestant"] for record in records if "contestant" in record))


def limit(case: dict[str, Record]) -> float | None:
    """Return the least time that a batch can take, or None if it was not measured.

    It is the time of Lightning's loop without a step, or the GPU's own time, whichever is more. The
    loop of training contains the optimizer, and the GPU's time is that of the closure and the
    optimizer.
    """
    loop, replay = case.get("loop", {}).get("microseconds"), gpu_time(case)
    return max(loop, replay + (optimizer_time(case) or 0.0)) if loop and replay else None


def gpu_time(case: dict[str, Record]) -> float | None:
    """Return the time of one replay of the step or closure, in microseconds.

    Compiled networks do not count, because they compute something else.
    """
    replays = [
        record["replay"]
        for name, record in case.items()
        if record.get("replay") and name not in (*OTHER_ORDER, *LOOPS)
    ]
    return min(replays, default=None)


def optimizer_time(case: dict[str, Record]) -> float | None:
    """Return the GPU's time for clipping and the optimizer, in microseconds; None: no training."""
    time: float | None = case.get("loop", {}).get("replay")
    return time


def write_lines(records: list[Record], path: Path) -> None:
    """Write one line for the environment and one line for each record."""
    path.write_text("".join(json.dumps(record) + "\n" for record in [environment(), *records]))


def read_lines(path: Path) -> list[Record]:
    """Return the records that :func:`write_lines` wrote, without the environment."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def read_environment(path: Path) -> Record:
    """Return the environment that :func:`write_lines` wrote."""
    record: Record = json.loads(path.read_text().splitlines()[0])
    return record


def describe_environment(record: Record) -> str:
    """Return hardware and versions as one line."""
    return f"{record['gpu'] or 'no GPU'}, torch {record['torch']}, lightning {record['lightning']}"
