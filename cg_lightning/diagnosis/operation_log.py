"""What operations of a step are given and give, as digests, and where two runs first differ.

A digest is a number that the device computes of the bits of a tensor, so a graph can hold it: it
needs no wait and no copy. It is read after the graph has run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves

from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from cg_lightning.backends.operation_writes import may_write_undeclared
from cg_lightning.core.equality import INTEGERS
from cg_lightning.core.lines import line_of
from cg_lightning.diagnosis.findings import find_location

MOST_OPERATIONS = 4000
"""Steps with more operations are not compared operation by operation."""
_ROW = 1024
_NUMBER = re.compile(r"True|False|\(?[-+]?(\d|inf|nan).*")
"""A number as it is printed."""
_FACTOR = 0x9E3779B97F4A7C1
"""An odd number with many bits set, from the golden ratio."""
_PLAIN = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _plain(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, _PLAIN) else type(value).__name__


def plain_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Return the arguments of an operation that are no tensors, as they are printed."""
    return tuple(_plain(e) for e in tree_leaves((args, kwargs)) if not isinstance(e, Tensor))


@dataclasses.dataclass(slots=True)
class Operation:
    """One operation of a run."""

    name: str
    plain: tuple[str, ...]
    """The arguments that are no tensors."""
    where: str = ""
    """The user's line."""
    inputs: Sequence[Any] = ()
    """Digests of the tensors that it is given."""
    outputs: Sequence[Any] = ()
    """Digests of the tensors that it returns or may write to."""

    def read(self) -> None:
        """Read the digests from the device."""
        self.inputs, self.outputs = _read(self.inputs), _read(self.outputs)

    def __str__(self) -> str:
        return f"{self.name} ({self.where})" if self.where else self.name


def _read(digests: Sequence[Any]) -> list[Any]:
    return [int(each) if isinstance(each, Tensor) else each for each in digests]


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, in one row. All NaN are the same."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg()
    if tensor.is_floating_point() and tensor.element_size() > 1:
        tensor = tensor.masked_fill(tensor.isnan(), float("nan"))
    return tensor.contiguous().view(INTEGERS[tensor.element_size()]).flatten()


