"""The counts as a table: as plain text, by rich, and as HTML.

A stage has at most 20 lines of 80 columns. What has no room is counted.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cg_lightning.core.reasons import Status
from cg_lightning.report.counts import Counts
from cg_lightning.report.html import html_paragraph, html_table
from cg_lightning.report.records import EntryRecord, StepsRecord, Times

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

MOST_GRAPHS = 6
"""Maximum number of rows of graphs for one stage."""
MOST_REASONS = 4
"""Maximum number of reasons for one stage, if there is room for them."""
MOST_AGAIN = 2
"""Maximum number of changes shown for one stage, for which graphs were captured again."""
WIDTH = 80
"""Width in columns. A longer word, such as a path, is not broken."""
_MOST_LINES = 20  # of one stage
_MOST_LINES_OF_A_SENTENCE = 4
_MOST_SHAPES = 3
_FEW_SHAPES = 5  # fewer shapes than this are not too many
_WORDS = {"NONE": "eager", "PIECEWISE": "PIECEWISE", "FULL": "FULL"}
_HEADERS = ("mode", "target", "shapes", "captures", "replays", "us (eager)", "MiB")
_SAVES = "saves"  # one more column, if that is known of a graph
_NUMBERS = 3  # columns from here on are aligned to the right
_UNTIMED = "not timed"
_LEAST_WIDTH = 12  # of shortened targets and shapes


@dataclasses.dataclass(frozen=True)
class ReasonLine:
    """Steps that ran in a lower mode than asked for the same reason."""

    text: str
    """How many, in which mode, of which shapes, and why."""
    remedy: str
    """The remedy; empty if there is none."""


@dataclasses.dataclass(frozen=True)
class StageSummary:
    """What is shown of one stage."""

    title: str
    """The stage, and its steps by mode."""
    rows: list[tuple[str, ...]]
    """A row for each graph or group of graphs."""
    headers: tuple[str, ...]
    """The columns of these rows."""
    notes: list[str]
    """Sentences about these graphs, as many as there is room for."""
    reasons: list[ReasonLine]
    """The most frequent reasons, as many as there is room for."""
    rest: str
    """How many reasons are left out; empty if all are shown."""


class Summary(str):
    """The table as text. A notebook shows it as HTML, and ``rich.print`` in colours.

    Args:
        heading: Its first line.
        stages: What is shown of each stage.
    """

    heading: str
    stages: list[StageSummary]

    def __new__(cls, heading: str, stages: list[StageSummary]) -> Summary:  # noqa: D102
        self = super().__new__(cls, _as_text(heading, stages, WIDTH))
        self.heading, self.stages = heading, stages
        return self

    def __getnewargs__(self) -> tuple[str, list[StageSummary]]:  # type: ignore[override]
        return self.heading, self.stages

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        parts = [html_paragraph(self.heading)]
        for stage in self.stages:
            parts.append(html_paragraph(stage.title))
            if stage.rows:
                parts.append(html_table(stage.headers, stage.rows, _NUMBERS))
            parts += map(html_paragraph, stage.notes)
            if stage.reasons:
                has_remedy = any(reason.remedy for reason in stage.reasons)
                columns = ("reason", "remedy")[: 1 + has_remedy]
                rows = [(reason.text, reason.remedy)[: 1 + has_remedy] for reason in stage.reasons]
                parts.append(html_table(columns, rows))
            if stage.rest:
                parts.append(html_paragraph(stage.rest))
        return "".join(parts)

    def __rich__(self) -> RenderableType:
        return _ForRich(self)

    def as_text(self, width: int) -> str:
        """Return the text for a terminal of ``width`` columns. No number is cut."""
        return _as_text(self.heading, self.stages, width)


class _ForRich:
    """The summary in colours. A console that prints it says how wide it is."""

    def __init__(self, summary: Summary) -> None:
        self._summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        yield Text(self._summary.heading, "bold")
        for stage in self._summary.stages:
            yield Text()
            yield Text(stage.title, "bold cyan")
            for line, is_header in _table(stage.headers, stage.rows, options.max_width):
                yield Text(line, "dim" if is_header else "")
            for note in stage.notes:
                yield Padding(Text(_relative(note)), (0, 0, 0, 2))
            for reason in stage.reasons:
                yield Padding(Text(_relative(reason.text), "yellow"), (0, 0, 0, 2))
                if reason.remedy:
                    yield Padding(Text(f"remedy: {reason.remedy}", "green"), (0, 0, 0, 4))
            if stage.rest:
                yield Padding(Text(stage.rest, "dim"), (0, 0, 0, 2))


def print_summary(summary: Summary) -> None:
    """Print it: by rich on a terminal or in a notebook if rich is installed, otherwise as text."""
    try:
        from rich import get_console
    except ImportError:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
        print(summary.as_text(min(columns, WIDTH)))
        return
    # the console of Lightning's bar, so that a bar that still runs is not torn
    console = get_console()
    if console.is_terminal or console.is_jupyter:
        console.print(summary)
    else:
        print(summary)


def _shortened(text: str, width: int) -> str:
    """Cut the middle, because names of layers often differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return f"{text[:head]}...{text[head + 3 - width :]}"


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> list[tuple[str, bool]]:
    """Return lines, and for each one whether it is a header. No number is cut.

    Targets and shapes are shortened to what is left of ``width``. If that is too little, or if
    names would not differ any more, each row has its numbers in lines of their own.
    """
    if not rows:
        return []
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    for column in (1, 2):  # targets, then shapes
        excess = 2 * len(widths) + sum(widths) - width
        widths[column] = min(widths[column], max(widths[column] - excess, _LEAST_WIDTH))
    short = [
        [_shortened(cell, width) for cell, width in zip(row, widths, strict=True)]
        for row in (headers, *rows)
    ]
    is_ambiguous = len({tuple(row[:_NUMBERS]) for row in short[1:]}) < len(
        {tuple(row[:_NUMBERS]) for row in rows}
    )
    if 2 * len(widths) + sum(widths) > width or is_ambiguous:
        return [(line, False) for row in rows for line in _row_in_lines(headers, row, width)]
    lines: list[tuple[str, bool]] = []
    for row in short:
        cells = [
            cell.rjust(width) if column >= _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells).rstrip(), not lines))
    return lines


