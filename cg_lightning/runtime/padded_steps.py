"""Steps whose batches are padded up to a size that is captured."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from cg_lightning.capture.call import GraphCall
from cg_lightning.capture.entry import GraphEntry
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import CaptureError, NotIndependentError, UnkeyableBatchError
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import Reason, Status
from cg_lightning.core.tree import flatten, rebuild
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.diagnosis.way import Way, WayRecorder
from cg_lightning.guards.guard_set import Unguarded
from cg_lightning.host_values.path import ReadPath
from cg_lightning.padding.entry import PaddedEntry
from cg_lightning.padding.leaves import Fill, PaddedLeaves
from cg_lightning.padding.padder import Padder
from cg_lightning.padding.path import PaddedPath
from cg_lightning.runtime.ahead import CaptureAhead
from cg_lightning.runtime.alike_runs import AlikeRuns
from cg_lightning.runtime.alike_steps import AlikeSteps, take_over
from cg_lightning.runtime.eager_run import EagerRun
from cg_lightning.runtime.keys import KeyState, Path, Variant
from cg_lightning.runtime.outcome import Outcome
from cg_lightning.runtime.padded_shapes import PaddedShapes, describe_like
from cg_lightning.runtime.plans import Plan
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.target import reason_of
from cg_lightning.runtime.verifier import Verdict

IN_PIECES = Reason(
    Status.PADDED_IN_PIECES,
    "not padded as a whole, since it may reduce over its batch: its submodules are",
)
WATCH_AT = 256
"""Number of steps after which a whole step may be one graph that has run in pieces until then.