def digest(tensor: Tensor) -> Tensor | None:
    """Return a number of all bits of a tensor and their places; None if it has no known memory.

    Large tensors are first added up by rows and by columns, so that little memory is needed.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return None
    bits = _bits(tensor.detach())
    rows = bits.numel() // _ROW
    if rows:
        table, rest = bits[: rows * _ROW].view(rows, _ROW), bits[rows * _ROW :]
        sums = [table.sum(axis, dtype=torch.int64) for axis in (0, 1)]
        bits = torch.cat([*sums, rest.long()])
    places = torch.arange(1, bits.numel() + 1, device=bits.device, dtype=torch.int64)
    weights = places * _FACTOR
    return ((weights ^ (weights >> 31)) * bits).sum()


class OperationLog(EagerDispatchMode):
    """Runs operations as in eager, and notes each with digests.

    Args:
        device_type: The type of the device of the step.
    """

    supports_higher_order_operators = True

    def __init__(self, device_type: str) -> None:
        super().__init__(device_type)
        self.operations: list[Operation] = []
        self.is_full = False
        """Whether the step has more operations than are compared."""

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is logged. Each call of it begins a new log."""

        def logged(*args: Any, **kwargs: Any) -> Any:
            self.operations.clear()
            self.is_full = False
            # under a dispatch mode alone, compiled functions would run as written for good
            with self.watching(), torch.compiler.set_stance("force_eager"):
                return function(*args, **kwargs)

        return logged

    def dispatch(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`~cg_lightning.backends.dispatch_mode.EagerDispatchMode`."""
        is_higher = isinstance(function, HigherOrderOperator)
        if len(self.operations) < MOST_OPERATIONS:
            where = find_location()
            line = str(where) if line_of(where.user) else ""
            self.operations.append(Operation(function.name(), plain_arguments(args, kwargs), line))
        else:
            self.is_full = True
        if is_higher or self.is_full:
            return function(*args, **kwargs) if is_higher else self.call(function, args, kwargs)
        operation = self.operations[-1]
        given = [e for e in tree_leaves((args, kwargs)) if isinstance(e, Tensor)]
        operation.inputs = _digests(given)
        output = self.call(function, args, kwargs)
        if "empty" in operation.name:  # it returns what was in memory
            return output
        returned = [e for e in tree_leaves(output) if isinstance(e, Tensor)]
        writes = function._schema.is_mutable or may_write_undeclared(function)
        operation.outputs = _digests([*returned, *given] if writes else returned)
        return output

    def read(self) -> list[Operation]:
        """Read all digests, after the operations have run."""
        for operation in self.operations:
            operation.read()
        return list(self.operations)


def _digests(tensors: Sequence[Tensor]) -> list[Any]:
    shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
    with torch._C.DisableTorchFunctionSubclass():
        return [*shapes, *map(digest, tensors)]


class Difference(NamedTuple):
    """The first operation in which two runs differ."""

    number: int
    """The number of the operation in the second run."""
    text: str
    """What differs, in words."""
    is_value: bool = False
    """Whether it is an argument that is no tensor."""


def first_difference(
    one: Sequence[Operation], other: Sequence[Operation], names: tuple[str, str]
) -> Difference | None:
    """Return the first operation in which two runs differ, if it can be told.

    If the runs have other operations in one place, as they do if a graph has side effects, these
    count only if no operation of both runs differs by itself, and a later one is given what they
    have returned.

    Args:
        one: The operations of one run.
        other: The operations of the other one.
        names: What the two runs are called.
    """
    with_shapes = bool(one and one[0].inputs)
    keys, other_keys = ([_key(each, with_shapes) for each in run] for run in (one, other))
    blocks: list[_Block] = []
    of_block: _Block | None = None
    for tag, *ends in SequenceMatcher(None, keys, other_keys, autojunk=False).get_opcodes():
        begin, end, other_begin, other_end = ends
        left, right = one[begin:end], other[other_begin:other_end]
        if tag != "equal":
            blocks.append(_Block(other_begin, left, right))
            continue
        for index, pair in enumerate(zip(left, right, strict=True), other_begin):
            found = _difference(index, *pair, names)
            if found is not None and found.text:
                return found
            if found is not None and of_block is None:
                of_block = next((each for each in blocks[::-1] if each.gives(*pair)), None)
    if len(blocks) == 1 and blocks[0].number + len(blocks[0].other) == len(other):
        of_block = blocks[0]  # nothing follows it
    return None if of_block is None else of_block.difference(names)


class _Block(NamedTuple):
    """Operations of two runs in one place that are not the same."""

    number: int
    one: Sequence[Operation]
    other: Sequence[Operation]

    def gives(self, one: Operation, other: Operation) -> bool:
        """Return whether a later operation of both runs is given what only one side returns."""
        left, right = ({e for each in run for e in each.outputs} for run in self[1:])
        given, other_given = set(one.inputs), set(other.inputs)
        return bool(
            (given - other_given) & (left - right) or (other_given - given) & (right - left)
        )

    def difference(self, names: tuple[str, str]) -> Difference:
        """Return the first operations of both sides as a difference."""
        runs = [str(run[0]) if run else "nothing" for run in self[1:]]
        text = f"{names[0]} runs {runs[0]} where {names[1]} runs {runs[1]}"
        return Difference(self.number, text)


def _key(operation: Operation, with_shapes: bool) -> tuple[Any, ...]:
    """Return what equal operations of two runs have in common, whatever numbers they are given."""
    plain = ["" if _NUMBER.fullmatch(each) else each for each in operation.plain]
    shapes = [each for each in operation.inputs if isinstance(each, tuple)] if with_shapes else []
    return (operation.name, *plain, *shapes)


def _difference(
    index: int, one: Operation, other: Operation, names: tuple[str, str]
) -> Difference | None:
    """Return how two operations of one name differ; without a text if they are given other tensors.

    None if they do not differ.
    """
    if one.plain != other.plain:
        pairs = zip(one.plain, other.plain, strict=False)
        values = next(((a, b) for a, b in pairs if a != b), (str(one.plain), str(other.plain)))
        given = " and ".join(
            f"{value} in {name}" for value, name in zip(values, names, strict=True)
        )
        return Difference(index, f"{other} is given {given}", is_value=True)
    if one.outputs == other.outputs or not (one.outputs and other.outputs):
        return None
    if one.inputs != other.inputs:
        return Difference(index, "")
    return Difference(index, f"{other} has equal inputs and another output")
