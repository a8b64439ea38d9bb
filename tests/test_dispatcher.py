"""The dispatcher as a table: no Trainer, no GPU, no graph."""

from __future__ import annotations

import dataclasses
import random

import pytest

from cg_lightning import BatchDescriptor, CUDAGraphDispatcher, CUDAGraphMode
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import NUM_OF_BATCH
from cg_lightning.core.reasons import Changed, Reason, Status
from cg_lightning.core.settings import Settings
from cg_lightning.guards.guard_set import Unguarded
from cg_lightning.report.records import Saving
from cg_lightning.runtime.dispatcher import MOST_UNREPEATED, NEXT_KEY_COST
from cg_lightning.runtime.keys import MOST_BRANCHES, MOST_KEYS, MOST_VARIANTS, KeyState, Variant
from cg_lightning.runtime.ledger import CAPTURE_COST, CREDIT, FIRST_WAIT, CaptureLedger
from cg_lightning.runtime.plans import (
    CAPTURED_TOO_SELDOM,
    TIMED,
    TOO_SHORT,
    Action,
    GuardScope,
    Plan,
)
from cg_lightning.runtime.trial import Trial

KEY, OTHER = BatchDescriptor(batch_size=1), BatchDescriptor(batch_size=2)
NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
SYNC = Reason(Cause.HOST_SYNC, "a sync")
NOTHING = Reason(Status.NO_TARGET, "nothing to capture")


@dataclasses.dataclass
class Value:
    """Guards of one value that the test changes."""

    world: dict[str, int]
    expected: int

    def check(self) -> bool:
        return self.world["value"] == self.expected

    def check_epoch(self) -> bool:
        return True

    def explain(self) -> Changed:
        text = f"self.value: now {self.world['value']}, before {self.expected}"
        return Changed("self.value", text)


@dataclasses.dataclass(eq=False)
class Graph:
    replays: int = 0
    dropped: bool = False

    def is_valid(self) -> bool:
        return not self.dropped


class Runner:
    """Follows plans as the runners do, without a real step."""

    def __init__(self, policy: CUDAGraphMode = FULL, **settings) -> None:
        self.world = {"value": 1}
        self.full: Reason | None = None
        self.piecewise: Reason | None = None
        self.fails = False
        self.second_look = False
        self.pieces_run = True
        self.trial: Decided | None = None
        self.dispatcher = CUDAGraphDispatcher(policy, **settings)

    def step(self, key: BatchDescriptor = KEY) -> Action:
        dispatcher, state = self.dispatcher, self.dispatcher.state(key.fields, key)
        plan = dispatcher.plan(state)
        if plan.action is Action.WATCH:
            modes, reason = dispatcher.judge(self.full, self.piecewise)
            guards = Value(self.world, self.world["value"])
            variant = Variant(guards, modes, reason, self.second_look)
            dispatcher.watched(state, variant, plan.variant)
            if dispatcher.wants_pieces(state, variant):
                dispatcher.add_pieces(state, watched=None).trial = self.trial
        elif plan.action is Action.WARM_UP:
            dispatcher.ran_eagerly(state)
        elif plan.action is Action.CAPTURE:
            self._capture(plan, state)
        elif plan.action in (Action.REPLAY, Action.VERIFY):
            plan.variant.entry.replays += 1
        elif plan.action is Action.PIECEWISE:
            dispatcher.ran_in_pieces(plan.variant, self.pieces_run)
            if plan.variant.trial is not None:
                dispatcher.settle(state, plan.variant)
        return plan.action

    def _capture(self, plan: Plan, state: KeyState) -> None:
        if self.fails:
            self.dispatcher.refused(plan.variant, Reason(Status.CAPTURE_FAILED, "failed"))
        else:
            self.dispatcher.captured(state, plan.variant, Graph(replays=1))

    def steps(self, number: int, key: BatchDescriptor = KEY) -> list[Action]:
        return [self.step(key) for _ in range(number)]


def test_by_hand_prefers_full_to_piecewise_to_none():
    dispatcher = CUDAGraphDispatcher()
    mode, descriptor, reason = dispatcher.dispatch(KEY)
    assert (mode, descriptor, str(reason)) == (NONE, KEY, "unknown key")
    dispatcher.add_cudagraph_key(PIECEWISE, KEY, SYNC)
    assert dispatcher.dispatch(KEY) == (PIECEWISE, KEY, SYNC)
    dispatcher.add_cudagraph_key(FULL, KEY)
    result = dispatcher.dispatch(KEY)
    assert (result.runtime_mode, result.batch_descriptor, result.reason) == (FULL, KEY, None)
    assert dispatcher.dispatch(OTHER).runtime_mode is NONE


def test_a_refused_key_runs_lower_with_its_reason():
    dispatcher = CUDAGraphDispatcher()
    dispatcher.add_cudagraph_key(FULL, KEY)
    dispatcher.add_cudagraph_key(PIECEWISE, KEY)
    (variant,) = dispatcher.state(KEY.fields).variants
    failed = Reason(Status.CAPTURE_FAILED, "the capture failed")
    dispatcher.refused(variant, failed)
    assert dispatcher.dispatch(KEY) == (PIECEWISE, KEY, failed)
    dispatcher.reset()
    assert str(dispatcher.dispatch(KEY).reason) == "unknown key"


