"""The key of one call of a submodule."""

from __future__ import annotations

from typing import Any

from cg_lightning.core.descriptor import BatchDescriptor, KnownDescriptors, describe


def describe_call(
    training: tuple[bool, ...],
    number: int,
    step: BatchDescriptor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: KnownDescriptors | None = None,
) -> tuple[BatchDescriptor, list[Any]]:
    """Gives the descriptor of a call and the leaves of its arguments.

    Calls have keys of their own: with equal batches, arguments inside the step may differ in shape or value.

    Args:
        training: The ``training`` flags of the submodule that is called, and of all in it.
        number: How many calls of it the step has made before.
        step: The key of the step.
        args: Positional arguments.
        kwargs: Keyword arguments.
        known: As in :func:`~cg_lightning.core.descriptor.describe`.

    Raises:
        UnkeyableBatchError: An argument cannot be keyed.
    """
    return describe(
        (args, kwargs),
        stage=step.stage,
        dataloader_idx=step.dataloader_idx,
        training=training,
        known=known,
        call=number,
        repeats=True,
    )
