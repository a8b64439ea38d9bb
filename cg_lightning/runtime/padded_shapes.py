"""Which batches of a step are padded, and how."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor, describe_fields
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.reasons import Reason
from cg_lightning.core.tree import flatten, rebuild
from cg_lightning.padding.leaves import PaddedLeaves
from cg_lightning.padding.padder import Padder
from cg_lightning.report.counts import Counts
from cg_lightning.runtime.keys import KeyState

Fields = tuple[Any, ...]
"""The fields of a key."""


def describe_like(batch: Any, like: BatchDescriptor) -> tuple[Fields, list[Any]]:
    """Return the fields of the key of a batch, and its leaves, in a step with another key."""
    return describe_fields(
        batch,
        stage=like.stage,
        dataloader_idx=like.dataloader_idx,
        training=like.training,
    )


class PaddedShapes:
    """Decides for each key if its batches are padded, and keeps what cannot be.

    Args:
        padder: Decides how a batch is padded.
        stats: Counts.
        name: The name of the step in the statistics.
    """

    def __init__(self, padder: Padder, stats: Counts, name: str) -> None:
        self._padder = padder
        self._stats = stats
        self._name = name
        self._refused: dict[Fields, Reason] = {}
        """The keys of padded batches that no batch is padded to any more."""
        self._too_large: set[tuple[Any, ...]] = set()
        """Padded shapes that memory cannot hold."""

    def note(self, batch: Any) -> None:
        """Note the shape of a batch with a new key."""
        self._padder.note(batch)

    def find(self, state: KeyState, batch: Any) -> tuple[PaddedLeaves, Fields] | None:
        """Return how a batch is padded, and the fields of the key of the padded batch.

        Args:
            state: The key.
            batch: A batch with this key.

        Returns:
            None if such batches run in their own shape.

        Raises:
            ValueError: A setting does not fit the batch.
        """
        if not self.may_be_padded(state, batch):
            return None
        leaves = flatten(batch)[0]
        padding = self._padder.pad(leaves, self._padder.rules_of(batch, leaves))
        if padding is None or padding.shapes in self._too_large:
            return None
        try:
            like = rebuild(batch, iter(padding.empty(leaves)))
        except RuntimeError as error:  # PyTorch has no class for sizes that are too large
            self.note_too_large(state.descriptor, batch, padding, error)
            return None
        fields = describe_like(like, state.descriptor)[0]
        return None if fields in self._refused else (padding, fields)

    def may_be_padded(self, state: KeyState, batch: Any) -> bool:
        """Return True if the key is that of the whole batch."""
        if state.without_batch is not None:
            return False
        try:
            own = describe_like(batch, state.descriptor)[0]
        except UnkeyableBatchError:
            return False
        return own == state.descriptor.fields  # a value that is passed on is no part of the key

    def note_too_large(
        self, key: BatchDescriptor, batch: Any, padding: PaddedLeaves, error: RuntimeError
    ) -> None:
        """Note that memory cannot hold a padded batch.

        Args:
            key: The key of the batch.
            batch: The batch.
            padding: How it is padded.
            error: What its allocation has raised.
        """
        cause = Cause.PADDING_TOO_LARGE
        reason = Reason(cause, f"{cause.value}: {str(error).splitlines()[0]}")
        like = rebuild(batch, iter(padding.empty(flatten(batch)[0], torch.device("meta"))))
        padded = BatchDescriptor(*describe_like(like, key)[0])
        self._stats.padded(self._name, padded).reason = reason
        if not self._too_large:
            warnings.warn(
                f"CUDAGraphCallback: batches of shapes {key.shapes()} are not padded: {reason}. "
                "Further sizes that are too large are in callback.stats.padding.",
                stacklevel=2,
            )
        self._too_large.add(padding.shapes)

    def refuse(self, padded: BatchDescriptor, reason: Reason) -> None:
        """Let no batch be padded to this key any more."""
        self._refused[padded.fields] = reason
        self._stats.padded(self._name, padded).reason = reason

    def refusal(self, padded: BatchDescriptor) -> Reason | None:
        """Return why no batch is padded to this key; None if one may be."""
        return self._refused.get(padded.fields)
