"""Random numbers of the host that a step draws and nobody uses: drawn again with each replay.

transformers does so, for layers that it drops in training only. The numbers are worth nothing, but
all that is drawn later depends on how many were drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch._ops import OpOverload

from cg_lightning.effects.effect import Effect


class HostDraw(NamedTuple):
    """One operation that draws from PyTorch's generator on the CPU, of plain values alone."""

    function: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> None:
        """Draw once more, and drop what was drawn."""
        self.function(*self.args, **self.kwargs)


class DrawAgain(Effect):
    """Draws the numbers of a step that nobody uses.

    Args:
        draws: What the step draws, in its order.
    """

    def __init__(self, draws: Sequence[HostDraw]) -> None:
        self._draws = draws

    def before_replay(self) -> None:
        """Draw."""
        for draw in self._draws:
            draw.run()
