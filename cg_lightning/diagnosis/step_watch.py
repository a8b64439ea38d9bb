"""The step that is watched: the stack of calls under way, and what detectors report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.backends import GraphBackend
from cg_lightning.backends.followed_generators import key_of
from cg_lightning.backends.host_indices import Place
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor, describe_call, is_inside_transform
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.tree import flatten, tensors_in
from cg_lightning.diagnosis.call_events import CallEvents
from cg_lightning.diagnosis.findings import Finding, Location, find_line, find_location
from cg_lightning.diagnosis.garbage import YoungGarbageOnly
from cg_lightning.diagnosis.late_unit import LateUnit
from cg_lightning.diagnosis.lines_of_changes import line_that_changes, line_that_names
from cg_lightning.diagnosis.step_run import StepRun
from cg_lightning.diagnosis.watched_step import ModuleCall, StepNotes, WatchedStep
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.effects.places import ChangedAttribute
from cg_lightning.guards.comparisons import Condition
from cg_lightning.guards.frozen_parts import ChangedPlace
from cg_lightning.guards.module_guard import Flags
from cg_lightning.guards.sources import Source
from cg_lightning.guards.values import FrozenValues
from cg_lightning.metrics.members import metrics_of
from cg_lightning.metrics.units import units_of
from cg_lightning.modules.compiled import is_compiled, modules_inside, watchable_modules
from cg_lightning.modules.kinds import is_lightning_module, is_metric, is_users_namespace

_READS = (Cause.HOST_SYNC, Cause.DATA_DEPENDENT_SHAPE)
"""The causes reported for an operation that reads a value on the host."""
_COPYING = (Cause.HOST_SYNC, Cause.CROSS_DEVICE_COPY)
"""The causes reported for a copy to the host."""
_READS_UNSEEN = frozenset(
    {"vars", "__dict__", "dir", "getmembers", "__reduce_ex__", "__reduce__", "__getstate__"}
)
"""By which code reads attributes of any object, and no property sees it."""
_MAKING = (Cause.TENSOR_FROM_PYTHON, Cause.CROSS_DEVICE_COPY, Cause.HOST_SYNC)
"""The causes reported for tensors of the host that are copied to the device."""


class StoppedStep(BaseException):  # not an Exception, so that no step catches it
    """Ends a watched step before it does something that cannot be undone."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


