"""``self.log`` called after a replay, if Lightning keeps logged values in a way we do not know."""

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
    """Keeps calls of ``self.log`` back, and makes them; a
    :class:`~cg_lightning.effects.logged_values.LogCalls`.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._is_held = False
        self._has_warned = False

    @contextlib.contextmanager
    def collected(self) -> Iterator[Calls]:
        """While this is entered, ``self.log`` only notes what it is given.

        Lightning's own ``log`` is replaced, which ``self.log_dict`` calls as well. A ``log`` of the
        user's that calls it runs, so that a step gets what it returns.
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
        """While this is entered, :meth:`make` does nothing: a step that is compared logs once."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def make(self, calls: Calls) -> None:
        """Make the calls, unless they are held."""
        if self._is_held:
            return
        log = base_method(self._module, "log")  # overrides of the user have run already
        for args, kwargs in calls:
            log(*args, **kwargs)