@pytest.mark.parametrize("mode", [NONE, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_keys_are_of_runtime_modes(mode):
    with pytest.raises(ValueError, match="PIECEWISE or FULL"):
        CUDAGraphDispatcher().add_cudagraph_key(mode, KEY)


WATCH, WARM_UP, EAGER = Action.WATCH, Action.WARM_UP, Action.EAGER
CAPTURE, VERIFY, REPLAY = Action.CAPTURE, Action.VERIFY, Action.REPLAY


@pytest.mark.parametrize(
    ("warmup_steps", "expected"),
    [
        (0, [WATCH, CAPTURE, REPLAY, REPLAY]),
        (1, [WATCH, CAPTURE, REPLAY, REPLAY]),
        (3, [WATCH, WARM_UP, WARM_UP, CAPTURE]),
    ],
)
def test_the_life_of_a_key(warmup_steps, expected):
    assert Runner(warmup_steps=warmup_steps).steps(4) == expected


def test_the_first_replays_and_every_third_one_are_compared():
    settings = Settings(verify_replays=2, verify_every=3)
    runner = Runner(next_verification=settings.next_verification)
    assert runner.steps(3) == [WATCH, CAPTURE, VERIFY]
    assert runner.steps(7) == [REPLAY, REPLAY, VERIFY, REPLAY, REPLAY, VERIFY, REPLAY]


def test_which_replays_are_compared():
    def compared(**settings) -> list[int]:
        given = Settings(**settings)
        return [replays for replays in range(10) if given.next_verification(replays) == replays]

    assert compared(verify_replays=0) == []
    assert compared(verify_replays=2) == [0, 1]
    assert compared(verify_replays=0, verify_every=1) == list(range(10))
    assert compared(verify_replays=2, verify_every=3) == [0, 1, 4, 7]


@pytest.mark.parametrize(
    ("policy", "full", "piecewise", "action", "reason"),
    [
        ("FULL", None, None, CAPTURE, None),
        ("FULL", SYNC, None, EAGER, SYNC),
        ("PIECEWISE", None, None, Action.PIECEWISE, None),
        ("PIECEWISE", SYNC, None, Action.PIECEWISE, None),
        ("PIECEWISE", SYNC, NOTHING, EAGER, NOTHING),
        ("FULL_AND_PIECEWISE", None, NOTHING, CAPTURE, None),
        ("FULL_AND_PIECEWISE", SYNC, None, Action.PIECEWISE, SYNC),
        ("FULL_AND_PIECEWISE", SYNC, NOTHING, EAGER, SYNC),
    ],
)
def test_policy_and_findings_decide(policy, full, piecewise, action, reason):
    runner = Runner(CUDAGraphMode.parse(policy))
    runner.full, runner.piecewise = full, piecewise
    assert runner.steps(2) == [WATCH, action]
    assert runner.dispatcher.dispatch(KEY).reason == reason


def test_a_capture_that_fails_is_not_tried_again():
    for policy, action in (("FULL", EAGER), ("FULL_AND_PIECEWISE", Action.PIECEWISE)):
        runner = Runner(CUDAGraphMode.parse(policy))
        runner.fails = True
        assert runner.steps(4) == [WATCH, CAPTURE, action, action]
        assert runner.dispatcher.dispatch(KEY).reason.kind is Status.CAPTURE_FAILED


def test_another_look_while_it_may_find_less():
    runner = Runner(warmup_steps=3)
    runner.second_look, runner.full = True, SYNC
    assert runner.step() is WATCH
    runner.second_look, runner.full = False, None
    assert runner.steps(3) == [WATCH, WARM_UP, CAPTURE]
    assert len(runner.dispatcher.state(KEY.fields).variants) == 1


def test_work_that_is_done_once_takes_one_more_eager_step():
    dispatcher = CUDAGraphDispatcher(FULL)
    state = dispatcher.state(KEY.fields, KEY)
    dispatcher.plan(state)
    done_once = Variant(Value({"value": 1}, 1), [FULL], did_one_time_work=True)
    dispatcher.watched(state, done_once)
    assert dispatcher.plan(state).action is WARM_UP
    dispatcher.ran_eagerly(state)
    assert dispatcher.plan(state).action is CAPTURE


def test_a_value_that_toggles_has_two_graphs():
    runner = Runner()
    actions = []
    for step in range(40):
        runner.world["value"] = step // 2 % 2
        actions.append(runner.step())
    assert actions.count(CAPTURE) == 2
    assert actions.count(WATCH) == 2
    assert actions[6:] == [REPLAY] * 34


def test_what_changed_is_named_with_both_values():
    runner = Runner()
    runner.steps(3)
    runner.world["value"] = 7
    plan = runner.dispatcher.plan(runner.dispatcher.state(KEY.fields))
    assert plan.action is WATCH
    assert str(plan.reason) == "changed: self.value: now 7, before 1"
    assert plan.reason.kind is Status.CHANGED


def test_a_value_that_changes_with_each_step_stops_being_watched():
    runner = Runner()
    actions = []
    for step in range(400):
        runner.world["value"] = step
        actions.append(runner.step())
    assert actions.count(WATCH) + actions.count(CAPTURE) < 20
    assert set(actions[200:]) <= {EAGER, WATCH}
    reason = runner.dispatcher.plan(runner.dispatcher.state(KEY.fields)).reason
    assert reason.kind is Status.UNPROFITABLE
    assert "self.value: now" in str(reason)
    assert len(runner.dispatcher.state(KEY.fields).variants) <= MOST_VARIANTS


@pytest.mark.parametrize(
    ("policy", "piecewise", "pieces_run", "share", "action", "most_others"),
    [
        ("FULL_AND_PIECEWISE", None, True, None, Action.PIECEWISE, 0),
        ("FULL_AND_PIECEWISE", None, True, 0.5, Action.PIECEWISE, 0),
        ("FULL_AND_PIECEWISE", None, True, 0.01, EAGER, 2),
        ("FULL_AND_PIECEWISE", None, False, None, EAGER, CREDIT + 6),
        ("FULL_AND_PIECEWISE", NOTHING, True, None, EAGER, 0),
        ("FULL", None, True, None, EAGER, 0),
    ],
)
def test_where_steps_run_whose_value_changes_each_time(
    policy, piecewise, pieces_run, share, action, most_others
):
    """In pieces, if these pay; else eagerly. What is tried again and again costs less than 5 %."""
    runner = Runner(CUDAGraphMode.parse(policy))
    runner.piecewise, runner.pieces_run = piecewise, pieces_run
    runner.trial = None if share is None else Decided(share)
    actions = []
    for step in range(1000):
        runner.world["value"] = step
        actions.append(runner.step())
    watched = actions.count(WATCH)
    assert watched < 20
    assert len(actions) - watched - actions.count(action) <= most_others
    state = runner.dispatcher.state(KEY.fields)
    reason = runner.dispatcher.plan(state).reason
    assert reason.kind is Status.UNPROFITABLE
    assert "self.value: now" in str(reason)
    assert len(state.variants) < MOST_VARIANTS, "values that did not come again are compared"


def test_a_value_that_stays_after_all_has_its_graph():
    runner = Runner(CUDAGraphMode.FULL_AND_PIECEWISE)
    for step in range(30):
        runner.world["value"] = step
        last = runner.step()
    assert last is Action.PIECEWISE
    actions = runner.steps(60)
    assert actions[-1] is REPLAY
    runner.world["value"] = -1
    assert runner.step() is not EAGER


def test_values_that_come_in_turn_have_their_graphs_in_the_end():
    runner = Runner(CUDAGraphMode.FULL_AND_PIECEWISE)
    actions = []
    for step in range(3000):
        runner.world["value"] = step % MOST_VARIANTS
        actions.append(runner.step())
    assert set(actions[-100:]) == {REPLAY}


def test_too_many_graphs_do_not_make_more_of_pieces():
    runner = Runner(CUDAGraphMode.FULL_AND_PIECEWISE)
    actions = []
    for _ in range(200):
        actions.append(runner.step())
        state = runner.dispatcher.state(KEY.fields)
        if state.variants[0].entry is not None:
            state.variants[0].entry.dropped = True
            runner.dispatcher.evicted(state, "evicted: more graphs than max_graphs=2")
    assert Action.PIECEWISE not in actions
    assert actions[-1] is EAGER


def test_keys_that_never_come_again_stop_being_watched():
    """Hazard 45."""
    runner = Runner()
    keys = [BatchDescriptor(batch_size=size) for size in range(1000)]
    actions = [runner.step(key) for key in keys]
    assert actions[:MOST_UNREPEATED] == [WATCH] * MOST_UNREPEATED
    assert set(actions[MOST_UNREPEATED:]) == {WARM_UP}
    assert runner.step(keys[-1]) is WATCH  # its second sight
    assert runner.step(keys[-1]) is CAPTURE


def test_keys_that_were_seen_once_do_not_pile_up():
    runner = Runner()
    for size in range(3 * MOST_KEYS):
        runner.step(BatchDescriptor(batch_size=size))
    assert len(runner.dispatcher._states) <= MOST_KEYS
    assert len(runner.dispatcher._ledgers) <= MOST_KEYS


def what_is_known(dispatcher: CUDAGraphDispatcher) -> dict[BatchDescriptor, tuple[int, ...]]:
    return {
        state.descriptor: (state.sights, state.warmup_runs, len(state.variants))
        for state in dispatcher.states()
    }


def is_counted(dispatcher: CUDAGraphDispatcher, key: BatchDescriptor, left: float) -> bool:
    of_batch = key.fields[:NUM_OF_BATCH]
    return dispatcher.is_new(of_batch) and dispatcher.runs_once(of_batch, left)


@pytest.mark.parametrize("warmup_steps", [1, 3])
def test_a_step_that_is_only_counted_is_planned_as_others_are(warmup_steps):
    """Hazard 45: a key that hardly comes again has no state before it does."""
    random.seed(0)
    numbers = [random.randrange(MOST_KEYS - 20) for _ in range(MOST_KEYS)]
    numbers += [each for each in numbers[-20:] for _ in range(4)]
    counting, planning = Runner(warmup_steps=warmup_steps), Runner(warmup_steps=warmup_steps)
    counted = 0
    for number in [1, 2, 3, 4, 5, 5, *numbers]:
        # no fields follow those of the batch
        key = BatchDescriptor(batch_size=number)
        if is_counted(counting.dispatcher, key, float("inf")):
            counted += 1
            assert planning.step(key) is WARM_UP
        else:
            assert counting.step(key) is planning.step(key)
    assert counted > MOST_KEYS // 2
    assert what_is_known(counting.dispatcher) == what_is_known(planning.dispatcher)
    assert len(counting.dispatcher._states) < len(planning.dispatcher._states)


def test_the_number_of_keys_that_are_only_counted_is_bounded():
    """Hazard 45: those that have graphs are not forgotten, nor are the latest ones."""
    runner = Runner()
    keys = [BatchDescriptor(batch_size=size) for size in range(4 * MOST_KEYS)]
    assert [runner.step(keys[0]) for _ in range(3)] == [WATCH, CAPTURE, REPLAY]
    for key in keys[1:]:
        if not is_counted(runner.dispatcher, key, float("inf")):
            runner.step(key)
        assert len(runner.dispatcher.seen) <= MOST_KEYS
    assert len(runner.dispatcher._states) == 1 + MOST_UNREPEATED
    assert runner.step(keys[0]) is REPLAY
    assert runner.step(keys[-1]) is WATCH, "it has come again"
    assert is_counted(runner.dispatcher, keys[100], float("inf")), "it is forgotten"


def test_a_key_with_other_flags_than_a_counted_one_is_watched_before_it_has_a_graph():
    """Hazard 45: only what the batch shows is stored of a step that is counted."""
    runner = Runner(warmup_steps=3)
    for size in range(1, MOST_UNREPEATED + 1):
        runner.step(BatchDescriptor(batch_size=size))
    before, now = (BatchDescriptor(batch_size=99, flags=(flag,)) for flag in (1, 2))
    assert is_counted(runner.dispatcher, before, float("inf"))
    assert [runner.step(now) for _ in range(4)] == [WATCH, WARM_UP, CAPTURE, REPLAY]
    assert not is_counted(runner.dispatcher, before, float("inf"))
    assert [runner.step(before) for _ in range(5)] == [WARM_UP, WATCH, WARM_UP, CAPTURE, REPLAY]


def test_a_reset_forgets_the_keys_that_were_only_counted():
    runner = Runner()
    for size in range(1, MOST_UNREPEATED + 2):
        key = BatchDescriptor(batch_size=size)
        assert is_counted(runner.dispatcher, key, 100) or runner.step(key) is WATCH
    assert runner.dispatcher.seen[key.fields[:NUM_OF_BATCH]]
    runner.dispatcher.reset()
    assert not runner.dispatcher.states()
    assert not runner.dispatcher.seen


def test_a_new_key_that_may_have_a_graph_is_not_only_counted():
    runner = Runner(warmup_steps=3, least_steps=4)
    keys = [BatchDescriptor(batch_size=size) for size in range(MOST_UNREPEATED + 2)]
    for key in keys[:MOST_UNREPEATED]:
        assert not is_counted(runner.dispatcher, key, 100)
        assert runner.step(key) is WATCH
    new = keys[-1]
    assert not is_counted(runner.dispatcher, new, 4 + 3 - 1), "it is too late for a graph"
    assert is_counted(runner.dispatcher, new, 4 + 3)
    assert not is_counted(runner.dispatcher, new, 100), "it has come again"
    assert runner.step(keys[-1]) is WATCH


def test_a_graph_that_was_dropped_is_captured_again():
    runner = Runner()
    runner.steps(3)
    (variant,) = runner.dispatcher.state(KEY.fields).variants
    variant.entry.dropped = True
    assert runner.steps(2) == [CAPTURE, REPLAY]


def test_a_graph_that_is_evicted_again_and_again_waits():
    runner = Runner()
    actions = []
    for _ in range(60):
        actions.append(runner.step())
        state = runner.dispatcher.state(KEY.fields)
        if state.variants and state.variants[0].entry is not None:
            state.variants[0].entry.dropped = True
            runner.dispatcher.evicted(state, "evicted: more graphs than max_graphs=2")
    assert actions.count(CAPTURE) <= 5
    reason = state.ledger.reason()
    assert reason.kind is Status.EVICTED
    assert "max_graphs=2" in str(reason)


def test_reset_forgets_keys_but_not_what_was_spent():
    runner = Runner()
    runner.steps(2)
    balance = runner.dispatcher.state(KEY.fields).ledger.balance
    runner.dispatcher.reset(Changed("the module has changed"))
    state = runner.dispatcher.state(KEY.fields, KEY)
    assert (state.variants, state.warmup_runs) == ([], 0)
    assert state.ledger.balance == balance
    assert "the module has changed" in str(state.ledger.reason())


def test_calls_of_submodules_are_not_watched():
    dispatcher = CUDAGraphDispatcher(PIECEWISE, 2, watches=False)
    state = dispatcher.state(KEY.fields, KEY)
    assert dispatcher.plan(state).action is WARM_UP
    dispatcher.add_variant(state, Variant(Value({"value": 1}, 1), [PIECEWISE]))
    dispatcher.ran_before(state, 2)
    assert dispatcher.plan(state).action is CAPTURE


def test_the_ledger_waits_longer_each_time():
    ledger = CaptureLedger()
    ledger.spend(CREDIT)
    waits = []
    for _ in range(3):
        wait = 0
        while not ledger.may_spend():
            wait += 1
        waits.append(wait)
        ledger.spend(CAPTURE_COST)
    assert waits == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT]


def test_what_is_earned_back_may_be_spent_again():
    ledger = CaptureLedger()
    ledger.spend(CREDIT + 1)
    assert not ledger.may_spend()
    for _ in range(2):
        ledger.earn()
    assert ledger.may_spend()
    for _ in range(2 * CREDIT):
        ledger.earn()
    assert ledger.balance == CREDIT


def test_a_way_with_findings_does_not_hide_the_one_with_a_graph():
    runner = Runner(CUDAGraphMode.FULL_AND_PIECEWISE)
    runner.steps(4)
    dispatcher, state = runner.dispatcher, runner.dispatcher.state(KEY.fields)
    runner.world["value"] = 2
    assert dispatcher.plan(state).action is WATCH
    modes, reason = dispatcher.judge(Reason(Status.CHANGED, "a finding"), None)
    dispatcher.watched(state, Variant(Unguarded(), modes, reason))
    assert runner.steps(3) == [Action.PIECEWISE] * 3
    runner.world["value"] = 1
    assert runner.steps(3) == [REPLAY] * 3
    runner.world["value"] = 2
    assert runner.steps(3) == [Action.PIECEWISE] * 3


def test_a_reason_that_is_in_many_branches_is_one_of_all_branches():
    runner = Runner(CUDAGraphMode.FULL_AND_PIECEWISE)
    runner.full = SYNC
    state = runner.dispatcher.state(KEY.fields, KEY)
    for value in range(MOST_BRANCHES):
        runner.world["value"] = value
        assert runner.dispatcher.is_of_one_branch(state, SYNC)
        assert runner.step() is WATCH
    assert runner.dispatcher.is_of_one_branch(state, SYNC), "the last branch is the one of now"
    runner.world["value"] = MOST_BRANCHES
    assert not runner.dispatcher.is_of_one_branch(state, SYNC)
    assert not runner.dispatcher.is_of_one_branch(state, dataclasses.replace(SYNC, text="another"))
    elsewhere = dataclasses.replace(SYNC, location="step.py:3")
    assert runner.dispatcher.is_of_one_branch(state, elsewhere)
    assert runner.dispatcher.is_of_one_branch(state, Reason(Cause.PRINTED, "print"))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [(PIECEWISE, SYNC), (FULL, Reason(Status.NO_KEY, "no key")), (FULL, NOTHING)],
)
def test_what_no_branch_changes(policy, reason):
    """A mode that knows no whole steps, and a reason that is not in the code of the step."""
    dispatcher = CUDAGraphDispatcher(policy)
    assert not dispatcher.is_of_one_branch(dispatcher.state(KEY.fields, KEY), reason)


