"""Where each part of an output comes from after a replay."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from torch import Tensor

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import flatten, leaf_paths, rebuild


class _Source(enum.Enum):
    INPUT = "the input tensor itself"
    HELD = "a parameter, a buffer, a view of one, or a plain value"
    COMPUTED = "a tensor that the graph computes"


@dataclasses.dataclass(frozen=True)
class OutputPlan:
    """Where each leaf of a captured output comes from. It does not keep computed tensors alive."""

    template: Any
    is_nested: bool
    sources: list[tuple[_Source, Any]]

    @classmethod
    def make(
        cls, output: Any, inputs: list[Any], module_storages: set[int]
    ) -> tuple[OutputPlan, list[Tensor]]:
        """Return the plan and the computed tensors, without duplicates.

        Args:
            output: The output of the captured call.
            inputs: The leaves of the arguments of the captured call.
            module_storages: The addresses of the storages of parameters and buffers.

        Raises:
            CaptureError: A leaf is neither a tensor nor a plain value, so a replay cannot make it.
        """
        leaves, structure = flatten(output)
        positions = {
            id(leaf): index for index, leaf in enumerate(inputs) if isinstance(leaf, Tensor)
        }
        computed: dict[int, int] = {}
        tensors: list[Tensor] = []
        sources: list[tuple[_Source, Any]] = []
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                if not is_plain_value(leaf):
                    path = leaf_paths(output, "output")[index]
                    raise CaptureError(
                        f"{path} is a {type(leaf).__qualname__}, which a replay cannot make."
                    )
                sources.append((_Source.HELD, leaf))
            elif id(leaf) in positions:
                sources.append((_Source.INPUT, positions[id(leaf)]))
            elif leaf.untyped_storage().data_ptr() in module_storages:
                sources.append((_Source.HELD, leaf))
            else:
                if id(leaf) not in computed:
                    computed[id(leaf)] = len(tensors)
                    tensors.append(leaf)
                sources.append((_Source.COMPUTED, computed[id(leaf)]))
        return cls(
            rebuild(output, iter([None] * len(leaves))), structure is not None, sources
        ), tensors

    @property
    def is_one_tensor(self) -> bool:
        """Whether the output is one computed tensor."""
        return not self.is_nested and self.sources[0][0] is _Source.COMPUTED

    @property
    def is_one_value(self) -> bool:
        """Whether the output is one leaf that no replay changes, such as None or a parameter."""
        return not self.is_nested and self.sources[0][0] is _Source.HELD

    @property
    def value(self) -> Any:
        """The output, if :attr:`is_one_value`."""
        return self.sources[0][1]

    def build(self, inputs: list[Any], computed: list[Tensor]) -> Any:
        """Return the output of one replay.

        Args:
            inputs: The leaves of the current batch.
            computed: The tensors that the graph has computed.
        """
        leaves = [
            value
            if source is _Source.HELD
            else inputs[value]
            if source is _Source.INPUT
            else computed[value]
            for source, value in self.sources
        ]
        return rebuild(self.template, iter(leaves)) if self.is_nested else leaves[0]
