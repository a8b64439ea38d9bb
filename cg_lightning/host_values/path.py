"""The values that one path through a step reads, as a program that is run before the step.

The values that a step reads decide which operations follow. So a graph of it is right only for
batches that give the same values. The program computes them with the operations of the step, in
their order, and stops at the first value that differs, because later operations may fail for
another value.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from cg_lightning.core.causes import Cause
from cg_lightning.core.lines import line_of
from cg_lightning.core.reasons import NO_CHANGE, Changed, Reason
from cg_lightning.core.tree import tensors_in
from cg_lightning.host_values.exact_operations import (
    NUMBER_READS,
    SCALAR_READS,
    cannot_fail,
    is_of_each_element,
    is_same_on_host,
)
from cg_lightning.host_values.host_copies import HostCopies


@dataclasses.dataclass(eq=False)
class HostRead:
    """One read of a watched step, whose value is known before the step."""

    operation: str
    """``aten::item``; or ``aten::nonzero``, whose value is the number of rows of its output."""
    location: str
    """The user's line, or a member of :class:`Elsewhere`."""
    library_location: str = ""
    """The line of a library that it called; empty if there is none."""
    module: str = ""
    """Dotted path of the innermost module that was running; empty for the step itself."""
    value: Any = None
    """The number that the watched step read."""
    is_constant: bool = False
    """True if the value does not depend on the batch."""
    strides: tuple[int, ...] = ()
    """For a number of rows: the strides of the indices of these rows."""

    @property
    def cause(self) -> Cause:
        """Why a graph cannot make it."""
        is_scalar = self.operation in SCALAR_READS
        return Cause.HOST_SYNC if is_scalar else Cause.DATA_DEPENDENT_SHAPE

    def __str__(self) -> str:
        library = f", in {self.library_location}" if self.library_location else ""
        module = f" in {self.module}" if self.module else ""
        return f"{self.operation}{module} ({self.location}{library})"


@dataclasses.dataclass(frozen=True)
class Ref:
    """A tensor in recorded arguments, by its number."""

    number: int


class Root(NamedTuple):
    """A tensor of the batch that a program starts from."""

    number: int
    leaf: int
    """Which leaf of the batch it is."""
    is_written: bool
    """True if the program writes to it, so it works on a copy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A parameter or buffer that a program starts from. It is read where it is then."""

    number: int
    table: dict[str, Any]
    """The parameters or the buffers of its module."""
    name: str
    is_written: bool
    """As for :class:`Root`."""


class Constant(NamedTuple):
    """A tensor that is no part of the batch, and whose values are known."""

    number: int
    values: Tensor
    is_written: bool
    """As for :class:`Root`."""


class Operation(NamedTuple):
    """One operation of a program."""

    function: Any
    args: Any
    kwargs: Any
    outputs: tuple[int | None, ...]
    """The numbers of the tensors that it returns; None for one that it was given."""
    returns_tensor: bool
    """False if it returns several tensors, or a list."""
    is_same_on_host: bool = True
    """Whether it gives the same bits on the host as on the device."""


class Read(NamedTuple):
    """A point of a program where a value is compared."""

    place: int
    """Which read of the path it is, from 0."""
    function: Any
    args: Any


class Mismatch(NamedTuple):
    """A read that gave another value than in the watched step."""

    place: int
    """Which read of the path it is; -1 if the program has failed."""
    value: Any


Check = Callable[[Sequence[Any] | dict[int, Tensor]], Mismatch | None]


