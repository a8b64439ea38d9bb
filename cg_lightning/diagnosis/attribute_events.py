"""What a step does to the attributes of a module, event by event, and what a replay can do again.

There are two such things. An attribute may be *set* before anything reads it: the step cannot
depend on what was there. Or its value is only *changed*: each line that reads it appends to it,
adds to it or sets an entry (``uses_of_attribute.py``). An attribute of which one read is anything
else is state, and its value may decide what the step computes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.tree import flatten
from cg_lightning.diagnosis.findings import AT_THE_END, find_location, is_our_file
from cg_lightning.diagnosis.step_watch import StepWatch, look_into
from cg_lightning.diagnosis.uses_of_attribute import Use, adds_to, use_of
from cg_lightning.effects.containers import ContainersSnapshot
from cg_lightning.effects.python_changes import ChangedAttribute
from cg_lightning.guards.changed_values import kind_to_change
from cg_lightning.guards.values import addresses_of
from cg_lightning.modules.attributes import (
    is_same_value,
    names_of_frameworks,
    slots_in,
    value_in_class,
)
from cg_lightning.modules.interception import ModuleHandler
from cg_lightning.modules.kinds import is_user_class

_Instruction = tuple[CodeType, int]
_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "torchmetrics")


def _accessing_frame() -> FrameType | None:
    """Return the frame that reads or sets an attribute now; None if we do it ourselves."""
    # this function, the handler, and the function that the interception has put into the class
    frame = sys._getframe(3)
    return None if is_our_file(frame.f_code.co_filename) else frame


class AttributeEvents(ModuleHandler):
    """Notes reads and writes of the attributes of one module in a watched step.

    Args:
        watch: The step that is watched.
        path: The path of the module.
        module: The module.
    """

    def __init__(self, watch: StepWatch, path: str, module: nn.Module) -> None:
        self.module = module
        self._watch = watch
        self._prefix = f"self.{path}." if path else "self."
        self._reads: dict[str, set[_Instruction]] = {}
        self._writes: dict[str, set[_Instruction]] = {}
        self._set_first: dict[str, None] = {}
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
            self._reads.setdefault(name, set()).add((frame.f_code, frame.f_lasti))
        elif str(frame.f_globals.get("__name__")).split(".")[0] not in _FRAMEWORKS:
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

    @property
    def _attributes(self) -> dict[str, Any]:
        found: dict[str, Any] = object.__getattribute__(self.module, "__dict__")
        return found

    def location(self, name: str) -> str:
        """Return where an attribute was first set to another value."""
        return self._locations.get(name, AT_THE_END)

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
        return ChangedAttribute(self.module, name, path, is_set, Use.ADD in uses)

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
        return all(use_of(*read) is not Use.OTHER for read in self._reads[name]) and all(
            adds_to(*write) for write in self._writes.get(name, ())
        )


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
