"""The counts as a plain table in 80 columns. What is alike is grouped: at most 20 lines a stage."""

from __future__ import annotations

import os
import textwrap
from collections import defaultdict
from collections.abc import Sequence

from cg_lightning.core.reasons import Reason, Status
from cg_lightning.report.stats import OTHER_SHAPES, CUDAGraphStats, EntryRecord, StepsRecord

MOST_GRAPHS = 6
"""Rows of graphs that are shown for one stage."""
MOST_REASONS = 4
"""Reasons that are shown for one stage, as long as there is room for them."""
MOST_AGAIN = 2
"""Changes for which graphs were captured again that are shown for one stage."""
WIDTH = 80
"""Columns. A word that is longer, such as a path, is not broken."""
_MOST_LINES = 20  # of one stage
_MOST_LINES_OF_A_REASON = 4
_MOST_SHAPES = 3
_FEW_SHAPES = 5  # fewer shapes than this are none too many
_WORDS = {"NONE": "eager", "PIECEWISE": "PIECEWISE", "FULL": "FULL"}
_HEADERS = ("mode", "target", "shapes", "captures", "replays", "capture ms", "MiB")
_NUMBERS = 3  # columns from here on are aligned to the right


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    for column in (2, 1):  # shapes, then targets
        excess = sum(widths) + 2 * len(widths) - WIDTH
        widths[column] = min(widths[column], max(widths[column] - excess, 12))

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column >= _NUMBERS else _shortened(cell, width).ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  " + "  ".join(cells).rstrip()

    return [line(headers), *(line(row) for row in rows)]


