"""The key of a graph: everything that must be equal for the graph to be replayable."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from cg_lightning.core.equality import PACKED
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.kernel_flags import kernel_flags
from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.core.tree import flatten, leaf_paths


@dataclasses.dataclass(frozen=True, eq=False)
class BatchDescriptor:
    """The key of a captured graph: two steps with equal descriptors may run from the same graph.

    :meth:`from_batch` makes it from a real batch. ``BatchDescriptor(batch_size=8)``, made by hand,
    is a key as well. It stores no tensor. It does *not* depend on the values of tensors or on the
    addresses of parameters. The name and ``batch_size`` follow vLLM (``vllm/forward_context.py``).

    Example::

        >>> import torch
        >>> from cg_lightning import BatchDescriptor
        >>> batch = {"image": torch.zeros(8, 1, 28, 28), "scale": 2.0}
        >>> key = BatchDescriptor.from_batch(batch, stage="validate")
        >>> key.batch_size, key.shapes()
        (8, '8x1x28x28')
        >>> key == BatchDescriptor.from_batch({**batch, "scale": 3.0}, stage="validate")
        False
    """

    batch_size: int | None = None
    """First dimension of the first tensor of the batch, if that tensor has dimensions."""
    structure: Hashable = None
    """Types and keys of the containers."""
    leaves: tuple[Hashable, ...] = ()
    """Tensors: shape, dtype, strides, device, requires_grad, alignment, class, names of attributes.
    Others: type and value."""
    stage: str | None = None
    """``validate``, ``test`` or ``predict``."""
    dataloader_idx: int = 0
    """Index of the dataloader of the batch."""
    training: tuple[bool | bytes, ...] = ()
    """The ``training`` flags of the wrapped modules, and ``requires_grad`` of their tensors."""
    flags: tuple[Hashable, ...] = ()
    """The switches of :func:`~cg_lightning.core.kernel_flags.kernel_flags`."""
    call: int = 0
    """The number of the call of one wrapper within one step, from 0."""

    def __post_init__(self) -> None:
        key = tuple([getattr(self, name) for name in _FIELDS])
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "_hash", hash(key))  # each step uses it several times

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BatchDescriptor):
            return NotImplemented
        return self is other or self._key == other._key  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), self.fields)

    @property
    def fields(self) -> tuple[Any, ...]:
        """Return the values of all fields, in order."""
        return self._key  # type: ignore[attr-defined, no-any-return]

    @property
    def family(self) -> tuple[Any, ...]:
        """The fields without plain values: equal for all keys whose tensors are described alike."""
        described = tuple([leaf if _is_in_family(leaf) else None for leaf in self.leaves])
        return (*self._key[:2], described, *self._key[3:])  # type: ignore[attr-defined]

    @classmethod
    def from_batch(
        cls,
        batch: Any,
        *,
        stage: str | None = None,
        dataloader_idx: int = 0,
        modules: Iterable[nn.Module] = (),
    ) -> BatchDescriptor:
        """Return the descriptor of a batch of containers, tensors and plain values.

        Args:
            batch: Tuples, lists, named tuples, mappings (such as a Hugging Face ``BatchEncoding``)
                and dataclasses. Leaves are strided tensors of any shape, None, bool, int, float,
                str, bytes, enums, dtypes and devices.
            stage: The stage of the step.
            dataloader_idx: Index of the dataloader of the batch.
            modules: The modules whose ``training`` flags are part of the key.

        Raises:
            UnkeyableBatchError: A leaf cannot be part of a key, or two leaves share storage. The
                message names the path of the leaf.
        """
        training = tuple([module.training for module in modules])
        fields, _ = describe_fields(
            batch, stage=stage, dataloader_idx=dataloader_idx, training=training
        )
        return cls(*fields)

    def shapes(self) -> str:
        """Return the shapes of the tensors for printing: ``8x3x32x32, 8``."""
        shapes = [leaf[1] for leaf in self.leaves if is_tensor_key(leaf)]
        if not self.leaves and self.batch_size is not None:
            return f"batch_size={self.batch_size}"
        return ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes) or "-"

    def difference(self, before: BatchDescriptor, paths: Sequence[str]) -> Changed:
        """Return the first part of the batch that differs from another key; empty if none does.

        Args:
            before: Another key.
            paths: The paths of the leaves of a batch with this key.
        """
        if self.structure != before.structure or len(self.leaves) != len(before.leaves):
            return Changed("other containers, keys or lengths in the batch")
        for path, now, was in zip(paths, self.leaves, before.leaves, strict=True):
            if now != was:
                return _difference(path, now, was)
        return NO_CHANGE

    def plain_values(self) -> tuple[str, ...]:
        """Return the plain values of the batch for printing, without those only passed on."""
        return tuple(
            _printed(*leaf)
            for leaf in self.leaves
            if isinstance(leaf, tuple) and isinstance(leaf[0], type) and not is_tensor_key(leaf)
        )


def _difference(path: str, now: Hashable, before: Hashable) -> Changed:
    if is_tensor_key(now) and is_tensor_key(before):
        for name, value, was in zip(_OF_TENSOR, now[1:], before[1:], strict=True):
            if value != was:
                where = f"{path}.{name}"
                return Changed(where, f"{where}: now {_text(value)}, before {_text(was)}")
    return Changed(path, f"{path}: now {_described(now)}, before {_described(before)}")


_OF_TENSOR = ("shape", "dtype", "stride", "device", "requires_grad", "alignment", "class", "names")


def _text(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _described(leaf: Hashable) -> str:
    if is_tensor_key(leaf):
        return "a tensor"
    if isinstance(leaf, tuple) and isinstance(leaf[0], type):
        return _printed(*leaf)
    return "another value"


def _printed(kind: type, value: Any) -> str:
    if kind is float:
        return repr(float.fromhex(value))
    text = f"{kind.__name__}.{value}" if issubclass(kind, enum.Enum) else repr(value)
    return text if len(text) <= _MOST_PRINTED else f"{text[: _MOST_PRINTED - 3]}..."


_MOST_PRINTED = 40  # characters of one value
_FIELDS = tuple(field.name for field in dataclasses.fields(BatchDescriptor))
ALIGNMENT = 16
"""At addresses that are multiples of it, kernels load more at once and may sum in another order."""
KINDS_OF_TENSOR = {Tensor, nn.Parameter}
"""The classes of tensors that can be part of a key."""


class Fixed:
    """A value of a batch that a step depends on without reading it.

    It is never left out of a key, and keys that differ in it are of different families.

    Args:
        value: The value, which must be hashable.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _fixed_key(value: Fixed) -> Hashable:
    return (Fixed, value.value)


