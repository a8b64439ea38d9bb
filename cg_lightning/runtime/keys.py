"""What is known of keys: their variants, guards and graphs. The dispatcher uses it.

It holds no tensor, no module and no Trainer: it only asks guards and entries if they are valid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from cg_lightning.core.descriptor import NUM_OF_BATCH, BatchDescriptor
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import NO_CHANGE, Changed, Reason, Status
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.guards.guard_set import Unguarded
from cg_lightning.padding.leaves import PaddedLeaves
from cg_lightning.report.records import EntryRecord, HostTime, StepsRecord
from cg_lightning.runtime.ledger import CaptureLedger
from cg_lightning.runtime.trial import StepTimes, Trial

MOST_VARIANTS = 8
"""Maximum number of variants of one key. The oldest one is dropped first."""
MOST_BRANCHES = 4
"""If this number of branches have the same reason, it counts as a reason of all branches."""
MOST_KEYS = 2048
"""Maximum number of stored keys. Beyond it, the oldest keys without a graph are dropped."""


class Guards(Protocol):
    """The guards of a variant, as the dispatcher sees them."""

    def check(self) -> bool:
        """Return True if all guarded values are unchanged."""

    def check_epoch(self) -> bool:
        """Return True if the values that are compared once per epoch are unchanged."""

    def explain(self) -> Changed:
        """Return the guard that failed, with both values."""


class Path(Protocol):
    """What a variant's step reads on the host, as the dispatcher sees it."""

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Return True if a batch with these leaves gives the values that were read."""

    def of_batch(self) -> Path | None:
        """Return the path for batches that are not padded any more; None if nothing is read."""

    def is_ruled_out_by(self, failed: Path) -> bool:
        """Return True if it cannot hold because ``failed`` does not hold."""

    def explain(self) -> Changed:
        """Return the read that gave another value, with both values. Empty if none did."""

    def varying(self) -> Reason:
        """Return the reason for a key with too many values."""


class Entry(Protocol):
    """A graph, as the dispatcher sees it."""

    replays: int
    record: EntryRecord
    """Its row in the statistics. The shapes that are padded to one batch share it."""

    def is_valid(self) -> bool:
        """Return True if the graph exists and may be replayed."""


class Miss(NamedTuple):
    """A submodule that may not run from a graph, because no watched step has seen its values."""

    changed: Changed
    """The value that has changed, now and before."""
    known: list[Guards]
    """Guards with the values that watched steps have seen."""

    def is_met(self) -> bool:
        """Return True if a step that is watched now would see such new values."""
        return not any(guards.check() for guards in self.known)


@dataclasses.dataclass(eq=False)
class Variant:
    """One path through the step of a key: the guarded values, the watched step, and the graph."""

    guards: Guards
    modes: list[CUDAGraphMode]
    """The allowed modes, highest first. If empty, the steps run eagerly."""
    reason: Reason | None = None
    """Why the steps run in a lower mode than asked."""
    needs_second_look: bool = False
    """True if watching a second step may find less."""
    did_one_time_work: bool = False
    """True if the watched step did one-time work, so one more eager step must follow."""
    watched: WatchedStep | None = None
    """The watched step, for messages."""
    record: StepsRecord | None = None
    """The row of its PIECEWISE steps in the statistics."""
    time: HostTime | None = None
    """Where the time of its PIECEWISE steps is added."""
    entry: Entry | None = None
    """The graph; None before the capture and after the graph was dropped."""
    path: Path | None = None
    """What the step reads on the host; None if it reads nothing, or if it is no graph."""
    padding: PaddedLeaves | None = None
    """How batches of the key are padded, to run from the graph of another key; None: not."""
    is_taken_over: bool = False
    """True if another shape was watched instead. Then it holds for padded batches only."""
    compare_at: int = 1
    """From this number of steps on, the graph of a padded batch is compared with eager."""
    watch_at: int = 0
    """From this number of steps on, a step is watched, as it may be one graph; 0 = never."""
    trial: Trial | None = None
    """Compares times, until it is known what graphs save; None: nothing is to be compared."""
    verify_at: int = -1
    """The number of replays after which the next one is compared with eager; -1 = never."""
    was_used: bool = False
    """Whether a step since the latest watched one had the guarded values."""
    ledger: CaptureLedger | None = None
    """The account of steps in pieces that may run no graph at all; None: there is none."""

    def explain(self) -> Changed:
        """Return what has changed, with both values. Call it only if the variant did not hold."""
        if self.path is not None and self.guards.check():
            return self.path.explain()
        return self.guards.explain()

    @property
    def only_computes(self) -> bool:
        """Whether its watched step did nothing but compute its output."""
        return self.watched is not None and self.watched.only_computes

    @property
    def mode(self) -> CUDAGraphMode:
        """The highest allowed mode."""
        return self.modes[0] if self.modes else CUDAGraphMode.NONE


@dataclasses.dataclass(eq=False)
class KeyState:
    """Everything that is known about one key of one target."""

    descriptor: BatchDescriptor
    ledger: CaptureLedger
    sights: int = 0
    """Number of steps with this key so far."""
    first_step: int = 1
    """The number of the target's step in which the key was seen first. 1 if that is not known."""
    warmup_runs: int = 0
    """Number of eager runs that count as warm-up."""
    variants: list[Variant] = dataclasses.field(default_factory=list)
    """The variants, the last one used first."""
    warm_up_times: list[StepTimes] = dataclasses.field(default_factory=list)
    """Times of eager warm-up steps, if graphs must save time."""
    miss: Miss | None = None
    """Set if a submodule asked for another watched step."""
    without_batch: Reason | None = None
    """Why the batch cannot be part of the key; None if it is part of it."""
    fastest_call: float | None = None
    """The shortest host time of an eager call of this submodule, in seconds; None for a step."""
    inputs_moved: int = 0
    """How often an input that its graph reads where it lies was given from elsewhere."""
    pieces: Variant | None = None
    """How steps run in pieces while the family may not spend; None: they run eagerly."""

    def called_eagerly(self, seconds: float) -> None:
        """Record the host time of an eager call of this submodule, in seconds."""
        if self.fastest_call is None or seconds < self.fastest_call:
            self.fastest_call = seconds

    def has_other_host_value(self) -> bool:
        """Whether guards hold, so that only values of the batch which the host reads are new."""
        return any(each.path is not None and each.guards.check() for each in self.variants)

    def varying(self) -> Reason | None:
        """Return why a watched step is not captured: the key has too many host values.

        None if it has few so far.
        """
        paths = [
            each.path for each in self.variants if each.path is not None and each.guards.check()
        ]
        return paths[0].varying() if len(paths) >= MOST_VARIANTS else None

    def is_in_many_branches(self, reason: Reason) -> bool:
        """Return True if several other variants have a reason at the same place in the code."""
        others = [
            each
            for each in self.variants
            if each.reason is not None
            and each.reason.place == reason.place
            and not each.guards.check()
        ]
        return len(others) >= MOST_BRANCHES

    def forget_values(self) -> None:
        """Forget values that did not come again, because each step would compare them."""
        self.variants = [
            each
            for each in self.variants
            if each.was_used
            or each.entry is not None
            or each.path is not None
            or each.mode is not CUDAGraphMode.FULL
        ]
        for each in self.variants:
            each.was_used = False