def _wrapped(text: str, indent: int = 2, most_lines: int | None = None) -> list[str]:
    """Break a sentence into lines; paths in the working directory are shown relative to it."""
    return textwrap.wrap(
        text.replace(f"{os.getcwd()}{os.sep}", ""),
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        max_lines=most_lines,
        placeholder=" ...",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _join(names: Sequence[str], what: str) -> str:
    shown = list(dict.fromkeys(names))
    if len(shown) <= _MOST_SHAPES:
        return " | ".join(shown)
    return f"{len(shown)} {what}"


def _row(entries: Sequence[EntryRecord]) -> tuple[str, ...]:
    return (
        entries[0].mode,
        _join([entry.target for entry in entries], "targets"),
        _join([entry.shapes for entry in entries], "shapes"),
        str(sum(entry.captures for entry in entries)),
        str(sum(entry.replays for entry in entries)),
        f"{sum(entry.seconds for entry in entries) * 1e3:.1f}",
        f"{sum(entry.bytes for entry in entries) / 2**20:.1f}",
    )


def _graph_rows(entries: Sequence[EntryRecord]) -> list[tuple[str, ...]]:
    """Return a row for each graph; if there are too many, one for each target; if those are too many, one for the rest."""
    if len(entries) <= MOST_GRAPHS:
        return [_row([entry]) for entry in entries]
    groups: dict[tuple[str, str], list[EntryRecord]] = defaultdict(list)
    for entry in entries:
        groups[entry.mode, entry.target].append(entry)
    targets = sorted(groups.values(), key=lambda group: -sum(entry.replays for entry in group))
    if len(targets) <= MOST_GRAPHS:
        return [_row(group) for group in targets]
    shown, rest = targets[: MOST_GRAPHS - 1], targets[MOST_GRAPHS - 1 :]
    return [*(_row(group) for group in shown), _row([entry for group in rest for entry in group])]


def _again_lines(entries: Sequence[EntryRecord]) -> list[str]:
    """Return what had changed for graphs that were captured again, each sentence once."""
    groups: dict[str, list[EntryRecord]] = defaultdict(list)
    for entry in entries:
        if entry.why_again:
            groups[entry.why_again].append(entry)
    lines: list[str] = []
    for why, group in list(groups.items())[:MOST_AGAIN]:
        targets = _join([entry.target for entry in group], "targets")
        lines += _wrapped(f"{targets} captured again: {why}")
    return lines


def _reason_lines(records: Sequence[StepsRecord], room: int) -> list[str]:
    groups: dict[tuple[str, Reason], list[StepsRecord]] = defaultdict(list)
    for record in records:
        assert record.reason is not None, "only records with a reason are shown"
        groups[record.mode, record.reason].append(record)
    ordered = sorted(groups.items(), key=lambda item: -sum(record.steps for record in item[1]))
    lines: list[str] = []
    shown = 0
    for (mode, reason), group in ordered[:MOST_REASONS]:
        steps = sum(record.steps for record in group)
        shapes = _join([record.shapes for record in group], "shapes")
        text = f"{steps} {_WORDS[mode]} ({shapes}): {reason}"
        block = _wrapped(text, most_lines=_MOST_LINES_OF_A_REASON)
        if reason.remedy:
            block += _wrapped(f"remedy: {reason.remedy}", indent=4)
        if shown and len(lines) + len(block) + (shown + 1 < len(ordered)) > room:
            break
        lines += block
        shown += 1
    rest = [record for _, group in ordered[shown:] for record in group]
    if rest:
        steps = sum(record.steps for record in rest)
        lines.append(f"  {steps} steps for {len(ordered) - shown} other reasons: see stats.reasons")
    return lines


def _time_lines(stats: CUDAGraphStats, backend: str, stage: str) -> list[str]:
    """What a step takes in graphs and without, as far as the host knows without waiting for a device."""
    lines = []
    for mode in ("FULL", "PIECEWISE"):
        times = stats.comparison(stage, mode)
        if times is not None:
            eager, graph = times.eager * 1e3, times.graph * 1e3
            # the recorder is there to try things without a GPU: its factor would say nothing
            factor = "no speed-up" if backend == "recorder" else f"factor {eager / graph:.1f}"
            text = f"host time a step: eager {eager:.3f} ms, {mode} {graph:.3f} ms ({factor})"
            lines += _wrapped(text)
    return lines


def _hint_lines(stats: CUDAGraphStats, stage: str) -> list[str]:
    """Say so if most steps were warm-ups, because there are many shapes and few batches of each."""
    warmups = [
        record
        for record in stats.reasons
        if (record.stage, record.mode) == (stage, "NONE")
        and record.reason is not None
        and record.reason.kind is Status.WARM_UP
    ]
    steps, every = sum(each.steps for each in warmups), sum(stats.steps_of(stage).values())
    shapes = {each.shapes for each in warmups}
    if len(shapes) < _FEW_SHAPES or 2 * steps <= every:
        return []
    number = f"more than {len(shapes) - 1}" if OTHER_SHAPES in shapes else str(len(shapes))
    return _wrapped(
        f"{number} shapes in {every} batches, so most steps are warm-ups: pad batches to fewer shapes, or set "
        "warmup_steps=1"
    )


def render_summary(
    stats: CUDAGraphStats, backend: str, stages: Sequence[str], scope: str = ""
) -> str:
    """Return, for each of ``stages`` in that order, its graphs, and why steps ran in a lower mode than asked.

    Args:
        stats: The counts.
        backend: The name of the backend.
        stages: The stages to show.
        scope: What the counts are of, if there is more than one run.
    """
    lines = [f"CUDA graphs (backend: {backend}){f', {scope}' if scope else ''}"]
    for stage in stages:
        counts = stats.steps_of(stage)
        if not counts:
            continue
        steps = ", ".join(f"{number} steps {_WORDS[mode]}" for mode, number in counts.items())
        shown = [f"{stage}: {steps}"]
        entries = [
            entry
            for entry in stats.entries
            if entry.stage == stage and (entry.captures or entry.replays)
        ]
        if entries:
            shown += _table(_HEADERS, _graph_rows(entries))
            shown += _time_lines(stats, backend, stage)
        shown += _again_lines(entries)
        if any(entry.within_spread for entry in entries):
            shown.append("  replays match eager within the difference between two eager runs")
        shown += _hint_lines(stats, stage)
        reasons = [record for record in stats.reasons if record.stage == stage]
        lines += ["", *shown, *_reason_lines(reasons, _MOST_LINES - len(shown))]
    return "\n".join(lines)