def _float_key(value: float) -> Hashable:
    return (type(value), value.hex())  # 0.0 and -0.0 differ, and NaN equals itself


def _value_key(value: Any) -> Hashable:
    return (type(value), value)


_VALUE_KEYS: dict[type, Callable[[Any], Hashable]] = {
    float: _float_key,
    Fixed: _fixed_key,
    **dict.fromkeys(
        (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format),
        _value_key,
    ),
}


def is_tensor_key(leaf: Hashable) -> TypeGuard[tuple[Any, ...]]:
    """Return True if an item of :attr:`BatchDescriptor.leaves` describes a tensor."""
    return isinstance(leaf, tuple) and leaf[0] is Tensor


def _is_in_family(leaf: Hashable) -> bool:
    return isinstance(leaf, tuple) and leaf[0] in (Tensor, Fixed)


_PASSED_ON = "passed on"


def passed_on(leaf: Hashable) -> Hashable:
    """Return the leaf of a key that replaces a plain value which the step only passes on.

    Args:
        leaf: The item of :attr:`BatchDescriptor.leaves` that describes the value.
    """
    assert isinstance(leaf, tuple)
    return (_PASSED_ON, leaf[0])


def is_passed_on(leaf: Hashable) -> bool:
    """Return True for a leaf that :func:`passed_on` has made."""
    return isinstance(leaf, tuple) and leaf[0] is _PASSED_ON


def is_text(leaf: Hashable) -> bool:
    """Return True if an item of :attr:`BatchDescriptor.leaves` describes a str or bytes."""
    return isinstance(leaf, tuple) and leaf[0] in (str, bytes)


