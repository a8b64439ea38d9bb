"""A figure of the time of each batch. It is imported only to draw, because it needs matplotlib."""

from __future__ import annotations

import io
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cg_lightning.core.reasons import Status
from cg_lightning.report.timeline import BatchTime, Ran

MOST_REASONS = 3
"""Maximum number of reasons with a colour of their own. All others share one."""
_COLOURS = {
    Ran.WARM_UP: "#f0c000",
    Ran.CAPTURE: "#7b3294",
    Ran.COMPARED: "#80b1d3",
    Ran.REPLAY: "#1a9850",
    Ran.PIECES_CAPTURED: "#9970ab",
    Ran.PIECEWISE: "#2166ac",
}
_EAGER_COLOURS = ("#b2182b", "#ef6548", "#fdae61", "#888888")
_MARKERS = {  # so that a figure without colours can be read
    Ran.WARM_UP: "s",
    Ran.CAPTURE: "^",
    Ran.COMPARED: "v",
    Ran.PIECES_CAPTURED: "^",
    Ran.PIECEWISE: "D",
    Ran.EAGER: "x",
}
_WIDTH = 48  # of a line of the legend

Points = list[tuple[int, float]]


class BatchFigure(Figure):
    """A figure that a notebook shows, also if pyplot is not used there."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def plot_batches(batches: Sequence[BatchTime], stage: str | None) -> Figure:
    """Draw the time of each batch; see :meth:`CUDAGraphStats.plot`."""
    stages = list(dict.fromkeys(batch.stage for batch in batches))
    if stage is not None and stage not in stages:
        ran = f"choose from {', '.join(stages)}" if stages else "no stage has"
        raise ValueError(f"stage={stage!r} has not run any batch; {ran}.")
    if not stages:
        raise ValueError("There is nothing to plot: no batch has run yet.")
    shown = stages if stage is None else [stage]
    figure = BatchFigure(figsize=(10, 3.2 * len(shown)), layout="constrained")
    for axes, name in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        _draw(axes, name, [batch for batch in batches if batch.stage == name])
    return figure


def _draw(axes: Any, stage: str, batches: Sequence[BatchTime]) -> None:
    for label, (colour, marker, points) in _groups(batches).items():
        places, times = zip(*points, strict=True)
        median = statistics.median(times)
        text = textwrap.fill(f"{label}: {len(points)}, median {median:,.0f} µs", _WIDTH)
        axes.scatter(places, times, s=18, color=colour, marker=marker, label=text)
    axes.set_title(f"{stage}: time of each batch on the host")
    axes.set_xlabel("batch")
    axes.set_ylabel("µs")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params("y", labelsize="small")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)


def _groups(batches: Sequence[BatchTime]) -> dict[str, tuple[str, str, Points]]:
    """Return colour, marker, and the numbers and times of batches, by the text in the legend."""
    by_kind: dict[Ran, Points] = defaultdict(list)
    by_reason: dict[Any, Points] = defaultdict(list)
    texts: dict[Any, str] = {}
    for number, batch in enumerate(batches):
        point = (number, batch.seconds * 1e6)
        # the steps of a warm-up may be eager for another reason, such as one that comes late
        is_warm_up = batch.reason is None or batch.reason.kind is Status.WARM_UP
        if batch.how is Ran.EAGER or (batch.how is Ran.WARM_UP and not is_warm_up):
            topic = None if batch.reason is None else batch.reason.topic
            texts[topic] = str(batch.reason)
            by_reason[topic].append(point)
        else:
            by_kind[batch.how].append(point)
    groups = {
        kind.value: (_COLOURS[kind], _MARKERS.get(kind, "o"), by_kind[kind])
        for kind in _COLOURS
        if kind in by_kind
    }
    reasons = sorted(by_reason, key=lambda reason: -len(by_reason[reason]))
    shown = reasons if len(reasons) <= MOST_REASONS + 1 else reasons[:MOST_REASONS]
    marker = _MARKERS[Ran.EAGER]
    for reason, colour in zip(shown, _EAGER_COLOURS, strict=False):
        label = f"eager, {textwrap.shorten(texts[reason], 110, placeholder=' ...')}"
        groups[label] = (colour, marker, by_reason[reason])
    rest = [point for reason in reasons[len(shown) :] for point in by_reason[reason]]
    if rest:
        label = f"eager, {len(reasons) - len(shown)} other reasons"
        groups[label] = (_EAGER_COLOURS[-1], marker, rest)
    return groups
