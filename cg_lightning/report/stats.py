"""The counts of one callback as users see them: they show themselves as a table and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cg_lightning.report.counts import Counts
from cg_lightning.report.summary import Summary, render_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_MATPLOTLIB = (
    'stats.plot() draws with matplotlib, which is not installed: pip install "cg-lightning[plot]".'
)


class CUDAGraphStats(Counts):
    """Counts over the life of one callback."""

    def plot(self, stage: str | None = None) -> Figure:
        """Draw the time of each batch: warm-up, capture, replay, and eager with its reason.

        Times are those of the host, in microseconds. The latest 10000 batches are kept.

        Args:
            stage: One stage. None: all stages that ran, one below the other.

        Returns:
            A figure of matplotlib. ``figure.savefig("batches.png")`` stores it.

        Raises:
            ValueError: No batch of that stage has run.
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from cg_lightning.report.plot import plot_batches
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "matplotlib":
                raise
            raise ModuleNotFoundError(_NO_MATPLOTLIB, name=error.name) from None
        return plot_batches(self.timeline.batches, stage)

    def __str__(self) -> str:
        return self._summary()

    def _repr_html_(self) -> str:
        return self._summary()._repr_html_()

    def _summary(self) -> Summary:
        return render_summary(self, "", self.stages)
