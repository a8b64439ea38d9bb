"""Where each part of an output comes from after a replay."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cg_lightning.capture.host_copies import (
    CopyPlaces,
    HostCopy,
    leaves_on_device,
    places_of_copies,
)
from cg_lightning.capture.static_inputs import overlaps_itself, without_repeats
from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.equality import PACKED
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import (
    containers_in,
    flatten,
    has_repeats,
    leaf_paths,
    rebuild,
    rebuild_with_repeats,
    with_leaves_for,
)
from cg_lightning.guards.values import addresses_of


class _Source(enum.Enum):
    INPUT = "the input tensor itself, or a value of the input that is passed on"
    CONTAINER = "a container of the input itself"
    HELD = "a tensor or container that existed before, such as a parameter, or a plain value"
    VIEW_OF_HELD = "a view of a tensor that existed before"
    COMPUTED = "a tensor that the graph computes"
    VIEW_OF_INPUT = "a view of an input tensor"
    VIEW_OF_COMPUTED = "a view of a tensor that the graph computes, with which it shares memory"


_VIEWS = {_Source.VIEW_OF_HELD, _Source.VIEW_OF_INPUT, _Source.VIEW_OF_COMPUTED}


class _Given:
    """A leaf that replaces a container of the input."""

    def __init__(self, number: int) -> None:
        self.number = number


class _HeldContainer:
    """A leaf that replaces a container that existed before, such as a list in an attribute."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _View(NamedTuple):
    """A view of the tensor with this number; the offset counts from that one's first element."""

    number: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensors: list[Any]) -> Tensor:
        base: Tensor = tensors[self.number]
        return base.as_strided(self.shape, self.strides, base.storage_offset() + self.offset)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return where in its storage a tensor begins and ends, in elements."""
    reach: int = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = int(tensor.storage_offset())
    return begin, begin + reach + 1


def _is_lazy(tensor: Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


class _SourceFinder:
    """Finds where the leaves of an output come from. Its arguments are those of the plan."""

    def __init__(self, output: Any, inputs: list[Any], held: Iterable[Tensor]) -> None:
        self._output = output
        self._inputs = inputs
        self._held = {id(tensor): tensor for tensor in held}
        self._held_storages = addresses_of(self._held.values())
        self._positions = {id(leaf): i for i, leaf in enumerate(inputs) if not is_plain_value(leaf)}
        self._given = {
            _storage(leaf): index
            for index, leaf in enumerate(inputs)
            if isinstance(leaf, Tensor) and leaf.numel()
        }
        self.computed: list[Tensor] = []
        """The tensors that the graph computes, without duplicates."""
        self._sources: dict[int, tuple[_Source, Any]] = {}
        """The source of each leaf, by its id: a tensor that is there twice is computed once."""

    def source_of(self, index: int, leaf: Any, attributes: list[str]) -> tuple[_Source, Any]:
        """Return where one leaf comes from.

        Args:
            index: Its position.
            leaf: The leaf.
            attributes: What the step has set on it.
        """
        if attributes:  # those of a copy on the host are not those of what it copies
            return self._find(index, leaf, attributes)
        if id(leaf) not in self._sources:  # a tensor that is in the output twice is one object
            self._sources[id(leaf)] = self._find(index, leaf, attributes)
        return self._sources[id(leaf)]

    def _find(self, index: int, leaf: Any, attributes: list[str]) -> tuple[_Source, Any]:
        if isinstance(leaf, _Given):
            return _Source.CONTAINER, leaf.number
        if isinstance(leaf, _HeldContainer):
            return _Source.HELD, leaf.value
        if id(leaf) in self._positions:
            return _Source.INPUT, self._positions[id(leaf)]
        if is_plain_value(leaf):
            return _Source.HELD, leaf
        if not isinstance(leaf, Tensor):
            raise self._error(
                index, f" is a {type(leaf).__qualname__}, which a replay cannot make."
            )
        if leaf.is_nested or leaf.layout is not torch.strided:
            raise self._unmakeable(index, "nested" if leaf.is_nested else str(leaf.layout))
        if _storage(leaf) in self._held_storages:
            if id(leaf) in self._held or (type(leaf) is Tensor and leaf.grad_fn):
                return _Source.HELD, leaf
            if type(leaf) is not Tensor:
                what = f" is a new {type(leaf).__qualname__}, which a replay cannot make."
                raise self._error(index, what)
            if not attributes:
                return _Source.VIEW_OF_HELD, leaf
        if attributes:
            raise self._error(index, f".{attributes[0]} is set, which a copy has not.")
        if leaf.numel() and _storage(leaf) in self._given:
            number = self._given[_storage(leaf)]
            given = self._inputs[number]
            _check_same_kind(leaf, given, self._output, index)
            offset = leaf.storage_offset() - given.storage_offset()
            return _Source.VIEW_OF_INPUT, _View(number, tuple(leaf.shape), leaf.stride(), offset)
        if leaf.requires_grad:  # the step has asked for it: a copy is another tensor
            raise self._error(index, " was made to require gradients.")
        if leaf.is_quantized or leaf.dtype in PACKED:
            kind = "quantized" if leaf.is_quantized else str(leaf.dtype)
            raise self._unmakeable(index, kind)
        self.computed.append(leaf)
        return _Source.COMPUTED, len(self.computed) - 1

    def _error(self, index: int, what: str) -> CaptureError:
        return CaptureError(f"{leaf_paths(self._output, 'output')[index]}{what}")

    def _unmakeable(self, index: int, kind: str) -> CaptureError:
        return self._error(index, f" is a {kind} tensor, which a replay cannot make.")


@dataclasses.dataclass(frozen=True)
class OutputPlan:
    """Where each leaf of a captured output comes from. It does not keep computed tensors alive."""

    template: Any
    is_nested: bool
    sources: list[tuple[_Source, Any]]
    gives_containers: bool = False
    """Whether containers of the batch itself are in the output."""
    host_copies: Sequence[CopyPlaces] = ()
    """The leaves that are copies on the host, or numbers."""
    has_repeats: bool = False
    """Whether a list or dictionary is in the output twice."""

    @classmethod
    def make(
        cls,
        output: Any,
        inputs: list[Any],
        held: Iterable[Tensor],
        containers: Sequence[Any] = (),
        held_containers: Sequence[Any] = (),
        detaches: bool = False,
    ) -> tuple[OutputPlan, list[Tensor]]:
        """Return the plan and the computed tensors, without duplicates.

        Args:
            output: The output of the captured call.
            inputs: The leaves of the arguments of the captured call.
            held: Tensors that existed before the call.
            containers: The containers of the inputs, as the call was given them.
            held_containers: Containers that existed before the call.
            detaches: Whether tensors leave their autograd graph.

        Raises:
            CaptureError: A leaf is no dense tensor and no plain value, so a replay cannot make it;
                or it shares memory with another one under another dtype.
        """
        output = _with_given_containers(output, containers, held_containers)
        leaves, structure = flatten(output)
        host_copies = places_of_copies(leaves)
        attributes = list(map(_attributes, leaves))
        leaves = leaves_on_device(leaves)
        if detaches:
            leaves = _detached(leaves)
        finder = _SourceFinder(output, inputs, held)
        sources = [
            finder.source_of(i, *each)
            for i, each in enumerate(zip(leaves, attributes, strict=True))
        ]
        tensors = _join_shared(sources, finder.computed, leaves, output)
        return cls(
            # ``torch.Size`` takes numbers only
            rebuild_with_repeats(output, iter([0] * len(leaves))),
            structure is not None,
            sources,
            any(source is _Source.CONTAINER for source, _ in sources),
            host_copies,
            has_repeats(output),
        ), tensors

    @property
    def is_one_tensor(self) -> bool:
        """Whether the output is one computed tensor."""
        return self._is_one and self.sources[0][0] is _Source.COMPUTED

    @property
    def is_one_value(self) -> bool:
        """Whether the output is one leaf that no replay changes, such as None or a parameter."""
        return self._is_one and self.sources[0][0] is _Source.HELD

    @property
    def _is_one(self) -> bool:
        return not (self.is_nested or self.host_copies)

    @property
    def value(self) -> Any:
        """The output, if :attr:`is_one_value`."""
        return self.sources[0][1]

    @property
    def structure(self) -> Any:
        """The structure of the output."""
        return flatten(self.template)[1]

    @functools.cached_property
    def is_computed_in_order(self) -> bool:
        """Whether the leaves are the computed tensors, as of a loss and its gradients."""
        in_order = [(_Source.COMPUTED, index) for index in range(len(self.sources))]
        return self.sources == in_order and not (self.host_copies or self.has_repeats)

    @functools.cached_property
    def _views(self) -> dict[int, tuple[_Source, Any]]:
        """The sources of views, by the id of their value: one view may be in the output twice."""
        return {id(value): (source, value) for source, value in self.sources if source in _VIEWS}

    def build(self, inputs: list[Any], computed: list[Tensor], tree: Any) -> Any:
        """Return the output of one replay.

        Args:
            inputs: The leaves of the current batch.
            computed: The tensors that the graph has computed.
            tree: The current batch.
        """
        if self.is_computed_in_order:
            return rebuild(self.template, iter(computed)) if self.is_nested else computed[0]
        given = list(containers_in(tree)) if self.gives_containers else []
        views = {
            key: _another(value)
            if source is _Source.VIEW_OF_HELD
            else value.of(inputs if source is _Source.VIEW_OF_INPUT else computed)
            for key, (source, value) in self._views.items()
        }
        leaves = [
            value
            if source is _Source.HELD
            else inputs[value]
            if source is _Source.INPUT
            else computed[value]
            if source is _Source.COMPUTED
            else given[value]
            if source is _Source.CONTAINER
            else views[id(value)]
            for source, value in self.sources
        ]
        for copy in self.host_copies:
            copy.fill(leaves)
        if self.has_repeats:
            return rebuild_with_repeats(self.template, iter(leaves))
        return rebuild(self.template, iter(leaves)) if self.is_nested else leaves[0]


def _another(view: Tensor) -> Tensor:
    """Return another view of the same memory: the user may change the shape of one in place."""
    with torch.no_grad():
        return view.view_as(view)


def _attributes(leaf: Any) -> list[str]:
    """Return the names of the attributes that a step has given to a tensor."""
    if not isinstance(leaf, Tensor):
        return []
    own = {"source"} if isinstance(leaf, HostCopy) else set()
    # private: marks of dimensions, for the next compilation
    return [name for name in vars(leaf) if name not in own and "_dynamo_" not in name]


def _with_given_containers(output: Any, containers: Sequence[Any], held: Sequence[Any]) -> Any:
    """Return the output with leaves for containers that the call was given or that were there."""
    known: dict[int, Any] = {id(container): _HeldContainer(container) for container in held}
    known |= {id(container): _Given(index) for index, container in enumerate(containers)}
    found = {
        id(container): known[id(container)]
        for container in containers_in(output)
        if id(container) in known
    }
    return with_leaves_for(output, found) if found else output


def _detached(leaves: list[Any]) -> list[Any]:
    """Return leaves without the autograd graph: the same tensor is the same again."""
    detached = {
        id(leaf): leaf.detach()
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None
    }
    return [detached.get(id(leaf), leaf) for leaf in leaves]


def _check_same_kind(one: Tensor, other: Tensor, output: Any, index: int) -> None:
    if one.dtype is other.dtype and not (_is_lazy(one) or _is_lazy(other)):
        return
    how = "under another dtype"
    if one.dtype is other.dtype:
        how = "as a lazy conjugate or negative; call resolve_conj() or resolve_neg()"
    path = leaf_paths(output, "output")[index]
    raise CaptureError(f"{path} shares memory with another tensor {how}.")


def _join_shared(
    sources: list[tuple[_Source, Any]], tensors: list[Tensor], leaves: list[Any], output: Any
) -> list[Tensor]:
    """Return the tensors, with one that spans them in place of those that share memory.

    So copies share memory too.
    """
    groups: dict[tuple[bool, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        key = (True, _storage(tensor)) if tensor.numel() else (False, index)
        groups.setdefault(key, []).append(index)
    if len(groups) == len(tensors):
        return tensors
    joined: list[Tensor] = []
    numbers: dict[int, int] = {}
    firsts: dict[int, int] = {}
    views: dict[int, _View] = {}
    for group in groups.values():
        base = tensors[group[0]]
        numbers.update(dict.fromkeys(group, len(joined)))
        if len(group) > 1:
            spans = [_span(tensors[index]) for index in group]
            first, last = min(begin for begin, _ in spans), max(end for _, end in spans)
            base = base.as_strided((last - first,), (1,), first)
            firsts[len(joined)] = first
        joined.append(base)
    for place, (source, index) in enumerate(sources):
        if source is not _Source.COMPUTED:
            continue
        number, leaf = numbers[index], leaves[place]
        sources[place] = (source, number)
        if number in firsts:
            _check_same_kind(leaf, joined[number], output, place)
            offset = leaf.storage_offset() - firsts[number]
            view = _View(number, tuple(leaf.shape), leaf.stride(), offset)
            # a tensor that is in the output twice is one object
            sources[place] = (_Source.VIEW_OF_COMPUTED, views.setdefault(id(leaf), view))
    return joined


def copy_with_strides(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides.

    It has them also where ``clone`` would make other ones: of a slice, for example.
    """
    stored = without_repeats(tensor)
    if overlaps_itself(stored):
        begin, end = _span(tensor)
        base = tensor.as_strided((end - begin,), (1,)).clone()
        return base.as_strided(tensor.shape, tensor.stride())
    copy = torch.empty_strided(
        stored.shape, stored.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(stored)
    return copy.expand(tensor.shape) if stored is not tensor else copy


def copy_of_own_kind(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides that is an inference tensor if the original is one.

    In inference mode, ``torch.func.jacrev`` for one makes tensors that are none.
    """
    with torch.inference_mode(tensor.is_inference()):
        return copy_with_strides(tensor)


class GroupedCopies:
    """Copies many tensors that ``clone`` copies with their strides.

    One grouped clone for each dtype takes less time on the host than a ``clone`` of each tensor.

    Args:
        tensors: The tensors.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._number = len(tensors)
        self._groups: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}
        for index, tensor in enumerate(tensors):
            places, group = self._groups.setdefault(tensor.dtype, ([], []))
            places.append(index)
            group.append(tensor)

    def make(self) -> list[Tensor]:
        """Return copies of what the tensors have now, in their order."""
        copies: list[Any] = [None] * self._number
        for places, group in self._groups.values():
            for index, copy in zip(places, _clones(group), strict=True):
                copies[index] = copy
        return copies

    def write_to(self, copies: list[Tensor]) -> None:
        """Write what the tensors have now to earlier copies, given in their order."""
        for places, group in self._groups.values():
            chosen = copies if len(places) == len(copies) else [copies[index] for index in places]
            torch._foreach_copy_(chosen, group)


def _clones_of_older_torch(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


_clones: Callable[[list[Tensor]], Sequence[Tensor]] = getattr(
    torch, "_foreach_clone", _clones_of_older_torch
)


def is_cloned_with_strides(tensor: Tensor) -> bool:
    """Whether ``clone`` keeps the strides."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()