class ReadPath:
    """What one path through a step reads.

    Args:
        reads: All reads, in order.
        roots: What the program starts from.
        slots: The program.
        constants: Further tensors that it uses.
        members: Parameters and buffers that it uses. They may change from step to step, and the
            host has no copy of them, so the program waits for the device, as eager does.
    """

    def __init__(
        self,
        reads: list[HostRead],
        roots: list[Root],
        slots: list[Operation | Read],
        constants: Sequence[Constant] = (),
        members: Sequence[Member] = (),
    ) -> None:
        self.reads = reads
        others: list[Constant | Member] = [*constants, *members]
        self._program = (roots, slots, others)
        on_host = [each._replace(values=each.values.cpu()) for each in constants]
        self._check = _compile(reads, [*roots, *constants, *members], slots)
        self._check_on_host = _compile(reads, [*roots, *on_host], list(map(_on_host, slots)))
        self._is_same_on_host = not members and all(map(_is_same_on_host, slots))
        self._places = [root.leaf for root in roots]
        self._compared = [slot.place for slot in slots if isinstance(slot, Read)]
        self._copies: HostCopies | None = None
        self._mismatch: Mismatch | None = None

    def is_of_all_shapes(self, other: ReadPath | None) -> bool:
        """Return True if the program computes the values for all shapes of the batch.

        That is so if it is the program of another shape as well, and names no number: a number may
        be a size, or be made of one.

        Args:
            other: What a step with another shape reads; None: nothing.
        """
        if other is None or not self._has_program_of(other):
            return False
        _, slots, _ = self._program
        given = [(slot.args, {} if isinstance(slot, Read) else slot.kwargs) for slot in slots]
        return not any(isinstance(each, (bool, int, float, complex)) for each in tree_leaves(given))

    def _has_program_of(self, other: ReadPath) -> bool:
        roots, slots, others = self._program
        return not others and other._program == (roots, slots, [])

    def is_same_for(self, other: ReadPath | None, padded: Collection[int]) -> bool:
        """Return True if what holds for a batch holds for the padded batch.

        That is so if both programs are equal, and start from leaves that are not padded.

        Args:
            other: What the step reads for the padded batch.
            padded: The places of the leaves that are padded.
        """
        if other is None or not self._has_program_of(other):
            return False
        values = [(self.reads[i].value, other.reads[i].value) for i in self._compared]
        are_same = all(same_value(one, another) for one, another in values)
        return are_same and not set(self._places) & set(padded)

    def is_decided_by(self, padding: Mapping[int, Tensor]) -> bool:
        """Return True if padding alone decides all values, whatever the batch holds besides.

        One element that is not true decides ``all()``, one that is true decides ``any()``.

        Args:
            padding: An element of the padding, on its own, by the place of its leaf.
        """
        roots, slots, others = self._program
        if others or any(root.is_written or root.leaf not in padding for root in roots):
            return False
        values = {root.number: padding[root.leaf] for root in roots}
        decided: set[int | None] = set()
        for slot in slots:
            numbers = [each.number for each in slot.args if isinstance(each, Ref)]
            if len(numbers) != 1 or numbers[0] not in values:
                return False
            is_decided, one = numbers[0] in decided, values[numbers[0]]
            given = [one if isinstance(each, Ref) else each for each in slot.args]
            if isinstance(slot, Read):
                if not is_decided or slot.function(*given) != self.reads[slot.place].value:
                    return False
                continue
            decisive = _DECIDED_BY_ONE.get(slot.function)
            if decisive is None and not is_of_each_element(slot.function):
                return False
            if _holds_ref([*given, *slot.kwargs.values()]):
                return False
            result = slot.function(*given, **slot.kwargs)
            is_decided |= decisive is not None and bool(result) is decisive
            if (number := slot.outputs[0]) is not None:
                values[number] = result
                decided |= {number} if is_decided else set()
        return True

    def use(self, copies: HostCopies) -> None:
        """Compute the values on the host, where it has the batch."""
        if self._is_same_on_host:
            self._copies = copies
            copies.are_wanted = True

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Return True if a batch gives all the values that were read."""
        copied = self.copies_of(leaves)
        if copied is not None:
            return self.holds_on_host(copied)
        # the host waits for the device once, and not once for each value
        values = self.begin(leaves) if len(self._compared) > 1 else None
        if values is not None:
            return self.holds_with(read_together(values))
        return self._holds(self._check, leaves)

    def begin(self, leaves: Sequence[Any]) -> list[Tensor] | None:
        """Let the device compute all values, and do not wait for them.

        Returns:
            The values, for :func:`read_together`. None: the host reads one after the other, since
            the operations between them may fail for another value.
        """
        try:
            return None if self._values is None else self._values(leaves)
        except (RuntimeError, LookupError):  # so it fails for the check, which notes it
            return None

    @functools.cached_property
    def _values(self) -> Callable[[Sequence[Any]], list[Tensor]] | None:
        """The program without comparisons; None if it may fail for another value."""
        roots, slots, others = self._program
        if not self._compared or not all(_can_wait(slot, self.reads) for slot in slots):
            return None
        return _compile(self.reads, [*roots, *others], slots, compares=False)

    def holds_with(self, values: Sequence[Any]) -> bool:
        """Return True if these are the values that were read, in the order of :meth:`begin`."""
        self._mismatch = None
        for place, value in zip(self._compared, values, strict=True):
            before = self.reads[place].value
            now = type(before)(value)  # flags and integers may have come as one type
            if now != before:
                self._mismatch = Mismatch(place, now)
                break
        return self._mismatch is None

    def copies_of(self, leaves: Sequence[Any]) -> dict[int, Tensor] | None:
        """Return the leaves that are read as the host has them; None if it does not have all."""
        return None if self._copies is None else self._copies.of(leaves, self._places)

    def holds_on_host(self, leaves: dict[int, Tensor]) -> bool:
        """Return True if these leaves on the host give all the values that were read."""
        return self._holds(self._check_on_host, leaves)

    def _holds(self, check: Check, leaves: Sequence[Any] | dict[int, Tensor]) -> bool:
        try:
            self._mismatch = check(leaves)
        except (RuntimeError, LookupError) as error:
            # the step takes another path, or fails as well: then it raises its own error
            self._mismatch = Mismatch(-1, error)
        return self._mismatch is None

    def of_batch(self) -> ReadPath:
        """Return what the step reads for the batch itself."""
        return self

    def is_ruled_out_by(self, failed: object) -> bool:
        """Return True if this path does not hold, since another one has just failed as it did.

        Both paths make the same reads as long as their values are equal.
        """
        if not isinstance(failed, ReadPath):  # that of a padded batch
            return False
        if failed._mismatch is None or failed._mismatch.place < 0:
            return False
        place, value = failed._mismatch
        values = [read.value for read in self.reads[: place + 1]]
        if len(values) <= place or same_value(values[place], value):
            return False
        others = [read.value for read in failed.reads[:place]]
        return all(map(same_value, values[:place], others))

    def explain(self) -> Changed:
        """Return which value differs; empty if none does."""
        if self._mismatch is None:
            return NO_CHANGE
        place, value = self._mismatch
        if place < 0:
            return Changed(f"host values cannot be computed: {type(value).__name__}")
        read = self.reads[place]
        text = f"{read}: now {value!r}, before {read.value!r}"
        return Changed(str(read), text, cause=read.cause)

    def varying(self) -> Reason:
        """Return the reason of steps that have too many values, after one did not hold."""
        place = 0 if self._mismatch is None else max(self._mismatch.place, 0)
        read = self.reads[place]
        text = f"{read.cause.value}: {read}, another value in each batch"
        return Reason(
            read.cause,
            text,
            line_of(read.location),
            operation=read.operation,
            submodule=read.module,
            library_location=read.library_location,
        )


def same_value(one: Any, other: Any) -> bool:
    """Return True for equal bits: NaN equals itself, and 0.0 is not -0.0."""
    if isinstance(one, float) and isinstance(other, float):
        return one.hex() == other.hex()
    return type(one) is type(other) and bool(one == other)


_aten = torch.ops.aten
_DECIDED_BY_ONE = {_aten.all.default: False, _aten.any.default: True}
"""The value that one such element gives, whatever the others are."""
_FASTER: dict[Any, Callable[..., Any]] = {
    _aten.all.default: Tensor.all,
    _aten.any.default: Tensor.any,
    _aten.sum.default: Tensor.sum,
    _aten.eq.Scalar: Tensor.eq,
    _aten.ne.Scalar: Tensor.ne,
    _aten.item.default: Tensor.item,
    _aten._local_scalar_dense.default: Tensor.item,
    _aten.is_nonzero.default: bool,
    _aten.bitwise_not.default: Tensor.bitwise_not,
    _aten.to.device: Tensor.to,
    _aten.to.dtype: Tensor.to,
}
"""A method of a tensor parses its arguments three times as fast as the operation does."""
_MOST_POSITIONAL = 3
"""All of these methods take so many arguments by their position, the tensor included."""


def _is_same_on_host(slot: Operation | Read) -> bool:
    if isinstance(slot, Operation):
        return slot.is_same_on_host
    return is_same_on_host(slot.function)


def _on_host(slot: Operation | Read) -> Operation | Read:
    """Return a part of a program for tensors on the host."""
    slot = slot._replace(args=_with_host(slot.args))
    return slot if isinstance(slot, Read) else slot._replace(kwargs=_with_host(slot.kwargs))


def _with_host(tree: Any) -> Any:
    return tree_map_only(torch.device, lambda _: torch.device("cpu"), tree)


class _Code:
    """The source of one function, and the objects that it names."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.lines: list[str] = []

    def name(self, value: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def text(self, tree: Any) -> str:
        if isinstance(tree, Ref):
            return f"v{tree.number}"
        if isinstance(tree, (tuple, list)) and any(_holds_ref(value) for value in tree):
            return f"[{', '.join(map(self.text, tree))}]"
        return self.name(tree)

    def start(self, root: Root | Constant | Member) -> str:
        if isinstance(root, Root):
            return f"leaves[{root.leaf}]"
        if isinstance(root, Member):
            return f"{self.name(root.table)}[{root.name!r}]"
        return self.name(root.values)

    def call(self, function: Any, args: Any, kwargs: dict[str, Any]) -> str:
        given = [self.text(value) for value in args]
        given += [f"{key}={self.text(value)}" for key, value in kwargs.items()]
        # ``Tensor.to`` takes a memory format by its name only
        faster = function if len(args) > _MOST_POSITIONAL else _FASTER.get(function, function)
        return f"{self.name(faster)}({', '.join(given)})"

    def function(self, returned: str) -> Callable[[Any], Any]:
        end = f"return [{returned}]" if returned else "return None"
        source = "\n    ".join(["def run(leaves):", *self.lines, end])
        exec(source, self.names)
        run: Callable[[Any], Any] = self.names["run"]
        return run


def _holds_ref(tree: Any) -> bool:
    if isinstance(tree, (tuple, list)):
        return any(map(_holds_ref, tree))
    return isinstance(tree, Ref)


def read_together(values: list[Tensor]) -> list[Any]:
    """Return the values of tensors with one element each. It waits for the device once."""
    first = values[0]
    if any((each.dtype, each.device) != (first.dtype, first.device) for each in values):
        values = [each.to(first.device, torch.int64) for each in values]
    found: list[Any] = torch.stack(values).tolist()
    return found


def _one_element(value: Tensor, is_flag: bool) -> Tensor:
    """Return a value that is read as a tensor of flags or integers."""
    value = value.reshape(())
    return value.ne(0) if is_flag and value.dtype is not torch.bool else value


def _can_wait(slot: Operation | Read, reads: list[HostRead]) -> bool:
    """Return True if what follows a part of a program can run, whatever its values are."""
    if isinstance(slot, Operation):
        return cannot_fail(slot.function)
    is_of_tensor = slot.function._schema.name in NUMBER_READS | {"aten::is_nonzero"}
    is_number = type(reads[slot.place].value) in (bool, int)
    return is_number and (is_of_tensor or cannot_fail(slot.function))


def _compile(
    reads: list[HostRead],
    roots: Sequence[Root | Constant | Member],
    slots: list[Operation | Read],
    compares: bool = True,
) -> Callable[[Any], Any]:
    """Return the program as one function, which is half as slow as a loop over its operations.

    Args:
        reads: What the watched step has read.
        roots: What the program starts from.
        slots: The program.
        compares: True for a function that returns the first mismatch; False for one that returns
            all values.
    """
    code = _Code()
    for root in roots:
        copied = ".clone()" if root.is_written else ""
        start = code.start(root)
        code.lines.append(f"v{root.number} = {start}{copied}")
    for slot in slots:
        if isinstance(slot, Read):
            value = reads[slot.place].value
            if not compares:
                one = code.text(slot.args[0])
                if slot.function._schema.name not in SCALAR_READS:
                    one = code.call(slot.function, slot.args, {})
                flag = type(value) is bool
                code.lines.append(f"r{slot.place} = {code.name(_one_element)}({one}, {flag})")
                continue
            call = code.call(slot.function, slot.args, {})
            code.lines.append(f"r = {'int' if type(value) is int else ''}({call})")
            if type(value) in (bool, int):
                code.lines.append(f"if r != {value!r}:")
            else:
                code.lines.append(f"if not {code.name(same_value)}(r, {code.name(value)}):")
            code.lines.append(f"    return {code.name(Mismatch)}({slot.place}, r)")
            continue
        call = code.call(slot.function, slot.args, slot.kwargs)
        if not any(number is not None for number in slot.outputs):
            code.lines.append(call)
        elif slot.returns_tensor:
            code.lines.append(f"v{slot.outputs[0]} = {call}")
        else:
            kept = ", ".join("_" if n is None else f"v{n}" for n in slot.outputs)
            code.lines.append(f"{kept}, = {code.name(tensors_in)}({call})")
    places = [] if compares else [slot.place for slot in slots if isinstance(slot, Read)]
    return code.function(", ".join(f"r{place}" for place in places))
