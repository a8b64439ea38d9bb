"""The backward of a training step, and the gradients that the step reads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import CodeType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.core.causes import Cause
from cg_lightning.core.closure import ClosureOutput, GradientsAside, UnfinishedClosure
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.lines import Elsewhere
from cg_lightning.diagnosis.contents import UnreadableError, look_into
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.detectors.logging import LOGGING_METHODS
from cg_lightning.diagnosis.findings import reading_frame
from cg_lightning.diagnosis.operands import addresses_in
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.guards.gradient_memory import GradientsElsewhere
from cg_lightning.guards.sources import Source
from cg_lightning.guards.values import FrozenValues, addresses_of
from cg_lightning.modules.attributes import backward_hooks_of
from cg_lightning.modules.interception import replaced_method
from cg_lightning.modules.kinds import is_our_file

_TORCH = Path(torch.__file__).parent
_HARMLESS = {
    (str(_TORCH / "_tensor.py"), "__deepcopy__"),  # of a copy's gradient, that is reported if read
    (str(_TORCH / "nn/modules/module.py"), "_apply"),  # of ``to``, which moves it as well
    (str(_TORCH / "utils/checkpoint.py"), "<genexpr>"),  # of inputs that its backward has made
}
"""Where PyTorch reads or sets gradients for itself: files and functions."""
_RUN_ENGINE = getattr(torch.autograd.graph, "_engine_run_backward", None)  # private
"""What runs the nodes of autograd that are written in C++."""


class Backward(Detector):
    """Reports a backward that a graph of the closure cannot hold.

    A graph computes new gradients, and the parameters have those of the iteration before until
    then. So a step must neither read nor set ``parameter.grad``, and its backward must not read
    memory of a gradient; what it has read must hold none later. Other tensors have no gradients
    after a replay, so a step must not ask for them by ``retain_grad``. What the backward logs
    belongs to another hook than the step.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._aside: GradientsAside | None = None
        self._addresses: set[int] = set()
        """The addresses of the gradients that are set aside."""
        self._read: set[int] = set()
        """The addresses of the tensors that code in the backward reads."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        if not self.watch.has_backward:
            yield
            return
        with contextlib.ExitStack() as stack:
            for name in LOGGING_METHODS:
                stack.enter_context(replaced_method(self.watch.root, name, self._replace(name)))
            stack.enter_context(self._noticing_gradients())
            yield
        self._aside = None

    def returned(self, call: ModuleCall, output: Any) -> None:
        if call is not self.watch.step:
            return
        if isinstance(output, UnfinishedClosure):
            self.watch.report(Cause.BACKWARD, output.problem, location=Elsewhere.NOT_YOURS)
        elif isinstance(output, ClosureOutput):
            self._keep_gradients_away()
            for name, gradient in (output.gradients or {}).items():
                if gradient is not None and gradient.layout is not torch.strided:
                    words = f"the gradient of {name} is sparse"
                    self.watch.report(Cause.BACKWARD, words, location=Elsewhere.NOT_YOURS)

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        aside = _aside()
        if aside is None or aside.are_given:
            return
        if aside is not self._aside:
            self._aside, self._addresses = aside, addresses_of(aside.gradients)
        is_python = _is_in_python()
        if not (self._addresses or is_python):
            return
        read = addresses_in([*args, *kwargs.values()])
        if read & self._addresses:
            self._note("the backward reads memory of a gradient")
        elif is_python:
            self._read |= read

    def _keep_gradients_away(self) -> None:
        """Note that no later gradient may be in memory that code in the backward has read."""
        if not self._read:
            return
        lasting = addresses_of(self.watch.root.buffers())
        for _, contents in _what_is_read(self.watch):
            lasting |= addresses_of(contents.tensors)
        if read := self._read & lasting:
            self.watch.compare(GradientsElsewhere(self.watch.root.parameters(), read))

    def _replace(self, name: str) -> Callable[..., Any]:
        def log(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            aside = _aside()
            if aside is not None and aside.has_begun:
                self.watch.report_unless_found(Cause.BACKWARD, f"self.{name} in the backward")
            return original(*args, **kwargs)

        return log

    def _note(self, words: str) -> None:
        """Report what the step does with gradients, and give it those of eager."""
        self.watch.report(Cause.BACKWARD, words)
        aside = _aside()
        if aside is not None:
            with self.watch.paused():
                aside.give()

    @contextlib.contextmanager
    def _noticing_gradients(self) -> Iterator[None]:
        inherited: Any = Tensor.grad  # of a base class that is written in C
        original: Any = Tensor.retain_grad
        watch = self.watch
        inside = 0  # a function mode calls these functions again for the same access

        @contextlib.contextmanager
        def noted(words: str) -> Iterator[None]:
            nonlocal inside
            code = sys._getframe(3).f_code  # this, __enter__, the property, its user
            aside = _aside()
            is_given = aside is not None and aside.are_given  # and noted, by whoever gave them
            is_quiet = inside or watch.is_paused or is_given
            if not (is_quiet or is_our_file(code.co_filename) or _is_harmless(code)):
                self._note(words)
            inside += 1
            try:
                yield
            finally:
                inside -= 1

        def get(tensor: Tensor) -> Tensor | None:
            with noted("the step reads a gradient"):
                return inherited.__get__(tensor)  # type: ignore[no-any-return]

        def set_gradient(tensor: Tensor, gradient: Tensor | None) -> None:
            with noted("the step sets a gradient"):
                inherited.__set__(tensor, gradient)

        def delete(tensor: Tensor) -> None:
            with noted("the step sets a gradient"):
                inherited.__delete__(tensor)

        def retain_grad(tensor: Tensor) -> None:
            watch.report(Cause.BACKWARD, "retain_grad")
            original(tensor)

        grad = property(get, set_gradient, delete)
        with patch.object(Tensor, "grad", grad), patch.object(Tensor, "retain_grad", retain_grad):
            yield


def report_older_graphs(watch: StepWatch) -> None:
    """Report autograd graphs and backward hooks that existed before the step.

    A graph holds no part of such an autograd graph, and nothing reports a hook that is added to
    its tensors. Call it after all detectors: by then, containers to which the step adds its own
    tensors count no longer as read.
    """

    def look_at(path: str, tensors: Iterable[Tensor], line: str = "") -> None:
        if any(tensor.requires_grad and not tensor.is_leaf for tensor in tensors):
            words = f"{path} brings an autograd graph from before the step"
            watch.report(Cause.BACKWARD, words, location=line or Elsewhere.NOT_YOURS)

    look_at("the batch", watch.step.inputs)
    for name, buffer in watch.root.named_buffers():
        look_at(f"self.{name}", [buffer])
    for source, contents in _what_is_read(watch):
        look_at(source.path, contents.tensors, source.line)
        for module in chain.from_iterable(each.modules() for each in contents.modules):
            if id(module) in watch.inside_root:
                continue
            look_at(source.path, module.buffers(), source.line)
            if any(backward_hooks_of(module)):
                words = f"a backward hook of {type(module).__name__}"
                watch.report(Cause.BACKWARD, words, location=source.line or Elsewhere.NOT_YOURS)


def _what_is_read(watch: StepWatch) -> list[tuple[Source, FrozenValues]]:
    """Return what the step has read, and what is inside; without what cannot be read."""
    found = []
    with watch.paused():
        for source in list(watch.step.sources.values()):
            with contextlib.suppress(UnreadableError):  # reported where the source was noted
                found.append((source, look_into(source.value())))
    return found


def _aside() -> GradientsAside | None:
    """Return the gradients that are set aside during the backward of the step; None before it."""
    context = current_forward_context()
    return None if context is None or context.step is None else context.step.aside


def _is_harmless(code: CodeType) -> bool:
    """Return True for functions of PyTorch in which a gradient decides nothing."""
    return (code.co_filename, code.co_name) in _HARMLESS


def _is_in_python() -> bool:
    """Return True if code in Python makes an operation of the backward, and no node in C++."""
    frame = reading_frame(sys._getframe(2))
    return frame is None or _RUN_ENGINE is None or frame.f_code is not _RUN_ENGINE.__code__
