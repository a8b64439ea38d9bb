"""The time of each batch on the host, in the order in which the batches ran."""

from __future__ import annotations

import enum
from collections import deque
from time import perf_counter
from typing import NamedTuple

from cg_lightning.core.reasons import Reason

MOST_BATCHES = 10_000
"""Maximum number of stored batches. The oldest one is dropped first."""


class Ran(enum.Enum):
    """How a step ran. Users read the values."""

    WARM_UP = "warm-up"
    CAPTURE = "capture"
    COMPARED = "replay, compared with eager"
    REPLAY = "replay"
    PIECES_CAPTURED = "pieces, captured or compared with eager"
    PIECEWISE = "pieces from graphs"
    EAGER = "eager"


class BatchTime(NamedTuple):
    """One step."""

    stage: str
    how: Ran
    seconds: float
    """Time on the host, in seconds. On a GPU, work may go on after the host is done."""
    reason: Reason | None
    """Why it ran in a lower mode than asked; None if it did not."""


class Timeline:
    """The latest batches of all stages."""

    def __init__(self) -> None:
        self.rows: deque[tuple[str, Ran, float, Reason | None]] = deque(maxlen=MOST_BATCHES)
        """The fields of each batch.

        The step runner appends here, because a replay has no time for more.
        """

    @property
    def batches(self) -> list[BatchTime]:
        """The batches, the oldest one first."""
        return [BatchTime(*row) for row in self.rows]

    def add(self, stage: str, how: Ran, start: float, reason: Reason | None = None) -> None:
        """Add a batch that has just ended.

        Args:
            stage: The stage.
            how: How it ran.
            start: The value of ``time.perf_counter()`` when it began.
            reason: Why it ran in a lower mode than asked.
        """
        self.rows.append((stage, how, perf_counter() - start, reason))
