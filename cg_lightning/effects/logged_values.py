"""What effects need to know of ``self.log``.

``trainer/logged_results.py`` implements this for Lightning; nothing here imports it.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

if TYPE_CHECKING:
    from cg_lightning.effects.effect import Effect

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""Positional and keyword arguments of calls of ``self.log``."""


class LogCalls(Protocol):
    """Calls of ``self.log``, for logged values whose metrics we do not know."""

    def collected(self) -> AbstractContextManager[Calls]:
        """While this is entered, ``self.log`` only notes what it is given."""

    def held(self) -> AbstractContextManager[None]:
        """While this is entered, :meth:`make` does nothing."""

    def make(self, calls: Calls) -> None:
        """Make the calls, unless they are held."""


class LoggedValues(Protocol):
    """The values that the steps of one module log, and the metrics behind them."""

    @property
    def calls(self) -> LogCalls:
        """Calls of ``self.log``: used if :meth:`is_supported` is False."""

    def is_supported(self) -> bool:
        """Return True if a graph can update what is logged, so that no call must be made again."""

    def metrics(self) -> list[nn.Module]:
        """Return the metric behind each logged value."""

    @property
    def stage_number(self) -> int:
        """Number of stages that have ended."""

    @property
    def collection(self) -> Any:
        """What has the values that are logged now; None if nothing can be logged."""

    def begin_stage(self) -> None:
        """Called after the first replay of a stage that logs."""

    def begin(self) -> None:
        """Do what the first ``self.log`` of an epoch does before all else; else nothing."""

    def effect(self) -> Effect:
        """Return what the step that has just logged did beside updating metrics."""

    def snapshot(self) -> Any:
        """Return what a step may change, for :meth:`restore`."""

    def restore(self, snapshot: Any) -> None:
        """Put back what a step has changed."""

    def release(self) -> None:
        """Leave no trace, at the end of a stage."""


class NoLogCalls:
    """No calls, because there is no ``self.log``."""

    def collected(self) -> AbstractContextManager[Calls]:
        """Return a context in which nothing is noted."""
        return contextlib.nullcontext([])

    def held(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def make(self, calls: Calls) -> None:
        """Do nothing; there can be no calls."""
        assert not calls


class NothingLogged:
    """The logged values of a module that runs without a Trainer: none."""

    collection: Any = None
    stage_number = 0

    def __init__(self) -> None:
        self.calls = NoLogCalls()

    def is_supported(self) -> bool:
        """Return True: there is nothing to log."""
        return True

    def metrics(self) -> list[nn.Module]:
        """Return no metrics."""
        return []

    def begin_stage(self) -> None:
        """Do nothing."""

    def begin(self) -> None:
        """Do nothing."""

    def effect(self) -> Effect:
        """Do not call this: it is asked for metrics behind logged values only."""
        raise AssertionError("nothing is logged")

    def snapshot(self) -> Any:
        """Return None."""

    def restore(self, snapshot: Any) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""