ALL, TRAINER, ALWAYS = GuardScope.ALL, GuardScope.TRAINER, GuardScope.NONE


@pytest.mark.parametrize(
    ("policy", "full", "piecewise", "is_padded", "modes", "guards", "has_trial"),
    [
        (CUDAGraphMode.FULL_AND_PIECEWISE, None, None, False, [FULL, PIECEWISE], ALL, True),
        (CUDAGraphMode.FULL_AND_PIECEWISE, None, None, True, [FULL, PIECEWISE], ALL, False),
        (CUDAGraphMode.FULL_AND_PIECEWISE, SYNC, None, False, [PIECEWISE], TRAINER, True),
        (CUDAGraphMode.FULL_AND_PIECEWISE, NOTHING, None, False, [PIECEWISE], ALWAYS, True),
        (CUDAGraphMode.FULL_AND_PIECEWISE, SYNC, NOTHING, False, [], TRAINER, False),
        (PIECEWISE, None, None, False, [PIECEWISE], ALWAYS, True),
        (PIECEWISE, SYNC, None, False, [PIECEWISE], ALWAYS, True),
        (FULL, SYNC, None, False, [], TRAINER, False),
    ],
)
def test_what_a_watched_step_may_do(policy, full, piecewise, is_padded, modes, guards, has_trial):
    dispatcher = CUDAGraphDispatcher(policy, min_saving=0.03)
    judged = dispatcher.judge_watched(dispatcher.state(KEY.fields, KEY), full, piecewise, is_padded)
    assert (judged.modes, judged.guards) == (modes, guards)
    assert (judged.trial is not None) is has_trial


