"""State that a step keeps in Python: attributes that it sets, containers that it fills."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from cg_lightning.core.causes import Cause
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import AT_THE_END, find_location
from cg_lightning.diagnosis.module_state import ModuleState
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.modules.attributes import is_same_value
from cg_lightning.modules.interception import Interception, ModuleHandler, can_intercept
from cg_lightning.modules.kinds import is_metric, is_user_module


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
        before = [(path, ModuleState(module)) for path, module in [*watch.modules, *inside]]
        known = {id(module) for module in watch.root.modules()}
        for path, state in list(before):
            for module in state.modules_inside():
                if id(module) not in known and not is_metric(module):
                    known.add(id(module))
                    before.append((path, ModuleState(module)))
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
            state = ModuleState(self.watch.root)
        yield
        for location, names in self._changed(state).items():
            # the step gets its finding from the comparison at its end
            self.watch.report(
                Cause.STATE_REBOUND, names, location=location, calls=self.watch.stack[1:]
            )

    def _changed(self, state: ModuleState) -> dict[str, str]:
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


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")