class KeyTable:
    """The keys of one target, and the accounts of their families."""

    def __init__(self) -> None:
        self._states: dict[tuple[Any, ...], KeyState] = {}
        """By the fields of the key."""
        self.seen: dict[tuple[Any, ...], bool] = {}
        """The fields of keys that need only the batch; True if it had one step and has no state."""
        self._ledgers: dict[tuple[Any, ...], CaptureLedger] = {}
        self._unrepeated: set[tuple[Any, ...]] = set()
        """The keys that were watched, and seen only once."""
        self.known: Callable[[tuple[Any, ...]], KeyState | None] = self._states.get
        """Returns the state of a key by the fields of its descriptor; None if it has none yet."""

    def state(self, fields: tuple[Any, ...], descriptor: BatchDescriptor | None = None) -> KeyState:
        """Return the state of a key. A new key gets a new state.

        Args:
            fields: The fields of its descriptor.
            descriptor: The descriptor, if the caller has one.
        """
        state = self._states.get(fields)
        if state is None:
            made = descriptor or BatchDescriptor(*fields)
            ledger = self._ledgers.get(made.family)
            if ledger is None:
                ledger = self._ledgers[made.family] = CaptureLedger()
            of_batch = fields[:NUM_OF_BATCH]
            # its flags may have been others, which costs a step of warm-up at most
            runs = 1 if self.seen.get(of_batch) else 0
            self.seen[of_batch] = False
            state = self._states[fields] = KeyState(made, ledger, sights=runs, warmup_runs=runs)
            if len(self._states) > MOST_KEYS:
                self._forget_unused()
        return state

    def states(self) -> list[KeyState]:
        """Return all keys. Those that had one step have a state for the caller only."""
        once = [
            KeyState(BatchDescriptor(*of_batch), CaptureLedger(), sights=1, warmup_runs=1)
            for of_batch, is_once in self.seen.items()
            if is_once
        ]
        return [*self._states.values(), *once]

    def add_variant(self, state: KeyState, variant: Variant) -> list[Entry]:
        """Add a variant of a key. Return the graphs that the caller must drop."""
        # one that always holds comes last: those with guards are asked first
        if isinstance(variant.guards, Unguarded):
            guarded = [each for each in state.variants if not isinstance(each.guards, Unguarded)]
            # host values that did not come again are not computed any more
            kept = [each for each in guarded if each.path is None or each.entry is not None]
            state.variants = [*kept, variant]
            return []
        state.variants.insert(0, variant)
        gone = state.variants[MOST_VARIANTS:]
        del state.variants[MOST_VARIANTS:]
        return [each.entry for each in gone if each.entry is not None]

    def forget(self, descriptor: BatchDescriptor) -> None:
        """Forget a key without a graph, as if none of its steps had run."""
        state = self._states.pop(descriptor.fields, None)
        if state is not None:
            self._unrepeated.discard(descriptor.fields)
            self.seen.pop(descriptor.fields[:NUM_OF_BATCH], None)

    def _forget_unused(self) -> None:
        once = [of_batch for of_batch, is_once in self.seen.items() if is_once]
        number = MOST_KEYS // 2
        others = max(number - len(once), 0)
        del once[:number]
        unused = [
            fields
            for fields, state in self._states.items()
            if all(variant.entry is None for variant in state.variants)
        ]
        for fields in unused[:others]:
            del self._states[fields]
            self._unrepeated.discard(fields)
        self.seen = dict.fromkeys(once, True)
        self.seen.update((fields[:NUM_OF_BATCH], False) for fields in self._states)
        families = {state.descriptor.family for state in self._states.values()}
        self._ledgers = {key: ledger for key, ledger in self._ledgers.items() if key in families}

    def entries(self) -> list[Entry]:
        """Return the graphs of all keys and forget them. The caller must drop them."""
        found: list[Entry] = []
        for state in self._states.values():
            for variant in state.variants:
                if variant.entry is not None:
                    found.append(variant.entry)
                    variant.entry = None
        return found

    def entries_of(self, descriptors: Iterable[BatchDescriptor]) -> list[Entry]:
        """Return the graphs of some keys."""
        states = [self._states.get(descriptor.fields) for descriptor in descriptors]
        variants = [variant for state in states if state is not None for variant in state.variants]
        return [variant.entry for variant in variants if variant.entry is not None]

    def ran_eagerly(self, state: KeyState) -> None:
        """Record that a step ran eagerly as a warm-up."""
        state.warmup_runs += 1

    def ran_before(self, state: KeyState, runs: int) -> None:
        """Record ``runs`` eager calls with this key that were made before it was known."""
        state.warmup_runs = max(state.warmup_runs, runs)

    def padded(self) -> list[tuple[KeyState, Variant, Entry]]:
        """Return the graphs of padded batches, with the keys that use them."""
        return [
            (state, variant, variant.entry)
            for state in self._states.values()
            for variant in state.variants
            if variant.padding is not None and variant.entry is not None
        ]

    def padded_like(self, variant: Variant) -> list[tuple[KeyState, Variant]]:
        """Return the keys and variants whose batches are padded to the same shapes."""
        assert variant.padding is not None
        return [
            (state, each)
            for state in self._states.values()
            for each in state.variants
            if each.padding is not None and each.padding.shapes == variant.padding.shapes
        ]

    def none_padded(self, padded: KeyState) -> None:
        """Record that no batch is padded to this key any more."""
        records = [variant.entry.record for variant in padded.variants if variant.entry is not None]
        for state, variant, entry in self.padded():
            if any(entry.record is record for record in records):
                self.not_padded(state, variant)

    def not_padded(self, state: KeyState, variant: Variant) -> None:
        """Record that batches of this key are not padded: they may have a graph of their own."""
        variant.entry = variant.padding = None
        variant.path = None if variant.path is None else variant.path.of_batch()
        if variant.is_taken_over:
            state.variants.remove(variant)

    def begin_epoch(self) -> list[Entry]:
        """Forget variants whose large containers have changed.

        Returns:
            Graphs that the caller must drop.
        """
        dropped: list[Entry] = []
        for state in self._states.values():
            for variant in [each for each in state.variants if not each.guards.check_epoch()]:
                state.ledger.note(Status.UNPROFITABLE, variant.guards.explain())
                state.variants.remove(variant)
                dropped += [variant.entry] if variant.entry is not None else []
        return dropped

    def changed(self, why: Changed) -> None:
        """Record that the module has changed, so graphs must be captured again."""
        for state in self._states.values():
            state.ledger.note(Status.UNPROFITABLE, why)

    def reset(self, why: Changed = NO_CHANGE) -> None:
        """Forget every key, because the module has changed and steps may take another path.

        The ledgers stay, so a module that changes at every step still runs out of credit.
        """
        self.changed(why)
        self._states.clear()
        self.seen.clear()
        self._unrepeated.clear()
