"""The one place that decides in which mode a step or a call runs.

The dispatcher receives facts (a step was watched, a capture failed, a replay differed). It knows
keys, phases, counts and reasons (``keys.py``, ``ledger.py``). It knows no tensor, no module and no
Trainer: it only asks guards and entries if they are still valid.

The life of a key::

    seen first -> WATCH -> WARM_UP ... -> CAPTURE -> VERIFY ... -> REPLAY ...
                    ^                        |          |
                    |  a guard failed        v          v
                    +----------------      refused in FULL: PIECEWISE, or EAGER for good

If every variant of a key has a failed guard, the step is watched once more, because it may take
another path with other values. If that never pays, the ledger of the key's family stops it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import NO_CHANGE, WARM_UP, Changed, Reason, Status
from cg_lightning.guards.guard_set import Unguarded
from cg_lightning.runtime.costs import MeasuredCosts
from cg_lightning.runtime.keys import (
    MOST_KEYS,
    Entry,
    KeyState,
    KeyTable,
    Miss,
    Path,
    Variant,
)
from cg_lightning.runtime.ledger import CAPTURE_COST, CREDIT, WATCH_COST, CaptureLedger
from cg_lightning.runtime.plans import (
    CAPTURED_TOO_SELDOM,
    NEW_KEY,
    TIMED,
    TOO_SELDOM,
    TOO_SHORT,
    UNKNOWN_KEY,
    Action,
    Dispatch,
    GuardScope,
    Judgement,
    Plan,
    Settled,
    no_gain,
)
from cg_lightning.runtime.trial import Trial

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
NEXT_KEY_COST = 20
"""Minimum cost of a watched step, in eager steps, if only the current stage can repay it.

The ledger counts less, because most keys come again. For each key after the first one, this cost is
compared with the steps that are left of a stage of known length. Otherwise many shapes could cost
more than the stage.
"""
MOST_UNREPEATED = 4
"""Maximum number of watched keys that were seen only once.

