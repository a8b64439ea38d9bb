"""State that a step keeps in Python: attributes that it sets, containers that it fills."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch._ops import OpOverload

from cg_lightning.core.causes import Cause
from cg_lightning.core.kernel_flags import switches
from cg_lightning.core.lines import Elsewhere
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.attribute_events import AttributeEvents, LastingValues
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.module_state import ModuleState, ValuesOf, values_of_classes
from cg_lightning.diagnosis.operands import addresses_in, written_tensors
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.guards.sources import Source
from cg_lightning.guards.values import addresses_of
from cg_lightning.metrics.members import states_of
from cg_lightning.modules.interception import Interception, can_intercept
from cg_lightning.modules.kinds import is_user_module


class ReboundState(Detector):
    """Compares the attributes of all modules before the step and after it.

    What the step changes without looking at it, a replay changes as well
    (:class:`~cg_lightning.diagnosis.attribute_events.AttributeEvents`). All else is reported. The
    line is known if an attribute was set. What changed inside a container is only seen by the
    comparison, and its line is searched for in the code that has run. The state of ``root`` is
    compared around its calls too, because its step may change it outside of them.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._events: dict[int, AttributeEvents] = {}
        """What was done to the attributes of each module, by its id."""
        self._written_later: set[int] | None = None
        """Addresses of tensors to which the step may write after it has called a method of a plain
        object; None before such a call."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        watch = self.watch
        inside = [pair for pairs in watch.hidden.values() for pair in pairs]
        then = values_of_classes()
        before = [(path, ModuleState(module, then)) for path, module in [*watch.modules, *inside]]
        known = {id(module) for module in watch.root.modules()}
        for path, state in list(before):
            for module in state.modules_inside():
                if id(module) not in known:
                    known.add(id(module))
                    before.append((path, ModuleState(module, then)))
        switched = switches()
        with self._noticing_events():
            yield
        self._report_switches(switched, [watch.step])
        late = [metric for each in watch.late_units if each.is_late for metric in each.unit.metrics]
        left_out = {id(child) for metric in late for child in metric.modules()}
        now = values_of_classes()
        changed = [
            (path, state, self._changed(state, now))
            for path, state in before
            if id(state.module) not in left_out
        ]
        repeated = self._repeated(changed)
        self._guard_what_is_set(changed, repeated)
        for path, state, names in changed:
            if not names:
                continue
            calls: list[ModuleCall] = []
            if path:  # the calls of ``root`` compared its state themselves
                calls = [c for c in watch.step.all_calls() if _is_inside(path, c.path)]
            own = [name for name in names if (id(state.module), name) not in repeated]
            self._report(state, path, own, [watch.step, *calls])
            self._report(state, path, [name for name in names if name not in own], calls)

    @contextlib.contextmanager
    def around_call(self, call: ModuleCall) -> Iterator[None]:
        switched = switches()
        if call.module is not self.watch.root:
            yield
            self._report_switches(switched, self.watch.stack[1:])
            return
        with self.watch.paused():
            state = ModuleState(self.watch.root)
        yield
        self._report_switches(switched, self.watch.stack[1:])
        # the step gets its finding from the comparison at its end
        now = values_of_classes()
        self._report(state, None, self._changed(state, now), self.watch.stack[1:])

    def _report_switches(self, before: tuple[Any, ...], calls: list[ModuleCall]) -> None:
        if switches() != before:
            self.watch.report(
                Cause.STATE_REBOUND,
                "a switch of PyTorch",
                location=Elsewhere.AT_THE_END,
                calls=calls,
            )

    def _changed(self, state: ModuleState, now: ValuesOf) -> list[str]:
        with self.watch.paused():
            return sorted(state.changed(now))

    def _report(
        self, state: ModuleState, path: str | None, names: list[str], calls: list[ModuleCall]
    ) -> None:
        """Report what changed, by the line that changed it."""
        events = self._events.get(id(state.module))
        found: dict[str, list[str]] = {}
        for name in names:
            attribute = name.removeprefix("_buffers.").removeprefix("_parameters.")
            location = "" if events is None else events.line_that_sets(attribute)
            if not location:
                with self.watch.paused():
                    location = self.watch.line_that_changes(state.changed_places(name))
            if not location and events is not None:
                location = events.line_that_reads(attribute)
            found.setdefault(location or Elsewhere.AT_THE_END, []).append(name)
        for location, together in found.items():
            self.watch.report(
                Cause.STATE_REBOUND,
                ", ".join(together),
                location=location,
                module=path,
                calls=calls,
            )

    @contextlib.contextmanager
    def _noticing_events(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for path, module in self.watch.modules:
                is_written = is_user_module(module) and id(module) not in self.watch.hidden
                if is_written and can_intercept(module):
                    events = self._events[id(module)] = AttributeEvents(
                        self.watch, path, module, self._on_call
                    )
                    stack.callback(Interception(module, events).remove)
            yield

    def _on_call(self, target: Any) -> None:
        with self.watch.paused():
            root, metrics = self.watch.root, self.watch.all_metrics
            states = [getattr(each, name) for each in metrics for name in states_of(each)]
            kept = [*root.parameters(), *root.buffers(), *tensors_in((vars(target), states))]
            self._written_later = (self._written_later or set()) | addresses_of(kept)

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._written_later is None:
            return
        if addresses_of(written_tensors(function, args, kwargs)) - self._written_later:
            for events in self._events.values():
                events.refuse_calls()

    def after_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._written_later is not None:
            given = addresses_in((*args, *kwargs.values()))
            self._written_later |= addresses_in(output) - given

    def _repeated(self, changed: list[tuple[str, ModuleState, list[str]]]) -> set[tuple[int, str]]:
        """Note what a replay can change as the step did; return ids of modules and names."""
        watch = self.watch
        if not all(each.is_known_before for each in watch.step.findings):  # it will be no graph
            return set()
        if watch.hidden:  # writes of compiled code are not reported
            for events in self._events.values():
                events.refuse_calls()
        names = {id(state.module): set(own) for _, state, own in changed}
        for key, name in watch.notes.late_targets:  # zero may have been added, for example
            names.setdefault(key, set()).add(name)
        with watch.paused():
            candidates = [
                attribute
                for key, events in self._events.items()
                for attribute in events.changes(sorted(names[key]))
            ]
            lasting = LastingValues(watch, candidates) if candidates else None
            repeated = [each for each in candidates if lasting and not lasting.are_in(each)]
        for attribute in repeated:
            watch.note_change(attribute)
        found = {(id(attribute.module), attribute.name) for attribute in repeated}
        self._report_late_reads(watch.notes.late_targets - found)
        return found

    def _report_late_reads(self, targets: set[tuple[int, str]]) -> None:
        """Report attributes that get a value which a replay would read later, and are read."""
        for key, name in sorted(targets, key=lambda target: target[1]):
            events = self._events.get(key)
            line = "" if events is None else events.line_that_reads(name)
            self.watch.report(
                Cause.HOST_SYNC,
                name,
                location=line or Elsewhere.AT_THE_END,
                calls=[self.watch.step],
            )

    def _guard_what_is_set(
        self, changed: list[tuple[str, ModuleState, list[str]]], repeated: set[tuple[int, str]]
    ) -> None:
        """Note as read what was set to what it was: a graph does not set it again."""
        for path, state, names in changed:
            events = self._events.get(id(state.module))
            for name in [] if events is None else events.set_first():
                source = Source(
                    state.module, name, f"self.{path}.{name}" if path else f"self.{name}"
                )
                if name not in names:
                    calls = [c for c in self.watch.step.all_calls() if _is_inside(path, c.path)]
                    if source.key not in repeated:
                        calls.append(self.watch.step)
                    for call in calls:
                        call.sources.setdefault(source.key, source)


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")