class Decided:
    """A trial whose result is given."""

    def __init__(self, share: float | None, pieces: dict[str, float] | None = None) -> None:
        self.min_saving = 0.03
        self.compares_again = False
        self.share = share
        self.pieces = pieces or {}

    def wants_eager(self) -> bool:
        return False

    def compare(self) -> None:
        self.compares_again = True

    def saving(self) -> Saving | None:
        return None if self.share is None else Saving(1.0, 1 - self.share)

    def savings_of_pieces(self) -> dict[str, Saving]:
        return {name: Saving(1.0, 1 - share) for name, share in self.pieces.items()}


def settle(mode: CUDAGraphMode, trial: Decided):
    dispatcher = CUDAGraphDispatcher()
    dispatcher.add_cudagraph_key(mode, KEY)
    state = dispatcher.state(KEY.fields)
    (variant,) = state.variants
    variant.trial = trial
    variant.entry = Graph(replays=1) if mode is FULL else None
    return dispatcher, variant, dispatcher.settle(state, variant)


def test_nothing_is_settled_before_the_saving_is_known():
    _, variant, settled = settle(FULL, Decided(None))
    assert settled is None
    assert variant.trial is not None


def test_a_graph_that_pays_is_kept():
    _, variant, settled = settle(FULL, Decided(0.5))
    assert (settled.reason, settled.entries, variant.trial) == (None, (), None)
    assert variant.mode is FULL


