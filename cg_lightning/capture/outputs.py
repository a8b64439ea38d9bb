"""How an output is put together after each replay."""

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
    COMPUTED = "what the graph computes"


@dataclasses.dataclass(frozen=True)
class OutputPlan:
    """Where each leaf of a captured output comes from. It keeps no computed tensor alive."""

    template: Any
    is_nested: bool
    sources: list[tuple[_Source, Any]]

    @classmethod
    def make(
        cls, output: Any, inputs: list[Any], module_storages: set[int]
    ) -> tuple[OutputPlan, list[Tensor]]:
        """Gives the plan, and the computed tensors, each once.

        Args:
            output: What was returned during capture.
            inputs: The leaves that the captured call was given.
            module_storages: Where the storages of parameters and buffers begin.

        Raises:
            CaptureError: A leaf is neither a tensor nor a plain value, so nobody knows how to make it anew.
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
                        f"{path} is a {type(leaf).__qualname__}, which a replay cannot make anew."
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
        """Whether the output is a single value that is the same after each replay: None, or a parameter."""
        return not self.is_nested and self.sources[0][0] is _Source.HELD

    @property
    def value(self) -> Any:
        """The output, if :attr:`is_one_value`."""
        return self.sources[0][1]

    def build(self, inputs: list[Any], computed: list[Tensor]) -> Any:
        """Return the output of one replay, made of the leaves of its own batch and of what was computed."""
        leaves = [
            value
            if source is _Source.HELD
            else inputs[value]
            if source is _Source.INPUT
            else computed[value]
            for source, value in self.sources
        ]
        return rebuild(self.template, iter(leaves)) if self.is_nested else leaves[0]
