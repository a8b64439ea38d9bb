"""Compare replays with eager, on the user's own batches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from cg_lightning.backends import GraphBackend
from cg_lightning.capture.call import CaptureTarget, GraphCall
from cg_lightning.capture.capture import WrittenTensors
from cg_lightning.core.equality import close_leaf, copy_of, same_leaf
from cg_lightning.core.errors import CaptureError, UnkeyableBatchError
from cg_lightning.core.tree import flatten, leaf_paths
from cg_lightning.effects.module_effects import Comparison
from cg_lightning.effects.step_state import NoState, StepState
from cg_lightning.modules.compilation import Compilation
from cg_lightning.report.records import EntryRecord
from cg_lightning.runtime.first_difference import FirstDifference

_POSSIBLE_CAUSES = (
    "Why is not known: it may have frozen a Python value, one that a library keeps for "
    "instance, or read memory that has moved"
)
_FAR = 0.05
"""Share of the largest value that no rounding exceeds, even in 16 bits."""
_MOST_EAGER_RUNS = 8
"""Number of eager runs that show how much eager differs from itself.

One replay in nine is outside the range of eight runs.
"""


class Replayed(Protocol):
    """A graph, as a comparison sees it."""

    record: EntryRecord

    def replay(self, leaves: list[Any], step: int, tree: Any = None) -> Any:
        """Run the step for a batch with these leaves from its graph."""


class Verdict(NamedTuple):
    """The result of a comparison. All state is that of the run whose output is returned."""

    output: Any
    """The output of the replay if it equals eager's, otherwise the output of eager."""
    difference: str = ""
    """The first value that differs; empty if replay and eager are equal."""
    error: Exception | None = None
    """The error of the capture; None if there is a graph."""


def _leaves(output: Any, values: list[tuple[str, Any]]) -> list[Any]:
    return [*flatten(output)[0], *[value for _, value in values]]


def _values(state: StepState | NoState, comparison: Comparison | None) -> list[tuple[str, Any]]:
    """Return names and values of everything that the latest run has changed or returned."""
    late = [] if comparison is None else comparison.late_arguments()
    return [*state.values(), *late]


def _are_floats(one: Any, other: Any) -> bool:
    """Return True for two tensors of floats of one shape."""
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.is_floating_point() and one.shape == other.shape


def _distance(one: Any, other: Any) -> float:
    """Return how far a tensor is from that of another eager run; 0.0 for all other values."""
    if not (_are_floats(one, other) and one.numel()):
        return 0.0
    return float((one - other).abs().max())


def _is_far(one: Any, other: Any) -> bool:
    """Return True for floats that differ by more than a share of the largest value."""
    if not (_are_floats(one, other) and one.numel()):
        return False
    largest = other.abs().nan_to_num(0.0, 0.0, 0.0).amax()
    return bool(((one - other).abs() > _FAR * largest).any())


def _is_within(one: Any, other: Any, spread: float) -> bool:
    return spread > 0 and _are_floats(one, other) and bool(((one - other).abs() <= spread).all())


