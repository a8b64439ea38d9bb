"""The tables of the benchmark: of a run, and those in README and docs, made from its records."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from cg_lightning.bench.cases import CASES
from cg_lightning.bench.contestants import LOOPS, PEERS
from cg_lightning.bench.records import (
    OURS,
    Record,
    by_case,
    contestants_of,
    describe_environment,
    gpu_time,
    limit,
    optimizer_time,
    read_environment,
    read_lines,
)
from cg_lightning.bench.training import TRAINERS
from cg_lightning.core.stages import TRAIN

_HEADERS = {
    "loop": "empty loop",
    "loop_and_logs": "logs alone",
    "eager": "eager",
    "piecewise": "PIECEWISE",
    "full": "FULL",
    OURS: "**callback**",
    "compile": "`torch.compile`",
    "reduce_overhead": "`reduce-overhead`",
    "make_graphed_callables": "`make_graphed_callables`",
    "compiled_full": "callback, net compiled",
}
_SHORT = ("eager", "reduce_overhead", "make_graphed_callables", OURS)
"""The columns of the README."""


def table(records: list[Record]) -> str:
    """Return microseconds per batch as a Markdown table, with the spread of rounds in brackets."""
    contestants = contestants_of(records)
    rows = []
    for (stage, name), case in by_case(records).items():
        row = [f"{stage}, {name}", _cell(limit(case)), _cell(gpu_time(case))]
        for contestant in contestants:
            record = case.get(contestant, {})
            time = _cell(record.get("microseconds"), f" ({record.get('spread', 0):.0f})")
            row.append("fails" if "error" in record else time)
        rows.append(row)
    return _markdown(["stage, case", "limit", "replay", *contestants], rows).rstrip()


def _rows(records: list[Record], stage: str) -> list[tuple[str, dict[str, Record]]]:
    """Return title and records of each case, in the order of ``CASES``.

    The saturated case is left out: there the GPU is the limit, so it has a table of its own.
    """
    cases = by_case(records)
    return [
        (case.title.replace("\n", ", "), cases[stage, name])
        for name, case in CASES.items()
        if (stage, name) in cases and name != "saturated"
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---") + "\n"


def _microseconds(case: dict[str, Record], name: str) -> float | None:
    time: float | None = case.get(name, {}).get("microseconds")
    return time


def _cell(time: float | None, spread: str = "", bold: bool = False) -> str:
    if time is None:
        return "-"
    return (f"**{time:.0f}**" if bold else f"{time:.0f}") + spread


def _faster(case: dict[str, Record], others: Sequence[str]) -> float | None:
    """Return how many times faster the callback is than the fastest of ``others``."""
    ours = _microseconds(case, OURS)
    times = [time for name in others if (time := _microseconds(case, name)) is not None]
    return min(times) / ours if ours and times else None


def results(records: list[Record], stage: str = "validate") -> str:
    """Return the short table: the limit, eager, two peers, the callback, and its factor."""
    rows = []
    for title, case in _rows(records, stage):
        times = [_cell(_microseconds(case, name), bold=name == OURS) for name in _SHORT]
        factor = _faster(case, ["eager"])
        rows.append([title, _cell(limit(case)), *times, f"{factor:.1f}x" if factor else "-"])
    columns = [_HEADERS[name] for name in _SHORT]
    return _markdown([f"`{stage}`", "limit", *columns, "faster than eager"], rows)


def details(records: list[Record], stage: str) -> str:
    """Return the long table: all contestants, with the spread of the rounds in brackets."""
    hidden = LOOPS if stage == "predict" else ("loop",)  # predict logs nothing
    names = [name for name in _HEADERS if name in contestants_of(records) and name not in hidden]
    rows = []
    for title, case in _rows(records, stage):
        row = [title, _cell(limit(case))]
        for name in names:
            spread = f" ({case.get(name, {}).get('spread', 0):.0f})"
            row.append(_cell(_microseconds(case, name), spread, bold=name == OURS))
        rows.append(row)
    return _markdown([f"`{stage}`", "limit", *(_HEADERS[name] for name in names)], rows)


def training(records: list[Record]) -> str:
    """Return two tables of training: times, and weights compared with those of eager."""
    measured = contestants_of(records)
    shown = [name for name in TRAINERS if name != "loop_and_logs" or name in measured]
    times, weights = [], []
    for title, case in _rows(records, TRAIN):
        row = [_cell(_microseconds(case, name), bold=name == OURS) for name in shown]
        factor = _faster(case, ["eager"])
        on_gpu = (_cell(gpu_time(case)), _cell(optimizer_time(case)))
        times.append([title, *on_gpu, *row, f"{factor:.1f}x" if factor else "-"])
        weights.append([title, *(_weights(case, name) for name in shown if name not in LOOPS)])
    headers = [_HEADERS[name] for name in shown if name != "loop"]
    on_gpu = ("closure on the GPU", "optimizer on it")
    header = ["`fit`", *on_gpu, "empty loop, optimizer", *headers, "faster than eager"]
    others = [_HEADERS[name] for name in shown if name not in (*LOOPS, "eager")]
    of_weights = ["weights", "eager again", *others]
    return f"{_markdown(header, times)}\n{_markdown(of_weights, weights)}"


def _weights(case: dict[str, Record], name: str) -> str:
    record = case.get(name, {})
    if "equal" not in record:
        return "-"
    return "equal" if record["equal"] else f"differ by {record['difference']:.1e}"


def training_facts(records: list[Record]) -> str:
    """Return the conclusions from the table of training, one fact a line."""
    eager, peers, of_limit = _factors(records, TRAIN)
    lines = [f"It is {_mean(eager)} times faster than eager (geometric mean)."] if eager else []
    if peers:
        lines.append(f"It is {_mean(peers)} times faster than the best peer (geometric mean).")
    if of_limit:
        lines.append(
            f"It takes {_range(of_limit)} times the longer one of two: the empty loop with the "
            "optimizer, and closure and optimizer on the GPU."
        )
    return "".join(f"- {line}\n" for line in lines)


def _factors(records: list[Record], stage: str) -> tuple[list[float], list[float], list[float]]:
    """Return how many times faster the callback is than eager and than the best peer.

    And by how many times it takes longer than the limit; one number for each case that has them.
    """
    rows = [case for _, case in _rows(records, stage)]
    eager = [factor for case in rows if (factor := _faster(case, ["eager"]))]
    peers = [factor for case in rows if (factor := _faster(case, PEERS))]
    pairs = [(_microseconds(case, OURS), limit(case)) for case in rows]
    return eager, peers, [ours / least for ours, least in pairs if ours and least]


def _mean(factors: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(factors):.1f}"


def _range(factors: Sequence[float]) -> str:
    return f"{min(factors):.2g} to {max(factors):.2g}"


def speed(records: list[Record]) -> str:
    """Return between which factors the callback is faster than eager in ``validate``."""
    return f"{_range(_factors(records, 'validate')[0])} times faster"


def facts(records: list[Record]) -> str:
    """Return the conclusions from the table of ``validate``, one fact a line."""
    _, peers, of_limit = _factors(records, "validate")
    near = [factor for factor in of_limit if factor < 1.1]
    lines = [f"It is {speed(records)} than eager."]
    if peers:
        lines.append(
            f"It is {_range(peers)} times faster than the best peer (geometric mean "
            f"{_mean(peers)}). No peer captures loss, metrics and logging."
        )
    if near:
        lines.append(
            f"It takes {min(near):.3f} to {max(near):.3f} times the limit in {len(near)} of "
            f"{len(of_limit)} cases."
        )
    return "".join(f"- {line}\n" for line in lines)


_BLOCKS: dict[str, Callable[[list[Record]], str]] = {
    "results": results,
    "speed": speed,
    "facts": facts,
    "validate": lambda records: details(records, "validate"),
    "predict": lambda records: details(records, "predict"),
    TRAIN: training,
    "train_facts": training_facts,
    "train_results": lambda records: results(records, TRAIN),
}
_STAGES = {"predict": "predict", **dict.fromkeys((TRAIN, "train_facts", "train_results"), TRAIN)}
"""The stage whose records a block shows; ``validate``, if it is not here."""


def fill_page(text: str, records: Path) -> str:
    """Return a page with the figures of a file of records.

    They stand between ``<!-- bench: NAME -->`` and ``<!-- /bench -->``. NAME is ``results``,
    ``speed``, ``facts``, ``validate``, ``predict``, ``train``, ``train_facts``, ``train_results``,
    or ``machine``: hardware and versions. A block stays as it is if the file has no record of its
    stage; that of ``results``, ``speed``, ``facts`` and ``machine`` is ``validate``.

    Args:
        text: The page, in Markdown.
        records: The file.

    Raises:
        ValueError: The page has a block with another name.
    """
    measured = read_lines(records)
    stages = {stage for stage, _ in by_case(measured)}

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name != "machine" and name not in _BLOCKS:
            names = ", ".join(("machine", *_BLOCKS))
            raise ValueError(f"<!-- bench: {name} --> has no such figures; choose from {names}")
        if _STAGES.get(name, "validate") not in stages:
            return match[0]
        if name == "machine":
            made = describe_environment(read_environment(records))
        else:
            made = _BLOCKS[name](measured)
        line_break = "\n" if made.endswith("\n") else ""
        return f"<!-- bench: {name} -->{line_break}{made}<!-- /bench -->"

    return re.sub(r"<!-- bench: (?P<name>\S+) -->.*?<!-- /bench -->", block, text, flags=re.DOTALL)
