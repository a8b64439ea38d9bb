"""The records of the benchmark as lines of JSON, as a table and as charts.

``python -m cg_lightning.bench.report RECORDS.jsonl IMAGE`` draws the chart of the README,
``IMAGE.svg`` and ``IMAGE.png``, from the records of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torchmetrics

from cg_lightning.backends import cuda
from cg_lightning.bench.cases import CASES
from cg_lightning.bench.contestants import OTHER_ORDER

Record = dict[str, Any]

OURS = "full_and_piecewise"
"""The contestant that charts call "with the callback": its default mode."""
_LIGHT, _DARK = "#c8ccd2", "#1f4e85"  # far apart in grey as well


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


def _by_case(records: list[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    cases: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        if "contestant" not in record:  # the record of costs
            continue
        cases.setdefault((record["stage"], record["case"]), {})[record["contestant"]] = record
    return cases


def _contestants(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(record["contestant"] for record in records if "contestant" in record))


def limit(case: dict[str, Record]) -> float | None:
    """Return the least time that a batch can take, or None if it was not measured.

    It is the time of Lightning's loop without a step, or the GPU's own time for the graph of the
    step, whichever is more.
    """
    loop, replay = case.get("loop", {}).get("microseconds"), gpu_time(case)
    return max(loop, replay) if loop and replay else None


def gpu_time(case: dict[str, Record]) -> float | None:
    """Return the time of one replay, in microseconds.

    Compiled networks do not count, because they compute something else.
    """
    replays = [
        record["replay"]
        for name, record in case.items()
        if record.get("replay") and name not in OTHER_ORDER
    ]
    return min(replays, default=None)


def table(records: list[Record]) -> str:
    """Return microseconds per batch as a Markdown table, with the spread of rounds in brackets."""
    contestants = _contestants(records)
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
            times = (
                f"{record['microseconds']:.0f} ({record['spread']:.0f})"
                if "microseconds" in record
                else "-"
            )
            cells.append("fails" if "error" in record else times)
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


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


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "cg_lightning"  # the same records give the same file
    from matplotlib import pyplot

    return pyplot


def draw_all(records: list[Record], path: Path) -> None:
    """Draw all contestants of each case relative to eager, with the limit as a line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    cases = {
        key: case
        for key, case in _by_case(records).items()
        if "microseconds" in case.get("eager", {})
    }
    contestants = [name for name in _contestants(records) if name != "loop"]
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
    axes.set_ylabel("time of a batch, eager = 1")
    figure.legend(loc="outside upper center", fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_before_after(
    records: list[Record], path: Path, *, stage: str = "validate", where: str = ""
) -> list[Path]:
    """Draw two bars for each case: the time of a batch before and with the callback.

    Args:
        records: Records of a run with the contestants ``eager`` and :data:`OURS`; ``loop`` adds
            the limit. Other records are ignored.
        path: The file to write, without a suffix. ``.svg`` and ``.png`` are added.
        stage: The stage to draw.
        where: Hardware and versions, printed below the title.

    Returns:
        The files written; none if no case has both contestants.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    from matplotlib.lines import Line2D

    cases = [
        (CASES[name].title or name if name in CASES else name, case)
        for (case_stage, name), case in _by_case(records).items()
        if case_stage == stage
        and all("microseconds" in case.get(who, {}) for who in ("eager", OURS))
    ]
    if not cases:
        return []
    cases.sort(key=lambda item: -item[1]["eager"]["microseconds"])
    longest = cases[0][1]["eager"]["microseconds"]
    figure, axes = pyplot.subplots(figsize=(8.5, 1.5 + 0.78 * len(cases)), layout="constrained")
    for row, (_, case) in enumerate(cases):
        before, after = case["eager"]["microseconds"], case[OURS]["microseconds"]
        least, end = limit(case), after
        without = axes.barh(row - 0.19, before, 0.36, color=_LIGHT)
        graphed = axes.barh(row + 0.19, after, 0.36, color=_DARK)
        if least is not None:
            axes.plot([least] * 2, [row - 0.03, row + 0.43], color="black", lw=1.8)
            end = max(after, least)
        gap = longest * 0.012
        axes.text(before + gap, row - 0.19, f"{before:,.0f} µs", va="center")
        after_text = f"{after:,.0f} µs, {before / after:.1f}x faster"
        axes.text(end + gap, row + 0.19, after_text, va="center", fontweight="bold")
    axes.set_yticks(range(len(cases)), [title for title, _ in cases])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.13)
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    title = f"Time of one batch in trainer.{stage}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")
    figure.supxlabel(where, x=0.99, ha="right", fontsize=8.5, color="#505050")
    legend = {"eager, as Lightning runs it": without, "with the callback": graphed}
    if any(limit(case) is not None for _, case in cases):
        legend["limit: GPU time, or Lightning's empty loop"] = Line2D(
            [], [], color="black", lw=1.8, marker="|", markersize=14, ls="none", markeredgewidth=1.8
        )
    # the longest bars are above, so this corner is free
    axes.legend(legend.values(), legend.keys(), loc="lower right", frameon=False, handlelength=1.2)
    files = [path.with_suffix(".svg"), path.with_suffix(".png")]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return files


def describe_environment(record: Record) -> str:
    """Return hardware and versions as one line."""
    return f"{record['gpu'] or 'no GPU'}, torch {record['torch']}, lightning {record['lightning']}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the chart of the README from the records of an earlier run."""
    parser = argparse.ArgumentParser(prog="python -m cg_lightning.bench.report")
    parser.add_argument("records", type=Path, help="lines of JSON that task=bench wrote")
    parser.add_argument("image", type=Path, help="file to write, without .svg and .png")
    parser.add_argument("--stage", default="validate", help="validate or predict")
    given = parser.parse_args(arguments)
    files = draw_before_after(
        read_lines(given.records),
        given.image,
        stage=given.stage,
        where=describe_environment(read_environment(given.records)),
    )
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
