"""What is captured: one call of a step or of a submodule, and what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.forward_context import ForwardContext, override_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.core.tree import rebuild
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.effects.side_effects import SideEffects
from cg_lightning.guards.guard_set import GuardSet
from cg_lightning.host_values.path import HostRead
from cg_lightning.report.records import EntryRecord


@dataclasses.dataclass(eq=False)
class GraphCall:
    """One call of a step or of a submodule.

    Attributes:
        descriptor: The key of the call.
        function: The callable: ``function(tree, *frozen_args, **frozen_kwargs)``.
        tree: The nested containers whose tensors are the inputs of the graph.
        leaves: The leaves of ``tree``, in order.
        frozen_args: Further positional arguments; a graph freezes them.
        frozen_kwargs: Further keyword arguments; a graph freezes them.
    """

    descriptor: BatchDescriptor
    function: Callable[..., Any]
    tree: Any
    leaves: list[Any]
    frozen_args: tuple[Any, ...] = ()
    frozen_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self) -> Any:
        """Call the function with the original arguments."""
        return self.function(self.tree, *self.frozen_args, **self.frozen_kwargs)

    def run_with(self, leaves: list[Any]) -> Any:
        """Call the function with other leaves in the same containers."""
        return self.run_on(rebuild(self.tree, iter(leaves)))

    def run_on(self, tree: Any) -> Any:
        """Call the function with another tree."""
        return self.function(tree, *self.frozen_args, **self.frozen_kwargs)

    def run_eagerly(self) -> Any:
        """Call the function with a forward context in mode NONE."""
        with override_forward_context(ForwardContext(CUDAGraphMode.NONE, self.descriptor)):
            return self.run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureTarget:
    """The step or submodule to capture.

    Attributes:
        mode: PIECEWISE or FULL.
        module: The module whose state a call may change.
        effects: The side effects of whole steps. None for a submodule, because a call with side
            effects is not captured.
        held: Parameters, buffers and tensors in attributes and globals, which an output may be.
        held_containers: Containers in attributes and globals, which an output may be or hold.
        record: The row in the statistics.
        side_effects: What the call does besides, as the watched step has shown.
        changed: The value that has changed since an earlier capture; empty if none has.
        reads: Reads of the watched step on the host, which a capture cannot make.
        copies_from_host: Whether the call copies constants from the host, and no function that it
            calls shows it.
        only_computes: Whether the call does nothing but compute its output, so that nothing has to
            be put back between two runs.
        operations: The operations of the watched step, without tensors; empty if they are those of
            another key.
        guards: The guards of the call. They receive what compiled code reads; None: it has none.
        reads_in_place: Whether inputs in memory of other graphs are read where they are.
    """

    mode: CUDAGraphMode
    module: nn.Module
    effects: ModuleEffects | None
    held: Sequence[Tensor]
    record: EntryRecord
    held_containers: Sequence[Any] = ()
    side_effects: SideEffects = dataclasses.field(default_factory=SideEffects)
    changed: Changed = NO_CHANGE
    reads: Sequence[HostRead] = ()
    copies_from_host: bool = False
    only_computes: bool = False
    operations: Sequence[Any] = ()
    guards: GuardSet | None = None
    reads_in_place: bool = False