Beyond it, a new key is watched when it is seen for the second time.
"""

_ENOUGH_EAGER = 8
"""After so many eager steps, their usual time is known."""
_FEW_LEFT = 3
"""If fewer further watched steps can be won back, the next one also finds the submodules."""


def _watched_again(changed: Changed) -> Reason:
    return Reason.of_change(Status.CHANGED, changed.after("changed: "))


class CUDAGraphDispatcher(KeyTable):
    """Decides in which mode a step runs: FULL before PIECEWISE before NONE.

    In a loop of your own, call :meth:`add_cudagraph_key` to allow a key in a mode, and
    :meth:`dispatch` to get the highest allowed mode. The callback calls :meth:`plan` and reports
    facts instead. The dispatcher does *not* capture or run anything, and it never sees a batch. The
    class and its two methods follow vLLM (``vllm/v1/cudagraph_dispatcher.py``).

    Example::

        >>> from cg_lightning import BatchDescriptor, CUDAGraphDispatcher, CUDAGraphMode
        >>> dispatcher = CUDAGraphDispatcher()
        >>> dispatcher.add_cudagraph_key(CUDAGraphMode.FULL, BatchDescriptor(batch_size=8))
        >>> dispatcher.dispatch(BatchDescriptor(batch_size=8)).runtime_mode.name
        'FULL'
        >>> dispatch = dispatcher.dispatch(BatchDescriptor(batch_size=9))
        >>> dispatch.runtime_mode.name, str(dispatch.reason)
        ('NONE', 'unknown key')

    Args:
        policy: The mode that the user asked for.
        warmup_steps: Number of eager runs of a key before its capture.
        next_verification: A function from the number of replays so far to the number of replays
            after which the next one is compared with eager (-1 = never).
        watches: True if steps are watched before a capture. False for calls of submodules, because
            the step around them is watched.
        least_steps: Number of steps, from the capture on, below which a capture cannot pay.
        min_saving: The share of a step's time that graphs must save; 0: times are not compared.
    """

    def __init__(
        self,
        policy: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
        warmup_steps: int = 0,
        next_verification: Callable[[int], int] = lambda _: -1,
        *,
        watches: bool = True,
        least_steps: int = 0,
        min_saving: float = 0.0,
    ) -> None:
        super().__init__()
        self._policy = policy
        self._warmup_steps = warmup_steps
        self._next_verification = next_verification
        self._watches = watches
        self._least_steps = least_steps
        self._min_saving = min_saving
        self._graph_mode = FULL if watches else PIECEWISE
        self._has_watched = False
        self._steps = 0
        self._captures = 0
        self.least_steps_left = least_steps + max(warmup_steps, 1)
        """Number of steps of a stage below which a key is too new for a graph."""
        self.costs = MeasuredCosts(least_steps, max(least_steps - 2, 0))
        self._unproven: set[int] = set()
        """The ids of the records of padded graphs that are compared at their next replay."""

    # by hand

    def add_cudagraph_key(
        self, mode: CUDAGraphMode, descriptor: BatchDescriptor, reason: Reason | None = None
    ) -> None:
        """Allow ``descriptor`` to run in ``mode``.

        Args:
            mode: PIECEWISE or FULL. A key may be allowed in both.
            descriptor: The key.
            reason: Why the key may not run in a higher mode.

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
        """Return the highest allowed mode of ``descriptor``, with the reason if it is not FULL.

        For an unknown key the mode is NONE. The descriptor in the result is the object that was
        added; it is equal to the given one.
        """
        state = self._states.get(descriptor.fields)
        variant = None if state is None else self._current_variant(state)
        if state is None or variant is None:
            return Dispatch(NONE, descriptor, UNKNOWN_KEY)
        return Dispatch(variant.mode, state.descriptor, variant.reason)

    # what the runners ask

    @property
    def captures(self) -> int:
        """Number of captures so far."""
        return self._captures

    @property
    def compares_times(self) -> bool:
        """Whether graphs that do not save time are dropped."""
        return self._min_saving > 0

    def plan(self, state: KeyState, leaves: Sequence[Any] = ()) -> Plan:
        """Decide what to do with the current step. Call it exactly once for each step.

        Args:
            state: The state of its key.
            leaves: The leaves of its batch.
        """
        self._steps += 1
        state.sights += 1
        if state.sights == 1:
            state.first_step = self._steps
        elif state.sights == 2:
            self._unrepeated.discard(state.descriptor.fields)
        variant = self._current_variant(state, leaves)
        if variant is None:
            return self._plan_without_variant(state)
        if state.miss is not None and state.miss.is_met():
            return self._plan_another_look(state, variant, state.miss)
        entry = variant.entry
        if entry is not None and entry.is_valid():  # a captured variant is warm
            return self._plan_replay(state, variant, entry)
        if not self._is_warm(state, variant):
            looks_again = self._watches and variant.needs_second_look
            return Plan(Action.WATCH if looks_again else Action.WARM_UP, state, variant, WARM_UP)
        return self._plan_warm(state, variant)

    def is_new(self, of_batch: tuple[Any, ...]) -> bool:
        """Return True if a step has a new key, and a new key is watched only if it comes again.

        Args:
            of_batch: The fields of its descriptor that need only the batch.
        """
        # written out, as in _awaits_repeats: every step comes here
        awaits_repeats = self._watches and len(self._unrepeated) >= MOST_UNREPEATED
        return awaits_repeats and of_batch not in self.seen

    def runs_once(self, of_batch: tuple[Any, ...], steps_left: float) -> bool:
        """Count a step of a new key, and return True if nothing but a warm-up is to be done.

        It does what :meth:`plan`, :meth:`within` and :meth:`ran_eagerly` do, but makes no state of
        the key, because it will most likely not come again.

        Args:
            of_batch: The fields of a descriptor that need only the batch, for which :meth:`is_new`
                has returned True. Its leaves are tensors.
            steps_left: Number of steps until the end of the stage, this one included.

        Returns:
            False if the step must be planned. Then it is not counted here.
        """
        if steps_left < self.least_steps_left:
            return False
        self._steps += 1
        self.seen[of_batch] = True
        if len(self.seen) > MOST_KEYS:
            self._forget_unused()
        return True

    def _awaits_repeats(self) -> bool:
        """Return True if a new key is watched only if it comes again."""
        return self._watches and len(self._unrepeated) >= MOST_UNREPEATED

    def _plan_replay(self, state: KeyState, variant: Variant, entry: Entry) -> Plan:
        if state.ledger.balance < CREDIT:
            state.ledger.earn()
        action = Action.REPLAY
        if self._unproven and variant.padding is not None and id(entry.record) in self._unproven:
            self._unproven.discard(id(entry.record))
            action = Action.VERIFY
        elif entry.replays == variant.verify_at:
            variant.verify_at = self._next_verification(entry.replays + 1)
            action = Action.VERIFY
        elif variant.trial is not None and variant.trial.wants_eager():
            return Plan(Action.TRIAL, state, variant, TIMED)
        return Plan(action, state, variant, variant.reason)

    def _plan_warm(self, state: KeyState, variant: Variant) -> Plan:
        if self._graph_mode not in variant.modes:
            if variant.trial is not None and variant.trial.wants_eager():
                return Plan(Action.TRIAL, state, variant, TIMED)
            if 0 < variant.watch_at <= state.sights and state.ledger.may_spend():
                return Plan(Action.WATCH, state, variant, variant.reason)
            action = Action.PIECEWISE if variant.modes else Action.EAGER
            return Plan(action, state, variant, variant.reason)
        if state.ledger.may_spend():
            return Plan(Action.CAPTURE, state, variant, variant.reason)
        return self._unprofitable(state, variant)

    def _plan_without_variant(self, state: KeyState) -> Plan:
        if state.sights == 1 and self._awaits_repeats():
            return Plan(Action.WARM_UP, state, None, NEW_KEY)
        is_overdrawn = self._watches and not state.ledger.may_spend()
        if is_overdrawn and state.ledger.why:  # an explanation at each step would take time
            return self._unprofitable(state, None)
        changed = state.variants[0].explain() if state.variants else NO_CHANGE
        state.ledger.note(Status.UNPROFITABLE, changed)
        if is_overdrawn:
            return self._unprofitable(state, None)
        if not self._watches:
            reason = Reason.of_change(Status.CHANGED, changed) if changed else WARM_UP
            return Plan(Action.WARM_UP, state, None, reason)
        return Plan(Action.WATCH, state, None, _watched_again(changed) if changed else WARM_UP)

    def _plan_another_look(self, state: KeyState, variant: Variant, miss: Miss) -> Plan:
        state.ledger.note(Status.UNPROFITABLE, miss.changed)
        if not state.ledger.may_spend():
            return self._plan_warm(state, variant)
        state.miss = None
        return Plan(Action.WATCH, state, None, _watched_again(miss.changed))

    def _unprofitable(self, state: KeyState, variant: Variant | None) -> Plan:
        """Plan a step whose family may not spend. It runs in pieces if these pay for themselves."""
        pieces = state.pieces if state.ledger.varies else None
        if pieces is None:
            return Plan(Action.EAGER, state, variant, state.ledger.reason())
        assert pieces.ledger is not None
        if not (pieces.modes and pieces.ledger.may_spend()):
            return Plan(Action.EAGER, state, pieces, state.ledger.reason())
        if pieces.trial is not None and pieces.trial.wants_eager():
            return Plan(Action.TRIAL, state, pieces, TIMED)
        return Plan(Action.PIECEWISE, state, pieces, pieces.reason)

    def _current_variant(self, state: KeyState, leaves: Sequence[Any] = ()) -> Variant | None:
        failed: Path | None = None
        for index, variant in enumerate(state.variants):
            if not variant.guards.check():
                continue
            path = variant.path
            if path is not None:
                if failed is not None and path.is_ruled_out_by(failed):
                    continue
                if not path.holds(leaves):
                    failed = path
                    continue
            # the last one used is asked first and dropped last; one that always holds stays last
            if index and not isinstance(variant.guards, Unguarded):
                state.variants.insert(0, state.variants.pop(index))
            variant.was_used = True
            return variant
        return None

    def _is_warm(self, state: KeyState, variant: Variant) -> bool:
        if variant.padding is not None:  # the graph is that of another key
            return state.sights >= variant.compare_at
        if variant.did_one_time_work and state.warmup_runs < 2:
            return False
        return state.warmup_runs >= max(self._warmup_steps, 1)

    # facts

    def judge(
        self, full: Reason | None, piecewise: Reason | None
    ) -> tuple[list[CUDAGraphMode], Reason | None]:
        """Return the allowed modes of a step, and the reason if the mode asked for is not allowed.

        Args:
            full: Why the step cannot be one graph; None if it can.
            piecewise: Why no submodule can run from a graph; None if one can.
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

    def judge_watched(
        self, state: KeyState, full: Reason | None, piecewise: Reason | None, is_padded: bool
    ) -> Judgement:
        """Decide what a watched step may do. It becomes a variant of its key.

        Args:
            state: The key.
            full: Why the step cannot be one graph; None if it can.
            piecewise: Why no submodule can run from a graph; None if one can.
            is_padded: Whether its batch is padded. Then graphs are kept even if they save no time.
        """
        modes, reason = self.judge(full, piecewise)
        is_full, guards = FULL in modes, GuardScope.NONE
        if is_full:
            guards = GuardScope.ALL
        elif full is not None and self.is_of_one_branch(state, full):
            guards = GuardScope.TRAINER
        trial = None
        if modes and self.compares_times and not is_padded:
            trial = Trial(self._min_saving, state.warm_up_times if is_full else [])
        return Judgement(modes, reason, guards, trial)

    def is_of_one_branch(self, state: KeyState, full: Reason) -> bool:
        """Return True if another branch of a step may be one graph, although this one cannot.

        If several branches have a reason at the same place, it counts as one of all branches. So a
        step that is never one graph is not watched again and again.

        Args:
            state: The key of the step.
            full: Why the step cannot be one graph in this branch.
        """
        if not (self._policy.has_full_cudagraphs() and isinstance(full.kind, Cause)):
            return False
        return not state.is_in_many_branches(full)

    def watched(
        self, state: KeyState, variant: Variant, replacing: Variant | None = None
    ) -> list[Entry]:
        """Record that a step ran under watch.

        Args:
            state: The key of the step.
            variant: The result of watching.
            replacing: The variant of an earlier watched step with the same guarded values.

        Returns:
            Graphs that the caller must drop.
        """
        self._has_watched = True
        if replacing is not None and replacing in state.variants:
            state.variants.remove(replacing)
        if state.ledger.balance <= 0:  # after a wait
            state.forget_values()
        state.ledger.spend(WATCH_COST)
        if state.sights == 1:
            self._unrepeated.add(state.descriptor.fields)
        self.ran_eagerly(state)
        return self.add_variant(state, variant)

    def wants_pieces(self, state: KeyState, variant: Variant) -> bool:
        """Return True if submodules are to be captured, although the whole step could be a graph.

        Args:
            state: The key of the step.
            variant: The result of watching it, just now.
        """
        may_be_pieces = variant.modes == [FULL, PIECEWISE] and variant.padding is None
        return may_be_pieces and state.ledger.balance <= 0 and state.ledger.varies

    def add_pieces(self, state: KeyState, watched: Any) -> Variant:
        """Let steps run in pieces while the family may not spend.

        Args:
            state: The key of the step.
            watched: What the watched step has found.

        Returns:
            The variant of these steps. Its guards always hold: submodules have guards of their own.
        """
        if state.pieces is None:
            trial = Trial(self._min_saving, []) if self.compares_times else None
            ledger = CaptureLedger(CREDIT + self._warmup_steps)
            state.pieces = Variant(Unguarded(), [PIECEWISE], trial=trial, ledger=ledger)
        state.pieces.watched = watched
        whole = state.ledger.reason("not captured as a whole")
        state.pieces.reason = state.varying() or whole
        return state.pieces

    def ran_in_pieces(self, variant: Variant, has_graphs: bool) -> None:
        """Record that a step ran in pieces.

        Args:
            variant: The variant of the step.
            has_graphs: Whether one of its submodules ran from a graph.
        """
        if variant.ledger is None:
            return
        if has_graphs:
            variant.ledger.earn()
        elif variant.ledger.balance > 0:
            variant.ledger.spend(1)

    def captured(self, state: KeyState, variant: Variant, entry: Entry) -> None:
        """Record that a graph was captured."""
        self._captures += 1
        state.ledger.spend(CAPTURE_COST - 1)  # the step itself ran from it
        variant.entry = entry
        variant.verify_at = self._next_verification(1)
        if variant.reason is not None and variant.reason.kind is Status.EVICTED:
            variant.reason = None

    def borrowed(self, state: KeyState, variant: Variant, entry: Entry) -> None:
        """Record that batches of this key are padded, and run from the graph of another key."""
        state.ledger.spend(1)  # a comparison with eager
        variant.entry = entry
        variant.verify_at = self._next_verification(entry.replays + 1)

    def compare_padded_again(self) -> None:
        """Let the next replay of each padded graph be compared with eager."""
        self._unproven = {id(entry.record) for _, _, entry in self.padded()}

    def captured_ahead(self, variant: Variant) -> None:
        """Record that the captured graph has not run any step yet."""
        variant.verify_at = self._next_verification(0)

    def no_room(
        self, state: KeyState, variant: Variant, why: str, was_captured: bool = False
    ) -> None:
        """Record that a step runs eagerly, since its graph would take the place of a used one.

        Args:
            state: The key of the step.
            variant: Its variant.
            why: Why there is no room.
            was_captured: Whether a capture has shown it.
        """
        state.ledger.spend(CAPTURE_COST if was_captured else 1)
        state.ledger.note(Status.EVICTED, Changed(why))
        variant.reason = state.ledger.reason()

    def evicted(self, state: KeyState, why: str) -> None:
        """Record that a graph of this key was dropped to make room for another one."""
        state.ledger.spend(CAPTURE_COST)
        state.ledger.note(Status.EVICTED, Changed(why))

    def refused(self, variant: Variant, reason: Reason) -> None:
        """Record that a capture failed or a replay differed.

        From now on the variant runs in the next lower mode.
        """
        variant.entry = None
        variant.reason = reason
        if variant.trial is not None:
            variant.trial.restart()
        variant.modes = [mode for mode in variant.modes if mode is not self._graph_mode]

    def within(self, plan: Plan, steps_left: float, is_each_watched: bool = True) -> Plan:
        """Return the plan. If the stage ends before a capture could pay, return an eager one.

        If it ends before a comparison of times could pay, the step runs from its graphs.

        Only certain costs count: the eager step of a comparison, and the step's Python in a
        capture. A replay counts as if it took no time. The first watched step counts less, because
        it shows if there are graphs at all.

        Args:
            plan: What the step would do.
            steps_left: Number of steps until the end of the stage, this one included.
            is_each_watched: Whether each shape is watched before it has a graph.
        """
        if plan.action is Action.TRIAL:
            assert plan.variant is not None and plan.variant.trial is not None  # noqa: PT018
            trial = plan.variant.trial
            return plan.without_trial() if steps_left < trial.least_steps() else plan
        if plan.action not in (Action.WATCH, Action.WARM_UP, Action.CAPTURE):
            return plan
        variant = plan.variant
        if plan.action is Action.WATCH and variant is None and plan.state.variants:
            if self.costs.lack_eager_step:
                return plan._replace(action=Action.WARM_UP)
            affordable = self._affordable(steps_left)
            if affordable < _FEW_LEFT:
                plan.state.ledger.overdraw()  # so the watched step finds the submodules as well
            if affordable < 1:
                return Plan(Action.EAGER, plan.state, None, plan.state.ledger.reason())
        is_padded = variant is not None and variant.padding is not None
        cost = self._cost(plan, is_padded, is_each_watched)
        if cost is not None and self._expected(plan.state, steps_left, is_padded) < cost:
            seldom = TOO_SELDOM if is_padded else CAPTURED_TOO_SELDOM
            return Plan(Action.EAGER, plan.state, variant, seldom)
        if is_padded and plan.action is Action.CAPTURE:
            assert variant is not None
            if self._pays_for_padded(variant, steps_left):
                return plan
            return Plan(Action.EAGER, plan.state, variant, CAPTURED_TOO_SELDOM)
        needed = self._least_steps
        if plan.action is not Action.CAPTURE:
            needed += max(self._warmup_steps - plan.state.warmup_runs, 1)
        if plan.action is Action.WATCH:
            is_next_key = self._has_watched and not plan.state.variants
            needed += (NEXT_KEY_COST if is_next_key else WATCH_COST) - 1
        if steps_left >= needed:
            return self._before_first_watch(plan, steps_left)
        if variant is not None and variant.watch_at:
            return plan._replace(action=Action.PIECEWISE)
        return Plan(Action.EAGER, plan.state, variant, TOO_SHORT)

    def _before_first_watch(self, plan: Plan, steps_left: float) -> Plan:
        """Return the plan. Before the first watched step, some steps run eagerly.

        They show what eager steps cost, and do the one-time work of a step, which would have to be
        watched once more.
        """
        is_first = plan.action is Action.WATCH and not (self._has_watched or plan.state.variants)
        if not (is_first and self.compares_times):
            return plan
        if self.costs.num_eager < self._warmup_steps - 1:
            return plan._replace(action=Action.WARM_UP)
        if self.costs.may_win_back(steps_left):
            return plan
        return Plan(Action.EAGER, plan.state, None, TOO_SHORT)

    def _affordable(self, steps_left: float) -> float:
        """Return how many further graphs the stage can win back, with all that were made so far.

        A value that changes again and again would otherwise be watched as often as the ledger
        allows, which counts less for a watched step than one costs.
        """
        cost = self.costs.of_new_shape()
        if cost is None:
            return inf
        entries = [each.entry for state in self._states.values() for each in state.variants]
        saved = sum(entry.replays for entry in entries if entry is not None)
        return (steps_left + saved - self.costs.spent()) / cost

    def _pays_for_padded(self, variant: Variant, steps_left: float) -> bool:
        """Return False if the graph of a padded batch would not pay, by what it costs as measured.

        All shapes that are padded alike use it. If one of them does already, it costs nothing.
        """
        cost = self.costs.of_capture()
        if cost is None:
            return True
        alike = self.padded_like(variant)
        has_graph = any(each.entry is not None and each.entry.is_valid() for _, each in alike)
        sights = sum(state.sights for state, _ in alike)
        return has_graph or steps_left * sights / self._steps >= cost

    def _cost(self, plan: Plan, is_padded: bool, is_each_watched: bool) -> float | None:
        """Return the measured cost of what is planned, in eager steps; None: not measured yet."""
        if plan.action is Action.CAPTURE:
            return self.costs.of_padded_shape() if is_padded else self.costs.of_capture()
        is_new = plan.action is Action.WATCH and not plan.state.variants
        return self.costs.of_new_shape() if is_new and is_each_watched else None

    def _expected(self, state: KeyState, steps_left: float, is_padded: bool) -> float:
        """Return how many of the steps that are left will have this key.

        It will come as often as since its first step. A key that has just come for the first time
        counts as one of equally frequent ones.
        """
        if is_padded:  # one comparison costs little, so the whole stage so far tells enough
            return steps_left * state.sights / self._steps
        if state.sights < 2:
            return steps_left / (len(self._states) + sum(self.seen.values()))
        return steps_left * state.sights / (self._steps - state.first_step + 1)

    def took(self, plan: Plan, captures: int, seconds: float) -> None:
        """Add the host time of a step to the costs. It ran as planned.

        Args:
            plan: The decision.
            captures: The value of :attr:`captures` before the step.
            seconds: Its time, in seconds.
        """
        variant = plan.variant
        is_padded = variant is not None and variant.padding is not None
        if plan.action is Action.WARM_UP:
            self.costs.ran_eagerly(seconds)
        elif plan.action is Action.WATCH:
            if self._captures == captures:  # none was captured ahead
                self.costs.watched(seconds)
        elif self._captures > captures:
            self.costs.captured(seconds)
        elif plan.action is Action.CAPTURE and is_padded:
            self.costs.compared_padding(seconds)
        elif plan.action is Action.VERIFY and not is_padded:
            self.costs.compared(seconds)

    def is_settled(self, plan: Plan) -> bool:
        """Return True if all steps of a key run eagerly until the next epoch.

        Then nobody has to ask again, except after a change of the module.

        Args:
            plan: The decision for an eager step.
        """
        assert plan.reason is not None
        if plan.reason.kind is Status.NO_GAIN:  # or else other values may lead to a graph
            return len(plan.state.variants) == 1
        is_of_new_key = plan.reason is TOO_SHORT and not plan.state.variants
        return is_of_new_key and self.costs.num_eager >= _ENOUGH_EAGER

    def ran_as_settled(self, state: KeyState) -> None:
        """Count a step for which :meth:`plan` was not called."""
        self._steps += 1
        state.sights += 1

    def settle(self, state: KeyState, variant: Variant) -> Settled | None:
        """Decide if the graphs of a variant pay. Call it after a step whose time was taken.

        Pieces that cost time are left alone. If their step did not pay with them, times are
        compared once more.

        Returns:
            What was decided; None if nothing was.
        """
        trial = variant.trial
        saving = None if trial is None else trial.saving()
        if trial is None or saving is None:
            return None
        least, pieces = trial.min_saving, trial.savings_of_pieces()
        if saving.share >= least:
            variant.trial = None
            costly = [piece for piece, each in pieces.items() if each.share < 0]
            return Settled(saving, pieces, left_alone=costly)
        costly = [piece for piece, each in pieces.items() if each.share < least]
        if variant.mode is PIECEWISE and not trial.compares_again and costly != list(pieces):
            trial.compare()
            return Settled(saving, pieces, left_alone=costly)
        dropped = [] if variant.entry is None else [variant.entry]
        variant.entry = variant.trial = variant.path = None
        variant.modes, variant.reason = [], no_gain(saving)
        if variant is state.pieces:  # the whole step may still pay
            return Settled(saving, pieces, variant.reason, left_alone=list(pieces))
        variant.guards = Unguarded()  # other values would not change the time
        state.variants.remove(variant)
        self.add_variant(state, variant)
        state.ledger.spend(CREDIT)
        state.ledger.note(Status.NO_GAIN, Changed(variant.reason.subject, variant.reason.text))
        return Settled(saving, pieces, variant.reason, dropped, list(pieces))
