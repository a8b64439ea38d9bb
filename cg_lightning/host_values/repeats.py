"""Programs of host values, without what they would compute twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch.utils._pytree import tree_map_only

from cg_lightning.host_values.path import Operation, Read, Ref


def without_repeats(slots: list[Operation | Read]) -> list[Operation | Read]:
    """Return a program that computes and reads the same, but nothing twice.

    Args:
        slots: The operations and reads, in order. None of them writes to a tensor.
    """
    same: dict[int, int] = {}
    made: dict[Hashable, tuple[int | None, ...]] = {}
    read: set[Hashable] = set()
    kept: list[Operation | Read] = []

    def canonical(tree: Any) -> Any:
        return tree_map_only(Ref, lambda ref: Ref(same.get(ref.number, ref.number)), tree)

    for slot in slots:
        args = canonical(slot.args)
        if isinstance(slot, Read):
            if (slot.function, _hashable(args)) not in read:
                read.add((slot.function, _hashable(args)))
                kept.append(slot._replace(args=args))
            continue
        kwargs = canonical(slot.kwargs)
        call = (slot.function, _hashable(args), _hashable(sorted(kwargs.items())))
        if call in made:
            for number, other in zip(slot.outputs, made[call], strict=True):
                if number is not None and other is not None:
                    same[number] = other
        else:
            made[call] = slot.outputs
            kept.append(slot._replace(args=args, kwargs=kwargs))
    return kept


def _hashable(tree: Any) -> Hashable:
    if isinstance(tree, (tuple, list)):
        return (type(tree), tuple([_hashable(value) for value in tree]))
    return (type(tree), tree.hex() if isinstance(tree, float) else tree)
