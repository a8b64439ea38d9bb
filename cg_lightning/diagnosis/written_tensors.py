"""Tensors, other than buffers, that a step changes in place: a running total, say. Verification puts them back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cg_lightning.guards.values import FrozenValues, addresses_of
from cg_lightning.modules.attributes import names_of_frameworks
from cg_lightning.modules.kinds import is_metric


class WrittenTensors:
    """What was seen to be written to. Attributes are looked up anew each time: a total may be another tensor by then."""

    def __init__(self) -> None:
        self._attributes: dict[tuple[int, str], nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}

    def add_attribute(self, module: nn.Module, name: str) -> None:
        """Adds all tensors that an attribute holds, however deep."""
        self._attributes[id(module), name] = module

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Adds these very tensors."""
        self._tensors.update({id(tensor): tensor for tensor in tensors})

    def update(self, other: WrittenTensors) -> None:
        """Adds what another has."""
        self._attributes.update(other._attributes)
        self._tensors.update(other._tensors)

    def now(self) -> list[Tensor]:
        """Gives them as they are now."""
        held = [vars(module).get(name) for (_, name), module in self._attributes.items()]
        return [*FrozenValues(held).tensors, *self._tensors.values()]


class LastingTensors:
    """The tensors that live longer than a step of a module: its parameters, and what attributes hold.

    Args:
        root: The module.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._attributes: list[tuple[nn.Module, str, FrozenValues]] = []
        for module in root.modules():
            for name, value in vars(module).items():
                if name not in names_of_frameworks(module) and not is_metric(module):
                    self._attributes.append((module, name, FrozenValues([value])))
        self._hidden = [module for _, _, values in self._attributes for module in values.modules]

    def of_attributes(self, modules: Iterable[nn.Module]) -> list[Tensor]:
        """Gives those that attributes of some submodules hold."""
        ids = set(map(id, modules))
        return [
            tensor
            for module, _, values in self._attributes
            if id(module) in ids
            for tensor in values.tensors
        ]

    def written(self, outside: dict[int, Tensor]) -> WrittenTensors:
        """Says which were written to.

        Args:
            outside: Tensors that were written to and not made in the step, by the address of their storage.
        """
        found = WrittenTensors()
        # not every operation says that it writes to buffers; those of submodules are always put back
        found.add(
            buffer for module in self._hidden for buffer in module.buffers() if not is_lazy(buffer)
        )
        modules = [self._root, *self._hidden]
        parameters = [
            parameter
            for module in modules
            for parameter in module.parameters()
            if not is_lazy(parameter)
        ]
        found.add(
            parameter for parameter in parameters if addresses_of([parameter]) & outside.keys()
        )
        known = addresses_of(
            [*parameters, *[b for module in modules for b in module.buffers() if not is_lazy(b)]]
        )
        for module, name, values in self._attributes:
            addresses = addresses_of(values.tensors)
            known |= addresses
            if addresses & outside.keys():
                found.add_attribute(module, name)
        found.add(tensor for address, tensor in outside.items() if address not in known)
        return found