def _row_in_lines(headers: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """Return mode and target, then shapes and numbers with their names."""
    mode, *names = row[:_NUMBERS]
    target, shapes = [_shortened(name, 2 * width) for name in names]
    parts = [shapes, *map(" ".join, zip(headers[_NUMBERS:], row[_NUMBERS:], strict=True))]
    whole = ", ".join(part.replace(" ", "\0") for part in parts)  # lines end between the parts
    numbers = textwrap.wrap(
        whole, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
    )
    lines = textwrap.wrap(f"{mode}  {target}", width, initial_indent="  ", subsequent_indent="    ")
    return [*lines, *(line.replace("\0", " ") for line in numbers)]


def _relative(text: str) -> str:
    """Shorten paths in the working directory."""
    return text.replace(f"{os.getcwd()}{os.sep}", "")


def _wrapped(text: str, width: int, indent: int = 2, most_lines: int | None = None) -> list[str]:
    return textwrap.wrap(
        _relative(text),
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        max_lines=most_lines,
        placeholder=" ...",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _steps(number: int) -> str:
    return f"{number} step{'' if number == 1 else 's'}"


def _join(names: Sequence[str], what: str) -> str:
    shown = list(dict.fromkeys(names))
    if len(shown) <= _MOST_SHAPES:
        return " | ".join(shown)
    return f"{len(shown)} {what}"


def _microseconds(times: Times) -> str:
    """Return the time of a step or call that is a replay and, in parentheses, of an eager one."""
    if times.graph is None and times.eager is None:
        return _UNTIMED
    graph, eager = [_UNTIMED if time is None else f"{time * 1e6:.0f}" for time in times]
    return f"{graph} ({eager})"


def _share(entries: Sequence[EntryRecord]) -> str:
    """Return the share of the time that graphs save, as far as it is known."""
    known = [
        (each.eager_seconds or 0.0, each.saving) for each in entries if each.saving is not None
    ]
    eager = sum(seconds for seconds, _ in known)
    return f"{sum(seconds * saving for seconds, saving in known) / eager:.0%}" if eager else "-"


def _row(stats: Counts, entries: Sequence[EntryRecord], values: str = "") -> tuple[str, ...]:
    # the time of a step is none of a call
    times = stats.times_of([entry for entry in entries if entry.mode == entries[0].mode])
    shapes = _join([entry.shapes for entry in entries], "shapes")
    return (
        entries[0].mode,
        _join([entry.target for entry in entries], "targets"),
        f"{shapes} with {values}" if values else shapes,
        str(sum(entry.captures for entry in entries)),
        str(sum(entry.replays for entry in entries)),
        _microseconds(times),
        f"{sum(entry.bytes for entry in entries) / 2**20:.1f}",
        _share(entries),
    )


def _values(entry: EntryRecord, entries: Sequence[EntryRecord]) -> str:
    """Return the plain values in which a graph differs from others of its target and shapes."""
    alike = [
        other.values
        for other in entries
        if (other.mode, other.target, other.shapes) == (entry.mode, entry.target, entry.shapes)
    ]
    if len({len(values) for values in alike}) > 1:
        return ", ".join(entry.values)
    return ", ".join(
        values[0] for values in zip(entry.values, *alike, strict=True) if len(set(values)) > 1
    )


def _graph_rows(stats: Counts, entries: Sequence[EntryRecord], most: int) -> list[tuple[str, ...]]:
    """Return a row for each graph; if too many, for each target; if too many, one for the rest."""
    if len(entries) <= most:
        return [_row(stats, [entry], _values(entry, entries)) for entry in entries]
    groups: dict[tuple[str, str], list[EntryRecord]] = defaultdict(list)
    for entry in entries:
        groups[entry.mode, entry.target].append(entry)
    targets = sorted(groups.values(), key=lambda group: -sum(entry.replays for entry in group))
    if len(targets) > most:
        rest = [entry for group in targets[most - 1 :] for entry in group]
        targets = [*targets[: most - 1], rest]
    return [_row(stats, group) for group in targets]


def _again_notes(entries: Sequence[EntryRecord]) -> list[str]:
    """Return what had changed for graphs that were captured again, each subject once."""
    groups: dict[str, list[EntryRecord]] = defaultdict(list)
    for entry in entries:
        if entry.why_again:
            groups[entry.why_again.subject].append(entry)
    return [
        f"{_join([entry.target for entry in group], 'targets')} captured again: "
        f"{group[-1].why_again}"
        for group in list(groups.values())[:MOST_AGAIN]
    ]


def _reason_lines(reason: ReasonLine, width: int) -> list[str]:
    lines = _wrapped(reason.text, width, most_lines=_MOST_LINES_OF_A_SENTENCE)
    return lines + (_wrapped(f"remedy: {reason.remedy}", width, 4) if reason.remedy else [])


def _reasons(records: Sequence[StepsRecord], room: int) -> tuple[list[ReasonLine], str]:
    """Return the reasons for which there is room, and how many are left out."""
    groups: dict[tuple[Any, ...], list[StepsRecord]] = defaultdict(list)
    for record in records:
        assert record.reason is not None, "only records with a reason are shown"
        groups[record.mode, *record.reason.topic].append(record)
    ordered = sorted(groups.values(), key=lambda group: -sum(record.steps for record in group))
    shown: list[ReasonLine] = []
    for group in ordered[:MOST_REASONS]:
        mode, reason = group[-1].mode, group[-1].reason
        assert reason is not None
        steps = sum(record.steps for record in group)
        shapes = _join([record.shapes for record in group], "shapes")
        line = ReasonLine(f"{steps} {_WORDS[mode]} ({shapes}): {reason}", reason.remedy)
        room -= len(_reason_lines(line, WIDTH))
        if shown and room < (len(shown) + 1 < len(ordered)):
            break
        shown.append(line)
    rest = [record for group in ordered[len(shown) :] for record in group]
    if not rest:
        return shown, ""
    steps = sum(record.steps for record in rest)
    left_out = len(ordered) - len(shown)
    return shown, f"{_steps(steps)} for {left_out} other reasons: see stats.reasons"


def _time_notes(stats: Counts, backend: str, stage: str) -> list[str]:
    """Return the host time of a step, from graphs and eagerly."""
    notes = []
    for mode in ("FULL", "PIECEWISE"):
        times = stats.comparison(stage, mode)
        if times is not None:
            eager, graph = times.eager * 1e3, times.graph * 1e3
            factor = f" (factor {eager / graph:.1f})"
            if backend in ("recorder", ""):  # unknown, it may be the recorder
                factor = " (recorder: means nothing)" if backend else ""
            notes.append(f"host time a step: eager {eager:.3f} ms, {mode} {graph:.3f} ms{factor}")
    return notes


def _padding_notes(stats: Counts, stage: str) -> list[str]:
    """Return how much padding adds, and each reason for batches that are not padded."""
    records = [record for record in stats.padding if record.stage == stage]
    notes = []
    steps = sum(record.steps for record in records)
    if steps:
        elements = sum(record.elements for record in records)
        share = 1 - elements / sum(record.padded_elements for record in records)
        notes.append(
            f"{steps} padded runs, {share:.0%} of their elements padding; results equal eager's "
            "within the tolerance 'close'"
        )
    if records and stats.proposed_pad_dims:
        notes.append(f"proposed: pad_dims={stats.proposed_pad_dims}")
    reasons = {(each.target, each.reason.topic): each for each in records if each.reason}
    notes += [f"{r.target} not padded: {r.reason}" for r in list(reasons.values())[:MOST_AGAIN]]
    return notes


def _hint_notes(stats: Counts, stage: str) -> list[str]:
    """Return a hint if most steps were warm-ups: many shapes, with few batches of each.

    Users who pad already get none.
    """
    if any(record.stage == stage for record in stats.padding):
        return []
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
    has_others = any(each.is_of_other_shapes for each in warmups)
    number = f"more than {len(shapes) - 1}" if has_others else str(len(shapes))
    return [
        f"{number} shapes in {every} batches, so most steps are warm-ups: pad batches to fewer "
        "shapes, or set warmup_steps=1"
    ]


def _as_text(heading: str, stages: Sequence[StageSummary], width: int) -> str:
    lines = [line for stage in stages for line in ("", *_lines(stage, width))]
    return "\n".join([heading, *lines])


def _lines(stage: StageSummary, width: int) -> list[str]:
    lines = _lines_without_reasons(stage, width)
    for reason in stage.reasons:
        lines += _reason_lines(reason, width)
    return lines + _wrapped(stage.rest, width)


def _lines_without_reasons(stage: StageSummary, width: int) -> list[str]:
    lines = [stage.title, *(line for line, _ in _table(stage.headers, stage.rows, width))]
    for note in stage.notes:
        lines += _wrapped(note, width, most_lines=_MOST_LINES_OF_A_SENTENCE)
    return lines


def _summarize(stats: Counts, backend: str, stage: str, counts: dict[str, int]) -> StageSummary:
    steps = ", ".join(f"{_steps(number)} {_WORDS[mode]}" for mode, number in counts.items())
    entries = [
        entry
        for entry in stats.entries
        if entry.stage == stage and (entry.captures or entry.replays)
    ]
    notes = [*(_time_notes(stats, backend, stage) if entries else []), *_again_notes(entries)]
    if any(entry.within_spread for entry in entries):
        notes.append("replays match eager within the difference between eager runs")
    notes += _padding_notes(stats, stage)
    notes += _hint_notes(stats, stage)
    is_saving_known = any(entry.saving is not None for entry in entries)
    headers = (*_HEADERS, _SAVES) if is_saving_known else _HEADERS
    records = [record for record in stats.reasons if record.stage == stage]
    shown = StageSummary(f"{stage}: {steps}", [], headers, notes, *_reasons(records, 0))
    choices = (_graph_rows(stats, entries, most) for most in range(MOST_GRAPHS, 0, -1))
    return _filled(shown, records, choices)


def _filled(
    least: StageSummary, records: Sequence[StepsRecord], choices: Iterable[list[tuple[str, ...]]]
) -> StageSummary:
    """Return a summary with the rows, notes and reasons for which there is room.

    Args:
        least: The summary without rows, with all notes and the most frequent reason.
        records: The records of all reasons.
        choices: Rows to choose from, the most rows first.
    """
    columns = len(least.headers)
    for rows in choices:
        shown = dataclasses.replace(least, rows=[row[:columns] for row in rows])
        if (excess := len(_lines(shown, WIDTH)) - _MOST_LINES) <= 0:
            break
    while excess > 0 and shown.notes:
        shown = dataclasses.replace(shown, notes=shown.notes[:-1])
        excess = len(_lines(shown, WIDTH)) - _MOST_LINES
    reasons, rest = _reasons(records, _MOST_LINES - len(_lines_without_reasons(shown, WIDTH)))
    return dataclasses.replace(shown, reasons=reasons, rest=rest)


def render_summary(stats: Counts, backend: str, stages: Sequence[str], scope: str = "") -> Summary:
    """Return, for each of ``stages``, its graphs, and why steps ran in a lower mode than asked.

    Times are those of the host, for a step or a call of a submodule: on a GPU, work may go on after
    the host is done.

    Args:
        stats: The counts.
        backend: The name of the backend; empty if it is unknown.
        stages: The stages to show, in that order.
        scope: What the counts are of, if there is more than one run.
    """
    heading = f"CUDA graphs (backend: {backend})" if backend else "CUDA graphs"
    notes = [scope] if scope else []
    if stats.overlapped_copies:
        notes.append(f"{stats.overlapped_copies} batches copied ahead")
    if stats.late_predictions:
        notes.append(f"{stats.late_predictions} predictions copied behind")
    if stats.compile_seconds:
        notes.append(f"compiled in {stats.compile_seconds:.1f} s, compared as 'close'")
    counted = [(stage, stats.steps_of(stage)) for stage in stages]
    shown = [_summarize(stats, backend, stage, counts) for stage, counts in counted if counts]
    return Summary(", ".join([heading, *notes]), shown)
