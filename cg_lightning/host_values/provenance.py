"""Provenance: tensors of a watched step that are computed from batch, module and constants alone.

What is hard here:

- Writes. The value of a read depends on all earlier writes to the memory of its tensor, through any
  view. So a program holds the operations that made its tensors, and all earlier writes to
  their storages. Tensors of the batch that it writes to are copied first.
- Aliases that no operation makes (``x.data``, ``set_``). A tensor is known by the object *and* by
  its storage and layout. A new object on a known storage that no operation returned is foreign.
- Addresses are used again. So every known tensor is kept alive until the step ends, and a storage
  that an operation allocates is a new one.
- A tensor that another operation writes is foreign from then on, and so are the arguments of an
  operation that raised. Custom operations may write to arguments that they do not declare.
- Tensors that existed before the step are foreign, because they may change. The exceptions are the
  batch, and parameters and buffers, which a program reads again before each step. Tensors made from
  Python values are foreign, unless a detector has found them to be constant: ``torch.tensor`` takes
  tensors as well, and does not dispatch that.
- The greatest of 0.0 and -0.0 may be either. Such a number may be compared, but not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from cg_lightning.backends.operation_writes import may_write_undeclared, written_arguments
from cg_lightning.host_values.exact_operations import (
    NUMBER_READS,
    SCALAR_READS,
    counted_masks,
    has_sign_of_zero,
    is_exact,
    is_plain,
    is_same_on_host,
    is_unique,
    sizing,
)
from cg_lightning.host_values.path import (
    Constant,
    HostRead,
    Member,
    Operation,
    Read,
    ReadPath,
    Ref,
    Root,
)
from cg_lightning.host_values.repeats import without_repeats

MOST_OPERATIONS = 96
"""Longer programs are not run before each step."""
_count = torch.ops.aten.count_nonzero.default
_size = torch.ops.aten.sym_size.int
_less, _any = torch.ops.aten.lt.Scalar, torch.ops.aten.any.default


@dataclasses.dataclass(eq=False)
class _Known:
    """A tensor that is made of the batch and of constants."""

    tensor: Tensor
    storage: int
    layout: tuple[Any, ...]
    made_by: int | None
    """The operation that returned it; None for a leaf of the batch, and for a constant."""
    leaf: int | None
    """Which leaf of the batch it is."""
    values: Tensor | None = None
    """A copy of a constant."""
    member: tuple[dict[str, Any], str] | None = None
    """The members of a module among which it is, and its name."""
    is_up_to_sign: bool = False
    """Whether its zeros may have another sign the next time."""

    @property
    def may_change(self) -> bool:
        """Whether it may have other values in the next step."""
        return self.leaf is not None or self.member is not None


@dataclasses.dataclass(eq=False)
class _Recorded:
    """An operation on known tensors."""

    operation: Operation
    inputs: list[int]
    written: set[int]
    """The storages that it writes to."""


@dataclasses.dataclass(eq=False)
class _RecordedRead:
    """A read of known tensors."""

    read: HostRead
    position: int
    """How many operations came before it."""
    inputs: list[int]
    function: OpOverload
    args: Any


@dataclasses.dataclass(eq=False)
class _Started:
    """An operation that is under way."""

    function: OpOverload
    args: Any
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    numbers: list[int | None]
    storages: list[int]
    is_read: bool = False
    read: HostRead | None = None
    """The read whose value the operation returns."""
    unique: HostRead | None = None
    """The read of how many different values it finds."""


def _tensors(arguments: Any) -> list[Tensor]:
    """Return the tensors among what an operation takes or returns."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (tuple, list)):
        return []
    found: list[Tensor] = []
    for each in arguments:
        if isinstance(each, (Tensor, tuple, list, dict)):
            found += _tensors(each)
    return found


def _storage(tensor: Tensor) -> int:
    """Return the identity of the memory of a tensor; 0 if it has none of its own."""
    if not is_plain(tensor):
        return 0
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())


