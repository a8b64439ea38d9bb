"""The tensors that a dispatched operation takes, makes and writes to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.core.tree import flatten
from cg_lightning.guards.values import addresses_of


def written_tensors(
    function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Return the arguments that the operation changes in place."""
    if not function._schema.is_mutable:
        return []
    arguments = function._schema.arguments
    written = [
        value
        for argument, value in zip(arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    written += [
        kwargs[argument.name]
        for argument in arguments
        if argument.alias_info is not None and argument.name in kwargs
    ]
    return [leaf for leaf in flatten(written)[0] if isinstance(leaf, Tensor)]


def addresses_in(values: Any) -> set[int]:
    """Return where the storages of the tensors begin that an operation takes or returns."""
    if isinstance(values, Tensor):
        return addresses_of((values,))
    if not isinstance(values, (tuple, list)):
        return set()
    found = addresses_of([value for value in values if isinstance(value, Tensor)])
    for value in values:
        if isinstance(value, (tuple, list)):
            found |= addresses_in(value)
    return found