In pieces, so many steps lose about what it costs to watch, capture and compare a whole one.
"""
_LATEST = 256
"""Number of shapes that tell if shapes come again. A stage may have a new one in each batch."""
_SELDOM = Reason(
    Status.WARM_UP, f"warm-up: in pieces, until batches of this shape have come {WATCH_AT} times"
)
_OTHER_WAY = Reason(
    Status.WARM_UP,
    "warm-up: this shape takes another way through the code than those that were watched",
)


class Pieces(Protocol):
    """Submodules that can be padded where the step around them is not."""

    def are_known(self) -> bool:
        """Return True if a step has shown them."""

    def add(self, watched: WatchedStep) -> bool:
        """Pad the submodules of a watched step. Return False if there are none."""


@dataclasses.dataclass
class _ComparedRun:
    """One step that runs eagerly and from the graph of the padded batch."""

    call: GraphCall
    padded: GraphCall
    """The step with the padded batch."""
    padding: PaddedLeaves
    eager: EagerRun
    path: ReadPath | None
    """What the step reads on the host, for the batch itself."""


class PaddedSteps:
    """Runs steps of one stage from graphs of padded batches.

    The shape of a batch keeps its own key: its step is watched, so its guards and host values are
    known. Instead of a graph of its own, the key uses that of the padded batch, which is captured
    ahead, with all state put back. For each shape, the graph is compared with eager on a real
    batch, with several paddings. A shape whose step goes the way of a watched one is not watched.

    Args:
        session: The runtime state of the module.
        stage: The stage.
        name: The name of the step in the statistics.
        step: The step: ``step(batch, *args, **kwargs)``.
        padder: Decides how a batch is padded.
        is_whole: Whether whole steps are padded.
        pieces: What is padded where whole steps are not; None: nothing.
    """

    def __init__(
        self,
        session: Session,
        stage: str,
        name: str,
        step: Callable[..., Any],
        padder: Padder,
        is_whole: bool = True,
        pieces: Pieces | None = None,
    ) -> None:
        self._session = session
        self._name = name
        self._shapes = PaddedShapes(padder, session.stats, name)
        self._is_whole = is_whole and session.settings.runtime_policy.has_full_cudagraphs()
        self._pieces = pieces
        self._pads = self._is_whole or pieces is not None
        self._ahead = CaptureAhead(session, stage, name, step)
        self._dispatcher = session.target.dispatcher
        self._alike = AlikeSteps(self._dispatcher)
        self._ways = WayRecorder()
        self._alike_runs = AlikeRuns(session, self._ahead, self._alike, self._ways)
        self._asked_for: set[tuple[Any, ...]] = set()
        """The keys of padded batches that a shape has asked for."""
        self._latest: deque[KeyState] = deque(maxlen=_LATEST)
        """The latest keys whose batches are padded, and that no step was watched for."""

    def padding_of(self, state: KeyState, batch: Any) -> PaddedLeaves | None:
        """Return how the batches of a key are padded; None if they run in their own shape.

        Args:
            state: The key.
            batch: A batch with this key.

        Raises:
            ValueError: A setting does not fit the batch.
        """
        found = self._shapes.find(state, batch) if self._pads else None
        return None if found is None else found[0]

    def begin(self, state: KeyState, batch: Any) -> None:
        """Prepare a new key. It need not be watched, if other steps have shown what it would show.

        Args:
            state: The key.
            batch: A batch with this key.
        """
        if state.without_batch is None:
            self._shapes.note(batch)
        found = self._shapes.find(state, batch) if self._pads else None
        if found is None:
            self._begin_in_pieces(state, batch)
            return
        padding, fields = found
        if self._is_whole:
            variant = self._alike.expect(state.descriptor, flatten(batch)[0])
            if variant is not None:
                variant.padding = padding
                variant.compare_at = self._compare_at(state, variant, fields)
                self._dispatcher.add_variant(state, variant)
            return
        if self._pieces is None:
            return
        if self._pieces.are_known():
            modes, reason = self._dispatcher.judge(IN_PIECES, None)
            variant = Variant(Unguarded(), modes, reason, padding=padding)
            self._dispatcher.add_variant(state, variant)

    def _compare_at(self, state: KeyState, variant: Variant, fields: tuple[Any, ...]) -> int:
        """Return at which step of a new key the graph is compared: the first one if it pays.

        It does not if there is no graph yet, and no other key has asked for it; nor if as many keys
        have come once as have come again: a comparison takes some three eager steps.
        """
        again = sum(each.sights > 1 for each in self._latest)
        once = len(self._latest) - again
        self._latest.append(state)
        if not variant.only_computes:
            return 2
        owner = self._dispatcher.known(fields)
        has_graph = owner is not None and any(each.entry is not None for each in owner.variants)
        if not has_graph and fields not in self._asked_for:
            self._asked_for.add(fields)
            return 2
        return 1 if once < again else 2

    def _begin_in_pieces(self, state: KeyState, batch: Any) -> None:
        """Let a step whose batch is not padded run in the pieces of steps whose batches are.

        Their graphs are there, so it need not be watched until it has come often.
        """
        if self._is_whole or self._pieces is None or not self._pieces.are_known():
            return
        if state.variants or not self._shapes.may_be_padded(state, batch):
            return
        modes, reason = self._dispatcher.judge(_SELDOM, None)
        no_padding = PaddedLeaves({}, 0)
        variant = Variant(Unguarded(), modes, reason, padding=no_padding)
        variant.watch_at = 0 if reason is None else WATCH_AT
        self._dispatcher.add_variant(state, variant)

    def may_be_known(self, state: KeyState, call: GraphCall) -> bool:
        """Return True if a step that is not padded may go the way of a watched one.

        Then :meth:`run_for_its_way` tells if it must be watched.

        Args:
            state: Its key.
            call: The step.
        """
        return (
            self._is_whole
            and not state.variants
            and state.without_batch is None
            and self._alike.knows(call.descriptor)
        )

    def run_for_its_way(self, call: GraphCall) -> Any:
        """Run a step eagerly. If it went the way of a watched one, its key need not be watched.

        Args:
            call: The step.

        Returns:
            Its output.
        """
        return self._alike_runs.run(call)

    def watched(
        self, plan: Plan, call: GraphCall, watched: WatchedStep, padding: PaddedLeaves | None
    ) -> None:
        """Report a watched step.

        Args:
            plan: The decision to watch.
            call: The step.
            watched: The watched step.
            padding: How its batch is padded.
        """
        session = self._session
        full = session.full_reason(plan.state, watched)
        is_whole = self._is_whole and full is None
        if plan.variant is not None and plan.variant.watch_at and full is not None:
            session.watched(plan, watched, plan.variant.padding, full)  # it stays in its pieces
        elif padding is None or is_whole:
            session.watched(plan, watched, padding)
            if padding is not None and watched.only_computes:
                self._alike_runs.note_watched(plan.state, call)
        elif self._pieces is not None and self._pieces.add(watched):
            session.watched(plan, watched, padding, IN_PIECES)
        else:
            session.watched(plan, watched)

    def run(self, plan: Plan, call: GraphCall) -> Outcome | None:
        """Compare the step from the graph of the padded batch with eager.

        If there is no such graph, it is captured. If the results differ, the user gets eager's, and
        batches of this shape are not padded any more.

        Args:
            plan: The decision: capture or verify.
            call: The step.

        Returns:
            None if memory cannot hold the padded batch or its graph: the step has not run.
        """
        variant = plan.variant
        assert variant is not None and variant.padding is not None  # noqa: PT018
        padding = variant.padding
        try:
            leaves = padding.pad(call.leaves)
        except RuntimeError as error:  # there is less memory now
            self._shapes.note_too_large(call.descriptor, call.tree, padding, error)
            self._dispatcher.not_padded(plan.state, variant)
            return None
        path = None if variant.path is None else variant.path.of_batch()
        assert path is None or isinstance(path, ReadPath)
        eager = EagerRun(call, self._session, self._ways)
        run = _ComparedRun(call, self._padded_call(call, leaves), padding, eager, path)
        if self._known_owner(run.padded) is None and (why := self._why_no_room(run)):
            self._dispatcher.no_room(plan.state, variant, why)
            return None
        get_entry = functools.partial(self._checked_entry, plan.state, variant, run)
        verdict = self._session.compare(self._name, plan, eager.call, get_entry, run.padded)
        reason = self._reason(verdict, padding)
        if reason is not None:
            self._not_padded(plan.state, variant, run, reason)
            return Outcome(verdict.output, CUDAGraphMode.NONE, reason)
        assert isinstance(variant.entry, PaddedEntry)
        variant.entry.count()
        return Outcome(verdict.output, CUDAGraphMode.FULL)

    def _checked_entry(self, state: KeyState, variant: Variant, run: _ComparedRun) -> PaddedEntry:
        """Return the graph of the padded batch, after it was compared with other paddings.

        Args:
            state: The key of the step.
            variant: Its variant, which gets the graph.
            run: The step, which has just run eagerly.

        Raises:
            CaptureError: There is none, or the step may not run from it.
        """
        call, padded, eager, padding = run.call, run.padded, run.eager, run.padding
        if (refusal := self._shapes.refusal(padded.descriptor)) is not None:
            raise _NotPaddedError(refusal)
        eager.check()
        if not variant.is_taken_over:
            self._alike.note(call.descriptor, variant, run.path, eager.way)
        owner = self._owner(padded)
        assert isinstance(owner.entry, GraphEntry)
        if variant.is_taken_over:
            run.path = self._take_over(variant, call, eager.way, owner)
        assert variant.watched is not None and owner.watched is not None  # noqa: PT018
        if variant.watched.called() != owner.watched.called():
            raise NotIndependentError("the step calls other submodules for the padded batch")
        record = self._session.stats.padded(self._name, padded.descriptor)
        verify_replays = self._session.settings.verify_replays
        guards = None if owner.guards is variant.guards else owner.guards
        entry = PaddedEntry(owner.entry, guards, padding, eager.cut(), record, verify_replays)
        fills = [Fill.OTHER, *padding.further_fills()]
        with eager.checked_replays():
            for fill in fills:
                self._check_fill(fill, owner, entry, call, eager.output)
        variant.path = self._path(run, owner, entry)
        self._dispatcher.borrowed(state, variant, entry)
        return entry

    def _why_no_room(self, run: _ComparedRun) -> str:
        return self._session.target.why_no_room(run.padded.descriptor)

    def _path(self, run: _ComparedRun, owner: Variant, entry: PaddedEntry) -> Path | None:
        """Return what must be read of a batch, so that the graph of the padded one is right."""
        real, path, padding = run.path, owner.path, run.padding
        if not isinstance(path, ReadPath):
            return real
        is_same = real is not None and real.is_same_for(path, padding.places)
        if is_same or path.is_decided_by(padding.padding_of(run.call.leaves)):
            return real
        return PaddedPath(real, path, entry)

    def _not_padded(
        self, state: KeyState, variant: Variant, run: _ComparedRun, reason: Reason
    ) -> None:
        """Take note of why a batch was not padded."""
        variant.path = run.path
        self._dispatcher.ran_eagerly(state)
        if reason is _OTHER_WAY:
            self._alike.note_unlike(run.call.descriptor, run.eager.way)
            self._dispatcher.not_padded(state, variant)
        elif reason.kind is Status.EVICTED:
            self._dispatcher.no_room(state, variant, str(reason), was_captured=True)
        elif reason.kind not in (Status.UNPROFITABLE, Status.WARM_UP):
            self._shapes.refuse(run.padded.descriptor, reason)
            self._dispatcher.not_padded(state, variant)
            if (owner := self._dispatcher.known(run.padded.descriptor.fields)) is not None:
                self._dispatcher.none_padded(owner)

    def _take_over(
        self, variant: Variant, call: GraphCall, way: Way | None, owner: Variant
    ) -> ReadPath | None:
        """Let a variant have what a watched step of another shape has shown that went its way.

        Args:
            variant: The variant.
            call: The step, which has just run.
            way: Its way.
            owner: The variant with the graph of the padded batch.

        Returns:
            What the step reads on the host.

        Raises:
            _NotPaddedError: There is none, so the step must be watched.
        """
        assert owner.path is None or isinstance(owner.path, ReadPath)
        found = self._alike.find(call.descriptor, call.leaves, way, owner.path)
        if found is None:
            raise _NotPaddedError(_OTHER_WAY)
        take_over(variant, *found)
        return found[1]

    def _padded_call(self, call: GraphCall, padded: list[Any]) -> GraphCall:
        tree = rebuild(call.tree, iter(padded))
        fields, leaves = describe_like(tree, call.descriptor)
        return dataclasses.replace(
            call, descriptor=BatchDescriptor(*fields), tree=tree, leaves=leaves
        )

    def _owner(self, padded: GraphCall) -> Variant:
        """Return the variant with the graph of the padded batch; capture it if there is none.

        Raises:
            CaptureError: There can be none.
        """
        variant = self._known_owner(padded)
        if variant is None:
            state = self._dispatcher.known(padded.descriptor.fields)
            if state is None or not state.variants:
                self._alike_runs.prepare(padded)
            reason = self._ahead.capture_padded(padded)
            variant = self._known_owner(padded)
            if variant is None:
                reason = reason or Reason(Status.CAPTURE_FAILED, "the padded batch has no graph")
                raise _NotPaddedError(reason)
        assert isinstance(variant.entry, GraphEntry)
        if does := variant.entry.does_besides:
            raise NotIndependentError(f"the step {does}")
        return variant

    def _known_owner(self, padded: GraphCall) -> Variant | None:
        state = self._dispatcher.known(padded.descriptor.fields)
        variants = () if state is None else state.variants
        return next(
            (
                variant
                for variant in variants
                if variant.entry is not None
                and variant.entry.is_valid()
                and variant.guards.check()
                and (variant.path is None or variant.path.holds(padded.leaves))
            ),
            None,
        )

    def _check_fill(
        self, fill: Fill, owner: Variant, entry: PaddedEntry, call: GraphCall, expected: Any
    ) -> None:
        """Compare a replay with another padding with eager.

        It need not be undone: the graph only computes, and the eager run has changed nothing.

        Raises:
            NotIndependentError: They differ.
        """
        if owner.path is not None and not owner.path.holds(entry.pad_ahead(call.leaves, fill)):
            raise NotIndependentError(f"with another padding, {owner.path.explain()}")
        found = entry.replay(call.leaves, self._session.cache.step, fill=fill)
        difference = self._session.difference(found, expected)
        if difference:
            raise NotIndependentError(f"with another padding, {difference}")

    def _reason(self, verdict: Verdict, padding: PaddedLeaves) -> Reason | None:
        """Return why a batch is not padded; None if the replay was equal to eager."""
        error = verdict.error
        if isinstance(error, _NotPaddedError):
            return error.reason
        if isinstance(error, (CaptureError, UnkeyableBatchError)) and not isinstance(
            error, NotIndependentError
        ):
            return reason_of(error)
        why = str(error) if error is not None else verdict.difference
        if not why:
            return None
        cause = (
            Cause.POSITIONS_NOT_INDEPENDENT if padding.has_positions else Cause.ROWS_NOT_INDEPENDENT
        )
        return Reason(cause, f"{cause.value}: {why}")


class _NotPaddedError(CaptureError):
    """The padded batch has no graph."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason
