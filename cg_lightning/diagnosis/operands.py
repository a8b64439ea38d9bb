"""The tensors that dispatched operations take, make and write to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

from cg_lightning.backends.operation_writes import written_arguments
from cg_lightning.core.tree import tensors_in
from cg_lightning.guards.values import addresses_of


def written_tensors(
    function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Return the arguments that the operation changes in place."""
    return tensors_in(written_arguments(function, args, kwargs))


def addresses_in(values: Any) -> set[int]:
    """Return the addresses of the storages that an operation takes or returns."""
    if isinstance(values, Tensor):
        return addresses_of((values,))
    if not isinstance(values, (tuple, list)):
        return set()
    found = addresses_of([value for value in values if isinstance(value, Tensor)])
    for value in values:
        if isinstance(value, (tuple, list)):
            found |= addresses_in(value)
    return found


class HeldOperand:
    """A tensor that is held until the step ends, so that its address is not used again."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.address = storage.data_ptr()
        self._tensor: Tensor | None = tensor
        self._storage = StorageWeakRef(storage)

    def is_held_by_others(self) -> bool:
        """Return True if other code refers to its memory. It is not held here from now on."""
        self._tensor = None
        return not self._storage.expired()
