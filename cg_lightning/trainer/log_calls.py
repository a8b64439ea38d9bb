"""``self.log`` called after a replay, if Lightning keeps logged values in a way we do not know."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from cg_lightning.effects.logged_values import Calls

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
        owner = self._lightning_class
        original = owner.log

        @functools.wraps(original)
        def log(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not self._module:
                return original(module, *args, **kwargs)
            calls.append((args, kwargs))
            return None

        with patch.object(owner, "log", log):
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
        for args, kwargs in calls:
            self._lightning_class.log(self._module, *args, **kwargs)

    @property
    def _lightning_class(self) -> Any:
        """The class that defines ``log``, below those of the user that override it."""
        return [cls for cls in type(self._module).__mro__ if "log" in vars(cls)][-1]
