"""What happened: counted by the step runner, read by users and by the summary."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from cg_lightning.core.descriptor import BatchDescriptor


@dataclasses.dataclass
class EntryRecord:
    """One graph of one target: captured anew after its weights moved, it stays one record."""

    stage: str
    mode: str
    target: str
    """Dotted path of the submodule, ``forward`` for that of the LightningModule, or the name of the step."""
    shapes: str
    captures: int = 0
    replays: int = 0
    """Replays that made a step's result, the one right after a capture included."""
    seconds: float = 0.0
    """Spent capturing, in seconds."""
    bytes: int = 0
    """Graph memory of the latest capture and its static inputs, in bytes."""
    within_spread: bool = False
    """Whether a verified replay differed from eager, by no more than eager differs from itself."""


@dataclasses.dataclass
class EagerRecord:
    """Steps of one stage and shape that ran no graph, for one reason."""

    stage: str
    shapes: str
    reason: str
    steps: int


class CUDAGraphStats:
    """Counts over the life of one callback."""

    def __init__(self) -> None:
        self.entries: list[EntryRecord] = []
        self._graphed_steps: Counter[tuple[str, str]] = Counter()
        self._eager_steps: Counter[tuple[str, str, str]] = Counter()
        self._index: dict[tuple[str, str, BatchDescriptor], EntryRecord] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": {}}  # keys may name types that cannot be pickled

    def record(self, mode: str, target: str, descriptor: BatchDescriptor) -> EntryRecord:
        """Gives the record of one graph, the same one after it was captured anew."""
        key = (mode, target, descriptor)
        if key not in self._index:
            self._index[key] = EntryRecord(
                descriptor.stage or "", mode, target, descriptor.shapes()
            )
            self.entries.append(self._index[key])
        return self._index[key]

    def count_graphed_step(self, stage: str, mode: str) -> None:
        """Counts a step that ran at least one graph."""
        self._graphed_steps[stage, mode] += 1

    def count_eager_step(self, stage: str, shapes: str, reason: str) -> None:
        """Counts a step that ran no graph."""
        self._eager_steps[stage, shapes, reason] += 1

    @property
    def captures(self) -> int:
        """Graphs captured."""
        return sum(entry.captures for entry in self.entries)

    @property
    def replays(self) -> int:
        """Replays that made a step's result."""
        return sum(entry.replays for entry in self.entries)

    @property
    def steps(self) -> dict[str, int]:
        """Steps by the mode that they ran in."""
        counts = Counter({"NONE": self.eager, "PIECEWISE": 0, "FULL": 0})
        for (_, mode), number in self._graphed_steps.items():
            counts[mode] += number
        return dict(counts)

    @property
    def eager(self) -> int:
        """Steps that ran no graph."""
        return self._eager_steps.total()

    @property
    def eager_reasons(self) -> dict[str, int]:
        """Steps that ran no graph, by reason."""
        counts: Counter[str] = Counter()
        for (_, _, reason), number in self._eager_steps.items():
            counts[reason] += number
        return dict(counts)

    @property
    def eager_records(self) -> list[EagerRecord]:
        """Steps that ran no graph, by stage, shapes and reason."""
        return [EagerRecord(*key, number) for key, number in self._eager_steps.items()]

    @property
    def capture_seconds(self) -> float:
        """Time spent capturing, in seconds."""
        return sum(entry.seconds for entry in self.entries)

    @property
    def graph_bytes(self) -> int:
        """Graph memory and static inputs, in bytes."""
        return sum(entry.bytes for entry in self.entries)

    def graphed_steps(self, stage: str) -> dict[str, int]:
        """Steps of one stage that ran a graph, by mode."""
        return {mode: number for (of, mode), number in self._graphed_steps.items() if of == stage}

    def to_dict(self) -> dict[str, Any]:
        """Gives all counts as plain values, fit for JSON."""
        return {
            "captures": self.captures,
            "replays": self.replays,
            "steps": self.steps,
            "eager": self.eager,
            "eager_reasons": self.eager_reasons,
            "capture_seconds": self.capture_seconds,
            "graph_bytes": self.graph_bytes,
            "entries": [dataclasses.asdict(entry) for entry in self.entries],
        }
