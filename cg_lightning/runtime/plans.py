"""The decisions of the dispatcher, as records, and the reasons that it gives for them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import Reason, Status
from cg_lightning.report.records import Saving
from cg_lightning.runtime.keys import Entry, KeyState, Variant
from cg_lightning.runtime.trial import Trial

UNKNOWN_KEY = Reason(Status.WARM_UP, "unknown key")
TIMED = Reason(Status.TIMED, Status.TIMED.value)
TOO_SHORT = Reason(
    Status.TOO_SHORT,
    "stage too short: too few batches are left to win back what a capture costs",
)
TOO_SELDOM = Reason(
    Status.TOO_SHORT,
    "stage too short: too few batches of this shape are expected to win back a comparison",
)
CAPTURED_TOO_SELDOM = Reason(
    Status.TOO_SHORT,
    "stage too short: too few batches of this shape are expected to win back a capture",
)
NEW_KEY = Reason(
    Status.WARM_UP,
    "warm-up: shapes so far did not come again, so a new one is watched only if it does",
)


def no_gain(saving: Saving) -> Reason:
    """Return the reason for graphs that are not used because they do not save time."""
    what = Status.NO_GAIN.value
    times = f"{saving.graph * 1e6:.0f} us from graphs, {saving.eager * 1e6:.0f} us eagerly"
    return Reason(Status.NO_GAIN, f"{what}: {times}", subject=what)


class Action(enum.Enum):
    """The decision for one step or call."""

    WATCH = "run it eagerly under watch"
    WARM_UP = "run it eagerly"
    EAGER = "run it eagerly, for a reason"
    PIECEWISE = "run it, with its submodules from graphs"
    TRIAL = "run it eagerly, to compare times"
    CAPTURE = "capture it, then replay"
    VERIFY = "replay it, and compare with eager"
    REPLAY = "replay it"


class Dispatch(NamedTuple):
    """The mode of a step, and the reason if it is lower than asked (None if it is not).

    Attributes:
        runtime_mode: NONE, PIECEWISE or FULL.
        batch_descriptor: The key of the step.
        reason: Why the step runs in a lower mode than asked.
    """

    runtime_mode: CUDAGraphMode
    batch_descriptor: BatchDescriptor
    reason: Reason | None


class GuardScope(enum.Enum):
    """Which guards a variant needs."""

    ALL = "all values that the step read"
    TRAINER = "batch_idx and values of the Trainer, which may lead to another branch"
    NONE = "none, so the variant always holds"


class Judgement(NamedTuple):
    """What a watched step may do from now on."""

    modes: list[CUDAGraphMode]
    """The allowed modes, highest first."""
    reason: Reason | None
    """Why the mode asked for is not allowed; None if it is."""
    guards: GuardScope
    trial: Trial | None
    """Compares times; None: nothing is to be compared."""


class Settled(NamedTuple):
    """What graphs of a variant save, and which are not used any more."""

    saving: Saving
    pieces: dict[Any, Saving]
    """What the graphs of submodules save, if that is known."""
    reason: Reason | None = None
    """Why the variant runs eagerly from now on; None if it does not."""
    entries: Sequence[Entry] = ()
    """Graphs that the caller must drop."""
    left_alone: Sequence[Any] = ()
    """Submodules that run eagerly from now on, in steps with this key."""


class Plan(NamedTuple):
    """The decision for the current step."""

    action: Action
    state: KeyState
    variant: Variant | None
    reason: Reason | None

    def without_trial(self) -> Plan:
        """Return the plan of a step that runs from its graphs instead of eagerly."""
        assert self.variant is not None
        action = Action.PIECEWISE if self.variant.entry is None else Action.REPLAY
        return self._replace(action=action, reason=self.variant.reason)
