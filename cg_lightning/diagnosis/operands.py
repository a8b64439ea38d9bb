"""The tensors that a dispatched operation takes, makes and writes to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.operation_writes import written_arguments
from cg_lightning.core.tree import tensors_in
from cg_lightning.guards.values import addresses_of


def written_tensors(
    function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Return the arguments that the operation changes in place."""
    return tensors_in(written_arguments(function, args, kwargs))


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
