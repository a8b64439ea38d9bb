"""The counts as a plain table. What is alike is grouped: at most 20 lines a stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from cg_lightning.core.reasons import Reason
from cg_lightning.report.stats import CUDAGraphStats, EntryRecord, StepsRecord

MOST_GRAPHS = 6
"""Rows of graphs that are shown for one stage."""
MOST_REASONS = 4
"""Reasons that are shown for one stage; each takes one or two lines."""
MOST_AGAIN = 2
"""Changes for which graphs were captured again that are shown for one stage."""
_MOST_SHAPES = 3
_WORDS = {"NONE": "eager", "PIECEWISE": "PIECEWISE", "FULL": "FULL"}
_HEADERS = ("mode", "target", "shapes", "captures", "replays", "capture ms", "MiB")
_NUMBERS = 3  # columns from here on are aligned to the right


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column >= _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  " + "  ".join(cells).rstrip()

    return [line(headers), *(line(row) for row in rows)]


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
    lines = [
        f"  {_join([entry.target for entry in group], 'targets')} captured again: {why}"
        for why, group in groups.items()
    ]
    return lines[:MOST_AGAIN]


def _reason_lines(records: Sequence[StepsRecord]) -> list[str]:
    groups: dict[tuple[str, Reason], list[StepsRecord]] = defaultdict(list)
    for record in records:
        assert record.reason is not None, "only records with a reason are shown"
        groups[record.mode, record.reason].append(record)
    ordered = sorted(groups.items(), key=lambda item: -sum(record.steps for record in item[1]))
    lines: list[str] = []
    for (mode, reason), group in ordered[:MOST_REASONS]:
        steps = sum(record.steps for record in group)
        shapes = _join([record.shapes for record in group], "shapes")
        lines.append(f"  {steps} {_WORDS[mode]} ({shapes}): {reason}")
        if reason.remedy:
            lines.append(f"    remedy: {reason.remedy}")
    rest = [record for _, group in ordered[MOST_REASONS:] for record in group]
    if rest:
        number = len(ordered) - MOST_REASONS
        steps = sum(record.steps for record in rest)
        lines.append(f"  {steps} steps for {number} other reasons: see stats.reasons")
    return lines


def render_summary(stats: CUDAGraphStats, backend: str, stages: Sequence[str]) -> str:
    """Return, for each of ``stages`` in that order, its graphs, and why steps ran in a lower mode than asked."""
    lines = [f"CUDA graphs (backend: {backend})"]
    for stage in stages:
        counts = stats.steps_of(stage)
        if not counts:
            continue
        steps = ", ".join(f"{number} steps {_WORDS[mode]}" for mode, number in counts.items())
        lines += ["", f"{stage}: {steps}"]
        entries = [entry for entry in stats.entries if entry.stage == stage]
        if entries:
            lines += _table(_HEADERS, _graph_rows(entries))
        lines += _again_lines(entries)
        if any(entry.within_spread for entry in entries):
            lines.append("  replays match eager within the difference between two eager runs")
        lines += _reason_lines([record for record in stats.reasons if record.stage == stage])
    return "\n".join(lines)
