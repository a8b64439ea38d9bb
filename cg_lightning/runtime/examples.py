"""Batches that are captured ahead, as the runtime sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from cg_lightning.core.reasons import Reason


class Example(Protocol):
    """A batch that a later batch will be like."""

    @property
    def shapes(self) -> str:
        """The shapes of its tensors, for printing."""

    def load(self) -> Any:
        """Return it on the device, as a step would get it."""


class Examples(Protocol):
    """The batches to capture ahead."""

    def take(self, stage: str, dataloader_idx: int) -> Sequence[Example]:
        """Return the batches of one dataloader, the largest first; the second time none."""

    def progress(self, examples: Sequence[Example]) -> Iterable[Example]:
        """Yield the batches, and show how many are done."""

    def not_captured(self, example: Example, reason: Reason) -> None:
        """Tell the user why a batch was not captured."""
