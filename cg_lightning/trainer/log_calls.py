"""Repeat ``self.log`` after a replay, if Lightning stores logged values in an unknown way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from cg_lightning.effects.logged_values import Calls
from cg_lightning.modules.interception import base_method, replaced_method

_UNKNOWN = (
    "CUDAGraphCallback: this version of Lightning keeps logged values in a way that is not known "
    "here, so self.log is called after each replay: what is logged is right, and steps take longer."
)


class HeldLogCalls:
    """Collects calls of ``self.log``, and repeats them after a replay.

    It implements :class:`~cg_lightning.effects.logged_values.LogCalls`.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._is_held = False
        self._has_warned = False

    @contextlib.contextmanager
    def collected(self) -> Iterator[Calls]:
        """While this is entered, ``self.log`` only stores its arguments.

        Lightning's own ``log`` is replaced, which ``self.log_dict`` calls as well. If the user
        overrides ``log``, the override still runs, so that the step gets its return value.
        """
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(_UNKNOWN)
        calls: Calls = []

        def collect(_: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

        with replaced_method(self._module, "log", collect):
            yield calls

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While this is entered, :meth:`make` does nothing, so that a verified step logs once."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def make(self, calls: Calls) -> None:
        """Make the calls, unless :meth:`held` is entered."""
        if self._is_held:
            return
        log = base_method(self._module, "log")  # the user's overrides have run already
        for args, kwargs in calls:
            log(*args, **kwargs)