@pytest.mark.parametrize("share", [0.02, -1.0])
def test_a_graph_without_gain_is_given_up(share):
    dispatcher, variant, settled = settle(FULL, Decided(share))
    assert settled.reason.kind is Status.NO_GAIN
    assert len(settled.entries) == 1
    assert (variant.entry, variant.trial) == (None, None)
    assert dispatcher.dispatch(KEY) == (NONE, KEY, settled.reason)


def test_pieces_that_cost_time_are_left_alone_first():
    dispatcher, variant, settled = settle(PIECEWISE, Decided(-0.1, {"one": 0.5, "two": -0.5}))
    assert (settled.reason, settled.left_alone) == (None, ["two"])
    assert variant.trial.compares_again
    settled = dispatcher.settle(dispatcher.state(KEY.fields), variant)
    assert settled.reason.kind is Status.NO_GAIN
    assert settled.left_alone == ["one", "two"]


def test_pieces_of_a_step_that_pays_stay_unless_they_cost_time():
    pieces = {"one": 0.5, "two": -0.5, "three": 0.01}
    _, variant, settled = settle(PIECEWISE, Decided(0.1, pieces))
    assert (settled.reason, settled.left_alone, variant.trial) == (None, ["two"], None)
    assert variant.mode is PIECEWISE


