"""A captured graph with all that a replay needs: the fast path.

What is hard here:

- Between two batches nothing may be left of the first one. Inputs are copied in, outputs and everything that effects give
  away are copied out, because the next replay writes the same memory. With ``copy_outputs=False`` the user takes that upon
  themselves.
- The order in :meth:`GraphEntry.replay` must not change. Effects bring metric states to where the graph reads them
  *before* the replay. Tensors of effects are cloned *after* it and before anything else can run on this stream, and
  before ``after_replay``, which may call code of the user's (``self.log``).
- A replay has no way back: what may make a graph unusable (a metric state with another shape, other metrics behind the
  logged values) is asked in :meth:`GraphEntry.is_valid`, together with the guards, by the dispatcher.
- It runs between two batches with cold caches, where each function call and each allocation counts: no context is
  entered, no key is hashed, nothing is looked up. A part that an entry does not have costs nothing.
- An output that *is* a tensor of the batch, a parameter or a buffer is returned as that very object
  (:mod:`cg_lightning.capture.outputs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cg_lightning.backends import CapturedGraph
from cg_lightning.capture.outputs import OutputPlan, copy_with_strides, is_cloned_with_strides
from cg_lightning.capture.static_inputs import StaticInputs
from cg_lightning.effects.effect import Effect, methods
from cg_lightning.report.stats import EntryRecord


class GraphEntry:
    """One graph of one variant of one key. :func:`~cg_lightning.capture.capture.capture` makes it.

    Args:
        graph: The graph.
        inputs: The tensors that it reads.
        outputs: How an output is put together.
        computed: What it computes for the output.
        effects: What a replay has to do again in Python.
        effect_tensors: What it computes for the effects, in their order.
        copies_outputs: Whether outputs are copied out of graph memory.
        record: Its row in the statistics.
    """

    __slots__ = (
        *("_after_replay", "_before_replay", "_validity_checks"),
        *(
            "_computed",
            "_copies_outputs",
            "_copy",
            "_effect_tensors",
            "_effects",
            "_graph",
            "_inputs",
        ),
        *("_is_built", "_outputs", "_value", "last_step", "record", "replays"),
    )

    def __init__(
        self,
        graph: CapturedGraph,
        inputs: StaticInputs,
        outputs: OutputPlan,
        computed: list[Tensor],
        effects: list[Effect],
        effect_tensors: list[Tensor],
        copies_outputs: bool,
        record: EntryRecord,
    ) -> None:
        self._graph: CapturedGraph | None = graph
        self._inputs: StaticInputs | None = inputs
        self._outputs = outputs
        self._is_built = not (outputs.is_one_tensor or outputs.is_one_value)
        self._value = outputs.value if outputs.is_one_value else None
        self._computed = computed
        self._copy: Callable[[Tensor], Tensor] = Tensor.clone
        if not all(map(is_cloned_with_strides, computed)):
            self._copy = copy_with_strides
        self._effects = effects
        self._validity_checks = methods(effects, "is_valid")
        self._before_replay = methods(effects, "before_replay")
        self._after_replay = methods(effects, "after_replay")
        self._effect_tensors = effect_tensors
        self._copies_outputs = copies_outputs
        self.record = record
        self.replays = 0
        """Replays that made a step's result."""
        self.last_step = 0
        """The number of the step that used it last."""

    @property
    def graph(self) -> CapturedGraph:
        """The graph.

        Raises:
            AssertionError: It was dropped.
        """
        assert self._graph is not None, "a graph that was dropped is not used"
        return self._graph

    @property
    def num_bytes(self) -> int:
        """Graph memory and static inputs, in bytes."""
        assert self._inputs is not None, "a graph that was dropped is not used"
        return self.graph.num_bytes + self._inputs.num_bytes

    def is_valid(self) -> bool:
        """Return whether the graph was not dropped, and its effects can be done again."""
        if self._graph is None:
            return False
        for check in self._validity_checks:  # noqa: SIM110  # a generator costs more than the calls
            if not check():
                return False
        return True

    def replay(self, leaves: list[Any], step: int) -> Any:
        """Run the step from its graph, and leave behind what the step would have left.

        Args:
            leaves: The leaves of the batch; tensors have the shapes of the capture.
            step: The number of the step under way.
        """
        assert self._graph is not None and self._inputs is not None  # noqa: PT018
        self.last_step = step
        self._inputs.copy_from(leaves)
        for prepare in self._before_replay:
            prepare()
        self._graph.replay()
        if self._after_replay:
            given = iter([tensor.clone() for tensor in self._effect_tensors])
            for finish in self._after_replay:
                finish(given)
        computed = self._computed
        if self._copies_outputs:
            copy = self._copy
            computed = [copy(tensor) for tensor in computed]
        if self._is_built:
            return self._outputs.build(leaves, computed)
        return computed[0] if computed else self._value

    def count(self) -> None:
        """Count a replay that made a step's result."""
        self.replays += 1
        self.record.replays += 1

    def drop(self) -> None:
        """Free the graph and its tensors. Only the cache calls it, after the device is done."""
        for effect in self._effects:
            effect.drop()
        self._graph = self._inputs = None
        self._computed, self._effects, self._effect_tensors = [], [], []
        self._before_replay, self._after_replay, self._validity_checks = [], [], []
