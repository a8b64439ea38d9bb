"""A captured graph with everything that its replay needs: the fast path.

What is hard here:

- All replays write the same memory. So inputs are copied in, and outputs and the tensors of effects
  are copied out. With ``copy_outputs=False`` the user is responsible for the outputs. Gradients are
  copied by whoever gives them to parameters, because their memory may serve again.
- The order in :meth:`GraphEntry.replay` must not change. *Before* the replay, effects copy metric
  states to the tensors that the graph reads. *After* it, inputs that the graph has written to
  are copied to the batch, and the tensors of effects are cloned before anything else can run on
  this stream. ``after_replay`` comes last, because it may call the user's code (``self.log``).
- A replay cannot turn into a capture. The dispatcher calls :meth:`GraphEntry.is_valid` before it,
  together with the guards. That method checks everything that could make the graph unusable, such
  as a metric state with another shape or other metrics behind the logged values.
- It runs between two batches with cold caches, so each function call and each allocation counts. It
  enters no context, hashes no key and looks up no name. Parts that an entry does not have cost no
  time.
- If an output *is* a tensor of the batch, a parameter or a buffer, that very object is returned
  (:mod:`cg_lightning.capture.outputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cg_lightning.backends import CapturedGraph
from cg_lightning.capture.answered_reads import raise_other_value
from cg_lightning.capture.outputs import (
    GroupedCopies,
    OutputPlan,
    copy_of_own_kind,
    copy_with_strides,
    is_cloned_with_strides,
)
from cg_lightning.capture.static_inputs import StaticInputs
from cg_lightning.effects.effect import Effect, Taker, methods
from cg_lightning.effects.kinds import ReadChecksLater
from cg_lightning.report.records import EntryRecord

_MANY = 8
"""From this number of tensors on, a grouped copy takes less time than copies of each."""


Copies = Callable[[Sequence[Tensor]], list[Tensor]]
"""Copies tensors out of graph memory, or parts of them."""


class Captured(NamedTuple):
    """What a captured call gives, besides its graph."""

    outputs: OutputPlan
    """Where each part of the output comes from."""
    computed: list[Tensor]
    """The tensors that the graph computes for the output."""
    effects: Sequence[Effect] = ()
    """The side effects to do again after a replay."""
    effect_tensors: Sequence[Tensor] = ()
    """The tensors that the graph computes for the effects, in their order."""
    takers: Sequence[Taker] = ()
    """Use values that the graph computes besides the output.

    Each one turns a pair into an output; the first one gets the pair that the graph computes.
    """


class GraphEntry:
    """One graph of one variant of one key.

    :meth:`Capturer.capture <cg_lightning.capture.capture.Capturer.capture>` makes it.

    Args:
        graph: The graph.
        inputs: The tensors that the graph reads.
        captured: What the call gives.
        record: The row in the statistics.
        copies_outputs: True if outputs are copied out of graph memory.
    """

    __slots__ = (
        *("_after_replay", "_before_replay", "_validity_checks"),
        *(
            "_computed",
            "_copies_back",
            "_copies_outputs",
            "_copy",
            "_effect_tensors",
            "_effects",
            "_graph",
            "_inputs",
        ),
        *("_grouped_copies", "_in_place", "_is_built"),
        *("_outputs", "_takers", "_value", "interval", "last_step", "parts", "record", "replays"),
    )

    def __init__(
        self,
        graph: CapturedGraph,
        inputs: StaticInputs,
        captured: Captured,
        record: EntryRecord,
        copies_outputs: bool = True,
    ) -> None:
        outputs, computed, effects, effect_tensors, takers = captured
        self._graph: CapturedGraph | None = graph
        self._inputs: StaticInputs | None = inputs
        self._outputs = outputs
        self._is_built = not (outputs.is_one_tensor or outputs.is_one_value)
        self._value = outputs.value if outputs.is_one_value else None
        self._computed = computed
        self._copy: Callable[[Tensor], Tensor] = Tensor.clone
        self._grouped_copies: GroupedCopies | None = None
        is_inference = torch.is_inference_mode_enabled()
        if not copies_outputs:  # an alias, because a user may change its shape in place
            self._copy = Tensor.detach
        elif any(tensor.is_inference() != is_inference for tensor in computed):
            self._copy = copy_of_own_kind
        elif not all(map(is_cloned_with_strides, computed)):
            self._copy = copy_with_strides
        elif len(computed) >= _MANY:
            self._grouped_copies = GroupedCopies([*effect_tensors, *computed])
        self._effects = list(effects)
        self._validity_checks = methods(effects, "is_valid")
        self._before_replay = methods(effects, "before_replay")
        self._after_replay = methods(effects, "after_replay")
        self._effect_tensors = list(effect_tensors)
        self._copies_outputs = copies_outputs
        self._copies_back = inputs.are_written
        self._in_place = inputs.in_place
        self.record = record
        self._takers = takers
        self.replays = 0
        """Number of replays whose result was returned to the user."""
        self.last_step = 0
        """The number of the step that last used this entry."""
        self.interval = 0
        """Number of steps from one use to the next, the longest lately; 0: it was used once."""
        self.parts: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        """Views of the static leaves, by who writes to them in parts."""

    @property
    def graph(self) -> CapturedGraph:
        """The graph.

        Raises:
            AssertionError: The graph was dropped.
        """
        assert self._graph is not None, "a graph that was dropped is not used"
        return self._graph

    @property
    def is_dropped(self) -> bool:
        """Whether the graph was dropped."""
        return self._graph is None

    @property
    def given_out(self) -> Sequence[Tensor]:
        """The tensors in graph memory that users are given."""
        return [] if self._copies_outputs else self._computed

    def finds(self, leaves: list[Any]) -> bool:
        """Return True if the inputs that are not copied are where the graph reads them."""
        for index, address in self._in_place:  # noqa: SIM110  # a generator costs more
            if leaves[index].data_ptr() != address:
                return False
        return True

    @property
    def static_leaves(self) -> Sequence[Any]:
        """The leaves that the graph reads. Values that are in them already need no copy."""
        assert self._inputs is not None, "a graph that was dropped is not used"
        return self._inputs.leaves

    @property
    def num_bytes(self) -> int:
        """Graph memory and static inputs, in bytes."""
        assert self._inputs is not None, "a graph that was dropped is not used"
        return self.graph.num_bytes + self._inputs.num_bytes

    @property
    def does_besides(self) -> str:
        """The side effects of the step, in words; empty if it only computes its output."""
        if self._outputs.gives_containers:
            return "returns a container of its batch"
        if self._copies_back:
            return "writes to its batch"
        only_computes = not self._takers and all(
            isinstance(effect, ReadChecksLater) and effect.calls() <= {raise_other_value}
            for effect in self._effects
        )
        return "" if only_computes else "changes state, or checks values of its batch"

    def gives_copies(self, structure: Any) -> bool:
        """Return True if the output has this structure, and consists of copies of what is computed.

        Then :meth:`replay` may leave it to its caller to copy.
        """
        return (
            self._copies_outputs
            and self._copy is not copy_of_own_kind
            and not self._takers
            and self._outputs.is_computed_in_order
            and self._outputs.structure == structure
        )

    def is_valid(self) -> bool:
        """Return True if the graph exists and all its side effects can be done again."""
        if self._graph is None:
            return False
        for check in self._validity_checks:  # noqa: SIM110  # a generator costs more than the calls
            if not check():
                return False
        return True

    def replay(
        self, leaves: list[Any], step: int, tree: Any = None, copies: Copies | None = None
    ) -> Any:
        """Run the step from its graph, with all its side effects, and return the output.

        Args:
            leaves: The leaves of the batch. Tensors must have the shapes of the capture.
            step: The number of the current step.
            tree: The batch.
            copies: Copies what is computed, if only a part of it is wanted. It needs
                :meth:`gives_copies`.
        """
        assert self._graph is not None and self._inputs is not None  # noqa: PT018
        if step != self.last_step:
            # shapes may come in bursts, so a long pause is forgotten slowly
            self.interval = max(step - self.last_step, self.interval * 7 // 8)
            self.last_step = step
        self._inputs.copy_from(leaves)
        for prepare in self._before_replay:
            prepare()
        self._graph.replay()
        if self._copies_back:
            self._inputs.copy_back(leaves)
        computed, grouped = self._computed, None if copies is not None else self._grouped_copies
        if grouped is not None:
            made = grouped.make()
            computed = made[len(self._effect_tensors) :]
        if self._after_replay:
            given = iter(
                [tensor.clone() for tensor in self._effect_tensors] if grouped is None else made
            )
            for finish in self._after_replay:
                finish(given)
        if copies is not None:
            computed = copies(computed)
        elif grouped is None:
            copy = self._copy
            computed = [copy(tensor) for tensor in computed]
        if self._is_built:
            output = self._outputs.build(leaves, computed, tree)
            for taker in self._takers:
                output = taker.take(output)
            return output
        return computed[0] if computed else self._value

    def count(self) -> None:
        """Count a replay whose result is returned to the user."""
        self.replays += 1
        self.record.replays += 1

    def count_timed(self, seconds: float) -> None:
        """Count a replay that was a step or call of its own, with its host time in seconds."""
        self.replays += 1
        record = self.record
        record.replays += 1
        record.timed += 1
        record.host_seconds += seconds

    def drop(self) -> None:
        """Free the graph and its tensors. Only the cache may call it, after a synchronization."""
        for effect in self._effects:
            effect.drop()
        self._graph = self._inputs = None
        self.parts.clear()
        self._computed, self._effects, self._effect_tensors = [], [], []
        self._grouped_copies = None
        self._before_replay, self._after_replay, self._validity_checks = [], [], []
        self._takers = ()
