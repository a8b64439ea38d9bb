"""What a watched step does besides computing, so that its captures and replays do it as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cg_lightning.effects.host_draws import HostDraw
from cg_lightning.effects.late_reads import ReadPlace
from cg_lightning.effects.places import ChangedAttribute
from cg_lightning.metrics.units import MetricUnit


@dataclasses.dataclass(eq=False)
class SideEffects:
    """Side effects of a step that detectors have found, other than those of metrics and logs."""

    changes: list[ChangedAttribute] = dataclasses.field(default_factory=list)
    """Attributes that the step changes in Python, and that a replay can change as well."""
    late: Sequence[MetricUnit] = ()
    """Metrics whose calls a graph of the whole step leaves out: they follow each replay."""
    fills_batch: bool = False
    """Whether the step only sets or removes entries of the containers of its batch."""
    batch_writes: Sequence[int] = ()
    """The numbers of the leaves of its batch that the step writes to: a replay copies them back."""
    host_draws: Sequence[HostDraw] = ()
    """Random numbers of the host that the step draws and does not use, in its order."""
    late_reads: frozenset[ReadPlace] = frozenset()
    """Where the step reads a value from a tensor, and only passes it on."""
