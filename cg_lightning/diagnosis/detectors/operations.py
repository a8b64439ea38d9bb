"""Dispatched operations that a graph cannot hold, and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.illegal_operations import find_illegal
from cg_lightning.core.causes import Cause
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.tree import flatten
from cg_lightning.diagnosis.detector import Detector

_AS_WRITTEN = {"aten::_local_scalar_dense": "aten::item"}
"""Names for users: without inference mode, as in the validation of ``fit``, a part is reported."""


class Operations(Detector):
    """Looks each dispatched operation up in the table that the recorder backend refuses by."""

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        device_type = self.watch.device_type
        if (cause := find_illegal(function, args, kwargs, device_type)) is not None:
            name = function._schema.name
            self.watch.report(cause, _AS_WRITTEN.get(name, name))
            context = current_forward_context()
            if cause is Cause.COLLECTIVE and context is not None and context.step is not None:
                context.step.ran_collective()
            if cause is Cause.CROSS_DEVICE_COPY and self.watch.is_in_framework:
                # the first log of a run moves what Lightning holds since the last one
                self.watch.notes.did_one_time_work = True
        if not self.watch.has_backward and torch.is_grad_enabled() and _tracks_gradients(args):
            casts = function._schema.name == "aten::_to_copy" and self.watch.run.is_autocast_enabled
            if not casts:  # autocast keeps what it casts with gradients
                self.watch.report(Cause.GRADIENTS, function._schema.name)


def _tracks_gradients(args: tuple[Any, ...]) -> bool:
    """Whether the output has a gradient: metrics enable gradients for values that have none."""
    if torch.is_inference_mode_enabled():
        return False
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in flatten(args)[0])