def _show(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    flat = value.detach().flatten()[:3].tolist()
    return f"{flat}{' ...' if value.numel() > 3 else ''} of shape {tuple(value.shape)}"


def _differs(output: Any, path: str, found: Any, wanted: Any, why: str) -> Verdict:
    text = f"{path} is {_show(found)} from the graph, {_show(wanted)} from eager"
    return Verdict(output, f"{text}. {why}")


class Verifier:
    """Runs a call eagerly and from its graph, both from the same state. The user sees one call.

    If both are equal, output and state are those of the replay, otherwise those of eager. If they
    differ by a rounding, eager runs again, up to eight times. If eager runs differ from each other
    (atomic additions, for example), the replay may differ by as much. More than a rounding is never
    excused: an unseen counter in the step makes eager runs differ as well.

    Args:
        backend: Captures and replays.
        tolerance: ``exact`` or ``close``.
        written: Tensors, other than buffers, that steps write to.
        compilation: What the callback compiles, which eager steps must not run. None: nothing.
        first: Looks for the first operation that differs. None: none is named.
    """

    def __init__(
        self,
        backend: GraphBackend,
        tolerance: str,
        written: WrittenTensors,
        compilation: Compilation | None = None,
        first: FirstDifference | None = None,
    ) -> None:
        self._first = first
        self._backend = backend
        self._compilation = compilation
        self._is_same = same_leaf if tolerance == "exact" else close_leaf
        self._written = written

    def check(
        self,
        target: CaptureTarget,
        call: GraphCall,
        get_entry: Callable[[], Replayed],
        step: int,
    ) -> Verdict:
        """Run the call both ways.

        Args:
            target: The step or submodule.
            call: The call.
            get_entry: Returns the graph, and captures it first if there is none. It is called after
                the eager run.
            step: The number of the current step.
        """
        comparing = (
            contextlib.nullcontext()
            if target.effects is None
            else target.effects.comparing(target.side_effects.late)
        )
        with comparing as comparison:
            return self._compare(target, call, comparison, get_entry, step)

    def difference(self, found: Any, expected: Any) -> str:
        """Return the first leaf of an output that differs from eager's; empty if none does.

        Values below the absolute tolerance are compared by their own scale.
        """
        leaves, structure = flatten(found)
        wanted, wanted_structure = flatten(expected)
        if structure != wanted_structure:
            return "the output has other containers than eager's"
        paths = leaf_paths(expected, "output")
        for path, one, other in zip(paths, leaves, wanted, strict=True):
            if not self._is_same(one, other) or _is_far(one, other):
                return f"{path} is {_show(one)} from the graph, {_show(other)} from eager"
        return ""

    def _run_eagerly(self, call: GraphCall, comparison: Comparison | None) -> Any:
        compilation = self._compilation
        with contextlib.nullcontext() if compilation is None else compilation.suspended():
            if comparison is None:
                return call.run_eagerly()
            return comparison.run(call.run_eagerly)

    def _why(
        self,
        target: CaptureTarget,
        call: GraphCall,
        comparison: Comparison | None,
        before: StepState | NoState,
    ) -> str:
        """Return why a replay differs from eager, as far as it can be told.

        It runs the call again, so the state must be restored afterwards.
        """
        if self._first is None:
            return _POSSIBLE_CAUSES
        run = functools.partial(self._run_eagerly, comparison=comparison)
        text = self._first.find(target, call, run, before.restore)
        return text or _POSSIBLE_CAUSES

    def _state(
        self, target: CaptureTarget, call: GraphCall, held_before: Sequence[Tensor] = ()
    ) -> StepState | NoState:
        if target.only_computes:
            return NoState()
        does = target.side_effects
        given = (call.tree, call.frozen_args, call.frozen_kwargs)
        return StepState(
            target.module,
            self._backend,
            target.effects,
            [*self._written.now(), *held_before, *[call.leaves[i] for i in does.batch_writes]],
            given,
            does.changes,
        )

    def _compare(
        self,
        target: CaptureTarget,
        call: GraphCall,
        comparison: Comparison | None,
        get_entry: Callable[[], Replayed],
        step: int,
    ) -> Verdict:
        before = self._state(target, call)
        given = [
            (leaf, copy_of(leaf))
            for index, leaf in enumerate(call.leaves)
            if isinstance(leaf, Tensor) and index not in target.side_effects.batch_writes
        ]
        expected = self._run_eagerly(call, comparison)
        # a graph writes to its own copies
        if not all(same_leaf(leaf, value) for leaf, value in given):
            return Verdict(expected, "it changes a tensor that it is given")
        if before.has_changed_containers() and not target.side_effects.fills_batch:
            return Verdict(expected, "it changes a container that it is given")
        expected_values = _values(before, comparison)
        after_eager = self._state(target, call, before.metric_tensors())
        before.restore()
        try:
            entry = get_entry()
        except (CaptureError, UnkeyableBatchError) as error:
            after_eager.restore()
            return Verdict(expected, error=error)
        output = entry.replay(call.leaves, step, call.tree)
        wanted = _leaves(expected, expected_values)
        found = _leaves(output, _values(before, comparison))
        if len(wanted) != len(found):
            why = self._why(target, call, comparison, before)
            after_eager.restore()
            return Verdict(
                expected,
                f"the output and the metrics have {len(found)} leaves, eager's {len(wanted)}. "
                f"{why}",
            )
        pairs = enumerate(zip(found, wanted, strict=True))
        differing = [index for index, (one, other) in pairs if not self._is_same(one, other)]
        if not differing:
            if comparison is not None:
                comparison.keep_replay()
            return Verdict(output)
        paths = [*leaf_paths(expected, "output"), *[name for name, _ in expected_values]]
        far = [index for index in differing if _is_far(found[index], wanted[index])]
        if far:
            why = self._why(target, call, comparison, before)
            after_eager.restore()
            return _differs(expected, paths[far[0]], found[far[0]], wanted[far[0]], why)
        outside, number = self._run_again(call, comparison, before, (found, wanted), differing)
        why = self._why(target, call, comparison, before) if outside else ""
        after_eager.restore()
        if number != len(wanted):
            return Verdict(
                expected,
                f"eager runs with the same batch give {len(wanted)} and then {number} leaves",
            )
        if outside:
            first = outside[0]
            return _differs(expected, paths[first], found[first], wanted[first], why)
        entry.record.within_spread = True
        return Verdict(expected)

    def _run_again(
        self,
        call: GraphCall,
        comparison: Comparison | None,
        before: StepState | NoState,
        leaves: tuple[list[Any], list[Any]],
        differing: list[int],
    ) -> tuple[list[int], int]:
        """Run eagerly until eager runs differ from each other as much as the replay from eager.

        Args:
            call: The call.
            comparison: Undoes its side effects; None: it has none.
            before: The state before the call.
            leaves: The leaves of the replay, and those of the first eager run.
            differing: The positions in which they differ.

        Returns:
            The positions in which the replay differs by more, and the number of leaves of the last
            run.
        """
        found, wanted = leaves
        outside, number = differing, len(wanted)
        spreads = dict.fromkeys(differing, 0.0)
        for _ in range(_MOST_EAGER_RUNS):
            before.restore()
            again = _leaves(self._run_eagerly(call, comparison), _values(before, comparison))
            number = len(again)
            if number != len(wanted):
                break
            for index, spread in spreads.items():
                spreads[index] = max(spread, _distance(wanted[index], again[index]))
            outside = [
                index
                for index, spread in spreads.items()
                if not _is_within(found[index], wanted[index], spread)
            ]
            if not outside or not any(spreads.values()):
                break
        return outside, number
