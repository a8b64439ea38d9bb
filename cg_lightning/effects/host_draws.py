"""Random numbers of the host that a step draws and does not use: drawn again with each replay.

transformers draws them for layers that it drops in training only. All later random numbers depend
on the number of earlier draws.
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
        """Draw once more, and drop the result."""
        self.function(*self.args, **self.kwargs)


class DrawAgain(Effect):
    """Draws the numbers that a step does not use.

    Args:
        draws: The draws of the step, in their order.
    """

    def __init__(self, draws: Sequence[HostDraw]) -> None:
        self._draws = draws

    def before_replay(self) -> None:
        """Draw."""
        for draw in self._draws:
            draw.run()