@pytest.mark.parametrize(
    ("action", "runs", "least"),
    [
        (Action.CAPTURE, 3, 4),
        (Action.WARM_UP, 1, 4 + 2),
        (Action.WARM_UP, 2, 4 + 1),
        (Action.WATCH, 0, 4 + 3 + 1),
        (Action.WATCH, 5, 4 + 1 + 1),  # of a warm key, whose guards have failed
    ],
)
def test_captures_need_enough_steps_that_are_left(action, runs, least):
    dispatcher = CUDAGraphDispatcher(FULL, 3, least_steps=4)
    state = dispatcher.state(KEY.fields, KEY)
    state.warmup_runs = runs
    plan = Plan(action, state, None, None)
    assert dispatcher.within(plan, least) is plan
    assert dispatcher.within(plan, float("inf")) is plan
    short = dispatcher.within(plan, least - 1)
    assert (short.action, short.reason.kind) == (Action.EAGER, Status.TOO_SHORT)


@pytest.mark.parametrize(
    ("earlier", "least"),
    [  # of runs before this one: watched, captured, compared; the first one does not count
        ([], 5),
        ([(0.5, 0.5, 0.5)], 5),
        ([(0.5, 0.5, 0.5), (0.03, 0.01, 0.005), (0.06, 0.02, 0.002)], 44),
        ([(0.001, 0.001, 0.001)] * 2, 5),
    ],
)
def test_the_first_key_is_watched_if_the_stage_can_win_back_its_graph(earlier, least):
    """Eager steps of 1 ms; the one that also prepares libraries takes longer."""
    dispatcher = CUDAGraphDispatcher(FULL, 3, least_steps=4, min_saving=0.03)
    costs = dispatcher.costs
    for watch, capture, comparison in earlier:
        costs.of_runs.add("watch", watch)
        costs.of_runs.add("capture", capture)
        costs.of_runs.add("comparison", comparison)
    state = dispatcher.state(KEY.fields, KEY)
    for seconds in (0.2, 0.001):
        plan = dispatcher.within(dispatcher.plan(state), 1000)
        assert plan.action is Action.WARM_UP
        dispatcher.ran_eagerly(state)
        dispatcher.took(plan, dispatcher.captures, seconds)
    plan = dispatcher.plan(state)
    assert dispatcher.within(plan, least + 1) is plan
    assert dispatcher.within(plan, float("inf")) is plan
    short = dispatcher.within(plan, least - 1)
    assert (short.action, short.reason.kind) == (Action.EAGER, Status.TOO_SHORT)


