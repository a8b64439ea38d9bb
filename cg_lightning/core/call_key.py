"""The key of one call of a submodule."""

from __future__ import annotations

from typing import Any

import torch

from cg_lightning.core.descriptor import BatchDescriptor, KnownDescriptors, describe
from cg_lightning.core.errors import UnkeyableBatchError

# private: whether ``torch.vmap`` or another transform runs, whose tensors have no memory of their own
_innermost_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def is_inside_transform() -> bool:
    """Whether a transform of ``torch.func`` runs."""
    return _innermost_transform() is not None


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
    if is_inside_transform():
        raise UnkeyableBatchError("the call", "is made inside a transform of torch.func")
    return describe(
        (args, kwargs),
        stage=step.stage,
        dataloader_idx=step.dataloader_idx,
        training=training,
        known=known,
        call=number,
        repeats=True,
    )
