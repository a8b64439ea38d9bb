"""The current step: its runtime mode and its key. Wrappers read it and trust it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from cg_lightning.core.closure import GradientsAside
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import Reason

_RUNTIME_MODES = frozenset(mode for mode in CUDAGraphMode if mode.is_valid_runtime_mode())


class StepInProgress:
    """The record of one step: which calls of submodules it made, and how they ran.

    The runner of the step makes and reads it. The runners of submodules report to it, because the
    user's code lies between them and the runner of the step.

    Args:
        batch: The batch, if submodules pad the parts of it that they are given; otherwise None.
        times: Stores the times of submodules; None: they are not taken. Only the runners use it.
    """

    __slots__ = (
        "_aside",
        "_calls",
        "batch",
        "graphs",
        "has_collective",
        "hook",
        "is_warm",
        "misses",
        "reasons",
        "times",
    )

    def __init__(self, batch: Any = None, times: Any = None) -> None:
        self._calls: dict[int, int] = {}
        self.batch = batch
        self.times = times
        self._aside: GradientsAside | None = None
        self.graphs = 0
        """Number of calls of submodules that ran from graphs."""
        self.hook = ""
        """The hook of a training closure that runs now; empty if the step or the backward runs."""
        self.has_collective = False
        """Whether the step was seen to run an operation of several processes."""
        self.is_warm = True
        """False if a call took longer than a replay, because of a capture for example."""
        self.misses: list[Any] = []
        """Submodules whose guarded values no watched step has seen. Only the runners read them."""
        self.reasons: dict[str, Reason] = {}
        """Why a submodule ran eagerly, by its path."""

    @property
    def aside(self) -> GradientsAside | None:
        """The gradients that are set aside during a backward; None outside of it."""
        return self._aside

    @contextlib.contextmanager
    def in_backward(self, aside: GradientsAside) -> Iterator[None]:
        """While this is entered, the backward runs, and these gradients are set aside."""
        self._aside = aside
        try:
            yield
        finally:
            self._aside = None

    def ran_from_graph(self) -> None:
        """Record a call of a submodule that ran from a graph."""
        self.graphs += 1

    def ran_eagerly(self, path: str, reason: Reason) -> None:
        """Record why a call of the submodule at ``path`` ran eagerly."""
        self.reasons[path] = reason

    def ran_collective(self) -> None:
        """Record that the step runs an operation of several processes."""
        self.has_collective = True

    def took_longer(self) -> None:
        """Record that a call took longer than a replay, so the time of the step does not count."""
        self.is_warm = False

    def missed(self, miss: Any) -> None:
        """Record a submodule whose guarded values no watched step has seen."""
        self.misses.append(miss)

    @contextlib.contextmanager
    def inside_timed_call(self) -> Iterator[None]:
        """While this is entered, a call runs whose time is taken. Calls inside it have no time."""
        times, self.times = self.times, None
        try:
            yield
        finally:
            self.times = times

    def next_call(self, caller: object) -> int:
        """Return the number of this call among those that ``caller`` makes."""
        number = self._calls.get(id(caller), 0)
        self._calls[id(caller)] = number + 1
        return number


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """The facts that a wrapper needs about the current step (vLLM: ``vllm/forward_context.py``).

    Open it with :func:`set_forward_context`. It does *not* store a batch or a module.

    Example::

        >>> from cg_lightning import BatchDescriptor, CUDAGraphMode, ForwardContext
        >>> context = ForwardContext(CUDAGraphMode.FULL, BatchDescriptor(batch_size=8))
        >>> context.cudagraph_runtime_mode.name, context.batch_descriptor.batch_size
        ('FULL', 8)

    Raises:
        ValueError: ``cudagraph_runtime_mode`` is a policy, or not a mode.
    """

    cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE
    """NONE, PIECEWISE or FULL."""
    batch_descriptor: BatchDescriptor | None = None
    """The key of the step. It may be None in mode NONE."""
    step: StepInProgress | None = dataclasses.field(default=None, repr=False, compare=False)
    """The record of the step so far.

    Only a step runner sets it, because a context that a user opens is not a step.
    """

    def __post_init__(self) -> None:
        mode = self.cudagraph_runtime_mode
        if mode not in _RUNTIME_MODES:
            raise ValueError(
                f"cudagraph_runtime_mode={mode!r} is not a runtime mode; "
                "choose NONE, PIECEWISE or FULL."
            )

    def next_call(self, caller: object) -> int:
        """Return the number of this call of ``caller`` within the step; 0 outside of steps."""
        return 0 if self.step is None else self.step.next_call(caller)


# a ContextVar is empty in a new thread, so a step never affects wrappers that other threads call
_current: ContextVar[ForwardContext | None] = ContextVar(
    "cg_lightning_forward_context", default=None
)

current_forward_context = _current.get
"""Return the current context, or None."""
enter_forward_context = _current.set
"""Make a context the current one, for steps that have no time for a context manager."""
leave_forward_context = _current.reset
"""Make the one before current again. It takes what :func:`enter_forward_context` has returned."""


def is_forward_context_available() -> bool:
    """Return True if this thread has a forward context (vLLM: ``vllm/forward_context.py``).

    Example::

        >>> from cg_lightning import is_forward_context_available, set_forward_context
        >>> is_forward_context_available()
        False
        >>> with set_forward_context():
        ...     is_forward_context_available()
        True
    """
    return _current.get() is not None


def get_forward_context() -> ForwardContext:
    """Return the current forward context of this thread (vLLM: ``vllm/forward_context.py``).

    Example::

        >>> from cg_lightning import get_forward_context, set_forward_context
        >>> with set_forward_context():
        ...     get_forward_context().cudagraph_runtime_mode.name
        'NONE'

    Returns:
        The context that :func:`set_forward_context` opened, or that of the callback's step.

    Raises:
        RuntimeError: There is no context.
    """
    context = _current.get()
    if context is None:
        raise RuntimeError(
            "No forward context is set: enter one with set_forward_context(...) first."
        )
    return context


class _Override:  # a class, because every step enters it and a generator takes three times as long
    __slots__ = ("_context", "_token")

    def __init__(self, context: ForwardContext | None) -> None:
        self._context = context

    def __enter__(self) -> ForwardContext | None:
        self._token = _current.set(self._context)
        return self._context

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


def override_forward_context(
    forward_context: ForwardContext | None,
) -> contextlib.AbstractContextManager[ForwardContext | None]:
    """While this is entered, ``forward_context`` is the current one of this thread.

    At exit the earlier context is restored. vLLM has the same function
    (``vllm/forward_context.py``).

    Example::

        >>> from cg_lightning import is_forward_context_available, override_forward_context
        >>> from cg_lightning import set_forward_context
        >>> with set_forward_context(), override_forward_context(None):
        ...     is_forward_context_available()
        False

    Args:
        forward_context: The context. None means no context, so that wrappers call their runnables.
    """
    return _Override(forward_context)


@contextlib.contextmanager
def set_forward_context(
    cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    batch_descriptor: BatchDescriptor | None = None,
) -> Iterator[ForwardContext]:
    """While this is entered, wrappers of this thread run in the given mode, with the given key.

    Use it in a loop of your own. The callback opens its contexts itself. It does *not* affect other
    threads, and it does *not* check that the key fits the batch. The name follows vLLM
    (``vllm/forward_context.py``).

    Example::

        >>> from cg_lightning import BatchDescriptor, CUDAGraphMode, get_forward_context
        >>> from cg_lightning import set_forward_context
        >>> with set_forward_context(CUDAGraphMode.FULL, BatchDescriptor(batch_size=8)):
        ...     get_forward_context().cudagraph_runtime_mode.name
        'FULL'

    Args:
        cudagraph_runtime_mode: NONE, PIECEWISE or FULL.
        batch_descriptor: The key of the step. It may be None in mode NONE.

    Raises:
        ValueError: The mode is not a runtime mode.
    """
    context = ForwardContext(cudagraph_runtime_mode, batch_descriptor)
    with override_forward_context(context):
        yield context
