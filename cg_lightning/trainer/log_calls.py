"""``self.log`` called after a replay: for a Lightning that keeps logged values in a way that we do not know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.tree import flatten, rebuild
from cg_lightning.modules.interception import base_method, replaced_method

_UNKNOWN = (
    "CUDAGraphCallback: this version of Lightning keeps logged values in a way that is not known here, so self.log is called "
    "after each replay: what is logged is right, and steps take longer."
)
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""Positional and keyword arguments of calls of ``self.log``."""


class CapturedLogCalls:
    """The calls of one captured step, without the tensors, which each replay gives anew.

    Raises:
        CaptureError: An argument is nothing that can be given again.
    """

    def __init__(self, calls: Calls) -> None:
        leaves = flatten(calls)[0]
        for leaf in leaves:
            if not (isinstance(leaf, (Tensor, Metric)) or is_plain_value(leaf) or callable(leaf)):
                raise CaptureError(
                    f"self.log was given a {type(leaf).__qualname__}, which cannot be logged again"
                )
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._calls = rebuild(calls, iter(self._leaves))

    def take_tensors(self) -> list[Tensor]:
        """Gives the tensors away, so that the graph's memory is not held."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def given(self, tensors: Iterator[Tensor]) -> Calls:
        """The calls with these tensors."""
        pairs = zip(self._leaves, self._is_tensor, strict=True)
        calls: Calls = rebuild(
            self._calls, iter([next(tensors) if is_tensor else leaf for leaf, is_tensor in pairs])
        )
        return calls


class LogCalls:
    """Keeps calls of ``self.log`` back, and makes them.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._is_held = False
        self._said = False

    @contextlib.contextmanager
    def collected(self) -> Iterator[Calls]:
        """While this is entered, ``self.log`` only notes what it is given (``self.log_dict`` calls it)."""
        if not self._said:
            self._said = True
            rank_zero_warn(_UNKNOWN)
        calls: Calls = []

        def collect(_: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

        with replaced_method(self._module, "log", collect):
            yield calls

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While this is entered, calls are not made: a step that is compared with eager logs once."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def make(self, calls: Calls) -> None:
        """Makes the calls, unless they are held."""
        if self._is_held:
            return
        log = base_method(self._module, "log")  # overrides of the user have run already
        for args, kwargs in calls:
            log(*args, **kwargs)
