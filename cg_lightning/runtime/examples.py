"""Batches that are captured ahead, as the runtime sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from cg_lightning.core.reasons import Reason


class Example(Protocol):
    """A batch like one that will come later."""

    @property
    def shapes(self) -> str:
        """The shapes of its tensors, for printing."""

    def load(self) -> Any:
        """Return the batch on the device, as a step would get it."""


class Examples(Protocol):
    """The batches to capture ahead."""

    def take(self, stage: str, dataloader_idx: int) -> Sequence[Example]:
        """Return the batches of one dataloader, the largest first. A second call returns none."""

    def progress(self, examples: Sequence[Example]) -> Iterable[Example]:
        """Yield the batches, and show how many are done."""

    def not_captured(self, example: Example, reason: Reason) -> None:
        """Report to the user why a batch was not captured."""
