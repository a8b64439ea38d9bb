"""The guard of a module itself: its members, their addresses and layouts, hooks and settings."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress, count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cg_lightning.core.equality import parts_of
from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.guards.layer_settings import LayerSettings, path_of
from cg_lightning.guards.library_code import LibraryCode, version_of
from cg_lightning.guards.sources import MISSING, describe_change
from cg_lightning.guards.written_settings import WrittenSettings
from cg_lightning.modules.attributes import (
    backward_hooks_of,
    global_hooks,
    hooks_of,
    is_same_value,
    same_attributes,
    scripted_attributes,
    stored_settings,
)
from cg_lightning.modules.kinds import is_lightning_module, is_metric

# private, and in CUDA builds only: compares 300 addresses in about 20 us
_native_compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
# private, the guards of Dynamo: compares the layouts of 200 tensors in 17 us, Python in 90 us
_NativeLayouts = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return how a tensor lies in its memory."""
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())


def layout_and_gradient_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return how a tensor lies in its memory, and whether it requires gradients."""
    return (*layout_of(tensor), tensor.requires_grad)


class Placement:
    """The addresses and layouts of some tensors when this is made.

    ``weight.data = weight.data.t()`` and ``weight.t_()`` keep the tensor and its address.

    Args:
        tensors: The tensors, all of them strided.
        layout: Returns the properties of a tensor that are compared, besides its address.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        layout: Callable[[Tensor], tuple[Any, ...]] = layout_of,
    ) -> None:
        self._tensors = tensors
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._indices = list(range(len(tensors)))
        self._layout_of = layout
        self._layouts = list(map(layout, tensors))
        # the guards of Dynamo refuse a tensor that comes twice
        self._different = list({id(tensor): tensor for tensor in tensors}.values())
        self._native_layouts: Any = None
        self.had_other_gradients = True
        """Whether a check has found that ``requires_grad`` of a tensor may have changed."""

    def check(self) -> bool:
        """Return True if all addresses and layouts are unchanged."""
        if not self._tensors:
            return True
        if _native_compare is not None:
            if not _native_compare(self._tensors, self._addresses, self._indices):
                return False
        elif list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            return False
        native = self._native_layouts
        if native is not None:
            has_gradients = torch.is_grad_enabled()
            torch._C._set_grad_enabled(True)  # or else it takes no notice of ``requires_grad``
            try:
                if native.check(*self._different):
                    return True
            finally:
                torch._C._set_grad_enabled(has_gradients)
        self.had_other_gradients = True
        return self._layouts_hold()

    def moved(self) -> list[int]:
        """Return the indices of the tensors whose address has changed."""
        pairs = zip(self._tensors, self._addresses, strict=True)
        return [i for i, (tensor, address) in enumerate(pairs) if tensor.data_ptr() != address]

    def laid_out_otherwise(self) -> list[int]:
        """Return the indices of the tensors whose layout has changed."""
        pairs = zip(self._tensors, self._layouts, strict=True)
        return [i for i, (tensor, layout) in enumerate(pairs) if self._layout_of(tensor) != layout]

    def _layouts_hold(self) -> bool:
        if list(map(self._layout_of, self._tensors)) != self._layouts:
            return False
        if _NativeLayouts is not None:
            with torch.enable_grad():
                # it also compares ``requires_grad``, and whether inference mode is on
                self._native_layouts = _NativeLayouts(
                    *self._different, dynamic_dims_sizes=None, dynamic_dims_strides=None
                )
        return True


class Change(enum.Enum):
    """Kind of change that the guard of a module found. It decides what happens next."""

    MOVED = "parameters or buffers are at new addresses"
    """Graphs are captured again. The step takes the same path."""
    STRUCTURE = "submodules, parameters, buffers or hooks were replaced"
    """The step may take another path, so it is watched again."""
    LAYOUT = "a parameter or buffer has another shape, other strides or another data type"
    """As for :attr:`STRUCTURE`."""
    SETTINGS = "a setting of a submodule has changed"
    """As for :attr:`STRUCTURE`."""
    CODE = "a function or class was replaced"
    """As for :attr:`STRUCTURE`."""


