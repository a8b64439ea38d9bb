"""The result of a step or a call, with its mode and its reason."""

from __future__ import annotations

from typing import Any, NamedTuple

from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import Reason
from cg_lightning.report.timeline import Ran


class Outcome(NamedTuple):
    """The result of a step or a call."""

    output: Any
    mode: CUDAGraphMode
    """The mode in which it ran."""
    reason: Reason | None = None
    """Why it ran in a lower mode than asked; None if it did not."""
    ran: Ran | None = None
    """How a whole step ran, as the timeline shows it; None for the call of a submodule."""