def test_a_step_is_settled_if_nothing_can_lead_to_a_graph():
    dispatcher = CUDAGraphDispatcher(FULL, 3, least_steps=4, min_saving=0.03)
    state = dispatcher.state(KEY.fields, KEY)
    no_gain = Reason(Status.NO_GAIN, "no gain")
    state.variants = [Variant(Unguarded(), [])]
    assert dispatcher.is_settled(Plan(Action.EAGER, state, None, no_gain))
    state.variants.append(Variant(Unguarded(), [FULL]))
    assert not dispatcher.is_settled(Plan(Action.EAGER, state, None, no_gain)), "another value"
    state.variants = []
    short = Plan(Action.EAGER, state, None, TOO_SHORT)
    assert not dispatcher.is_settled(short), "nobody knows what a step costs"
    for _ in range(8):
        dispatcher.costs.ran_eagerly(1.0)
    assert dispatcher.is_settled(short)
    assert not dispatcher.is_settled(short._replace(reason=CAPTURED_TOO_SELDOM))


def test_further_keys_are_watched_only_if_that_pays_in_what_is_left():
    dispatcher = CUDAGraphDispatcher(FULL, 3, least_steps=4)
    first, other = dispatcher.state(KEY.fields, KEY), dispatcher.state(OTHER.fields, OTHER)
    dispatcher.watched(first, Variant(Unguarded(), [FULL]))
    plan, least = Plan(Action.WATCH, other, None, None), 4 + 3 + NEXT_KEY_COST - 1
    assert dispatcher.within(plan, least) is plan
    assert dispatcher.within(plan, least - 1).reason.kind is Status.TOO_SHORT
    again = Plan(Action.WATCH, first, None, None)  # a key that was watched
    assert dispatcher.within(again, 4 + 2 + 1) is again


@pytest.mark.parametrize(
    ("action", "sights", "step", "left", "runs"),
    [  # a new shape costs 50 + 20 + 2 * 5 eager steps, and a watched one the last two
        (Action.WATCH, 1, 100, 4 * 80, True),  # one of 4 shapes
        (Action.WATCH, 1, 100, 4 * 80 - 1, False),
        (Action.WATCH, 2, 100, 4000, True),  # 2 of 100 steps
        (Action.WATCH, 2, 100, 3999, False),
        (Action.CAPTURE, 3, 100, 1000, True),
        (Action.CAPTURE, 3, 100, 999, False),
        (Action.CAPTURE, 3, 100, float("inf"), True),
        (Action.REPLAY, 3, 100, 1, True),
    ],
)
@pytest.mark.parametrize("is_measured", [True, False])
def test_shapes_are_worth_a_graph_if_they_come_often_enough(
    action, sights, step, left, runs, is_measured
):
    dispatcher = CUDAGraphDispatcher(FULL, 1, least_steps=4)
    for size in range(4):
        dispatcher.state((size,), KEY)
    state, costs = dispatcher.state((0,)), dispatcher.costs
    state.sights, dispatcher._steps = sights, step
    for seconds in (500, 50, 60)[: 3 if is_measured else 1]:  # the first does not count
        costs.watched(seconds)
        costs.captured(2 * seconds / 5)
        costs.compared(seconds / 10)
        costs.ran_eagerly(seconds / 50)
    plan = dispatcher.within(Plan(action, state, None, None), left)
    assert (plan.action is action) is (runs or not is_measured)
    if plan.action is not action:
        assert plan.reason == CAPTURED_TOO_SELDOM


def changing(runner: Runner, length: int, watch: float, eager: float = 1.0) -> list[Action]:
    """Run a stage of known length in which a value changes with each batch."""
    dispatcher, actions = runner.dispatcher, []
    for number in range(length):
        runner.world["value"] = number
        state = dispatcher.state(KEY.fields, KEY)
        plan = dispatcher.within(dispatcher.plan(state), length - number)
        if plan.action is Action.WATCH:
            variant = Variant(Value(runner.world, number), [FULL, PIECEWISE])
            dispatcher.watched(state, variant, plan.variant)
            if dispatcher.wants_pieces(state, variant):
                dispatcher.add_pieces(state, watched=None)
            dispatcher.took(plan, dispatcher.captures, watch)
        elif plan.action is Action.WARM_UP:
            dispatcher.ran_eagerly(state)
            dispatcher.took(plan, dispatcher.captures, eager)
        actions.append(plan.action)
    return actions


