"""The charts of the benchmark, drawn from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cg_lightning.bench.cases import CASES
from cg_lightning.bench.contestants import LOOPS
from cg_lightning.bench.records import OURS, Record, by_case, contestants_of, limit
from cg_lightning.core.stages import TRAIN

TITLES = {
    "eager": "eager",
    "compile": "torch.compile",
    "reduce_overhead": "torch.compile,\nreduce-overhead",
    "make_graphed_callables": "torch.cuda.make_\ngraphed_callables",
    "piecewise": "callback, PIECEWISE",
    "full": "callback, FULL",
    OURS: "callback",
    "compiled_full": "callback, net compiled",
}
"""Names of contestants in charts."""
_LIMIT = "GPU time, or Lightning's empty loop"
_LIGHT, _DARK = "#c8ccd2", "#1f4e85"  # far apart in grey as well


def _method(stage: str) -> str:
    return "trainer.fit" if stage == TRAIN else f"trainer.{stage}"


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "cg_lightning"  # the same records give the same file
    from matplotlib import pyplot

    return pyplot


def draw_all(records: list[Record], path: Path) -> list[Path]:
    """Draw the time of a batch of all contestants: a panel for each case, a row for each stage.

    Args:
        records: Records of a run. Cases without ``eager`` are left out.
        path: The file to write, without a suffix. ``.svg`` and ``.png`` are added.

    Returns:
        The files written; none if there is no case to draw.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    cases = {
        key: case
        for key, case in by_case(records).items()
        if "microseconds" in case.get("eager", {})
    }
    if not cases:
        return []
    pyplot = _pyplot()
    shown = [name for name in contestants_of(records) if name not in LOOPS]
    stages = list(dict.fromkeys(stage for stage, _ in cases))
    names = list(dict.fromkeys(name for _, name in cases))
    figure, grid = pyplot.subplots(
        len(stages),
        len(names),
        figsize=(2.4 + 2.1 * len(names), 0.9 + (0.5 + 0.42 * len(shown)) * len(stages)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for stage, row in zip(stages, grid, strict=True):
        row[0].set_ylabel(_method(stage), fontweight="bold", labelpad=12)
        for name, axes in zip(names, row, strict=True):
            _draw_panel(axes, cases.get((stage, name), {}), shown)
    for name, axes in zip(names, grid[0], strict=True):
        axes.set_title(CASES[name].title if name in CASES else name, fontsize="medium")
    grid[0, 0].invert_yaxis()  # the axis is shared
    _title(figure, "Microseconds a batch: shorter is faster")
    if any(limit(case) is not None for case in cases.values()):
        figure.supxlabel(f"black line: the limit ({_LIMIT})", x=0.99, ha="right", fontsize=10)
    return _save(figure, path)


def _draw_panel(axes: Any, case: dict[str, Record], shown: list[str]) -> None:
    """Draw a bar for each contestant, with its time, and a line for the limit."""
    times = [case.get(name, {}).get("microseconds", 0.0) for name in shown]
    colors = [_DARK if name == OURS else _LIGHT for name in shown]
    bars = axes.barh([TITLES.get(name, name) for name in shown], times, color=colors)
    least = limit(case)
    longest = max([*times, least or 0.0, 1.0])
    if least is not None:
        axes.axvline(least, color="black", lw=1.5)
    for name, bar, time in zip(shown, bars, times, strict=True):
        if time:
            weight = "bold" if name == OURS else "normal"
            middle = bar.get_y() + bar.get_height() / 2
            # a text over the line could not be read
            axes.text(
                max(time, least or 0.0) + longest * 0.03, middle, f"{time:,.0f}",
                va="center", fontweight=weight,
            )  # fmt: skip
    axes.set_xlim(0, longest * 1.3)
    _hide_frame(axes)


def _hide_frame(axes: Any) -> None:
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=15, fontweight="bold")


def _save(figure: Any, path: Path) -> list[Path]:
    files = [path.with_suffix(".svg"), path.with_suffix(".png")]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=150, metadata={"Software": None})
    _pyplot().close(figure)
    return files


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
        for (case_stage, name), case in by_case(records).items()
        if case_stage == stage
        and all("microseconds" in case.get(who, {}) for who in ("eager", OURS))
    ]
    if not cases:
        return []
    cases.sort(key=lambda item: -item[1]["eager"]["microseconds"])
    # without a GPU, graphs and even the empty loop may take longer than eager
    longest = max(
        time
        for _, case in cases
        for time in (case["eager"]["microseconds"], case[OURS]["microseconds"], limit(case) or 0.0)
    )
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
    _hide_frame(axes)
    _title(figure, f"Time of one batch in {_method(stage)}")
    figure.supxlabel(where, x=0.99, ha="right", fontsize=8.5, color="#505050")
    legend = {"eager, as Lightning runs it": without, "with the callback": graphed}
    if any(limit(case) is not None for _, case in cases):
        legend[f"limit: {_LIMIT}"] = Line2D(
            [], [], color="black", lw=1.8, marker="|", markersize=14, ls="none", markeredgewidth=1.8
        )
    # the longest bars are above, so this corner is free
    axes.legend(legend.values(), legend.keys(), loc="lower right", frameon=False, handlelength=1.2)
    return _save(figure, path)
