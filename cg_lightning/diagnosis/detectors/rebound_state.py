"""State that a step keeps in Python: attributes that it sets, containers that it fills."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import AT_THE_END, find_location
from cg_lightning.diagnosis.step_watch import StepWatch, UnreadableError, look_into
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.guards.values import FrozenValues
from cg_lightning.modules.attributes import (
    class_values,
    is_same_value,
    names_of_frameworks,
    scripted_attributes,
)
from cg_lightning.modules.interception import Interception, ModuleHandler, can_intercept
from cg_lightning.modules.kinds import is_metric, is_user_module

_TABLES = ("_parameters", "_buffers", "_modules")


class ReboundState(Detector):
    """Compares the attributes of all modules before the step and after it.

    The line is known if an attribute was set; what changed inside a container is only seen by the
    comparison. The state of ``root`` is compared around its calls too, because its step may change
    it outside of them.
    """

    causes = (Cause.STATE_REBOUND,)

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._locations: dict[tuple[int, str], str] = {}
        """Where an attribute was first set to another value."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        watch = self.watch
        inside = [pair for pairs in watch.hidden.values() for pair in pairs]
        before = [(path, _State(module)) for path, module in [*watch.modules, *inside]]
        known = {id(module) for module in watch.root.modules()}
        for path, state in list(before):
            for module in state.modules_inside():
                if id(module) not in known and not is_metric(module):
                    known.add(id(module))
                    before.append((path, _State(module)))
        with self._noticing_writes():
            yield
        for path, state in before:
            for location, names in self._changed(state).items():
                calls = [watch.step]
                if path:  # the calls of ``root`` compared its state themselves
                    calls += [c for c in watch.step.all_calls() if _is_inside(path, c.path)]
                watch.report(
                    Cause.STATE_REBOUND, names, location=location, module=path, calls=calls
                )

    @contextlib.contextmanager
    def around_call(self, call: ModuleCall) -> Iterator[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        if call.module is not self.watch.root:
            yield
            return
        with self.watch.paused():
            state = _State(self.watch.root)
        yield
        for location, names in self._changed(state).items():
            # the step gets its finding from the comparison at its end
            self.watch.report(
                Cause.STATE_REBOUND, names, location=location, calls=self.watch.stack[1:]
            )

    def _changed(self, state: _State) -> dict[str, str]:
        """Returns the names of what changed, by the line that changed it."""
        with self.watch.paused():
            names = state.changed()
        found: dict[str, list[str]] = {}
        for name in sorted(names):
            attribute = name.removeprefix("_buffers.").removeprefix("_parameters.")
            location = self._locations.get((id(state.module), attribute), AT_THE_END)
            found.setdefault(location, []).append(name)
        return {location: ", ".join(names) for location, names in found.items()}

    @contextlib.contextmanager
    def _noticing_writes(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for _, module in self.watch.modules:
                is_written = is_user_module(module) and id(module) not in self.watch.hidden
                if is_written and can_intercept(module):
                    handler = _WriteHandler(module, self._locations)
                    stack.callback(Interception(module, handler).remove)
            yield


class _WriteHandler(ModuleHandler):
    def __init__(self, module: nn.Module, locations: dict[tuple[int, str], str]) -> None:
        self._module = module
        self._locations = locations

    def on_write(self, name: str, value: Any) -> None:
        """See :class:`~cg_lightning.modules.interception.ModuleHandler`."""
        key = (id(self._module), name)
        attributes = object.__getattribute__(self._module, "__dict__")
        if key not in self._locations and not is_same_value(attributes.get(name), value):
            self._locations[key] = find_location().user


class _State:
    """What the attributes of a module and of its classes refer to, and what is in the user's own.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._values = _values(module)
        self._contents = {
            name: contents
            for name in self._values.keys() - names_of_frameworks(module)
            if (contents := _contents(self._values[name])) is not None
        }

    def modules_inside(self) -> list[nn.Module]:
        """Returns the modules that attributes hold in containers or objects, with theirs."""
        held = [module for contents in self._contents.values() for module in contents.modules]
        return [child for module in held for child in module.modules()]

    def changed(self) -> list[str]:
        """Returns the names of attributes that changed, came or went, or whose contents changed."""
        missing, now = object(), _values(self.module)
        changed = [
            name
            for name, value in now.items()
            if not is_same_value(self._values.get(name, missing), value)
        ]
        gone = [name for name in self._values if name not in now]
        inside = [name for name, contents in self._contents.items() if not contents.all_hold()]
        return list(dict.fromkeys([*changed, *gone, *inside]))


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _values(module: nn.Module) -> dict[str, Any]:
    attributes = {**vars(module), **scripted_attributes(module)}
    # Lightning's cache of the names of metrics, made by the first ``self.log``
    attributes.pop("_metric_attributes", None)
    # torch.jit's cache of its compiled methods, made when they are first read
    attributes = {k: v for k, v in attributes.items() if not isinstance(v, torch.ScriptMethod)}
    members = {
        f"{table}.{name}": member
        for table in _TABLES
        for name, member in attributes.pop(table, {}).items()
    }
    return {**dict(class_values(module)), **attributes, **members}


def _contents(value: Any) -> FrozenValues | None:
    """Returns what is in a value; None if nothing is, or if nobody can look into it."""
    if is_plain_value(value):
        return None
    try:
        return look_into(value)
    except UnreadableError:  # AttributeReads reports whatever reads it
        return None
