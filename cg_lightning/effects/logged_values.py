"""The interface between effects and ``self.log``.

``trainer/logged_results.py`` implements it for Lightning. Nothing here imports that module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from cg_lightning.effects.effect import Effect

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""Positional and keyword arguments of calls of ``self.log``."""


class LogCalls(Protocol):
    """Calls of ``self.log``, for a Lightning version whose result metrics are unknown."""

    def collected(self) -> AbstractContextManager[Calls]:
        """While this is entered, ``self.log`` only stores its arguments."""

    def held(self) -> AbstractContextManager[None]:
        """While this is entered, :meth:`make` does nothing."""

    def make(self, calls: Calls) -> None:
        """Make the calls, unless :meth:`held` is entered."""


class LoggedValues(Protocol):
    """The values that the steps of one module log, and the metrics behind them."""

    @property
    def calls(self) -> LogCalls:
        """Calls of ``self.log``, used if :meth:`is_supported` returns False."""

    def is_supported(self) -> bool:
        """Return True if a graph can update the logged values, so no call has to be repeated."""

    def metrics(self) -> list[nn.Module]:
        """Return the metric behind each logged value."""

    @property
    def stage_number(self) -> int:
        """Number of stages that have ended."""

    @property
    def collection(self) -> Any:
        """The collection that stores the current values; None if nothing can be logged."""

    def begin_stage(self) -> None:
        """Prepare a stage. It is called after the first replay of a stage that logs."""

    def begin(self, hooks: Sequence[str] = ()) -> None:
        """Reset values as the first ``self.log`` of an epoch does. Otherwise do nothing.

        Args:
            hooks: The hooks that log, in this order; empty: the one that runs now.
        """

    def noting_hooks(self) -> AbstractContextManager[None]:
        """While this is entered, ``self.log`` resets no values, and :meth:`effect` will do so."""

    def begin_batch(self, batch: Any) -> None:
        """Take the size of ``batch`` as the weight of the values that the next step logs."""

    def effect(self) -> Effect:
        """Return the side effects of ``self.log`` in the last step, except metric updates."""

    def snapshot(self) -> Any:
        """Return the state that a step may change, for :meth:`restore`."""

    def restore(self, snapshot: Any) -> None:
        """Restore the state of a snapshot."""

    def release(self) -> None:
        """Leave no trace, at the end of a stage."""


class NoLogCalls:
    """No calls, because there is no ``self.log``."""

    def collected(self) -> AbstractContextManager[Calls]:
        """Return a context in which nothing is collected."""
        return contextlib.nullcontext([])

    def held(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def make(self, calls: Calls) -> None:
        """Do nothing, because there are no calls."""
        assert not calls


class NothingLogged:
    """The logged values of a module that runs without a Trainer: none."""

    collection: Any = None
    stage_number = 0

    def __init__(self) -> None:
        self.calls = NoLogCalls()

    def is_supported(self) -> bool:
        """Return True, because there is nothing to log."""
        return True

    def metrics(self) -> list[nn.Module]:
        """Return no metrics."""
        return []

    def begin_stage(self) -> None:
        """Do nothing."""

    def begin(self, hooks: Sequence[str] = ()) -> None:
        """Do nothing."""

    def noting_hooks(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def begin_batch(self, batch: Any) -> None:
        """Do nothing."""

    def effect(self) -> Effect:
        """Raise an error, because only steps that log have such an effect."""
        raise AssertionError("nothing is logged")

    def snapshot(self) -> Any:
        """Return None."""

    def restore(self, snapshot: Any) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""