def is_plain_value(leaf: Any) -> bool:
    """Return True if ``leaf`` is not a tensor and can be part of a key."""
    cls = type(leaf)  # ``isinstance`` asks the leaf as well, and a dead proxy raises
    try:
        return cls in _VALUE_KEYS or issubclass(cls, enum.Enum)
    except TypeError:  # a class without a hash
        return False


def _tensor_key(tensor: Tensor, index: int, tree: Any) -> Hashable:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        raise UnkeyableBatchError(
            leaf_paths(tree)[index],
            "is a tensor without plain strides (sparse, nested or quantized)",
        )
    if tensor.is_neg() or tensor.is_conj():
        raise UnkeyableBatchError(leaf_paths(tree)[index], "is a lazily negated or conjugated view")
    if tensor.dtype in PACKED:
        raise UnkeyableBatchError(
            leaf_paths(tree)[index], f"is of {tensor.dtype}, which PyTorch does not copy"
        )
    return (
        Tensor,
        tensor.shape,
        tensor.dtype,
        tensor.stride(),
        tensor.device,
        tensor.requires_grad,
        tensor.data_ptr() & (ALIGNMENT - 1),
        type(tensor),
        names_on(tensor) if tensor.__dict__ else (),
    )


def names_on(tensor: Tensor) -> tuple[str, ...]:
    """Return the names of a tensor's attributes, without the marks of the compiler."""
    return tuple(sorted(name for name in vars(tensor) if not name.startswith("_dynamo_")))


def _value_leaf_key(leaf: Any, index: int, tree: Any) -> Hashable:
    kind = type(leaf)
    make = _VALUE_KEYS.get(kind) if is_plain_value(leaf) else None
    if make is not None:
        return make(leaf)
    if isinstance(leaf, enum.Enum):
        return (kind, leaf.name)
    what = "a tensor subclass" if isinstance(leaf, Tensor) else "a value"
    raise UnkeyableBatchError(
        leaf_paths(tree)[index],
        f"is {what} of type {kind.__module__}.{kind.__qualname__}, which cannot be part of a key",
    )


def _may_share_storage(tensors: list[Tensor]) -> bool:
    storages = map(Tensor.untyped_storage, tensors)
    return len(set(map(torch.UntypedStorage.data_ptr, storages))) < len(tensors)


def _find_shared_storage(leaves: list[Any], tree: Any, repeats: bool) -> dict[int, int]:
    """Return the leaves that are the same object as an earlier leaf, with the index of that leaf.

    Raise :class:`UnkeyableBatchError` for all other leaves that share storage, and for repeated
    leaves unless ``repeats`` is True.
    """
    owners: dict[int, int] = {}
    repeated: dict[int, int] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and (address := leaf.untyped_storage().data_ptr()):
            first = owners.setdefault(address, index)
            if first == index:
                continue
            if not repeats or leaf is not leaves[first]:
                paths = leaf_paths(tree)
                raise UnkeyableBatchError(paths[index], f"shares storage with {paths[first]}")
            repeated[index] = first
    return repeated


NUM_OF_BATCH = 5
"""Number of the first fields of a descriptor, which :func:`describe_batch` returns."""


def describe_batch(
    batch: Any,
    stage: str | None = None,
    dataloader_idx: int = 0,
    *,
    repeats: bool = False,
    objects: bool = False,
) -> tuple[tuple[Any, ...], list[Any]]:
    """Return the fields of a descriptor that need only the batch, and its leaves, flattened once.

    If no step has had these fields, none has had its descriptor.

    Args:
        batch: As in :meth:`BatchDescriptor.from_batch`.
        stage: The stage.
        dataloader_idx: Index of the dataloader.
        repeats: True if one tensor may occur several times, as in ``attention(x, x, x)``. Its
            positions are then part of the key.
        objects: True if objects may be leaves. Then only their types are part of the key.

    Raises:
        UnkeyableBatchError: As in :meth:`BatchDescriptor.from_batch`.
    """
    leaves, structure = flatten(batch)
    keys: list[Hashable] = []
    tensors: list[Tensor] = []
    for index, leaf in enumerate(leaves):
        if type(leaf) in KINDS_OF_TENSOR:
            tensors.append(leaf)
            keys.append(_tensor_key(leaf, index, batch))
        elif objects and not (isinstance(leaf, Tensor) or is_plain_value(leaf)):
            keys.append((_PASSED_ON, type(leaf)))
        else:
            keys.append(_value_leaf_key(leaf, index, batch))
    if len(tensors) > 1 and _may_share_storage(tensors):
        for index, first in _find_shared_storage(leaves, batch, repeats).items():
            keys[index] = ("repeats leaf", first)
    shape = tensors[0].shape if tensors else ()
    batch_size = shape[0] if shape else None
    return (batch_size, structure, tuple(keys), stage, dataloader_idx), leaves


