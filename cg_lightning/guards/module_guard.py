"""Notices when the tensors that graphs read have moved or were replaced."""

from __future__ import annotations

import enum
import operator
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cg_lightning.guards.values import Addresses, FrozenValues, same_attributes
from cg_lightning.modules.attributes import (
    global_hooks,
    holding_class,
    hooks_of,
    is_same_value,
    scripted_attributes,
    settings,
)


class Change(enum.Enum):
    """What happened to a module since the last look."""

    NOTHING = "nothing"
    MOVED = "parameters or buffers lie at new addresses"
    ATTRIBUTE = "an attribute that a graph has frozen has changed"
    REPLACED = "submodules, parameters, buffers or forward hooks were replaced"
    SETTINGS = "a setting of a submodule has changed"


_training = operator.itemgetter("training")


class ModuleState:
    """Remembers the submodules, parameters, buffers and forward hooks of a module, and the addresses of its tensors.

    It sees a rebound ``.data``, a replaced parameter, buffer or child, a hook that came or went, a move to another device, and
    a change of the plain attributes that it was asked to watch, each at the next look; settings of other submodules at the
    next close look. Tensors changed in place are none of its business: graphs read them as they are.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._watched: dict[tuple[int, str], Mapping[str, Any]] = {}
        self.remember()
        self._settings: dict[tuple[int, str], Any] | None = None
        self._layout: list[Any] = []

    def remember(self) -> None:
        """Takes what is there now for what is to be compared with."""
        self.modules: list[nn.Module] = list(self._root.modules())
        self._flags = [vars(module) for module in self.modules if "training" in vars(module)]
        self._scripted = [module for module in self.modules if "training" not in vars(module)]
        tables = [
            (module._modules, module._parameters, module._buffers, *hooks_of(module))
            for module in self.modules
        ]
        every: list[Any] = [*chain.from_iterable(tables), *global_hooks()]
        self._tables = [table for table in every if isinstance(table, dict) and table]
        self._empty_tables = [table for table in every if not table]
        self._tables_of_scripted = [
            table for table in every if not isinstance(table, dict) and table
        ]
        self._members = self._current_members()
        members = [member for member in self._members if isinstance(member, Tensor)]
        self._lazy = [
            member for member in members if is_lazy(member)
        ]  # they have no address before their first step
        self.tensors = [member for member in members if not is_lazy(member)]
        self._addresses = Addresses(self.tensors)
        self._scripted_values = [scripted_attributes(module) for module in self._scripted]
        self._remember_attributes()

    def _remember_attributes(self) -> None:
        self._owners = list(self._watched.values())
        self._names = [name for _, name in self._watched]
        self._values = self._current_values()
        self._frozen = FrozenValues(self._values)
        known = set(map(id, self.modules))
        self._hidden = [
            ModuleState(module) for module in self._frozen.modules if id(module) not in known
        ]
        self._hidden_flags = [hidden.training_flags() for hidden in self._hidden]

    def _current_values(self) -> list[Any]:
        return [owner.get(name) for owner, name in zip(self._owners, self._names, strict=True)]

    def watch(self, reads: list[tuple[Any, str]]) -> None:
        """Watches attributes of modules and of their classes, and globals, from now on: plain values by value, others by
        identity and by what is in them (:class:`FrozenValues`).
        """
        before = len(self._watched)
        for owner, name in reads:
            self._watched.setdefault(
                (id(owner), name), owner if isinstance(owner, dict) else vars(owner)
            )
            if isinstance(owner, nn.Module) and (cls := holding_class(owner, name)) is not None:
                self._watched.setdefault((id(cls), name), vars(cls))
        if len(self._watched) > before:
            self._remember_attributes()

    def _attributes_hold(self) -> bool:
        scripted = map(scripted_attributes, self._scripted)
        if not all(map(same_attributes, scripted, self._scripted_values)):
            return False
        values = self._current_values()
        if not all(map(operator.is_, values, self._values)) and not all(
            map(is_same_value, self._values, values)
        ):
            return False
        return self._frozen.hold() and all(
            hidden.holds() and hidden.training_flags() == flags
            for hidden, flags in zip(self._hidden, self._hidden_flags, strict=True)
        )

    def _current_members(self) -> list[Any]:
        members = list(chain.from_iterable(map(dict.values, self._tables)))
        return members + [member for table in self._tables_of_scripted for member in table.values()]

    def _addresses_hold(self) -> bool:
        return self._addresses.hold()

    def _members_hold(self) -> bool:
        members = self._current_members()
        same = len(members) == len(self._members) and all(map(operator.is_, members, self._members))
        return (
            same
            and not any(self._empty_tables)
            and (not self._lazy or all(map(is_lazy, self._lazy)))
        )

    def look(self) -> Change:
        """Compares with the last look, and remembers what is there now."""
        if not self._members_hold():
            change = Change.REPLACED
        elif not self._addresses_hold():
            change = Change.MOVED
        elif not self._attributes_hold():
            change = Change.ATTRIBUTE
        else:
            return Change.NOTHING
        if change is Change.REPLACED:
            self._watched.clear()
        self.remember()
        return change

    def holds(self) -> bool:
        """Whether nothing has changed since the last look."""
        return self._members_hold() and self._addresses_hold() and self._attributes_hold()

    def look_closely(self) -> Change:
        """Compares settings, large containers and the layout of tensors with the last close look: at the start of a stage or
        epoch, since it takes longer.
        """
        large_ones_hold = self._frozen.large_ones_hold()
        if not large_ones_hold:
            self._remember_attributes()
        before, self._settings = self._settings, self._current_settings()
        layout, self._layout = self._layout, self._current_layout()
        if before is None:  # the first close look: there are no graphs yet
            return Change.NOTHING
        same = before.keys() == self._settings.keys() and all(
            is_same_value(before[key], value) for key, value in self._settings.items()
        )
        return (
            Change.NOTHING
            if same and large_ones_hold and layout == self._layout
            else Change.SETTINGS
        )

    def _current_settings(self) -> dict[tuple[int, str], Any]:
        return {
            (id(module), name): value
            for module in self._root.modules()
            for name, value in settings(module).items()
        }

    def _current_layout(self) -> list[Any]:
        return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in self.tensors]

    def training_flags(self) -> tuple[bool, ...]:
        """The ``training`` flags of all submodules."""
        return (*map(_training, self._flags), *[module.training for module in self._scripted])

    def storage_addresses(self) -> set[int]:
        """Where the storages of parameters and buffers begin."""
        return {tensor.untyped_storage().data_ptr() for tensor in self.tensors}
