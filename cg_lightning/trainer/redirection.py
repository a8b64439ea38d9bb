"""Run another step in the place of a LightningModule's, in the forward of DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy


def run_in_wrapper(
    strategy: Strategy,
    module: LightningModule,
    name: str,
    step: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run ``step`` where Lightning runs the step ``name``: in the forward of DDP, for example.

    Args:
        strategy: A strategy whose ``model`` wraps ``module``.
        module: The LightningModule.
        name: The name of its step.
        step: What runs instead.
        args: The arguments of the forward, which may move them to its device.
        kwargs: Its keyword arguments.
    """
    wrapper = strategy.model
    assert wrapper is not None
    stand_in: Any = _StandIn(module, name, step)
    # private, in Lightning since 2.1; trainer/preconditions.py checks that it exists
    return strategy._forward_redirection(wrapper, stand_in, name, *args, **kwargs)


class _StandIn:
    """A LightningModule with another step, for Lightning's redirection through a wrapper's forward.

    The redirection sets ``forward``, which the wrapper calls, so this attribute goes to the module
    itself.
    """

    def __init__(self, module: LightningModule, name: str, step: Callable[..., Any]) -> None:
        attributes = vars(self)
        attributes["_module"] = module
        attributes[name] = step

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_module"], name, value)