class StepWatch:
    """One watched step. It owns the stack of calls; detectors report what they find to it.

    Detectors read its attributes. Only methods of this class write them, except :attr:`notes`.

    Args:
        root: The module whose step runs.
        backend: Where it runs.
        batch: What the step is given.
        effects: The side effects of the step. None: a graph of the whole step can hold neither
            ``self.log`` nor updates of metrics.
        run_logging: Whether ``self.log`` and ``self.print`` are executed.
        has_backward: Whether the step computes its gradients itself.
        stops_at: Findings of the step with these causes end it, by :class:`StoppedStep`.
    """

    def __init__(
        self,
        root: nn.Module,
        backend: GraphBackend,
        batch: Any,
        *,
        effects: ModuleEffects | None = None,
        run_logging: bool = True,
        has_backward: bool = False,
        stops_at: frozenset[Cause] = frozenset(),
    ) -> None:
        self._stops_at = stops_at
        self.root = root
        self.backend = backend
        self.device_type = backend.device.type
        self.effects = effects
        self.run_logging = run_logging
        self.has_backward = has_backward
        self.is_lightning = is_lightning_module(root)
        """Whether ``root`` is a LightningModule."""
        self.inside_root = frozenset(id(module) for module in root.modules())
        """The ids of ``root`` and of all modules inside it, as it was before the step."""
        self.modules = list(watchable_modules(root))
        """Paths and modules whose calls are seen: not metrics, and not modules in compiled code."""
        self.metrics = metrics_of(root)
        """All metrics in ``root``."""
        self.all_metrics = self.metrics if effects is None else effects.metrics()
        """The same, and those behind ``self.log``."""
        self.late_units = [] if effects is None else list(map(LateUnit, units_of(root)))
        """The metrics in ``root`` whose updates may follow the step."""
        self.hidden = {
            id(module): [pair for pair in modules_inside(path, module) if not is_metric(pair[1])]
            for path, module in self.modules
            if is_compiled(module)
        }
        """Paths and modules inside each compiled module, by its id. Their calls are not seen."""
        self.batch = batch
        """What the step is given."""
        self.step = ModuleCall("", None, tensors_in(batch))
        self.stack: list[ModuleCall] = [self.step]
        """The step, and the calls of modules that are under way."""
        self.notes = StepNotes()
        """What else the step shows. Detectors write it."""
        self.reads_host_value = False
        """Whether an operation is under way that reads a value which is known before the step."""
        self.makes_constant = False
        """Whether a function of PyTorch runs that makes a tensor of host constants."""
        self.makes_on_host = False
        """The same for a tensor that stays on the host."""
        self.copies_constant = False
        """Whether an operation is under way that copies such a tensor to the device."""
        self.copies_to_host = False
        """Whether a tensor is copied to the host, and a capture can copy it after the graph."""
        self._indexing: tuple[Place | None, int] = (None, 0)
        """The place where lists were last made indices, and the number of copies not reported."""
        self._inside: dict[int, list[nn.Module]] = {}
        """Each module that was asked for, and all modules inside it, by its id."""
        self._first = 0
        self.codes: list[CodeType] = []
        """The code of the user's that the step has run so far."""
        self._set_aside: list[Finding] | None = None
        """Receives the findings of the step while a call runs that may follow it."""
        self._is_paused = False
        self._is_in_framework = False
        self._generators: dict[int, torch.Generator] = {}
        """Random generators that the step may know, because it has read what holds them."""
        self._drawn: dict[int, torch.Generator] = {}
        """Those among them that the step draws from."""
        self.sources_held: Callable[[FrozenValues], list[Source]] = lambda _: []
        """Returns what the step may read of what some values hold, other than attributes."""
        self.read_all_attributes: Callable[[nn.Module | None], None] = lambda _: None
        """Notes that the step may read every attribute of a module; None: of all modules."""
        self._sources_held: list[Source] = []
        """What it has returned for the value that is read next."""
        self.call_events: CallEvents | None = None
        """Reports each call to a detector; it pauses while detectors look at operations."""
        self.run = StepRun()
        """How the step runs."""
        self.garbage = YoungGarbageOnly()
        """What is collected while it runs."""

    # what detectors report

    def report(
        self,
        cause: Cause,
        operation: str,
        *,
        location: str | Location | None = None,
        module: str | None = None,
        calls: Iterable[ModuleCall] | None = None,
    ) -> None:
        """Add a finding.

        Args:
            cause: Why it cannot run from a graph.
            operation: What was called or changed.
            location: Where; None: the user's line that runs now.
            module: Path of the module; None: the innermost one that runs now.
            calls: The calls that get the finding; None: all that are under way.
        """
        calls = self.stack[self._first :] if calls is None else list(calls)
        if self._is_paused or not calls or self._is_allowed(cause):
            return
        where = _where(location)
        module = self.stack[-1].path if module is None else module
        is_known = self.reads_host_value and cause in _READS
        context = current_forward_context()
        if context is not None and context.step is not None and context.step.hook:
            operation = f"{operation} in {context.step.hook}"
        finding = Finding(
            cause,
            operation,
            module,
            where.user,
            where.library,
            is_known_before=is_known,
            is_of_logging=self._is_in_framework,
        )
        for call in calls:
            is_aside = call is self.step and self._set_aside is not None
            (self._set_aside if is_aside else call.findings).append(finding)  # type: ignore[union-attr]
            if call is self.step and not is_aside and cause in self._stops_at:
                raise StoppedStep(finding)

    def _is_allowed(self, cause: Cause) -> bool:
        if self.copies_to_host and cause in _COPYING:
            return True
        return (self.makes_constant or self.copies_constant) and cause in _MAKING

    def report_unless_found(
        self, cause: Cause, operation: str, *, location: str | None = None
    ) -> None:
        """Add a finding to the calls under way that have none of this cause."""
        self.report(
            cause,
            operation,
            location=location,
            calls=[
                call
                for call in self.stack[self._first :]
                if not any(finding.cause is cause for finding in call.findings)
            ],
        )

    def report_once_a_line(
        self, cause: Cause, operation: str, *, location: str | None = None
    ) -> None:
        """Add a finding to the calls under way that have none of this cause at the same line."""
        where = _where(location)
        self.report(
            cause,
            operation,
            location=where,
            calls=[
                call
                for call in self.stack[self._first :]
                if not any(
                    finding.cause is cause and finding.location == where.user
                    for finding in call.findings
                )
            ],
        )

    def read(self, source: Source) -> None:
        """Note for every call under way that it reads a value in Python."""
        if self._is_paused:
            return
        for each in (source, *self._sources_held):
            key = each.key
            if key not in self.step.sources and not each.line:
                each = dataclasses.replace(each, line=find_line())
            for call in self.stack:
                call.sources.setdefault(key, each)
        self._sources_held = []

    def forget_reads(self, modules: Sequence[nn.Module]) -> None:
        """Forget reads of the attributes of modules, which a capture does not make."""
        known = set(map(id, modules))
        for call in self.calls():
            for key in [key for key in call.sources if key[0] in known]:
                del call.sources[key]

    def compare(self, compared: Condition) -> None:
        """Note for every call under way a condition, other than a value, that must hold."""
        if not self._is_paused:
            for call in self.stack:
                call.compared[compared.key] = compared

    def note_unseen_read(self, tensor: Tensor) -> None:
        """Note that the step reads a tensor of the host, which no operation shows."""
        if not (self._is_paused or self._is_in_framework):
            self.run.before_read(tensor)

    def note_operation(
        self, *, reads_host_value: bool | None = None, copies_constant: bool | None = None
    ) -> None:
        """Note what the operation under way does, until it has ended. None: no change.

        Args:
            reads_host_value: See the attribute.
            copies_constant: See the attribute.
        """
        if reads_host_value is not None:
            self.reads_host_value = reads_host_value
        if copies_constant is not None:
            self.copies_constant = copies_constant

    def note_call_events(self, events: CallEvents) -> None:
        """Note what reports each call to a detector."""
        self.call_events = events

    def note_classes(self, classes: Iterable[type]) -> None:
        """Note the user's among some classes: the step uses their functions."""
        self.notes.classes.update({id(each): each for each in filter(is_users_namespace, classes)})

    def note_code(self, code: CodeType) -> None:
        """Note code of the user's that the step runs."""
        self.codes.append(code)

    def note_copy_from_host(self) -> None:
        """Note for every call under way that it copies a constant from the host by itself."""
        if not self._is_paused:
            for call in self.stack:
                call.copies_from_host = True

    def note_index(self, place: Place) -> None:
        """Note that a list becomes an index at this place. On a GPU it is copied there."""
        if place != self._indexing[0]:
            self._indexing = (place, 0)
        self._indexing = (place, self._indexing[1] + 1)

    def takes_index(self, place: Place | None) -> bool:
        """Return whether a wait at this place belongs to a list that becomes an index."""
        known, copies = self._indexing
        if place is None or place != known or not copies:
            return False
        self._indexing = (known, copies - 1)
        return True

    def look_at(self, contents: FrozenValues) -> list[str]:
        """Note the random generators among values that are read; return the opaque values.

        In compiled code, draws from a generator cannot be observed.
        """
        self.note_classes(contents.classes())
        self._sources_held += self.sources_held(contents)
        self._generators.update({key_of(each): each for each in contents.generators.values()})
        hidden = [f"{path}: torch.Generator" for path in contents.generators if self.hidden]
        return [*contents.opaque(), *hidden]

    def draws_from(self, generator: torch.Generator) -> bool:
        """Note that the step draws; return whether a capture can draw from this generator too.

        It must have existed before the step, so that it goes on from step to step.
        """
        key = key_of(generator)
        can_follow = key in self._generators and self.backend.can_follow(generator)
        if can_follow and not self._is_paused:
            self._drawn[key] = self._generators[key]
        return can_follow

    def note_change(self, changed: ChangedAttribute) -> None:
        """Note an attribute that the step changes without looking at it, so a replay can as well.

        A graph freezes no value of it.
        """
        self.notes.changes.append(changed)
        self.step.sources.pop((id(changed.module), changed.name), None)
        if not changed.is_set:
            source = changed.kind_source()
            self.step.sources[source.key] = source
        if changed.is_added_to:
            self.notes.written.add_attribute(changed.module, changed.name)

    # what detectors ask

    def line_that_may_read_unseen(self) -> str:
        """Return the first line of the step so far that names what reads attributes unseen.

        It is empty if there is none.
        """
        return line_that_names(self.codes, _READS_UNSEEN)

    def calls(self) -> list[ModuleCall]:
        """Return the step and all its calls so far."""
        return [self.step, *self.step.all_calls()]

    def line_that_changes(self, places: Sequence[ChangedPlace]) -> str:
        """Return the line of the step that has changed something; empty if none is known."""
        return line_that_changes(self.codes, places)

    def modules_in(self, module: nn.Module) -> list[nn.Module]:
        """Return a module and all modules inside it, as it was when it was first called."""
        if id(module) not in self._inside:
            self._inside[id(module)] = list(module.modules())
        return self._inside[id(module)]

    def late_unit(self, metric: nn.Module) -> LateUnit | None:
        """Return the unit of a metric; None if its updates cannot follow the step."""
        return next(
            (
                late
                for late in self.late_units
                if any(other is metric for other in late.unit.metrics)
            ),
            None,
        )

    @property
    def is_paused(self) -> bool:
        """Whether this package compares something."""
        return self._is_paused

    @property
    def is_about_step(self) -> bool:
        """Whether a graph of the step holds what runs now.

        It may hold something else in its place, or leave it out.
        """
        return self._first == 0 and self._set_aside is None

    @property
    def is_in_framework(self) -> bool:
        """Whether Lightning itself runs, in ``self.log``: what it reads is not read by the step."""
        return self._is_in_framework

    # how long something holds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While this is entered, this package compares something. Reports and reads are ignored."""
        before, self._is_paused = self._is_paused, True
        with self.backend.ignoring_host_syncs():
            try:
                yield
            finally:
                self._is_paused = before

    @contextlib.contextmanager
    def _with(self, **attributes: Any) -> Iterator[None]:
        """While this is entered, some attributes of the watch have other values."""
        before = {name: getattr(self, name) for name in attributes}
        vars(self).update(attributes)
        try:
            yield
        finally:
            vars(self).update(before)

    def making_constant(self) -> AbstractContextManager[None]:
        """While a tensor is made that a capture makes before the graph. That is no finding."""
        return self._with(makes_constant=True)

    def making_on_host(self) -> AbstractContextManager[None]:
        """While a tensor of constants is made that stays on the host."""
        return self._with(makes_on_host=True)

    def copying_to_host(self) -> AbstractContextManager[None]:
        """While a tensor is copied to the host. That is no finding if nothing reads the copy."""
        return self._with(copies_to_host=True)

    def only_for_submodules(self) -> AbstractContextManager[None]:
        """While something runs that a graph of the whole step can hold, but none of a submodule."""
        return self._with(_first=1)

    def setting_aside(self, findings: list[Finding]) -> AbstractContextManager[None]:
        """While ``findings`` receives what is found about the step."""
        return self._with(_set_aside=findings)

    def in_framework(self) -> AbstractContextManager[None]:
        """While Lightning itself runs in ``self.log``."""
        return self._with(_is_in_framework=True)

    @contextlib.contextmanager
    def calling(self, call: ModuleCall) -> Iterator[None]:
        """While a call of a module is under way."""
        self.stack[-1].calls.append(call)
        self.stack.append(call)
        try:
            yield
        finally:
            self.stack.pop()
            call.inputs.clear()
            call.given.clear()

    # what the watcher makes and takes

    def new_call(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ModuleCall:
        """Describe a call of a module that is about to be made."""
        descriptor, leaves = self._describe(module, args, kwargs)
        inside = self.hidden.get(id(module))
        hidden = () if inside is None else (module, *[child for _, child in inside])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        arguments = [*args, *kwargs.values()]
        given = [value for value in arguments if not isinstance(value, Tensor)]
        return ModuleCall(path, module, tensors, descriptor, hidden, given)

    def _describe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[BatchDescriptor | None, list[Any]]:
        """Return the key of a call, None if it has none, and the leaves of its arguments."""
        if is_inside_transform():  # the tensors of a transform have no memory
            return None, []
        context = current_forward_context()
        if context is not None and context.batch_descriptor is not None:
            with self.paused():  # it reads attributes, and the step does not
                training = Flags(self.modules_in(module)).now()
            number = context.next_call(module)
            with contextlib.suppress(UnkeyableBatchError):  # such calls run eagerly, and say so
                key = context.batch_descriptor
                fields, leaves = describe_call(training, number, key, args, kwargs)
                return BatchDescriptor(*fields), leaves
        return None, flatten((args, kwargs))[0]

    def release(self) -> None:
        """Drop everything, which would otherwise live until garbage is collected.

        Detectors and the watch refer to each other. A weak reference of the user's tells if what
        they hold is alive.
        """
        vars(self).clear()

    def result(self) -> WatchedStep:
        """Return what the step showed; it holds no tensor that a call was given."""
        self.step.inputs.clear()
        self.notes.late = [late.unit for late in self.late_units if late.is_late]
        self.notes.generators = list(self._drawn.values())
        return WatchedStep(self.step, self.notes)


def _where(location: str | Location | None) -> Location:
    if location is None:
        return find_location()
    return Location(location, "") if isinstance(location, str) else location
