"""The arguments that a dispatched operation writes to, as far as its schema says."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload


def may_write_undeclared(function: OpOverload) -> bool:
    """Return True if an operation may write to arguments that its schema does not declare.

    Batch norm updates its statistics without declaring it. Schemas of custom operations are not
    checked by PyTorch.
    """
    return function.namespace != "aten" or "norm" in function._schema.name


def written_arguments(
    function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """Return the arguments that the schema declares to be written, in the order of the schema.

    ``detach_`` changes no value. ``torch.tensor`` calls it for its result.
    """
    if not function._schema.is_mutable or function._schema.name == "aten::detach_":
        return []
    arguments = function._schema.arguments
    given = list(zip(arguments, args, strict=False))
    given += [(each, kwargs[each.name]) for each in arguments if each.name in kwargs]
    return [
        value
        for argument, value in given
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
