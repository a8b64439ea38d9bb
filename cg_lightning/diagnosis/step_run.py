"""How a watched step runs: under our dispatch mode, as it is written, with its observers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cg_lightning.backends.dispatch_mode import EagerDispatchMode


class Observer:
    """Receives what a watched step does. It overrides the methods that it needs."""

    sees_compiled_code: ClassVar[bool] = False
    """Whether it goes on while a network that the callback compiles runs as it is written."""

    def around_update(self) -> AbstractContextManager[None]:
        """Is entered before a call of a metric that may follow the step, and left after it."""
        return contextlib.nullcontext()

    def before_read(self, tensor: Tensor) -> None:
        """Is called before the step reads a tensor of the host, if no operation shows that."""

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Is called before each dispatched operation."""

    def after_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Is called after each dispatched operation."""

    def suspended(self) -> AbstractContextManager[None]:
        """Is entered while code runs that ``torch.compile`` made; it must meet nothing of ours."""
        return contextlib.nullcontext()


class StepRun:
    """The run of one watched step, from the first operation to the last."""

    def __init__(self) -> None:
        self._observers: Sequence[Observer] = ()
        self._mode: EagerDispatchMode | None = None
        self._stance: Any = None

    @property
    def is_autocast_enabled(self) -> bool:
        """Whether autocast is on in the code that runs now."""
        assert self._mode is not None, "the step runs"
        return self._mode.is_autocast_enabled

    @contextlib.contextmanager
    def running(self, mode: EagerDispatchMode, observers: Sequence[Observer]) -> Iterator[None]:
        """While the step runs.

        Functions that ``torch.compile`` made run as they were written; under a dispatch mode they
        would do so for good.

        Args:
            mode: Dispatches the operations of the step.
            observers: Receive everything else.
        """
        self._mode, self._observers = mode, observers
        with mode.watching():
            # the stance is set when its object is made, so this comes last
            self._stance = torch.compiler.set_stance("force_eager")
            try:
                yield
            finally:
                self._stance.__exit__(None, None, None)

    @contextlib.contextmanager
    def suspended_for_compiled_code(self, as_written: bool) -> Iterator[None]:
        """While a compiled module runs. It runs compiled, and without our modes and functions.

        Args:
            as_written: Whether it runs as it is written instead, and its calls are reported.
        """
        with contextlib.ExitStack() as stack:
            for observer in self._observers:
                if not (as_written and observer.sees_compiled_code):
                    stack.enter_context(observer.suspended())
            if not as_written:
                self._stance.__exit__(None, None, None)
            try:
                with self.mode_left():
                    yield
            finally:
                if not as_written:
                    self._stance = torch.compiler.set_stance("force_eager")

    @contextlib.contextmanager
    def mode_left(self) -> Iterator[None]:
        """Run without our dispatch mode, if it is the innermost one."""
        mode = self._mode
        if mode is None or mode is not _get_current_dispatch_mode():
            yield
            return
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            mode.__enter__()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """While a call of a metric runs that may follow the step."""
        with contextlib.ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.around_update())
            yield

    def before_read(self, tensor: Tensor) -> None:
        """Report a tensor of the host that the step reads, which no operation shows."""
        for observer in self._observers:
            observer.before_read(tensor)
