"""How steps, graphs and captures are counted. Runners count; the summary and loggers read."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.reasons import NO_CHANGE, Reason, Status
from cg_lightning.core.settings import check_name
from cg_lightning.core.stages import CALL, STEP_METHODS
from cg_lightning.report.records import (
    Comparison,
    EntryRecord,
    HostTime,
    PaddingRecord,
    StepsRecord,
    Times,
)
from cg_lightning.report.timeline import Timeline

MOST_SHAPES = 64
"""Maximum number of shapes of one stage, mode and reason. Others are counted together."""
MOST_REASONS = 64
"""Maximum number of sentences of one kind of reason. Others are counted by their kind."""
MOST_TIMES = 1024
"""Maximum number of stages, modes and shapes with a time on the host."""
MOST_UNSORTED = 4096
"""Maximum number of steps that are stored until a user asks for the statistics."""
OTHER_SHAPES = "other shapes"
_Topic = tuple[Cause | Status, str, str]


class Counts:
    """Counts of steps, graphs and captures, and their sums."""

    def __init__(self) -> None:
        self.entries: list[EntryRecord] = []
        """A record for each key of each target that was captured."""
        self.timeline = Timeline()
        """The time of each of the latest batches. A copy has no batches."""
        self.overlapped_copies = 0
        """Number of batches that were copied to the device during the computation."""
        self.late_predictions = 0
        """Number of predictions that were copied to the host while the device computed the next."""
        self.compile_seconds = 0.0
        """Time that ``compile`` took, in seconds. It is not in ``capture_seconds``."""
        self.proposed_pad_dims: dict[str, Any] = {}
        """What ``pad_dims="auto"`` has proposed, as ``pad_dims`` takes it."""
        self._padding: dict[tuple[str, str, str], PaddingRecord] = {}
        self._sorted: dict[tuple[str, str, str, _Topic | None], StepsRecord] = {}
        self._num_shapes: Counter[tuple[str, str, _Topic | None]] = Counter()
        self._num_reasons: Counter[tuple[str, str, Cause | Status]] = Counter()
        self._index: dict[tuple[str, str, BatchDescriptor], EntryRecord] = {}
        self._sorted_times: dict[tuple[str, str, str], HostTime] = {}
        self._unsorted: list[tuple[str, tuple[Any, ...], float, Reason]] = []

    def __getstate__(self) -> dict[str, Any]:
        self._sort()
        return {**self.__dict__, "_index": {}}  # keys may name types that cannot be pickled

    def entry(self, mode: str, target: str, descriptor: BatchDescriptor) -> EntryRecord:
        """Return the record of one key of one target; the same one after a second capture."""
        key = (mode, target, descriptor)
        if key not in self._index:
            made = EntryRecord(
                descriptor.stage or "",
                mode,
                target,
                descriptor.shapes(),
                values=descriptor.plain_values(),
            )
            self._index[key] = made
            self.entries.append(made)
        return self._index[key]

    def ran(self, stage: str, mode: str, shapes: str, reason: Reason | None) -> StepsRecord:
        """Count a step that ran in a lower mode than FULL.

        Args:
            stage: The stage.
            mode: ``PIECEWISE`` or ``NONE``.
            shapes: The shapes of its batch.
            reason: Why it did not run in the mode that was asked for; None if it did.

        Returns:
            The record in which it is counted, for a caller that counts more steps of the same kind.
        """
        topic = None if reason is None else reason.topic
        key = (stage, mode, shapes, topic)
        if key not in self._records:  # which sorts what came before
            if reason is not None and (stage, mode, topic) not in self._num_shapes:
                self._num_reasons[stage, mode, reason.kind] += 1
                if self._num_reasons[stage, mode, reason.kind] > MOST_REASONS:
                    # for example a text of the user's
                    reason = Reason(reason.kind, f"{reason.kind.value}, for one of many reasons")
                    topic = reason.topic
                    key = (stage, mode, shapes, topic)
            is_other = self._num_shapes[stage, mode, topic] >= MOST_SHAPES
            if key not in self._records and is_other:
                key = (stage, mode, OTHER_SHAPES, topic)
            if key not in self._records:
                self._num_shapes[stage, mode, topic] += 1
                self._records[key] = StepsRecord(*key[:3], reason, is_other)
        record = self._records[key]
        record.reason = reason
        record.steps += 1
        return record

    def ran_once(self, stage: str, fields: tuple[Any, ...], seconds: float, reason: Reason) -> None:
        """Count an eager warm-up step whose shapes hardly come again. It takes little time.

        Args:
            stage: The stage.
            fields: The first fields of the descriptor of its batch, or all.
            seconds: Its host time, in seconds.
            reason: Why it did not run in the mode that was asked for.
        """
        self._unsorted.append((stage, fields, seconds, reason))
        if len(self._unsorted) == MOST_UNSORTED:
            self._sort()

    def _sort(self) -> None:
        """Count the steps of :meth:`ran_once` by their shapes. Everything that reads does it."""
        unsorted, self._unsorted = self._unsorted, []
        for stage, fields, seconds, reason in unsorted:
            shapes = BatchDescriptor(*fields).shapes()
            self.host_time(stage, "NONE", shapes).add(seconds)
            self.ran(stage, "NONE", shapes, reason)

    @property
    def _records(self) -> dict[tuple[str, str, str, _Topic | None], StepsRecord]:
        if self._unsorted:
            self._sort()
        return self._sorted

    @property
    def _times(self) -> dict[tuple[str, str, str], HostTime]:
        if self._unsorted:
            self._sort()
        return self._sorted_times

    @property
    def padding(self) -> list[PaddingRecord]:
        """Real and padded elements of the batches that were padded, by stage, target and key."""
        return list(self._padding.values())

    def padded(self, target: str, descriptor: BatchDescriptor) -> PaddingRecord:
        """Return the record of the batches that are padded up to one key of one target."""
        made = PaddingRecord(descriptor.stage or "", target, descriptor.shapes())
        return self._padding.setdefault((made.stage, target, made.shapes), made)

    def host_time(self, stage: str, mode: str, shapes: str) -> HostTime:
        """Return where to add the time of an eager warm-up step, or of a warm step in PIECEWISE.

        Args:
            stage: The stage.
            mode: ``NONE`` or ``PIECEWISE``. In FULL the record of the graph has the times.
            shapes: The shapes of its batch.
        """
        key = (stage, mode, shapes)
        if key not in self._times and len(self._times) >= MOST_TIMES:
            return HostTime()
        return self._times.setdefault(key, HostTime())

    def comparison(self, stage: str, mode: str) -> Comparison | None:
        """Compare the host's time of graphs with that of eager steps of the same shapes.

        Args:
            stage: The stage.
            mode: ``FULL`` or ``PIECEWISE``.

        Returns:
            Both times; None if no shape ran in both ways. On a GPU, work may go on after the host
            is done.
        """
        graphs: dict[str, HostTime] = {}
        for entry in self.entries:
            is_asked_for = (entry.stage, entry.mode) == (stage, mode) and entry.is_of_step
            if is_asked_for and entry.timed:
                time = graphs.setdefault(entry.shapes, HostTime())
                time.steps += entry.timed
                time.seconds += entry.host_seconds
        for (of_stage, of_mode, shapes), time in self._times.items():
            if (of_stage, of_mode) == (stage, mode):
                graphs[shapes] = time
        both = [
            (time, self._times[stage, "NONE", shapes])
            for shapes, time in graphs.items()
            if (stage, "NONE", shapes) in self._times
        ]
        eager_mean = _mean([(graph.steps, graph.steps * eager.fastest) for graph, eager in both])
        graph_mean = _mean([(graph.steps, graph.seconds) for graph, _ in both])
        if eager_mean is None or graph_mean is None:
            return None
        return Comparison(mode, eager_mean, graph_mean)

    def times_of(self, entries: Sequence[EntryRecord]) -> Times:
        """Return the host times of steps, or of calls of submodules.

        Args:
            entries: Graphs of whole steps, or of submodules: their times are those of a call.
        """
        eager = [(entry.timed or 1, self._fastest_eager(entry)) for entry in entries]
        return Times(
            _mean([(entry.timed, entry.host_seconds) for entry in entries]),
            _mean([(steps, steps * seconds) for steps, seconds in eager if seconds is not None]),
        )

    def _fastest_eager(self, entry: EntryRecord) -> float | None:
        if not entry.is_of_step:
            return entry.fastest_call
        time = self._times.get((entry.stage, "NONE", entry.shapes))
        return None if time is None else time.fastest

    def host_times(self, stage: str) -> Times:
        """Return the host times of a stage's steps: from graphs, whole or in pieces, and eager."""
        entries = [entry for entry in self.entries if entry.stage == stage and entry.is_of_step]
        times = {
            mode: [time for key, time in self._times.items() if key[:2] == (stage, mode)]
            for mode in ("NONE", "PIECEWISE")
        }
        graphs = [(entry.timed, entry.host_seconds) for entry in entries]
        graphs += [(time.steps, time.seconds) for time in times["PIECEWISE"]]
        eager = [(time.steps, time.steps * time.fastest) for time in times["NONE"] if time.steps]
        return Times(_mean(graphs), _mean(eager))

    def compiled(self, seconds: float) -> None:
        """Count the time of a compilation."""
        self.compile_seconds += seconds

    def copy(self) -> Self:
        """Return the counts as they are now, for :meth:`since`."""
        return self.since(type(self)())

    def since(self, earlier: Self) -> Self:
        """Return what was counted since a :meth:`copy` was taken."""
        new = type(self)()
        new.overlapped_copies = self.overlapped_copies - earlier.overlapped_copies
        new.late_predictions = self.late_predictions - earlier.late_predictions
        new.compile_seconds = self.compile_seconds - earlier.compile_seconds
        new.proposed_pad_dims = copy.deepcopy(self.proposed_pad_dims)
        for index, entry in enumerate(self.entries):
            record = dataclasses.replace(entry)
            if index < len(earlier.entries):
                before = earlier.entries[index]
                for name in ("captures", "replays", "seconds", "timed", "host_seconds"):
                    setattr(record, name, getattr(entry, name) - getattr(before, name))
            if record.captures < 2 and index < len(earlier.entries):
                record.why_again = NO_CHANGE  # that was in an earlier run
            new.entries.append(record)
        for key, steps in self._records.items():
            seen = earlier._records.get(key)
            number = steps.steps - (0 if seen is None else seen.steps)
            if number:
                new._records[key] = dataclasses.replace(steps, steps=number)
        for padding_key, padded in self._padding.items():
            last = earlier._padding.get(padding_key, PaddingRecord("", "", ""))
            new._padding[padding_key] = dataclasses.replace(
                padded,
                steps=padded.steps - last.steps,
                elements=padded.elements - last.elements,
                padded_elements=padded.padded_elements - last.padded_elements,
            )
        for times_key, time in self._times.items():
            known = earlier._times.get(times_key, HostTime())
            if number := time.steps - known.steps:
                new._times[times_key] = HostTime(number, time.seconds - known.seconds, time.fastest)
        return new

    @property
    def captures(self) -> int:
        """Number of captures."""
        return sum(entry.captures for entry in self.entries)

    @property
    def replays(self) -> int:
        """Number of replays that made a step's result; PIECEWISE counts those of each submodule."""
        return sum(entry.replays for entry in self.entries)

    @property
    def steps(self) -> dict[str, int]:
        """Number of steps by the mode in which they ran."""
        return {
            "NONE": self.eager,
            "PIECEWISE": self._count("PIECEWISE"),
            "FULL": sum(entry.replays for entry in self.entries if entry.is_of_step),
        }

    @property
    def eager(self) -> int:
        """Number of steps that ran no graph."""
        return self._count("NONE")

    @property
    def eager_reasons(self) -> dict[str, int]:
        """Number of steps that ran no graph, by the sentence that says why."""
        counts: Counter[str] = Counter()
        for record in self._of("NONE"):
            counts[str(record.reason)] += record.steps
        return dict(counts)

    @property
    def reasons(self) -> list[StepsRecord]:
        """Why steps ran in a lower mode than asked: records by stage, mode, shapes and reason."""
        return [record for record in self._records.values() if record.reason is not None]

    @property
    def capture_seconds(self) -> float:
        """Time spent on captures, in seconds."""
        return sum(entry.seconds for entry in self.entries)

    @property
    def graph_bytes(self) -> int:
        """Graph memory and static inputs, in bytes."""
        return sum(entry.bytes for entry in self.entries)

    def steps_of(self, stage: str) -> dict[str, int]:
        """Return the number of steps of one stage by mode, the highest mode first.

        Modes without steps are left out.

        Raises:
            ValueError: There is no such stage.
        """
        check_name("stage", stage, (*STEP_METHODS, CALL))
        entries = [entry for entry in self.entries if entry.stage == stage]
        counts = {
            "FULL": sum(entry.replays for entry in entries if entry.is_of_step),
            "PIECEWISE": self._count("PIECEWISE", stage),
            "NONE": self._count("NONE", stage),
        }
        return {mode: number for mode, number in counts.items() if number}

    def to_dict(self) -> dict[str, Any]:
        """Return all counts as plain values, fit for JSON."""
        return {
            "captures": self.captures,
            "replays": self.replays,
            "steps": self.steps,
            "eager": self.eager,
            "eager_reasons": self.eager_reasons,
            "reasons": [record.to_dict() for record in self.reasons],
            "capture_seconds": self.capture_seconds,
            "graph_bytes": self.graph_bytes,
            "overlapped_copies": self.overlapped_copies,
            "late_predictions": self.late_predictions,
            "compile_seconds": self.compile_seconds,
            "entries": [entry.to_dict() for entry in self.entries],
            "padding": [record.to_dict() for record in self.padding],
            "proposed_pad_dims": copy.deepcopy(self.proposed_pad_dims),
        }

    @property
    def stages(self) -> list[str]:
        """The stages that have run, in the order in which they came first."""
        counted = [record.stage for record in self._records.values()]
        return list(dict.fromkeys([*counted, *[entry.stage for entry in self.entries]]))

    def _of(self, mode: str) -> list[StepsRecord]:
        return [record for record in self._records.values() if record.mode == mode]

    def _count(self, mode: str, stage: str | None = None) -> int:
        records = [record for record in self._of(mode) if stage in (None, record.stage)]
        return sum(record.steps for record in records)


def _mean(sums: Sequence[tuple[int, float]]) -> float | None:
    """Return the mean over all steps, of numbers of steps and their seconds; None without steps."""
    steps = sum(number for number, _ in sums)
    return sum(seconds for _, seconds in sums) / steps if steps else None
