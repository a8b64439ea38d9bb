"""Attributes of parameters, buffers and inputs that a step reads: ``.grad``, ``weight.scale``.

Such attributes are in the dictionary of a tensor, whose class is written in C. While a step is
watched, the class has properties with their names, so each read is observed. Names that no tensor
has yet are observed as well: ``getattr(weight, "scale", 1.0)``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import names_on
from cg_lightning.core.lines import Elsewhere
from cg_lightning.diagnosis.contents import UnreadableError, look_into
from cg_lightning.diagnosis.detector import ReplacingDetector
from cg_lightning.diagnosis.findings import is_called_by_step, is_read_by_user
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.guards.sources import Source
from cg_lightning.guards.values import FrozenValues
from cg_lightning.modules.kinds import is_our_file, is_user_file


class TensorAttributes(ReplacingDetector):
    """Notes attributes of parameters and buffers, and reports gradients that an evaluation reads.

    Training replaces gradients, so a graph would read those that were there when it was captured.
    In training, ``Backward`` watches gradients.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._tensors: dict[int, tuple[str, Tensor]] = {
            id(tensor): (f"self.{name}", tensor)
            for name, tensor in chain(watch.root.named_parameters(), watch.root.named_buffers())
        }
        self._inputs = {id(tensor): tensor for tensor in watch.step.inputs}
        self._read_values: dict[tuple[int, str], tuple[Source, FrozenValues]] = {}
        """What was read, and what is inside."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        before = [(path, tensor, names_on(tensor)) for path, tensor in self._tensors.values()]
        try:
            with self.replacing():
                yield
            line = self.watch.line_that_may_read_unseen()
            if line and any(map(names_on, self._inputs.values())):
                words, calls = _of_batch("vars()"), self.watch.calls()
                self.watch.report(Cause.OPAQUE, words, location=line, module="", calls=calls)
        finally:
            self._inputs.clear()  # detectors and their watch are garbage that is not yet collected
        for path, tensor, names in before:
            if names_on(tensor) != names:
                self._report_change(f"attributes of {path}", self.watch.calls())
        for source, contents in self._read_values.values():
            with self.watch.paused():
                is_same = contents.hold()
            if not is_same:
                readers = [call for call in self.watch.calls() if source.key in call.sources]
                self._report_change(source.path, readers)

    def _is_held(self, tensor: Tensor) -> bool:
        """Return whether a value that the step has read holds a tensor."""
        with self.watch.paused():
            for source in list(self.watch.step.sources.values()):
                with contextlib.suppress(UnreadableError):
                    if any(each is tensor for each in look_into(source.value()).tensors):
                        return True
        return False

    def _report_change(self, words: str, calls: list[ModuleCall]) -> None:
        self.watch.report(
            Cause.STATE_REBOUND, words, location=Elsewhere.AT_THE_END, module="", calls=calls
        )

    def replace(self, replaced: contextlib.ExitStack) -> None:
        inherited: Any = Tensor.grad  # of a base class that is written in C

        def gradient(tensor: Tensor) -> Tensor | None:
            code = sys._getframe(1).f_code
            # ``self.half()`` only moves them; a profiler reads them in the middle of other code
            is_read = (
                "grad" in (*code.co_names, *code.co_consts)
                and code is not nn.Module._apply.__code__
                and not is_our_file(code.co_filename)
            )
            if is_read and not self.watch.is_paused:
                if id(tensor) in self._tensors:
                    self.watch.report(Cause.OPAQUE, f"{self._tensors[id(tensor)][0]}.grad")
                elif id(tensor) in self._inputs and is_called_by_step(__file__):
                    self.watch.report(Cause.OPAQUE, _of_batch("grad"))
                elif is_user_file(code.co_filename) and self._is_held(tensor):
                    self.watch.report(Cause.OPAQUE, "grad, the gradient of a tensor")
            return inherited.__get__(tensor)  # type: ignore[no-any-return]

        def reported(name: str, words: str) -> property:
            member: Any = getattr(Tensor, name)

            def get(tensor: Tensor) -> Any:
                if is_read_by_user():
                    self.watch.report(Cause.OPAQUE, f"{name}, {words}")
                return member.__get__(tensor)

            return property(get, member.__set__, member.__delete__)

        def reporting(name: str, method: Any) -> Any:
            def report(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                if is_read_by_user() and id(tensor) not in self._tensors:
                    self.watch.report(Cause.OPAQUE, f"torch.Tensor.{name}")
                return method(tensor, *args, **kwargs)

            return report

        def missing(tensor: Tensor, name: str) -> Any:
            # libraries ask for many names, to find out what kind of object it is
            if id(tensor) in self._inputs and is_read_by_user() and not name.startswith("__"):
                self.watch.report(Cause.OPAQUE, _of_batch(name))
            self._read(tensor, name)
            raise AttributeError(f"{type(tensor).__name__!r} object has no attribute {name!r}")

        tensors = [*[tensor for _, tensor in self._tensors.values()], *self._inputs.values()]
        names = {name for tensor in tensors for name in names_on(tensor)}
        members: dict[str, Any] = {
            name: self._property(name) for name in names if not hasattr(Tensor, name)
        }
        if not self.watch.has_backward:
            members["grad"] = property(gradient, inherited.__set__, inherited.__delete__)
        # a replay writes without a count
        members["_version"] = reported("_version", "how often a tensor was written to")
        members["_base"] = reported("_base", "of which a tensor is a view")
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            members[name] = reported(name, "the hooks of a tensor")
        for name in ("storage", "_typed_storage", "is_shared"):  # written in Python
            members[name] = reporting(name, getattr(Tensor, name))
        if not hasattr(Tensor, "__getattr__"):
            members["__getattr__"] = missing
        for name, value in members.items():
            replaced.enter_context(patch.object(Tensor, name, value, create=True))

    def _property(self, name: str) -> property:
        def get(tensor: Tensor) -> Any:
            attributes = vars(tensor)
            if name not in attributes:
                raise AttributeError(f"{type(tensor).__name__!r} object has no attribute {name!r}")
            if id(tensor) in self._inputs and is_called_by_step(__file__):
                # no key has it
                self.watch.report(Cause.OPAQUE, _of_batch(name))
            self._read(tensor, name)
            return attributes[name]

        def set_(tensor: Tensor, value: Any) -> None:
            if id(tensor) in self._tensors:
                path = f"{self._tensors[id(tensor)][0]}.{name}"
                self.watch.report(Cause.STATE_REBOUND, path)
            vars(tensor)[name] = value

        def delete(tensor: Tensor) -> None:
            if name not in vars(tensor):
                raise AttributeError(name)
            del vars(tensor)[name]

        return property(get, set_, delete)

    def _read(self, tensor: Tensor, name: str) -> None:
        """Note that an attribute is read, or asked for where there is none."""
        if id(tensor) not in self._tensors or self.watch.is_paused or name.startswith("__"):
            return
        if not is_called_by_step(__file__):
            return
        source = Source(vars(tensor), name, f"{self._tensors[id(tensor)][0]}.{name}")
        if source.key not in self._read_values:
            with self.watch.paused():
                value = source.value()
            try:
                contents = look_into(value, source.path)
            except UnreadableError as error:
                self.watch.report(Cause.STATE_REBOUND, f"{source.path} {error}")
                return
            self._read_values[source.key] = (source, contents)
        for words in self._read_values[source.key][1].opaque():
            self.watch.report(Cause.OPAQUE, words)
        self.watch.read(source)


def _of_batch(name: str) -> str:
    return f"{name}, an attribute of a tensor of the batch"
