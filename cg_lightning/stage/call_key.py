"""The key of one call of a submodule."""

from __future__ import annotations

from typing import Any

from torch import nn

from cg_lightning.core.descriptor import BatchDescriptor, KnownDescriptors, describe


def describe_call(
    modules: list[nn.Module],
    number: int,
    step: BatchDescriptor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: KnownDescriptors | None = None,
) -> tuple[BatchDescriptor, list[Any]]:
    """Gives the descriptor of a call and the leaves of its arguments.

    Calls have keys of their own: with equal batches, arguments inside the step may differ in shape or value.

    Args:
        modules: The submodule that is called, and all in it.
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
        training=tuple([child.training for child in modules]),
        known=known,
        call=number,
        repeats=True,
    )
