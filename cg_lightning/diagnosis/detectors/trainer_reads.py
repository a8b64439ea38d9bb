"""Values of the Trainer that a step reads: plain ones are guarded, and others are findings.

``self.trainer`` returns the whole Trainer, and later reads of its attributes cannot be observed.
But line and column of the read are known: if the source there is ``self.trainer.sanity_checking``,
nothing else is read. ``self.current_epoch > 3`` is guarded by its outcome, ``self.current_epoch``
by its value.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.diagnosis.compared_expressions import comparisons_with_constants, is_test
from cg_lightning.diagnosis.definitions import Parents, node_at
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import find_line, reading_frame
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.guards.comparisons import ComparedSource
from cg_lightning.guards.sources import Source
from cg_lightning.guards.trainer_values import (
    NAMES_OF_MODULE,
    NAMES_OF_TRAINER,
    OBJECTS,
    TrainerTypes,
    TrainerValues,
)
from cg_lightning.modules.interception import Interception, ModuleHandler
from cg_lightning.modules.kinds import is_lightning_module, is_user_file, lightning_class


class ReadNames(ModuleHandler):
    """Reports reads of some attributes, unless Lightning itself reads them in ``self.log``."""

    def __init__(
        self, watch: StepWatch, module: nn.Module, cause: Cause, names: tuple[str, ...]
    ) -> None:
        self._watch = watch
        self._cause = cause
        self._names = names
        cls = lightning_class(type(module), "LightningModule")
        self._overridden = {
            name
            for name in names
            if getattr(type(module), name, None) is not getattr(cls, name, None)
        }
        """Names that the user's class overrides: their values may be of any kind."""
        self._values = TrainerValues(module)
        self._types = TrainerTypes(module)
        self._last: tuple[str, int, int] | None = None
        """The last read of such a property: its name, and where in which frame."""

    def on_read(self, name: str) -> None:
        if name not in self._names or self._watch.is_in_framework or self._watch.is_paused:
            return
        frame = reading_frame()
        is_user = frame is not None and is_user_file(frame.f_code.co_filename)
        if name.startswith("_") and not is_user:  # ``self.trainer`` reads it as well
            return
        if frame is None:
            self._watch.report(self._cause, f"self.{name}")
            return
        outer, asked = reading_frame(frame.f_back), frame.f_code.co_name
        if outer is not None and not is_user and asked in NAMES_OF_MODULE:
            # the property asks the Trainer; ``super().current_epoch`` does not come here before
            is_known = self._last == (asked, id(outer), outer.f_lasti)
            if not (is_known or self._guard_value(asked)):
                self._watch.report(self._cause, f"self.{asked}")
            return
        if name in NAMES_OF_MODULE:
            self._last = (name, id(frame), frame.f_lasti)
        if name in self._overridden or not self._is_guarded(name, frame):
            self._watch.report(self._cause, f"self.{name}")

    def _is_guarded(self, name: str, frame: FrameType) -> bool:
        """Guard what a frame reads, if it is a plain value, or asked whether it is there."""
        node, parents = node_at(frame)
        if not isinstance(node, ast.Attribute) or node.attr != name:
            return name in NAMES_OF_MODULE and self._guard_value(name)
        if name in NAMES_OF_MODULE:
            return self._guard_number(name, node, parents)
        if name != "trainer":
            return name in OBJECTS and self._guard_type(name, node, parents)
        outer = parents[node]
        if self._types.get("", None) is type(None):  # the step stops here
            return False
        if not (isinstance(outer, ast.Attribute) and isinstance(outer.ctx, ast.Load)):
            return self._guard_type("", node, parents)
        path, inner = outer.attr, parents[outer]
        if path == "state" and isinstance(inner, ast.Attribute):
            return self._guard_value(f"state.{inner.attr}", "self.trainer.")
        if path in NAMES_OF_MODULE:
            return self._guard_number(path, outer, parents)
        if path in OBJECTS:
            return self._guard_type(path, outer, parents)
        return self._guard_value(path, "self.trainer.")

    def _guard_value(self, name: str, owner: str = "self.") -> bool:
        if name not in NAMES_OF_TRAINER:
            return False
        source = Source(self._values, name, f"{owner}{name}")
        try:
            value = source.value()
        except AttributeError:  # of another version of Lightning: the step will say so
            return False
        if is_plain_value(value):
            self._watch.read(source)
        return is_plain_value(value)

    def _guard_number(self, name: str, node: ast.AST, parents: Parents) -> bool:
        comparisons = comparisons_with_constants(node, parents)
        if comparisons is None:
            return self._guard_value(name)
        source = Source(self._values, name, f"self.{name}", find_line())
        self._watch.compare(ComparedSource.now(source, comparisons))
        return True

    def _guard_type(self, name: str, node: ast.AST, parents: Parents) -> bool:
        """Guard ``self.logger is not None`` and ``isinstance(self.logger, ...)`` by the type."""
        source = Source(self._types, name, f"type(self.{name or 'trainer'})")
        if not (_is_none_asked(node, parents) or _is_type_asked(node, parents)):
            has_truth = {"__bool__", "__len__"}.intersection(dir(source.value()))
            if not is_test(node, parents) or (has_truth and source.value() is not type(None)):
                return False
        self._watch.read(source)
        return True


def _is_none_asked(node: ast.AST, parents: Parents) -> bool:
    outer = parents[node]
    if not isinstance(outer, ast.Compare) or len(outer.ops) > 1 or outer.left is not node:
        return False
    other: Any = outer.comparators[0]
    is_none = isinstance(other, ast.Constant) and other.value is None
    return is_none and isinstance(outer.ops[0], (ast.Is, ast.IsNot))


def _is_type_asked(node: ast.AST, parents: Parents) -> bool:
    outer = parents[node]
    if not isinstance(outer, ast.Call) or not outer.args or outer.args[0] is not node:
        return False
    return isinstance(outer.func, ast.Name) and outer.func.id == "isinstance"


@contextlib.contextmanager
def noticed_reads(watch: StepWatch, cause: Cause, names: tuple[str, ...]) -> Iterator[None]:
    """While this is entered, reads of some attributes of LightningModules are noticed."""
    with contextlib.ExitStack() as stack:
        for _, module in watch.modules:
            is_lightning = is_lightning_module(module)
            if is_lightning and id(module) not in watch.hidden:
                handler = ReadNames(watch, module, cause, names)
                stack.callback(Interception(module, handler).remove)
        yield


class TrainerReads(Detector):
    """Reports reads of ``self.trainer`` and of what it counts, unless they can be guarded."""

    def around_step(self) -> contextlib.AbstractContextManager[None]:
        names = ("trainer", "_trainer", *sorted(NAMES_OF_MODULE))
        return noticed_reads(self.watch, Cause.TRAINER_READ, names)
