"""What a step or a call gave, and in which mode it ran."""

from __future__ import annotations

from typing import Any, NamedTuple

from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import Reason


class Outcome(NamedTuple):
    """The result of a step or of a call."""

    output: Any
    mode: CUDAGraphMode
    """The mode in which it ran."""
    reason: Reason | None = None
    """Why it did not run in the mode that was asked for; None if it did."""