class Provenance:
    """Records the operations of one watched step, and its reads on the host.

    Args:
        leaves: The leaves of its batch.
        where: Returns the user's line that runs now, that of a library which it called, and the
            path of the module that runs.
        members: The parameters and the buffers of each module.
    """

    def __init__(
        self,
        leaves: Sequence[Any],
        where: Callable[[], tuple[str, str, str]],
        members: Iterable[dict[str, Any]] = (),
    ) -> None:
        self._where = where
        self._known: list[_Known] = []
        self._numbers: dict[int, int] = {}
        """By the id of the tensor object."""
        self._writes: dict[int, list[int]] = {}
        """The operations that wrote to a storage of known tensors."""
        self._foreign: set[int] = set()
        """Storages with values that are not computed from the batch."""
        self._operations: list[_Recorded] = []
        self._reads: list[_RecordedRead] = []
        self._started: _Started | None = None
        self._is_given_up = False
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and is_plain(leaf):
                self._add(leaf, leaf=index)
        for table in members:
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in self._numbers and is_plain(tensor):
                    self._add(tensor, member=(table, name))

    def give_up(self) -> None:
        """Forget everything: the step reads something else, so there is no path."""
        self._is_given_up = True
        for held in (self._known, self._numbers, self._writes, self._operations, self._reads):
            held.clear()
        self._started = None

    # one operation

    def begin(
        self, function: OpOverload, args: Any, kwargs: dict[str, Any], is_of_step: bool
    ) -> bool:
        """Note that an operation begins; return True if it reads a value known before the step.

        ``is_of_step`` is False if a capture of the whole step runs something else in its place.
        """
        if self._is_given_up:
            return False
        if self._started is not None:  # it has raised
            self._spoil(self._started.tensors)
            if self._started.is_read:
                self.give_up()
                return False
        tensors = _tensors((args, kwargs))
        storages = list(map(_storage, tensors))
        numbers = list(map(self._number_at, tensors, storages))
        started = _Started(function, args, kwargs, tensors, numbers, storages)
        self._started = started
        return is_of_step and self._read(started)

    def _read(self, started: _Started) -> bool:
        function, args, kwargs = started.function, started.args, started.kwargs
        name = function._schema.name
        if is_unique(function, args, kwargs) and None not in started.numbers:
            started.is_read = True
            started.unique = HostRead(name, *self._where())
            return True
        if (sized := sizing(function, args, kwargs)) is not None:
            return self._read_size(name, *sized, started)
        masks = counted_masks(name, args)
        if name not in SCALAR_READS and not masks:
            return False
        numbers = [self._number(mask) for mask in masks] if masks else started.numbers
        known = [number for number in numbers if number is not None]
        is_answerable = is_exact(_count if masks else function, masks or started.tensors, [])
        is_answerable &= all(mask.dim() > 0 for mask in masks)
        if name in NUMBER_READS:
            is_answerable &= not any(self._known[number].is_up_to_sign for number in known)
        if len(known) < len(numbers) or not is_answerable:
            self.give_up()
            return False
        started.is_read = True
        position, where = len(self._operations), self._where()
        if not masks:
            started.read = HostRead(name, *where)
            args = self._with_refs(args)
            self._reads.append(_RecordedRead(started.read, position, known, function, args))
        for number, mask in zip(known, masks, strict=bool(masks)):
            rows = mask.nonzero()
            read = HostRead(name, *where, len(rows), strides=rows.stride())
            self._reads.append(_RecordedRead(read, position, [number], _count, (Ref(number),)))
        return True

    def _read_size(self, name: str, by: OpOverload, tensor: Tensor, started: _Started) -> bool:
        """Note a read that decides the shape of an output."""
        number = self._number(tensor)
        if number is None or not is_exact(by, [tensor], []):
            return False
        started.is_read = True
        where = self._where()
        if name == "aten::bincount":  # which refuses negative numbers
            self._read_whether_negative(HostRead(name, *where, False), tensor, number)
        read = HostRead(name, *where, int(by(tensor)))
        position = len(self._operations)
        self._reads.append(_RecordedRead(read, position, [number], by, (Ref(number),)))
        return True

    def _read_whether_negative(self, read: HostRead, tensor: Tensor, number: int) -> None:
        negative = tensor < 0
        read.value = bool(negative.any())
        started = _Started(_less, (tensor, 0), {}, [tensor], [number], [_storage(tensor)])
        self._note(started, negative, [negative])
        inputs = [self._numbers[id(negative)]]
        position = len(self._operations)
        self._reads.append(_RecordedRead(read, position, inputs, _any, (Ref(inputs[0]),)))

    def _note_unique(self, read: HostRead, values: Tensor) -> None:
        """Note how many different values there were."""
        number = self._number(values)
        if number is None:
            self.give_up()
            return
        read.value = len(values)
        args = (Ref(number), 0)
        position = len(self._operations)
        self._reads.append(_RecordedRead(read, position, [number], _size, args))

    def end(self, output: Any) -> None:
        """Note that the operation has returned."""
        started, self._started = self._started, None
        if self._is_given_up or started is None:
            return
        if started.storages != list(map(_storage, started.tensors)):  # ``set_``, ``resize_``
            self._foreign.update(started.storages)
            self._spoil(started.tensors)
            return
        if started.read is not None:
            started.read.value = output
            return
        outputs = _tensors(output)
        if None in started.numbers or not is_exact(started.function, started.tensors, outputs):
            self._note_foreign(started, outputs)
        else:
            self._note(started, output, outputs)
        if started.unique is not None:
            self._note_unique(started.unique, outputs[0])

    def note_constant(self, tensor: Tensor) -> None:
        """An operation has made a tensor whose values are the same in each step."""
        if not self._is_given_up and is_plain(tensor):
            self._foreign.discard(_storage(tensor))
            self._writes[_storage(tensor)] = []
            self._add(tensor, values=tensor.clone())

    def _note(self, started: _Started, output: Any, outputs: list[Tensor]) -> None:
        position, function = len(self._operations), started.function
        args, kwargs = self._with_refs(started.args), self._with_refs(started.kwargs)
        given = {id(tensor) for tensor in started.tensors}
        numbers: list[int | None] = []
        written = self._written(function, args, kwargs)
        if torch.Tag.inplace_view in function.tags:
            written |= set(started.storages)
        for tensor in outputs:
            if id(tensor) in given:
                self._known[self._numbers[id(tensor)]].layout = _layout(tensor)
                numbers.append(None)
                continue
            if _storage(tensor) not in started.storages:
                self._foreign.discard(_storage(tensor))
                self._writes[_storage(tensor)] = []
            numbers.append(self._add(tensor, made_by=position))
        returns_tensor = isinstance(output, Tensor)
        on_host = is_same_on_host(function, outputs)
        operation = Operation(function, args, kwargs, tuple(numbers), returns_tensor, on_host)
        inputs = [number for number in started.numbers if number is not None]
        self._operations.append(_Recorded(operation, inputs, written))
        for storage in written:
            self._writes[storage].append(position)
        if not has_sign_of_zero(function) or any(self._known[n].is_up_to_sign for n in inputs):
            self._mark_up_to_sign([n for n in numbers if n is not None], written)

    def _mark_up_to_sign(self, numbers: list[int], written: set[int]) -> None:
        """Note that zeros may have another sign in new tensors, and in all with these storages."""
        marked = [self._known[number] for number in numbers]
        if written:
            marked += [known for known in self._known if known.storage in written]
        for known in marked:
            known.is_up_to_sign = known.tensor.is_floating_point()

    def _written(self, function: OpOverload, args: Any, kwargs: Any) -> set[int]:
        """Return the storages of the arguments, given as references, that are written."""
        return {
            self._known[leaf.number].storage
            for leaf in tree_leaves(written_arguments(function, args, kwargs))
            if isinstance(leaf, Ref)
        }

    def _note_foreign(self, started: _Started, outputs: list[Tensor]) -> None:
        self._foreign.update(set(map(_storage, outputs)) - set(started.storages))
        written = started.tensors
        if not may_write_undeclared(started.function):
            found = written_arguments(started.function, started.args, started.kwargs)
            written = _tensors(found)
        self._spoil(written)

    def _spoil(self, tensors: list[Tensor]) -> None:
        self._foreign.update(map(_storage, tensors))

    # tensors

    def _add(
        self,
        tensor: Tensor,
        *,
        made_by: int | None = None,
        leaf: int | None = None,
        values: Tensor | None = None,
        member: tuple[dict[str, Any], str] | None = None,
    ) -> int:
        number = len(self._known)
        storage = _storage(tensor)
        self._known.append(_Known(tensor, storage, _layout(tensor), made_by, leaf, values, member))
        self._numbers[id(tensor)] = number
        self._writes.setdefault(storage, [])
        return number

    def _number(self, tensor: Tensor) -> int | None:
        """Return the number of a known tensor, and None for a foreign one."""
        return self._number_at(tensor, _storage(tensor))

    def _number_at(self, tensor: Tensor, storage: int) -> int | None:
        """Return the same for a tensor with this storage."""
        number = self._numbers.get(id(tensor))
        if number is None or not storage or storage in self._foreign:
            return None
        known = self._known[number]
        is_same = storage == known.storage and _layout(tensor) == known.layout
        return number if is_same else None

    def _with_refs(self, arguments: Any) -> Any:
        """Return the arguments of an operation with numbers in the place of tensors."""
        if isinstance(arguments, Tensor):
            return Ref(self._numbers[id(arguments)])
        if type(arguments) in (tuple, list):
            return type(arguments)(map(self._with_refs, arguments))
        if type(arguments) is dict:
            return {name: self._with_refs(each) for name, each in arguments.items()}
        return arguments

    # the path

    def path(self) -> ReadPath | None:
        """Return the reads of the step; None if their values cannot be known before the step."""
        if self._is_given_up or not self._reads or self._started is not None:
            return None
        slices = [self._slice(recorded) for recorded in self._reads]
        needed: set[int] = set()
        numbers: set[int] = set()
        for recorded, positions in zip(self._reads, slices, strict=True):
            inputs = set(recorded.inputs)
            inputs.update(*[self._operations[position].inputs for position in positions])
            if not any(self._known[number].may_change for number in inputs):
                recorded.read.is_constant = True
                continue
            needed |= positions
            numbers |= inputs
        if len(needed) > MOST_OPERATIONS:
            return None
        written: set[int] = set()
        written.update(*[self._operations[position].written for position in needed])
        roots, constants, members = list[Root](), list[Constant](), list[Member]()
        for number in sorted(numbers):
            known = self._known[number]
            is_written = known.storage in written
            if known.leaf is not None:
                roots.append(Root(number, known.leaf, is_written))
            if known.values is not None:
                constants.append(Constant(number, known.values, is_written))
            if known.member is not None:
                members.append(Member(number, *known.member, is_written))
        slots = self._slots(needed)
        reads = [recorded.read for recorded in self._reads]
        slots = slots if written else without_repeats(slots)
        return ReadPath(reads, roots, slots, constants, members)

    def _slots(self, needed: set[int]) -> list[Operation | Read]:
        slots: list[Operation | Read] = []
        done = 0
        for index, recorded in enumerate(self._reads):
            if recorded.read.is_constant:
                continue
            for position in range(done, recorded.position):
                if position in needed:
                    slots.append(self._operations[position].operation)
            done = recorded.position
            slots.append(Read(index, recorded.function, recorded.args))
        return slots

    def _slice(self, recorded: _RecordedRead) -> set[int]:
        """Return the operations a read needs: what made its tensors, and all earlier writes."""
        needed: set[int] = set()
        seen: set[int] = set()
        numbers = list(recorded.inputs)
        while numbers:
            number = numbers.pop()
            if number in seen:
                continue
            seen.add(number)
            known = self._known[number]
            positions = [p for p in self._writes[known.storage] if p < recorded.position]
            if known.made_by is not None:
                positions.append(known.made_by)
            for position in positions:
                if position not in needed:
                    needed.add(position)
                    operation = self._operations[position]
                    numbers += operation.inputs
                    numbers += [n for n in operation.operation.outputs if n is not None]
        return needed
