"""The counts as a plain table."""

from __future__ import annotations

from collections.abc import Sequence

from cg_lightning.report.stats import CUDAGraphStats

_HEADERS = ("stage", "mode", "target", "shapes", "captures", "replays", "capture ms", "MiB")
_NUMBERS = 4  # columns from here on are aligned to the right
_EAGER_HEADERS = ("stage", "shapes", "eager steps", "reason")


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right_from: int, right_to: int
) -> list[str]:
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if right_from <= column < right_to else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(headers), "  ".join("-" * width for width in widths), *(line(row) for row in rows)]


def render_summary(stats: CUDAGraphStats, backend: str, stages: Sequence[str]) -> str:
    """Gives, for ``stages`` in that order, graphs by target and shape, and eager steps by shape and reason."""
    lines = [f"CUDA graphs (backend: {backend})"]
    for stage in stages:
        graphed = stats.graphed_steps(stage)
        eager = [record for record in stats.eager_records if record.stage == stage]
        counts = {**graphed, "NONE": sum(record.steps for record in eager)}
        if any(counts.values()):
            lines.append(
                f"{stage}: "
                + ", ".join(f"{number} steps {mode}" for mode, number in counts.items() if number)
            )
    graphs = [
        (
            *(
                entry.stage,
                entry.mode,
                entry.target,
                entry.shapes,
                str(entry.captures),
                str(entry.replays),
            ),
            *(f"{entry.seconds * 1e3:.1f}", f"{entry.bytes / 2**20:.1f}"),
        )
        for stage in stages
        for entry in stats.entries
        if entry.stage == stage
    ]
    if graphs:
        lines += ["", *_table(_HEADERS, graphs, _NUMBERS, len(_HEADERS))]
    spread = [entry for entry in stats.entries if entry.within_spread and entry.stage in stages]
    lines += [
        f"{e.stage} {e.target} {e.shapes}: replays equal eager within what eager differs from itself"
        for e in spread
    ]
    reasons = [
        (record.stage, record.shapes, str(record.steps), record.reason)
        for stage in stages
        for record in stats.eager_records
        if record.stage == stage
    ]
    if reasons:
        lines += ["", *_table(_EAGER_HEADERS, reasons, 2, 3)]
    return "\n".join(lines)
