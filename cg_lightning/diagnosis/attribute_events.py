"""What a step does to the attributes of a module, event by event, and what a replay can do again.

There are two such things. An attribute may be *set* before anything reads it: the step cannot
depend on what was there. Or its value is only *changed*: each line that reads it appends to it,
adds to it, sets an entry, or reads an entry that the step itself has set
(``uses_of_attribute.py``); or it calls a method of a plain object that only accumulates
(``accumulators.py``). An attribute of which one read is anything else is state, and its value may
decide what the step computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.lines import file_and_line
from cg_lightning.core.tree import flatten
from cg_lightning.diagnosis.accumulators import accumulates
from cg_lightning.diagnosis.contents import look_into
from cg_lightning.diagnosis.findings import find_location
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.uses_of_attribute import Entry, Use, adds_to, entry_of, use_of
from cg_lightning.effects.containers import ContainersSnapshot
from cg_lightning.effects.places import ChangedAttribute
from cg_lightning.guards.changed_values import MAPPINGS, is_plain_object, kind_to_change
from cg_lightning.guards.values import addresses_of
from cg_lightning.metrics.caught_errors import is_exception_handled
from cg_lightning.modules.attributes import (
    is_same_value,
    names_of_frameworks,
    slots_in,
    value_in_class,
)
from cg_lightning.modules.interception import ModuleHandler
from cg_lightning.modules.kinds import (
    FRAMEWORKS,
    is_our_file,
    is_user_class,
    is_user_file,
    namespace_of,
)

_Instruction = tuple[CodeType, int]


def _accessing_frame() -> FrameType | None:
    """Return the frame that reads or sets an attribute now; None if we do it ourselves."""
    # this function, the handler, and the function that the interception has put into the class
    frame = sys._getframe(3)
    return None if is_our_file(frame.f_code.co_filename) else frame


class AttributeEvents(ModuleHandler):
    """Notes reads and writes of the attributes of one module in a watched step.

    ``on_call`` receives an object before the step calls a method of it that may accumulate.
    """

    def __init__(
        self, watch: StepWatch, path: str, module: nn.Module, on_call: Callable[[Any], None]
    ) -> None:
        self.module = module
        self._on_call = on_call
        self._watch = watch
        self._prefix = f"self.{path}." if path else "self."
        self._reads: dict[str, set[_Instruction]] = {}
        self._writes: dict[str, set[_Instruction]] = {}
        self._set_first: dict[str, None] = {}
        self._set_entries: dict[str, set[tuple[tuple[bool, Any], ...]]] = {}
        """The entries of each attribute that the step has set so far."""
        self._calls: dict[str, set[tuple[type, str]]] = {}
        """Classes and methods that the step calls of what is in an attribute."""
        self._refused: set[str] = set()
        """Attributes of which something else is called."""
        self._locations: dict[str, str] = {}
        classes = type(module).__mro__
        self._is_ordinary = not any(
            is_user_class(cls) and {"__getattribute__", "__setattr__", "__delattr__"} & {*vars(cls)}
            for cls in classes
        )
        """False if not all events are seen, or if setting an attribute runs code of the user's."""

    def on_read(self, name: str) -> None:
        """See :class:`~cg_lightning.modules.interception.ModuleHandler`."""
        frame = _accessing_frame()
        if frame is None or self._watch.is_paused or self._watch.is_in_framework:
            return
        if name != "__dict__":
            is_set = self._reads_what_is_set(name, frame)
            if not is_set:
                self._reads.setdefault(name, set()).add((frame.f_code, frame.f_lasti))
            if is_set or name in self._set_first:
                self._report_late_read(name)
        elif str(frame.f_globals.get("__name__")).split(".")[0] not in FRAMEWORKS:
            self._is_ordinary = False  # ``vars(self)["name"]``

    def on_write(self, name: str, value: Any) -> None:
        """See :class:`~cg_lightning.modules.interception.ModuleHandler`."""
        if name not in self._locations and not is_same_value(self._attributes.get(name), value):
            self._locations[name] = find_location().user
        frame = _accessing_frame()
        if frame is None or self._watch.is_paused or self._watch.is_in_framework:
            return
        if name not in self._reads:
            self._set_first[name] = None
        self._writes.setdefault(name, set()).add((frame.f_code, frame.f_lasti))

    def _report_late_read(self, name: str) -> None:
        """Report that the step reads a value that it has set, if a replay would read it later."""
        if (id(self.module), name) in self._watch.notes.late_targets:
            self._watch.report(Cause.HOST_SYNC, f"{self._prefix}{name}")

    def _reads_what_is_set(self, name: str, frame: FrameType) -> bool:
        """Return whether a line only reads an entry that the step has set; note what it sets."""
        value = self._attributes.get(name)
        if type(value) not in MAPPINGS and not is_plain_object(value):
            return False
        entry = entry_of(frame)
        if entry is None:
            return False
        done = self._set_entries.setdefault(name, set())
        if entry.is_set:
            if _holder(value, entry.steps) is not None:
                done.add(entry.steps)
            return False
        if any(entry.steps[:length] in done for length in range(1, len(entry.steps) + 1)):
            return True
        self._note_call(name, value, entry, frame)
        return False

    def _note_call(self, name: str, value: Any, entry: Entry, frame: FrameType) -> None:
        """Note a method that may be called in a statement of its own."""
        target, (is_key, method) = _holder(value, entry.steps), entry.steps[-1]
        if type(target) in MAPPINGS and (is_key, method) == (False, "update"):
            self._calls.setdefault(name, set()).add((type(target), method))
            return
        is_method = not is_key and is_plain_object(target) and method not in vars(target)
        if is_method and not _is_handled_around(frame):
            self._calls.setdefault(name, set()).add((type(target), method))
            self._on_call(target)
        else:
            self._refused.add(name)

    def refuse_calls(self) -> None:
        """Note that the step changes what methods were given: later calls would see the change."""
        self._refused.update(self._calls)

    @property
    def _attributes(self) -> dict[str, Any]:
        return namespace_of(self.module)

    def line_that_sets(self, name: str) -> str:
        """Return where an attribute was first set to another value; empty if nowhere."""
        return self._locations.get(name, "")

    def line_that_reads(self, name: str) -> str:
        """Return the line by which the value of an attribute decides what the step computes.

        That is a line that reads it, and neither adds to it nor sets an entry. Without one, it is a
        line that reads it at all. Empty if the user's code has no such line.
        """
        reads = [read for read in self._reads.get(name, ()) if is_user_file(read[0].co_filename)]
        deciding = [read for read in reads if use_of(*read) in (Use.OTHER, Use.CALL)]
        return min(map(_line_of, deciding or reads), default="")

    def set_first(self) -> list[str]:
        """Return the names of attributes that the step set before it read them."""
        frameworks = names_of_frameworks(self.module)
        stored = {*self._attributes, *slots_in(self.module)}
        return [name for name in self._set_first if name in stored and name not in frameworks]

    def changes(self, changed: Iterable[str]) -> list[ChangedAttribute]:
        """Return the attributes that a replay can change as the step did.

        Args:
            changed: Names of attributes that refer to something else after the step, or in which
                something has changed.
        """
        if not self._is_ordinary:
            return []
        set_first = [name for name in self.set_first() if self._can_be_set(name)]
        only_changed = [name for name in changed if self._is_only_changed(name)]
        return [
            *[self._changed(name, is_set=True) for name in set_first],
            *[self._changed(name) for name in only_changed],
        ]

    def _changed(self, name: str, is_set: bool = False) -> ChangedAttribute:
        uses = [] if is_set else [use_of(*read) for read in self._reads[name]]
        path = f"{self._prefix}{name}"
        is_added_to = Use.ADD in uses or Use.CALL in uses
        return ChangedAttribute(self.module, name, path, is_set, is_added_to)

    def _can_be_set(self, name: str) -> bool:
        """Whether a graph can make the value, and setting it runs no code of the user's."""
        if hasattr(value_in_class(type(self.module), name), "__set__"):
            return False
        return all(
            is_plain_value(leaf)
            or (
                isinstance(leaf, Tensor)
                and not isinstance(leaf, nn.Parameter)
                and leaf.grad_fn is None  # a replay would set a tensor without autograd graph
            )
            for leaf in flatten(self._attributes[name])[0]
        )

    def _is_only_changed(self, name: str) -> bool:
        if name in self._set_first or name not in self._attributes or name not in self._reads:
            return False
        if kind_to_change(self._attributes[name]) is None:
            return False
        uses = {use_of(*read) for read in self._reads[name]}
        if Use.OTHER in uses or not all(adds_to(*write) for write in self._writes.get(name, ())):
            return False
        calls = self._calls.get(name, set())
        return Use.CALL not in uses or (
            bool(calls) and name not in self._refused and all(map(_only_fills, calls))
        )


