"""Attributes of containers of the batch that are no items: ``batch.scale`` of a dictionary.

Keys have the items only. While a step is watched, the class of such a container has properties with
the names of its attributes, so each read is observed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.lines import Elsewhere
from cg_lightning.core.tree import containers_in
from cg_lightning.diagnosis.detector import ReplacingDetector
from cg_lightning.diagnosis.findings import is_called_by_step, reading_frame
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.guards.sources import MISSING
from cg_lightning.modules.attributes import attributes_beside_items
from cg_lightning.modules.kinds import is_framework_file, is_users_namespace, is_value_of_class


class BatchAttributes(ReplacingDetector):
    """Reports attributes of containers of the batch that a step reads or asks for."""

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._names: dict[type, set[str]] = {}
        """The names by the class of the container."""
        for each in containers_in(watch.batch, has_tuples=True):
            cls: type = type(each)
            if cls.__dictoffset__ and cls is not collections.OrderedDict:
                self._names.setdefault(cls, set()).update(_names_in(each))

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        self._report_keys(self.watch.batch, self.watch.step)
        with self.replacing():
            yield
        # a dataclass has all that it usually has in fields, which are part of the key
        found = [
            cls for cls, names in self._names.items() if names or not dataclasses.is_dataclass(cls)
        ]
        if found and (line := self.watch.line_that_may_read_unseen()):
            self._report("vars()", location=line, module="", calls=self.watch.calls())

    def around_call(self, call: ModuleCall) -> contextlib.AbstractContextManager[None]:
        self._report_keys(call.given, call)
        return contextlib.nullcontext()

    def _report_keys(self, given: Any, call: ModuleCall) -> None:
        """Report keys of mappings that are objects: what they hold is in no key of ours."""
        for each in containers_in(given):
            if isinstance(each, Mapping) and not all(map(_is_plain_key, each)):
                words = f"an object as a key of a {type(each).__name__} of the batch"
                self.watch.report(Cause.OPAQUE, words, location=Elsewhere.AT_THE_END, calls=[call])

    def replace(self, replaced: contextlib.ExitStack) -> None:

        def missing(container: Any, name: str) -> Any:
            if not (name.startswith("__") or _is_asked_by_framework()):
                self._report(name)
            raise AttributeError(f"{type(container).__name__!r} object has no attribute {name!r}")

        for cls, names in self._names.items():
            defaults = _values_of(cls)
            members: dict[str, Any] = {
                name: self._property(name, defaults.get(name, MISSING))
                for name in {*names, *defaults}
                if name in defaults or not hasattr(cls, name)
            }
            if not hasattr(cls, "__getattr__"):
                members["__getattr__"] = missing
            for name, value in members.items():
                replaced.enter_context(patch.object(cls, name, value, create=True))

    def _report(self, name: str, **where: Any) -> None:
        words = f"{name}, an attribute of a container of the batch"
        self.watch.report(Cause.OPAQUE, words, **where)

    def _property(self, name: str, default: Any) -> property:
        """Return a property for an attribute, with the value that the class has for it."""

        def get(container: Any) -> Any:
            value = vars(container).get(name, default)
            if value is MISSING:
                raise AttributeError(name)
            if is_called_by_step(__file__):
                self._report(name)
            return value

        def set_(container: Any, value: Any) -> None:
            vars(container)[name] = value

        def delete(container: Any) -> None:
            if name not in vars(container):
                raise AttributeError(name)
            del vars(container)[name]

        return property(get, set_, delete)


def _values_of(cls: type) -> dict[str, Any]:
    """Return the values that instances of a user's class may hide by attributes of their own."""
    fields = getattr(cls, "__dataclass_fields__", ())
    return {
        name: value
        for base in reversed(cls.__mro__)
        if is_users_namespace(base)
        for name, value in vars(base).items()
        if name[0] != "_" and name not in fields and is_value_of_class(value)
        if not (isinstance(value, type) or hasattr(type(value), "__get__"))
    }


def _is_asked_by_framework() -> bool:
    """Return whether a framework, or Python itself, asks what kind of object it is."""
    frame = reading_frame()
    return frame is None or is_framework_file(frame.f_code.co_filename)


def _is_plain_key(key: Any) -> bool:
    """Return whether nothing in the key of a mapping can change."""
    return all(map(_is_plain_key, key)) if type(key) is tuple else is_plain_value(key)


def _names_in(container: Any) -> set[str]:
    names = {*vars(container)} & {*attributes_beside_items(container)}
    return names - {"data"} if isinstance(container, collections.UserDict) else names
