"""Batches that the user gives to ``CUDAGraphCallback.capture``."""

from __future__ import annotations

import weakref
from typing import Any

from lightning.pytorch import LightningModule

from cg_lightning.core.settings import Settings, check_names
from cg_lightning.core.stages import EVALUATING


class GivenBatches:
    """The user's batches by stage, for one module. A copy and a pickle have none."""

    def __init__(self) -> None:
        self._batches: dict[str, list[Any]] = {}
        self._module: weakref.ref[LightningModule] | None = None

    def __reduce__(self) -> tuple[type[GivenBatches], tuple[()]]:
        return (GivenBatches, ())

    def keep(
        self, settings: Settings, module: LightningModule, batches: Any, stage: str | None
    ) -> None:
        """Keep batches of one stage. None: of all stages that evaluate.

        Raises:
            ValueError: The mode has no whole steps, the stage is unknown, or ``batches`` is no list
                of batches.
        """
        if not settings.runtime_policy.has_full_cudagraphs():
            raise ValueError(
                "callback.capture captures whole steps, and "
                f"mode={settings.runtime_policy.name!r} has none; set mode='FULL' or "
                "'FULL_AND_PIECEWISE'."
            )
        if not isinstance(batches, (list, tuple)):
            raise ValueError(
                f"callback.capture(..., batches): expected a list of batches, not a "
                f"{type(batches).__name__}; for one batch, give [batch]."
            )
        stages = tuple(each for each in settings.stages if each in EVALUATING)
        if not stages:
            raise ValueError(
                "callback.capture captures steps that evaluate, and "
                f"stages={settings.stages!r} has none."
            )
        chosen = stages if stage is None else check_names("stage", stage, stages)
        self._batches = {**self._batches, **{name: list(batches) for name in chosen}}
        self._module = weakref.ref(module)

    def of(self, module: LightningModule) -> dict[str, list[Any]]:
        """Return the batches by stage; none if they were given for another module."""
        is_for_it = self._module is not None and self._module() is module
        return self._batches if is_for_it else {}
