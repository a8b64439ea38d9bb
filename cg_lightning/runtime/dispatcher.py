"""The one place that decides in which mode a step or a call runs.

It is told facts (a step was watched, a capture failed, a replay differed) and knows keys, phases, counts and reasons. It
knows no tensor, no module and no Trainer: guards and entries are objects that it asks whether they still hold.

The life of a key::

    seen first -> WATCH -> WARM_UP ... -> CAPTURE -> VERIFY ... -> REPLAY ...
                    ^                        |          |
                    |  guards do not hold    v          v
                    +----------------      refused in FULL: PIECEWISE, or EAGER for good

If the guards of no variant of a key hold, the step is watched once more: with other values it may take another way. The
ledger of the key's family ends that if it never pays.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import WARM_UP, Reason, Status

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
UNKNOWN_KEY = Reason(Status.WARM_UP, "unknown key")
NEW_KEY = Reason(
    Status.WARM_UP,
    "warm-up: shapes so far did not come again, so a new one is watched only if it does",
)
CAPTURE_COST = 4
"""Approximate cost of one capture, in eager steps."""
WATCH_COST = 2
"""Approximate cost of watching one step, in eager steps, once what it costs at first is paid."""
CREDIT = 16
"""What a family of keys may spend before its graphs have saved anything, in eager steps."""
FIRST_WAIT = 10
"""Steps that an overdrawn family runs eagerly before it may spend once more; doubled each time."""
MOST_UNREPEATED = 4
"""Watched keys that have not come again: with so many, the next new key is watched only if it comes a second time."""
MOST_VARIANTS = 8
"""Variants of one key; the oldest goes first."""
MOST_KEYS = 2048
"""Keys without a graph that are remembered; the oldest go first."""


class CaptureLedger:
    """Keeps the account of one family of keys: equal shapes, any plain values, any guarded values.

    A capture costs 4 steps, a watched step 2, and each step that runs from a graph earns 1. A family that has spent its credit
    of 16 without earning it back runs eagerly for 10 steps, may then spend once more, waits for 20, 40, ... So keys that never
    come again, a module that changes with each step, and more shapes than there may be graphs cost little in the long run.
    """

    def __init__(self) -> None:
        self.balance = CREDIT
        self.why = ""
        """What varies, or that a graph was evicted: why the family had to spend last."""
        self._status = Status.UNPROFITABLE
        self._waiting = 0
        self._next_wait = FIRST_WAIT

    def may_spend(self) -> bool:
        """Return whether the family may watch or capture in this step. While it may not, each call is one step of waiting."""
        if self.balance > 0:
            return True
        if self._waiting == 0:
            self._waiting, self._next_wait = self._next_wait, 2 * self._next_wait
            return False
        self._waiting -= 1
        return self._waiting == 0

    def spend(self, steps: int) -> None:
        """Pay for a capture or a watched step."""
        self.balance -= steps

    def earn(self) -> None:
        """Take what one step from a graph saves."""
        if self.balance < CREDIT:
            self.balance += 1
            if self.balance == CREDIT:
                self._next_wait = FIRST_WAIT

    def note(self, status: Status, why: str) -> None:
        """Store for what the family has to spend: what varies, or that a graph was evicted."""
        if why:
            self._status, self.why = status, why

    def reason(self) -> Reason:
        """Return why the family may not spend now."""
        why = self.why or "its keys do not come again"
        return Reason(self._status, f"not captured, since it would not pay: {why}")


class Guards(Protocol):
    """What the dispatcher asks of the guards of a variant."""

    def check(self) -> bool:
        """Return whether they hold."""

    def check_epoch(self) -> bool:
        """Return whether what is compared once an epoch holds."""

    def explain(self) -> str:
        """Return which one does not hold, with both values."""


class Entry(Protocol):
    """What the dispatcher asks of a graph."""

    replays: int

    def is_valid(self) -> bool:
        """Return whether the graph was not dropped and may be replayed."""


class Action(enum.Enum):
    """What to do with a step or a call."""

    WATCH = "run it eagerly under watch"
    WARM_UP = "run it eagerly"
    EAGER = "run it eagerly, for a reason"
    PIECEWISE = "run it, with its submodules from graphs"
    CAPTURE = "capture it, then replay"
    VERIFY = "replay it, and compare with eager"
    REPLAY = "replay it"


class Dispatch(NamedTuple):
    """The mode that a step is to run in, and why not in a higher one (None if it runs as asked)."""

    runtime_mode: CUDAGraphMode
    batch_descriptor: BatchDescriptor
    reason: Reason | None


class Miss(NamedTuple):
    """A submodule that no watched step allows with the values that it reads now."""

    changed: str
    """What has changed, with both values."""
    known: list[Guards]
    """The values with which it is allowed."""

    def is_met(self) -> bool:
        """Return whether a step that is watched now would meet such values."""
        return not any(guards.check() for guards in self.known)


@dataclasses.dataclass(eq=False)
class Variant:
    """One way that the steps of a key take: what they read, what a watched one showed, and its graph."""

    guards: Guards
    modes: list[CUDAGraphMode]
    """The modes that it may run in, the highest first; empty: eager."""
    reason: Reason | None = None
    """Why it does not run in the mode that was asked for."""
    needs_second_look: bool = False
    """Whether another watched step may find less."""
    did_one_time_work: bool = False
    """Whether the watched step did something that is done once, so that one more eager step has to follow."""
    watched: Any = None
    """What the watched step showed, for messages."""
    record: Any = None
    """The row of its PIECEWISE steps in the statistics."""
    entry: Entry | None = None
    verify_at: int = -1
    """The number of replays after which the next one is compared with eager; -1: never."""

    @property
    def mode(self) -> CUDAGraphMode:
        """The highest mode that is left."""
        return self.modes[0] if self.modes else NONE


@dataclasses.dataclass(eq=False)
class KeyState:
    """All that is known of one key of one target."""

    descriptor: BatchDescriptor
    ledger: CaptureLedger
    sights: int = 0
    """Steps with this key so far."""
    warmup_runs: int = 0
    variants: list[Variant] = dataclasses.field(default_factory=list)
    miss: Miss | None = None
    """Why another step has to be watched, if a submodule asked for it."""


class Plan(NamedTuple):
    """A decision: what to do with the step under way."""

    action: Action
    state: KeyState
    variant: Variant | None
    reason: Reason | None


class CUDAGraphDispatcher:
    """Decides in which mode a step runs: FULL before PIECEWISE before NONE.

    By hand: :meth:`add_cudagraph_key` makes a key valid in a mode, and :meth:`dispatch` returns the highest mode that is
    valid. The callback uses :meth:`plan` and tells facts. It neither captures nor runs anything, and it never sees a batch.

    Args:
        policy: The mode that the user asked for.
        warmup_steps: Eager runs of a key before its capture.
        next_verification: Returns the number of replays after which the next one is compared with eager, given the
            replays so far; -1: never.
        watches: Whether steps are watched before a capture. Calls of submodules are not: the step around them is.
    """

    def __init__(
        self,
        policy: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
        warmup_steps: int = 0,
        next_verification: Callable[[int], int] = lambda _: -1,
        *,
        watches: bool = True,
    ) -> None:
        self._policy = policy
        self._warmup_steps = warmup_steps
        self._next_verification = next_verification
        self._watches = watches
        self._graph_mode = FULL if watches else PIECEWISE
        self._states: dict[tuple[Any, ...], KeyState] = {}
        self._ledgers: dict[tuple[Any, ...], CaptureLedger] = {}
        self._unrepeated: set[tuple[Any, ...]] = set()

    # by hand

    def add_cudagraph_key(
        self, mode: CUDAGraphMode, descriptor: BatchDescriptor, reason: Reason | None = None
    ) -> None:
        """Make ``descriptor`` valid in ``mode``; ``reason`` says why not in a higher one.

        Raises:
            ValueError: ``mode`` is neither PIECEWISE nor FULL.
        """
        if mode not in (PIECEWISE, FULL):
            raise ValueError(f"Keys are PIECEWISE or FULL, not {mode}.")
        state = self.state(descriptor.fields, descriptor)
        if not state.variants:
            state.variants.append(Variant(Unguarded(), []))
        variant = state.variants[0]
        variant.modes = [
            each for each in (FULL, PIECEWISE) if each is mode or each in variant.modes
        ]
        variant.reason = None if FULL in variant.modes else reason

    def dispatch(self, descriptor: BatchDescriptor) -> Dispatch:
        """Return the highest mode that ``descriptor`` is valid in, and why not a higher one.

        The descriptor in the result is equal to the one given, but the object that was added.
        """
        state = self._states.get(descriptor.fields)
        variant = None if state is None else self._current_variant(state)
        if state is None or variant is None:
            return Dispatch(NONE, descriptor, UNKNOWN_KEY)
        return Dispatch(variant.mode, state.descriptor, variant.reason)

    # what the runners ask

    def known(self, fields: tuple[Any, ...]) -> KeyState | None:
        """Return the state of a key, given by the fields of its descriptor; None if it was never seen."""
        return self._states.get(fields)

    def state(self, fields: tuple[Any, ...], descriptor: BatchDescriptor | None = None) -> KeyState:
        """Return the state of a key, given by the fields of its descriptor; a new one if it was never seen."""
        state = self._states.get(fields)
        if state is None:
            made = descriptor or BatchDescriptor(*fields)
            ledger = self._ledgers.setdefault(made.family, CaptureLedger())
            state = self._states[fields] = KeyState(made, ledger)
            if len(self._states) > MOST_KEYS:
                self._forget_unused()
        return state

    def plan(self, state: KeyState) -> Plan:
        """Decide what to do with the step under way. Call it once for each step."""
        state.sights += 1
        if state.sights == 2:
            self._unrepeated.discard(state.descriptor.fields)
        variant = self._current_variant(state)
        if variant is None:
            return self._plan_without_variant(state)
        if state.miss is not None and state.miss.is_met():
            return self._plan_another_look(state, variant, state.miss)
        entry = variant.entry
        if entry is not None and entry.is_valid():  # only what is warm was captured
            return self._plan_replay(state, variant, entry)
        if not self._is_warm(state, variant):
            looks_again = self._watches and variant.needs_second_look
            return Plan(Action.WATCH if looks_again else Action.WARM_UP, state, variant, WARM_UP)
        return self._plan_warm(state, variant)

    def _plan_replay(self, state: KeyState, variant: Variant, entry: Entry) -> Plan:
        state.ledger.earn()
        action = Action.REPLAY
        if entry.replays == variant.verify_at:
            variant.verify_at = self._next_verification(entry.replays + 1)
            action = Action.VERIFY
        return Plan(action, state, variant, variant.reason)

    def _plan_warm(self, state: KeyState, variant: Variant) -> Plan:
        if variant.mode is not self._graph_mode:
            action = Action.PIECEWISE if variant.mode is PIECEWISE else Action.EAGER
            return Plan(action, state, variant, variant.reason)
        if state.ledger.may_spend():
            return Plan(Action.CAPTURE, state, variant, variant.reason)
        return self._unprofitable(state, variant)

    def _plan_without_variant(self, state: KeyState) -> Plan:
        changed = state.variants[0].guards.explain() if state.variants else ""
        if changed:
            state.ledger.note(Status.UNPROFITABLE, changed)
        if not self._watches:
            reason = Reason(Status.CHANGED, changed) if changed else WARM_UP
            return Plan(Action.WARM_UP, state, None, reason)
        if state.sights == 1 and len(self._unrepeated) >= MOST_UNREPEATED:
            return Plan(Action.WARM_UP, state, None, NEW_KEY)
        if not state.ledger.may_spend():
            return self._unprofitable(state, None)
        reason = Reason(Status.CHANGED, f"changed: {changed}") if changed else WARM_UP
        return Plan(Action.WATCH, state, None, reason)

    def _plan_another_look(self, state: KeyState, variant: Variant, miss: Miss) -> Plan:
        state.ledger.note(Status.UNPROFITABLE, miss.changed)
        if not state.ledger.may_spend():
            return self._plan_warm(state, variant)
        reason = Reason(Status.CHANGED, f"changed: {miss.changed}")
        state.miss = None
        return Plan(Action.WATCH, state, None, reason)

    def _unprofitable(self, state: KeyState, variant: Variant | None) -> Plan:
        return Plan(Action.EAGER, state, variant, state.ledger.reason())

    def _current_variant(self, state: KeyState) -> Variant | None:
        for index, variant in enumerate(state.variants):
            if variant.guards.check():
                if index and not isinstance(
                    variant.guards, Unguarded
                ):  # the latest one is asked first, and goes last
                    state.variants.insert(0, state.variants.pop(index))
                return variant
        return None

    def _is_warm(self, state: KeyState, variant: Variant) -> bool:
        if variant.did_one_time_work and state.warmup_runs < 2:
            return False
        return state.warmup_runs >= max(self._warmup_steps, 1)

    # facts

    def judge(
        self, full: Reason | None, piecewise: Reason | None
    ) -> tuple[list[CUDAGraphMode], Reason | None]:
        """Return the modes that a step may run in, and why not in the one that was asked for.

        Args:
            full: Why it cannot be one graph; None if it can.
            piecewise: Why no submodule of it can run from a graph; None if one can.
        """
        modes, reasons = [], []
        for mode, reason, is_asked in (
            (FULL, full, self._policy.has_full_cudagraphs()),
            (PIECEWISE, piecewise, self._policy.has_piecewise_cudagraphs()),
        ):
            if is_asked and reason is None:
                modes.append(mode)
            elif is_asked and not modes:
                reasons.append(reason)
        return modes, reasons[0] if reasons else None

    def watched(
        self, state: KeyState, variant: Variant, replacing: Variant | None = None
    ) -> list[Entry]:
        """A step ran under watch.

        Args:
            state: The key of the step.
            variant: What the step showed.
            replacing: The variant of the same values that an earlier look gave.

        Returns:
            Graphs that have to be dropped.
        """
        state.ledger.spend(WATCH_COST)
        if replacing is not None and replacing in state.variants:
            state.variants.remove(replacing)
        if state.sights == 1:
            self._unrepeated.add(state.descriptor.fields)
        self.ran_eagerly(state)
        return self.add_variant(state, variant)

    def add_variant(self, state: KeyState, variant: Variant) -> list[Entry]:
        """Another way that steps of this key take is known. Returns graphs that have to be dropped."""
        if isinstance(variant.guards, Unguarded):  # always holds: those with guards are asked first
            guarded = [each for each in state.variants if not isinstance(each.guards, Unguarded)]
            state.variants = [*guarded, variant]
            return []
        state.variants.insert(0, variant)
        gone = state.variants[MOST_VARIANTS:]
        del state.variants[MOST_VARIANTS:]
        return [each.entry for each in gone if each.entry is not None]

    def ran_eagerly(self, state: KeyState) -> None:
        """A step that is not warm yet ran eagerly."""
        state.warmup_runs += 1

    def ran_before(self, state: KeyState, runs: int) -> None:
        """Calls with this key ran so often before anybody counted."""
        state.warmup_runs = max(state.warmup_runs, runs)

    def captured(self, state: KeyState, variant: Variant, entry: Entry) -> None:
        """A graph was captured."""
        state.ledger.spend(CAPTURE_COST - 1)  # the step itself ran from it
        variant.entry = entry
        variant.verify_at = self._next_verification(1)

    def evicted(self, state: KeyState, why: str) -> None:
        """A graph of this key had to make room for another one."""
        state.ledger.spend(CAPTURE_COST)
        state.ledger.note(Status.EVICTED, why)

    def refused(self, variant: Variant, reason: Reason) -> None:
        """A capture failed, or a replay differed: the variant runs in the next lower mode from now on."""
        variant.entry = None
        variant.reason = reason
        variant.modes = [mode for mode in variant.modes if mode is not self._graph_mode]

    def entries(self) -> list[Entry]:
        """Return the graphs of all keys, and forget them: the caller drops them."""
        found: list[Entry] = []
        for state in self._states.values():
            for variant in state.variants:
                if variant.entry is not None:
                    found.append(variant.entry)
                    variant.entry = None
        return found

    def changed(self, why: str) -> None:
        """The module has changed, so that graphs have to be captured again."""
        for state in self._states.values():
            state.ledger.note(Status.UNPROFITABLE, why)

    def reset(self, why: str = "") -> None:
        """The module has changed so that its steps may take another way: forget every key, but not what was spent."""
        self.changed(why)
        self._states.clear()
        self._unrepeated.clear()

    def begin_epoch(self) -> list[Entry]:
        """Forget the variants whose large containers have changed. Returns graphs that have to be dropped."""
        dropped: list[Entry] = []
        for state in self._states.values():
            for variant in [each for each in state.variants if not each.guards.check_epoch()]:
                state.ledger.note(Status.UNPROFITABLE, variant.guards.explain())
                state.variants.remove(variant)
                dropped += [variant.entry] if variant.entry is not None else []
        return dropped

    def _forget_unused(self) -> None:
        unused = [
            fields
            for fields, state in self._states.items()
            if all(variant.entry is None for variant in state.variants)
        ]
        for fields in unused[: MOST_KEYS // 2]:
            del self._states[fields]
            self._unrepeated.discard(fields)
        families = {state.descriptor.family for state in self._states.values()}
        self._ledgers = {key: ledger for key, ledger in self._ledgers.items() if key in families}


class Unguarded:
    """The guards of a key that was added by hand, and of one that runs no graph: they always hold."""

    def check(self) -> bool:
        """Return True."""
        return True

    def check_epoch(self) -> bool:
        """Return True."""
        return True

    def explain(self) -> str:
        """Return nothing."""
        return ""