def describe_fields(
    batch: Any,
    *,
    stage: str | None = None,
    dataloader_idx: int = 0,
    training: tuple[bool | bytes, ...] = (),
    call: int = 0,
    repeats: bool = False,
    objects: bool = False,
) -> tuple[tuple[Any, ...], list[Any]]:
    """Return the fields of the descriptor of a batch together with its leaves.

    A lookup of the fields in a dictionary is faster than a lookup of a new descriptor.

    Args:
        batch: As in :meth:`BatchDescriptor.from_batch`.
        stage: The stage.
        dataloader_idx: Index of the dataloader.
        training: The ``training`` flags, and ``requires_grad`` of tensors.
        call: The number of the call within one step.
        repeats: As in :func:`describe_batch`.
        objects: As in :func:`describe_batch`.

    Raises:
        UnkeyableBatchError: As in :meth:`BatchDescriptor.from_batch`.
    """
    fields, leaves = describe_batch(batch, stage, dataloader_idx, repeats=repeats, objects=objects)
    return complete_fields(fields, training, call), leaves


def complete_fields(
    of_batch: tuple[Any, ...], training: tuple[bool | bytes, ...], call: int = 0
) -> tuple[Any, ...]:
    """Return all fields of a descriptor.

    Args:
        of_batch: Those that :func:`describe_batch` has returned.
        training: As in :func:`describe_fields`.
        call: As in :func:`describe_fields`.
    """
    return (*of_batch, training, kernel_flags(), call)


_WITHOUT_KEY = "a batch without a key"


def describe_without_batch(
    stage: str, dataloader_idx: int, training: tuple[bool | bytes, ...]
) -> tuple[Any, ...]:
    """Return the fields of the key of all steps whose batches cannot be part of one.

    These steps are never one graph. Their submodules may have graphs, by keys of their own.
    """
    return (None, _WITHOUT_KEY, (), stage, dataloader_idx, training, kernel_flags(), 0)


# private: None unless ``torch.vmap`` or another transform runs, whose tensors have no own memory
_innermost_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def is_inside_transform() -> bool:
    """Return True inside a transform of ``torch.func``."""
    return _innermost_transform() is not None


_number_of_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def is_under_users_mode() -> bool:
    """Return True if a dispatch mode sees each operation. A replay would show it none."""
    if not _number_of_dispatch_modes():
        return False
    modes = [torch._C._get_dispatch_stack_at(i) for i in range(_number_of_dispatch_modes())]
    return any(not type(mode).__module__.startswith("cg_lightning.") for mode in modes)


def describe_call(
    training: tuple[bool | bytes, ...],
    number: int,
    step: BatchDescriptor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], list[Any]]:
    """Return the fields of the descriptor of a call, and the leaves of its arguments.

    A call has its own key, because arguments inside a step may differ although batches are equal.

    Args:
        training: The ``training`` flags of the submodule and of all modules in it.
        number: Number of earlier calls of the submodule in this step.
        step: The key of the step.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        UnkeyableBatchError: An argument cannot be part of a key.
    """
    if is_inside_transform():
        raise UnkeyableBatchError("the call", "is made inside a transform of torch.func")
    if is_under_users_mode():
        raise UnkeyableBatchError("the call", "is made under a dispatch mode")
    return describe_fields(
        (args, kwargs),
        stage=step.stage,
        dataloader_idx=step.dataloader_idx,
        training=training,
        call=number,
        repeats=True,
    )
