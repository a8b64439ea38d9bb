"""Results of jobs, and the one table of them with which a multirun ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from cg_lightning.app.tables import print_table

_FILE = "cg_lightning.json"


@dataclasses.dataclass(frozen=True)
class JobResult:
    """The result of one job."""

    failed: str = ""
    """Why the job failed, in one sentence; empty if it did not."""
    microseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """The median time of a batch with graphs, by stage."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """The metrics of the run with graphs."""
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Steps by the mode in which they ran."""


def is_one_of_several() -> bool:
    """Whether the job is one of a multirun."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def finish_job(result: JobResult) -> None:
    """Store the result for the table of a multirun; outside of one, a failed job ends the process.

    Raises:
        SystemExit: The job failed, and there are no further jobs to run.
    """
    if not is_one_of_several():
        if result.failed:
            raise SystemExit(result.failed)
        return
    record = {
        "job": HydraConfig.get().job.num,
        "overrides": list(HydraConfig.get().overrides.task),
        **dataclasses.asdict(result),
    }
    (Path(HydraConfig.get().runtime.output_dir) / _FILE).write_text(json.dumps(record))


class MergedTable(Callback):
    """Prints the results of all jobs when a multirun ends."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remove the results of an earlier multirun in the same folder."""
        for file in _files(config):
            file.unlink()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print one row for each job; exit with 1 if one has failed."""
        records = [json.loads(file.read_text()) for file in _files(config)]
        records.sort(key=lambda record: record["job"])
        if not records:  # the jobs of the benchmark have tables of their own
            return
        everywhere = set.intersection(*(set(record["overrides"]) for record in records))
        names = list(dict.fromkeys(name for record in records for name in record["metrics"]))
        rows = [
            [
                str(record["job"]),
                " ".join(each for each in record["overrides"] if each not in everywhere),
                _joined(f"{time:.0f} {stage}" for stage, time in record["microseconds"].items()),
                *(_metric(record["metrics"].get(name)) for name in names),
                _joined(f"{number} {mode}" for mode, number in record["steps"].items()),
                record["failed"] or "ok",
            ]
            for record in records
        ]
        header = ["job", "overrides", "us a batch", *names, "steps", "result"]
        print_table(" ".join(["All jobs", *sorted(everywhere)]), header, rows)
        failed = sum(bool(record["failed"]) for record in records)
        if failed:
            raise SystemExit(f"{failed} of {len(records)} jobs failed.")


def _files(config: DictConfig) -> list[Path]:
    return list(Path(config.hydra.sweep.dir).glob(f"*/{_FILE}"))


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts) or "-"
