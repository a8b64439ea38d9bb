"""The number of batches of a stage, as the runtime sees it."""

from __future__ import annotations

from typing import Protocol


class StageLength(Protocol):
    """The number of batches of each dataloader."""

    def steps_left(self, stage: str, dataloader_idx: int) -> float:
        """Return the number of batches that are left, the current one included.

        ``inf`` if the number is unknown, or if the stage may run again before its graphs are
        dropped.

        Args:
            stage: The stage.
            dataloader_idx: The number of the dataloader of the current batch, or of an earlier one.
        """