class GuardFailure(NamedTuple):
    """A change that a guard found."""

    change: Change
    text: Changed
    """The kind of change and its subject, for messages."""


_TABLES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
"""The attributes of a module that have its members and hooks."""
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
_training = operator.itemgetter("training")
_requires_grad = operator.attrgetter("requires_grad")


class Flags:
    """The ``training`` flags of modules, and ``requires_grad`` of their tensors, as part of keys.

    Args:
        modules: A module, and all modules inside it.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.scripted = [module for module in modules if "training" not in vars(module)]
        """They have the flag outside of Python."""
        self._holders = [module for module in modules if "training" in vars(module)]
        self._others = [vars(module) for module in self._holders]
        self._tensors = [
            member
            for module in modules
            for table in (module._parameters, module._buffers)
            for member in table.values()
            if isinstance(member, Tensor)
        ]

    def now(self) -> tuple[bool | bytes, ...]:
        """Return all flags as they are now."""
        flags = (*map(_training, self._others), bytes(map(_requires_grad, self._tensors)))
        if self.scripted:
            flags += tuple([module.training for module in self.scripted])
        return flags

    def are_of(
        self,
        quiet: Sequence[nn.Module],
        restless: Sequence[dict[str, Any]],
        tensors: Sequence[Tensor],
    ) -> bool:
        """Return True if they are those of two kinds of modules, and of these tensors."""
        return (
            not self.scripted
            and len(quiet) + len(restless) == len(self._holders)
            and len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
        )

    def named(self, flags: Sequence[bool | bytes]) -> list[tuple[nn.Module | Tensor, str, bool]]:
        """Return flags, as :meth:`now` has returned them, with what has them and their names."""
        number = len(self._holders)
        required = flags[number]
        assert isinstance(required, bytes)
        modules = [*self._holders, *self.scripted]
        trained = zip(modules, [*flags[:number], *flags[number + 1 :]], strict=True)
        return [
            *[(module, "training", bool(flag)) for module, flag in trained],
            *[
                (tensor, "requires_grad", bool(flag))
                for tensor, flag in zip(self._tensors, required, strict=True)
            ],
        ]


class ModuleGuard:
    """Compares a module and all its submodules with their state at the last :meth:`refresh`.

    :meth:`check` finds rebound ``.data``, other strides, a replaced parameter, buffer or child,
    added or removed hooks, a move to another device, and changed attributes of scripted modules.
    :meth:`check_epoch` finds changed settings of layers and metrics. What is set between two calls
    of it, during a stage, is seen by
    :class:`~cg_lightning.guards.written_settings.WrittenSettings`. A tensor that is changed in
    place is not a change, because graphs read its current value. It does *not* compare other
    attributes that the step reads; see :class:`~cg_lightning.guards.guard_set.GuardSet`.

    Args:
        root: The module.
        has_code: Whether functions of libraries are compared as well.
        backward_hooks: Whether backward hooks are compared, too.
        written: Takes note of settings that were written. None: a guard with such a setting does
            not hold.
    """

    def __init__(
        self,
        root: nn.Module,
        has_code: bool = False,
        backward_hooks: bool = False,
        written: WrittenSettings | None = None,
    ) -> None:
        self._root = root
        self._has_code = has_code
        self._backward_hooks = backward_hooks
        self._written = written
        self._stored_settings: list[dict[str, Any]] = []
        """Those of the quiet modules at the latest :meth:`check_epoch`."""
        self.settings = LayerSettings(root)
        """All settings, as they were at the latest :meth:`check_epoch`."""
        self.modules: list[nn.Module] = []
        self._used_classes: list[type] = []
        self.refresh()

    def refresh(self) -> None:
        """Store the current state as the reference for later checks."""
        modules = [module for _, module in self._root.named_modules()]
        has_others, self.modules = modules != self.modules, modules
        if has_others:
            self.settings.renew()
        self._flags = Flags(self.modules)
        self._scripted = self._flags.scripted
        every = self._every_table = self._current_tables()
        tables = [table for table in every if isinstance(table, dict) and table]
        self._views = [table.values() for table in tables]  # they follow their dictionaries
        self._empty_tables = [table for table in every if not table]
        self._tables_of_scripted = [
            table for table in every if not isinstance(table, dict) and table
        ]
        self._members = self._current_members()
        # of an OrderedDict, moved items do not change the version
        self._ordered = [table.values() for table in tables if type(table) is not dict]
        self._ordered_members = list(chain.from_iterable(self._ordered))
        self._read_tables = operator.itemgetter(*_TABLES, *_BACKWARD * self._backward_hooks)
        holders = [each for each in self.modules if vars(each).keys() >= {*_TABLES, *_BACKWARD}]
        # they set attributes in each step
        self._restless = [vars(each) for each in holders if _is_restless(each)]
        self._tables_of_restless = list(self._tables_in(self._restless))
        self._own_methods = [
            (vars(each), name, vars(each).get(name))
            for each in holders
            for name in _own_methods_of(each)
        ]
        self._quiet = [each for each in holders if not _is_restless(each)]
        attributes = list(map(vars, self._quiet))
        self._tables_of_quiet = list(map(self._read_tables, attributes))
        self._stored_settings = []
        self._dictionaries = [*attributes, *tables]
        self._versions = list(map(version_of, self._dictionaries))
        members = [member for member in self._members if isinstance(member, Tensor)]
        # lazy parameters have no address before their first step
        self._lazy = [member for member in members if is_lazy(member)]
        self.tensors = [
            part for member in members if not is_lazy(member) for part in parts_of(member)
        ]
        self._sparse = [member for member in members if member.layout is not torch.strided]
        self._placement = Placement(self.tensors)
        self._keeps_flags = self._flags.are_of(self._quiet, self._restless, self.tensors)
        self._kept_flags: tuple[bool | bytes, ...] = ()
        self._training_of_restless: list[bool] = []
        self._may_have_other_flags = True
        self._scripted_values = [scripted_attributes(module) for module in self._scripted]
        self._code = LibraryCode(self.modules) if self._has_code else None
        if self._code is not None:
            self._code.add_classes(self._used_classes)

    def add_classes(self, classes: Iterable[type]) -> None:
        """Compare the functions of further classes of the user's, which a step has just used."""
        known = set(map(id, self._used_classes))
        new = [each for each in classes if id(each) not in known]
        self._used_classes += new
        if self._code is not None:
            self._code.add_classes(new)

    def _current_tables(self) -> list[Any]:
        tables: list[tuple[dict[Any, Any], ...]] = [
            (module._modules, module._parameters, module._buffers, *hooks_of(module))
            for module in self.modules
        ]
        if self._backward_hooks:
            tables += map(backward_hooks_of, self.modules)
        return [*chain.from_iterable(tables), *global_hooks()]

    def _has_same_tables(self) -> bool:
        return all(map(operator.is_, self._current_tables(), self._every_table))

    def _tables_in(self, attributes: Iterable[dict[str, Any]]) -> Iterator[Any]:
        return chain.from_iterable(map(self._read_tables, attributes))

    def _current_members(self) -> list[Any]:
        members = list(chain.from_iterable(self._views))
        if self._tables_of_scripted:
            members += [member for table in self._tables_of_scripted for member in table.values()]
        return members

    def _members_hold(self) -> bool:
        if any(self._empty_tables):
            return False
        if self._lazy and not all(map(is_lazy, self._lazy)):
            return False
        versions = list(map(version_of, self._dictionaries))
        if versions != self._versions:
            self._may_have_other_flags = True
            if not self._contents_hold(map(operator.ne, versions, self._versions)):
                return False
            self._versions = versions
        if self._tables_of_scripted and not self._has_same_members():
            return False
        if self._ordered and not all(
            map(operator.is_, chain.from_iterable(self._ordered), self._ordered_members)
        ):
            return False
        for attributes, name, method in self._own_methods:
            if attributes.get(name) is not method:
                return False
        return not self._restless or all(
            map(operator.is_, self._tables_in(self._restless), self._tables_of_restless)
        )

    def _has_same_members(self) -> bool:
        members = self._current_members()
        return len(members) == len(self._members) and all(map(operator.is_, members, self._members))

    def _contents_hold(self, has_changed: Iterable[bool]) -> bool:
        """Return True if dictionaries that have changed have the tables and members that they had.

        Args:
            has_changed: For each dictionary, whether its version has changed.
        """
        before = self._tables_of_quiet
        for index in compress(count(), has_changed):
            if index >= len(before):
                return self._has_same_members()
            attributes = vars(self._quiet[index])
            tables = self._read_tables(attributes)
            if attributes is not self._dictionaries[index] or not all(
                map(operator.is_, tables, before[index])
            ):
                return False
            if self._stored_settings and not self._settings_hold(index):
                return False
        return True

    def _settings_hold(self, index: int) -> bool:
        """Return False if a module has another setting, and nobody is told of it."""
        module, before = self._quiet[index], self._stored_settings[index]
        now = stored_settings(module)
        for name in {**before, **now}:
            value = before.get(name, MISSING)
            if not is_same_value(value, now.get(name, MISSING)):
                if self._written is None:
                    return False
                self._written.note(module, name, value)
        return True

    def _parts_hold(self) -> bool:
        """Return True if sparse members have the same parts, each in the same place."""
        before = {tensor.data_ptr() for tensor in self.tensors}
        return all(part.data_ptr() in before for each in self._sparse for part in parts_of(each))

    def _scripted_hold(self) -> bool:
        now = map(scripted_attributes, self._scripted)
        return all(map(same_attributes, now, self._scripted_values))

    def check(self) -> bool:
        """Return True if members, their addresses and layouts, hooks and code are unchanged."""
        if (code := self._code) is not None:
            # what code.holds() does first, here because a replay enters as few files as it can
            is_as_it_was = (
                list(map(version_of, code.dictionaries)) == code.versions
                and len(code.rewritten) == code.number
            )
            if not is_as_it_was and not code.holds():
                return False
        if not (self._members_hold() and self._placement.check()):
            return False
        if self._sparse and not self._parts_hold():
            return False
        return not self._scripted or self._scripted_hold()

    def failure(self) -> GuardFailure:
        """Return the change. Call it after :meth:`check` has failed and before :meth:`refresh`."""
        if self._code is not None and (replaced_code := self._code.explain()):
            return self._failure(Change.CODE, replaced_code)
        for attributes, name, method in self._own_methods:
            if attributes.get(name) is not method:
                return self._failure(Change.CODE, f"{name} of an instance")
        now = map(scripted_attributes, self._scripted)
        for attributes, before in zip(now, self._scripted_values, strict=True):
            for name, value in attributes.items():
                if not is_same_value(before.get(name), value):
                    text = describe_change(name, value, before.get(name))
                    return self._failure(Change.SETTINGS, text)
        if not self._has_same_tables():
            return self._failure(Change.STRUCTURE, "another dictionary")
        members = self._current_members()
        if len(members) == len(self._members) and not any(self._empty_tables):
            pairs = list(zip(self._members, members, strict=True))
            replaced = [before for before, now in pairs if before is not now]
            if replaced and all(_is_another_address(before, now) for before, now in pairs):
                return self._failure(Change.MOVED, self._name_of(replaced[0]))
            if not replaced and (changed := self._placement.laid_out_otherwise()):
                return self._failure(Change.LAYOUT, self._name_of(self.tensors[changed[0]]))
            if not replaced and (moved := self._placement.moved()):
                return self._failure(Change.MOVED, self._name_of(self.tensors[moved[0]]))
            if replaced:
                return self._failure(Change.STRUCTURE, self._name_of(replaced[0]))
        return self.epoch_failure() or self._failure(Change.STRUCTURE, "")

    def check_epoch(self) -> GuardFailure | None:
        """Compare settings with those of the last call.

        Call it at the start of a stage or epoch.

        Returns:
            The change. None if there is none, and at the first call.
        """
        failure = self.epoch_failure()
        self.settings.take()
        self._stored_settings = list(map(stored_settings, self._quiet))
        return failure

    def epoch_failure(self) -> GuardFailure | None:
        """Compare settings with those of the latest :meth:`check_epoch`."""
        if not self.settings.are_taken:
            return None
        if not self._has_same_tables():  # the attributes of a module may be in another dictionary
            return self._failure(Change.STRUCTURE, "another dictionary")
        changed = self.settings.explain()
        return self._failure(Change.SETTINGS, changed) if changed else None

    def flags(self) -> tuple[bool | bytes, ...]:
        """Return the ``training`` flags of submodules, and ``requires_grad`` of their tensors."""
        return self._flags.now()

    def flags_after_check(self) -> tuple[bool | bytes, ...]:
        """Return what :meth:`flags` returns, right after :meth:`check` has returned True.

        It takes no time as long as the check finds no dictionary and no tensor changed.
        """
        placement, training = self._placement, list(map(_training, self._restless))
        if (
            self._may_have_other_flags
            or placement.had_other_gradients
            or training != self._training_of_restless
        ):
            self._kept_flags, self._training_of_restless = self._flags.now(), training
            self._may_have_other_flags = placement.had_other_gradients = not self._keeps_flags
        return self._kept_flags

    def explain_flags(self, now: Sequence[bool | bytes], before: Sequence[bool | bytes]) -> Changed:
        """Return the first of the flags that differs; empty if none does.

        Args:
            now: What :meth:`flags` returns.
            before: What it had returned earlier.
        """
        sizes = [[len(f) if isinstance(f, bytes) else 0 for f in flags] for flags in (now, before)]
        if sizes[0] != sizes[1]:
            return Changed(Change.STRUCTURE.value)
        for (holder, name, value), (_, _, was) in zip(
            self._flags.named(now), self._flags.named(before), strict=True
        ):
            if value != was:
                if isinstance(holder, nn.Module):
                    return describe_change(path_of(self._root, id(holder), name), value, was)
                return describe_change(f"self.{self._name_of(holder)}.{name}", value, was)
        return NO_CHANGE

    def _failure(self, change: Change, what: str | Changed) -> GuardFailure:
        if not what:
            return GuardFailure(change, Changed(change.value))
        changed = what if isinstance(what, Changed) else Changed(what)
        return GuardFailure(change, changed.after(f"{change.value}: "))

    def _name_of(self, member: Any) -> str:
        """Return the path of a member, or its type if it was removed."""
        for path, module in self._root.named_modules():
            for table in (module._parameters, module._buffers, module._modules):
                for name, value in table.items():
                    if value is member:
                        return f"{path}.{name}" if path else name
        for module in self.modules:
            if module is member:
                return type(module).__name__
        return (
            f"{type(member).__name__} of shape {tuple(member.shape)}"
            if isinstance(member, Tensor)
            else ""
        )


def _own_methods_of(module: nn.Module) -> tuple[str, ...]:
    """Return the methods that a metric has as attributes, or that an attribute may hide."""
    if is_metric(module):
        return ("update", "compute")
    return ("log", "log_dict") if is_lightning_module(module) else ()


def _is_restless(module: nn.Module) -> bool:
    """Return True if attributes of a module are set in each step, by Lightning or a metric."""
    return is_lightning_module(module) or is_metric(module)


def _is_another_address(before: Any, now: Any) -> bool:
    """Return True if two members differ only in their address."""
    if before is now:
        return True
    return (
        isinstance(before, Tensor)
        and isinstance(now, Tensor)
        and type(before) is type(now)
        and not is_lazy(before)
        and not is_lazy(now)
        and (before.shape, before.dtype, before.device, before.requires_grad, before.layout)
        == (now.shape, now.dtype, now.device, now.requires_grad, now.layout)
    )