def _only_fills(call: tuple[type, str]) -> bool:
    kind, method = call
    return kind in MAPPINGS or accumulates(kind, method)


def _holder(value: Any, steps: tuple[tuple[bool, Any], ...]) -> Any:
    """Return the object that the last step is looked up in; None if a step before finds nothing."""
    for is_key, key in steps[:-1]:
        if is_key is not (type(value) in MAPPINGS) or not (is_key or is_plain_object(value)):
            return None
        value = value.get(key) if is_key else vars(value).get(key)
    return value


def _is_handled_around(frame: FrameType | None) -> bool:
    """Return whether an error of what a frame calls now may be handled in the step."""
    while frame is not None and not is_our_file(frame.f_code.co_filename):
        if is_exception_handled(frame):
            return True
        frame = frame.f_back
    return False


def _line_of(instruction: _Instruction) -> str:
    code, offset = instruction
    lines = [line for start, end, line in code.co_lines() if start <= offset < end]
    line = lines[0] if lines and lines[0] else code.co_firstlineno
    return file_and_line(code.co_filename, line)


class LastingValues:
    """What a step reads and what lives longer than it, other than parts of modules.

    If the step keeps such a value, it keeps the very object, and a replay would keep a copy.

    Args:
        watch: The step that is watched, at its end.
        changes: What the step changes.
    """

    def __init__(self, watch: StepWatch, changes: Iterable[ChangedAttribute]) -> None:
        changed = {(id(each.module), each.name) for each in changes}
        sources = [source for key, source in watch.step.sources.items() if key not in changed]
        values = [(source.path, source.value()) for source in sources]
        self._containers = ContainersSnapshot([("batch", watch.batch), *values])
        self._addresses = addresses_of(look_into([value for _, value in values]).tensors)

    def are_in(self, changed: ChangedAttribute) -> bool:
        """Return whether an attribute now holds one of them."""
        value = changed.attributes[changed.name]
        tensors = look_into(value).tensors
        if isinstance(value, Tensor):
            tensors = [value]
        return self._containers.holds(value) or bool(addresses_of(tensors) & self._addresses)
