"""Operations that PyTorch differentiates in another way while a dispatch mode is on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.core.causes import Cause
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.detector import ReplacingDetector
from cg_lightning.diagnosis.step_watch import StepWatch

_OTHER_WAY = {
    "aten::prod": Cause.HOST_SYNC,
    "aten::cumprod": Cause.HOST_SYNC,
    "aten::cumprod_": Cause.HOST_SYNC,
    "aten::masked_fill": Cause.DATA_DEPENDENT_SHAPE,
    "aten::masked_fill_": Cause.DATA_DEPENDENT_SHAPE,
}
"""Operations whose backward asks on the host where zeros are, but not under a mode (torch 2.13)."""
_ENGINE = "_engine_run_backward"  # private


class OtherGradients(ReplacingDetector):
    """Lets a watched step compute the gradients of eager, and reports such operations.

    PyTorch looks for dispatch modes and tensor subclasses, and avoids then what depends on data.
    The last bit differs. So from such an operation on, the backward runs without our mode, and so
    does ``ctc_loss`` if it has a gradient: its lengths may lie on the host.
    """

    causes = (Cause.HOST_SYNC, Cause.DATA_DEPENDENT_SHAPE)

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._is_met = False
        """Whether the step has run such an operation."""

    def around_step(self) -> contextlib.AbstractContextManager[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        return self.replacing()

    def replace(self, replaced: contextlib.ExitStack) -> None:
        """See :class:`~cg_lightning.diagnosis.detector.ReplacingDetector`."""
        if (engine := getattr(torch.autograd, _ENGINE, None)) is not None:
            replaced.enter_context(patch.object(torch.autograd, _ENGINE, self._engine(engine)))
        replaced.enter_context(patch.object(torch, "ctc_loss", self._ctc_loss(torch.ctc_loss)))

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        name = function._schema.name
        if name in _OTHER_WAY and _has_gradient(args[2:] if "masked" in name else args):
            self._is_met = True
            self.watch.report(_OTHER_WAY[name], f"the gradient of {name}")

    def _engine(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._is_met:
                return original(*args, **kwargs)
            with self.watch.mode_left():
                return original(*args, **kwargs)

        return run

    def _ctc_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def ctc_loss(log_probs: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not _has_gradient([log_probs]):
                return original(log_probs, *args, **kwargs)
            self.watch.report(Cause.HOST_SYNC, "aten::ctc_loss")
            with self.watch.mode_left():
                return original(log_probs, *args, **kwargs)

        return ctc_loss


def _has_gradient(arguments: Any) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors_in(arguments))