@pytest.mark.parametrize(
    ("length", "watch", "most", "has_pieces"),
    [(100, 60.0, 2, False), (100, 20.0, 5, True), (1000, 1.0, 14, True)],
)
def test_a_value_that_changes_is_watched_while_the_stage_can_win_it_back(
    length, watch, most, has_pieces
):
    """One that changed with each batch was watched 11 times in 100 batches, at any cost."""
    runner = Runner(CUDAGraphMode.FULL_AND_PIECEWISE, min_saving=0.03)
    actions = changing(runner, length, watch)
    watched = [number for number, action in enumerate(actions) if action is Action.WATCH]
    assert len(watched) == most
    assert watch * (len(watched) - 1) <= length, "the first one also prepares libraries"
    reason = runner.dispatcher.state(KEY.fields, KEY).ledger.reason()
    assert "self.value" in str(reason)
    assert (Action.PIECEWISE in actions) is has_pieces


def test_a_value_that_changed_once_is_watched_again_in_a_stage_that_has_saved_enough():
    runner = Runner(min_saving=0.03)
    runner.steps(2)
    costs = runner.dispatcher.costs
    costs.ran_eagerly(1.0)
    for _ in range(2):
        costs.watched(60.0)
    assert costs.spent() == 60.0, "not the first one"
    state = runner.dispatcher.state(KEY.fields, KEY)
    runner.world["value"] = 2
    entry, plan = state.variants[0].entry, runner.dispatcher.plan(state)
    assert plan.action is Action.WATCH
    entry.replays = 0
    assert runner.dispatcher.within(plan, 119).action is Action.EAGER
    assert runner.dispatcher.within(plan, 120) is plan
    entry.replays = 1
    assert runner.dispatcher.within(plan, 119) is plan


class Padding:
    def __init__(self, size: int) -> None:
        self.shapes = ((size,),)


@pytest.mark.parametrize(
    ("left", "has_graph", "runs"),
    [  # a capture costs 20 + 2 * 5 eager steps; 2 + 3 of 100 steps are padded alike
        (600, False, True),
        (599, False, False),
        (599, True, True),
    ],
)
def test_the_graph_of_a_padded_batch_is_worth_what_all_shapes_save_that_use_it(
    left, has_graph, runs
):
    dispatcher = CUDAGraphDispatcher(FULL, 1, least_steps=4)
    variants = []
    for size, padded, sights in ((1, 4, 2), (2, 4, 3), (5, 8, 50)):
        variants.append(Variant(Unguarded(), [FULL], padding=Padding(padded)))
        state = dispatcher.state((size,), KEY)
        state.sights = sights
        dispatcher.add_variant(state, variants[-1])
    variants[1].entry = Graph() if has_graph else None
    variants[2].entry = Graph()  # of another size
    dispatcher._steps, costs = 100, dispatcher.costs
    for seconds in (50, 5):  # the first does not count
        costs.captured(4 * seconds)
    costs.compared(5)
    costs.ran_eagerly(1)
    costs.compared_padding(3)
    plan = Plan(Action.CAPTURE, dispatcher.state((1,)), variants[0], None)
    found = dispatcher.within(plan, left)
    assert (found is plan) is runs
    assert runs or found.reason == CAPTURED_TOO_SELDOM


def test_what_runs_in_pieces_stays_there_if_too_little_is_left_to_watch_it():
    dispatcher = CUDAGraphDispatcher(FULL, 3, least_steps=4)
    state = dispatcher.state(KEY.fields, KEY)
    variant = Variant(Unguarded(), [PIECEWISE], padding=object(), watch_at=3)
    dispatcher.add_variant(state, variant)
    plans = [dispatcher.plan(state) for _ in range(4)]
    actions = [Action.PIECEWISE, Action.PIECEWISE, Action.WATCH, Action.WATCH]
    assert [plan.action for plan in plans] == actions
    assert dispatcher.within(plans[-1], 2).action is Action.PIECEWISE
    assert dispatcher.within(plans[-1], 100).action is Action.WATCH


@pytest.mark.parametrize("action", [Action.REPLAY, Action.VERIFY, Action.PIECEWISE])
def test_what_is_captured_runs_to_the_end(action):
    dispatcher = CUDAGraphDispatcher(FULL, 3, least_steps=4)
    plan = Plan(action, dispatcher.state(KEY.fields, KEY), None, None)
    assert dispatcher.within(plan, 1) is plan


@pytest.mark.parametrize(
    ("mode", "instead"), [(FULL, Action.REPLAY), (PIECEWISE, Action.PIECEWISE)]
)
def test_times_are_compared_only_if_the_result_can_be_used(mode, instead):
    dispatcher = CUDAGraphDispatcher(FULL, 3, least_steps=4, min_saving=0.1)
    variant = Variant(Unguarded(), [mode], trial=Trial(0.1, []))
    variant.entry = Graph(replays=1) if mode is FULL else None
    variant.trial.compare()
    plan = Plan(Action.TRIAL, dispatcher.state(KEY.fields, KEY), variant, TIMED)
    assert dispatcher.within(plan, 24) is plan
    assert dispatcher.within(plan, 23) == plan._replace(action=instead, reason=None)
