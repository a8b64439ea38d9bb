"""The benchmark's figures as lines of JSON, as a table and as a chart."""

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
from cg_lightning.bench.contestants import OTHER_ORDER

Record = dict[str, Any]


def environment() -> Record:
    """Versions, GPU and commit."""
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


def _by_case(records: list[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    cases: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        cases.setdefault((record["stage"], record["case"]), {})[record["contestant"]] = record
    return cases


def limit(case: dict[str, Record]) -> float | None:
    """The least that a step can cost: the loop alone, or the GPU's own time for a graph of it, whichever is more."""
    loop, replay = case.get("loop", {}).get("microseconds"), gpu_time(case)
    return max(loop, replay) if loop and replay else None


def gpu_time(case: dict[str, Record]) -> float | None:
    """The time of a replay, in microseconds; a compiled network, which computes something else, does not count."""
    replays = [
        record["replay"]
        for name, record in case.items()
        if record.get("replay") and name not in OTHER_ORDER
    ]
    return min(replays, default=None)


def table(records: list[Record]) -> str:
    """Microseconds a batch in Markdown; in brackets the spread over the rounds."""
    contestants = list(dict.fromkeys(record["contestant"] for record in records))
    lines = [
        " | ".join(["stage, case", "limit", "replay", *contestants]),
        "|".join(["---"] * (len(contestants) + 3)),
    ]
    for (stage, name), case in _by_case(records).items():
        cells = [
            f"{stage}, {name}",
            f"{limit(case) or float('nan'):.0f}",
            f"{gpu_time(case) or float('nan'):.0f}",
        ]
        for contestant in contestants:
            record = case.get(contestant, {})
            figures = (
                f"{record['microseconds']:.0f} ({record['spread']:.0f})"
                if "microseconds" in record
                else "-"
            )
            cells.append("fails" if "error" in record else figures)
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def write_lines(records: list[Record], path: Path) -> None:
    """Writes a line for the environment, and one for each record."""
    path.write_text("".join(json.dumps(record) + "\n" for record in [environment(), *records]))


def read_lines(path: Path) -> list[Record]:
    """Reads the records of :func:`write_lines`."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def draw(records: list[Record], path: Path) -> None:
    """Draws bars by case, relative to eager, with the limit as a line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    cases = {
        key: case
        for key, case in _by_case(records).items()
        if "microseconds" in case.get("eager", {})
    }
    contestants = [
        name for name in dict.fromkeys(record["contestant"] for record in records) if name != "loop"
    ]
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(cases), 4), layout="constrained")
    width = 0.8 / len(contestants)
    for index, contestant in enumerate(contestants):
        places, heights = [], []
        for place, case in enumerate(cases.values()):
            if "microseconds" in case.get(contestant, {}):
                places.append(place + index * width)
                heights.append(case[contestant]["microseconds"] / case["eager"]["microseconds"])
        axes.bar(places, heights, width, label=contestant)
    for place, case in enumerate(cases.values()):
        if (least := limit(case)) is not None:
            height = least / case["eager"]["microseconds"]
            label = "limit: the loop alone, or the GPU's time" if not place else None
            axes.plot(
                [place - width / 2, place + 0.8 - width / 2],
                [height, height],
                color="black",
                label=label,
            )
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(cases))],
        [f"{case}\n{stage}" for stage, case in cases],
    )
    axes.set_ylabel("time a batch, eager = 1")
    figure.legend(loc="outside upper center", fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
