"""Gradients that a graph gives out as they are, because whoever gets them copies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cg_lightning.backends import GraphBackend
from cg_lightning.capture.graph import weak_ref_tensors
from cg_lightning.core.closure import ClosureOutput, ReplayedOutput
from cg_lightning.core.tree import flatten

# private: the counters of changes, which eager's gradients have as well
set_versions: Callable[[Sequence[Tensor], Sequence[int]], None] | None = getattr(
    torch._C._autograd, "_unsafe_set_version_counter", None
)


class LentGradients:
    """Adds its gradients to the output of a replay.

    It is a :class:`~cg_lightning.effects.effect.Taker`.

    Args:
        gradients: Those that the graph computes, by the names of their parameters.
    """

    def __init__(self, gradients: dict[str, Tensor | None]) -> None:
        self._gradients = gradients

    @classmethod
    def of(cls, output: Any, besides: Iterable[Any]) -> LentGradients | None:
        """Return the gradients in the output of a closure; None if they must be copied with it.

        They must if two of them share memory, or one and another tensor. Then copies share it, too.

        Args:
            output: The output, or pairs of which it is the first part.
            besides: What else there is; tensors among it may share memory with a gradient.
        """
        closure = output
        while type(closure) is tuple:
            closure = closure[0]
        if not isinstance(closure, ClosureOutput) or not closure.gradients:
            return None
        given = [each for each in closure.gradients.values() if each is not None]
        if not all(each.layout is torch.strided and each.grad_fn is None for each in given):
            return None
        known = set(map(id, given))
        leaves = [*flatten(output)[0], *besides]
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in known]
        memory = [leaf.untyped_storage().data_ptr() for leaf in given]
        if len(set(memory)) < len(memory) or not set(memory).isdisjoint(map(_memory_of, others)):
            return None
        return cls(closure.gradients)

    def left_out_of(self, output: Any) -> Any:
        """Return an output, as :meth:`of` was given it, without the gradients."""
        if isinstance(output, ClosureOutput):
            return output._replace(gradients=None)
        return (self.left_out_of(output[0]), *output[1:])

    def hold_weakly(self, backend: GraphBackend) -> None:
        """Let later captures use their memory again."""
        before = self._gradients
        self._gradients = weak_ref_tensors(before, backend)
        if set_versions is not None:
            pairs = zip(self._gradients.values(), before.values(), strict=True)
            given = [(weak, each) for weak, each in pairs if weak is not None and each is not None]
            set_versions([weak for weak, _ in given], [each._version for _, each in given])

    def take(self, built: Any) -> ReplayedOutput:
        """Return the output of a replay with the gradients. The next replay overwrites these."""
        return ReplayedOutput(built[0], built[1], self._gradients)


def _memory_of(tensor: Tensor) -> int:
    is_plain = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.untyped_storage().data_ptr() if is_plain else 0
