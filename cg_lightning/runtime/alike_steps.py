"""Padded steps of other shapes that read the same in Python: not each shape has to be watched.

To watch a step costs hundreds of steps, and a loader of texts has a hundred shapes. What is padded
is compared with eager for each shape all the same. So a new shape takes over what watched steps of
other shapes have shown, if these have read the same values, at the same lines. If the step of one
shape reads another value than the others, every shape is watched.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from cg_lightning.core.descriptor import BatchDescriptor, is_tensor_key
from cg_lightning.diagnosis.watched_step import WatchedStep
from cg_lightning.host_values.path import ReadPath
from cg_lightning.runtime.dispatcher import CUDAGraphDispatcher, Variant

_ENOUGH = 4
"""The number of watched shapes, padded ones included, that must have read the same."""


class AlikeSteps:
    """Knows the watched steps of one stage.

    Args:
        dispatcher: Has the watched steps. What it has forgotten counts no more.
    """

    def __init__(self, dispatcher: CUDAGraphDispatcher) -> None:
        self._dispatcher = dispatcher
        self._noted: dict[Hashable, dict[BatchDescriptor, tuple[Variant, ReadPath | None]]] = {}

    def note(self, key: BatchDescriptor, variant: Variant, path: ReadPath | None) -> None:
        """Note a watched step.

        Args:
            key: Its key.
            variant: What it has shown.
            path: What it reads on the host.
        """
        if isinstance(variant.watched, WatchedStep) and not variant.is_taken_over:
            self._noted.setdefault(_without_shapes(key), {})[key] = (variant, path)

    def like(self, key: BatchDescriptor, leaves: Sequence[Any]) -> Variant | None:
        """Return a variant for a key that was not watched; None if it must be.

        Args:
            key: The key.
            leaves: The leaves of its batch.
        """
        known = [
            (variant, path)
            for noted, (variant, path) in self._noted.get(_without_shapes(key), {}).items()
            if self._is_known(noted, variant)
        ]
        if len(known) < _ENOUGH or len({_what_it_reads(*each) for each in known}) > 1:
            return None
        for variant, path in known:
            if variant.guards.check() and (path is None or path.holds(leaves)):
                return Variant(
                    variant.guards,
                    variant.modes,
                    variant.reason,
                    watched=variant.watched,
                    path=path,
                    is_taken_over=True,
                )
        return None

    def _is_known(self, key: BatchDescriptor, variant: Variant) -> bool:
        state = self._dispatcher.known(key.fields)
        return state is not None and variant in state.variants


def _without_shapes(key: BatchDescriptor) -> Hashable:
    """Return the fields of a key without the shapes and strides of its tensors."""
    leaves = tuple(
        [(*leaf[2:3], *leaf[4:]) if is_tensor_key(leaf) else leaf for leaf in key.leaves]
    )
    return (key.structure, leaves, key.stage, key.dataloader_idx, key.training, key.flags)


def _what_it_reads(variant: Variant, path: ReadPath | None) -> Hashable:
    reads = () if path is None else tuple([(r.operation, r.location) for r in path.reads])
    sources = frozenset([source.key for source in variant.watched.sources()])
    compared = frozenset([each.key for each in variant.watched.compared()])
    return (sources, compared, reads)
