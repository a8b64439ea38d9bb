"""The rows of the statistics: graphs, steps that ran in a lower mode, times, padding."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import NO_CHANGE, Changed, Reason


class Saving(NamedTuple):
    """The time of a step, or of the calls of a submodule in a step, with graphs and without.

    On a GPU, it is the longer one of host time and device time.
    """

    eager: float
    """Without graphs, in seconds."""
    graph: float
    """With graphs, in seconds."""

    @property
    def share(self) -> float:
        """The share of the time that graphs save. Negative if they cost time."""
        return 1 - self.graph / self.eager if self.eager else 0.0


@dataclasses.dataclass
class EntryRecord:
    """The graphs of one key of one target.

    A graph that is captured again is counted in the same record.
    """

    stage: str
    mode: str
    """``FULL`` for graphs of whole steps, ``PIECEWISE`` for those of submodules."""
    target: str
    """Dotted path of the submodule, or the name of the step.

    The LightningModule itself is called ``forward``.
    """
    shapes: str
    captures: int = 0
    replays: int = 0
    """Replays that made a step's result, the one right after a capture included."""
    seconds: float = 0.0
    """Time spent on captures, in seconds."""
    bytes: int = 0
    """Graph memory of the latest capture and its static inputs, in bytes."""
    why_again: Changed = NO_CHANGE
    """What had changed since an earlier capture, of this key or of another one of the target.

    Empty if there was none.
    """
    timed: int = 0
    """Replays whose time was taken: those that were neither captures nor compared with eager."""
    host_seconds: float = 0.0
    """Host time of these replays, in seconds: for the whole step, or for the submodule's calls."""
    fastest_call: float | None = None
    """Host time of the fastest eager warm-up call of a submodule, in seconds.

    None for a step, whose times belong to its shapes, and if no call was timed.
    """
    eager_seconds: float | None = None
    """Time of an eager step, or of the submodule's calls in one. None: it was not compared."""
    graph_seconds: float | None = None
    """The same from graphs. Each is the longer one of host time and device time."""
    saving: float | None = None
    """The share of the time that graphs save. Negative if they cost time."""
    within_spread: bool = False
    """Whether a verified replay differed from eager, but not by more than eager runs differ."""
    values: tuple[str, ...] = ()
    """The plain values of the key, such as ``2.0``, in the order of the batch."""

    @property
    def is_of_step(self) -> bool:
        """Whether a replay makes a whole step, and not a call of a submodule."""
        return self.mode == CUDAGraphMode.FULL.name

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {**dataclasses.asdict(self), "why_again": str(self.why_again)}

    def saved(self, saving: Saving) -> None:
        """Store what graphs save."""
        self.eager_seconds, self.graph_seconds = saving
        self.saving = saving.share

    def captured(self, seconds: float, num_bytes: int, why_again: Changed) -> None:
        """Count a capture.

        Args:
            seconds: The time that it took, in seconds.
            num_bytes: Graph memory and static inputs, in bytes.
            why_again: What has changed since an earlier capture; empty if there was none.
        """
        self.why_again = why_again
        self.captures += 1
        self.seconds += seconds
        self.bytes = num_bytes


@dataclasses.dataclass
class HostTime:
    """The time that steps of one mode and shape took on the host.

    Steps that were watched, captured or compared are left out.
    """

    steps: int = 0
    seconds: float = 0.0
    fastest: float = float("inf")
    """The shortest eager one, in seconds."""

    def add(self, seconds: float) -> None:
        """Count an eager step."""
        self.steps += 1
        self.seconds += seconds
        self.fastest = min(self.fastest, seconds)


class Times(NamedTuple):
    """Host times of a step, on average over some graphs."""

    graph: float | None
    """The mean of the steps that were one replay, in seconds; None if none was timed."""
    eager: float | None
    """The fastest eager warm-up steps of their shapes, in seconds; None if there were none."""


class Comparison(NamedTuple):
    """What one step takes on the host, on average over the shapes that ran in both ways."""

    mode: str
    """``FULL`` or ``PIECEWISE``."""
    eager: float
    """The fastest eager warm-up step that was not watched, in seconds."""
    graph: float
    """The mean of the steps in this mode, without those that captured or compared, in seconds."""


@dataclasses.dataclass
class StepsRecord:
    """Steps of one stage and shape that did not run FULL, for one reason.

    Reasons that differ only in values are one. The record has the latest one.
    """

    stage: str
    mode: str
    shapes: str
    reason: Reason | None
    """Why they ran in a lower mode than asked; None if they did not."""
    is_of_other_shapes: bool = False
    """True for the record that counts all shapes after the first ones."""
    steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values."""
        assert self.reason is not None, "only records with a reason are shown"
        return {
            "stage": self.stage,
            "mode": self.mode,
            "shapes": self.shapes,
            "cause": self.reason.kind.value,
            "text": self.reason.text,
            "operation": self.reason.operation,
            "submodule": self.reason.submodule,
            "location": self.reason.location,
            "library_location": self.reason.library_location,
            "remedy": self.reason.remedy,
            "steps": self.steps,
        }


@dataclasses.dataclass
class PaddingRecord:
    """The batches that were padded up to one key of one target."""

    stage: str
    target: str
    shapes: str
    """The shapes of the padded batch."""
    steps: int = 0
    """Steps, or calls of a submodule, that ran from the graph of the padded batch."""
    elements: int = 0
    """Elements of their tensors."""
    padded_elements: int = 0
    """Elements of the padded tensors."""
    reason: Reason | None = None
    """Why shapes stay as they are; None if batches are padded."""

    def ran(self, elements: int, padded_elements: int) -> None:
        """Count a step."""
        self.steps += 1
        self.elements += elements
        self.padded_elements += padded_elements

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {**dataclasses.asdict(self), "reason": str(self.reason or "")}
