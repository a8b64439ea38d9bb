"""Operations that PyTorch computes in another way while a dispatch mode is on.

What is hard here: such functions ask for modes and tensor subclasses before any mode receives
them, and what they choose then differs in the last bit. So a watched step would give another number
than an eager one. They were found by running PyTorch's own samples of all its operations with and
without a mode (``torch.testing._internal``, 2.11 and 2.13).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload

from cg_lightning.backends.imported_functions import replaced_where_imported
from cg_lightning.core.causes import Cause
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.detector import ReplacingDetector
from cg_lightning.diagnosis.step_watch import StepWatch

_BACKWARD = {
    "aten::prod": Cause.HOST_SYNC,
    "aten::cumprod": Cause.HOST_SYNC,
    "aten::cumprod_": Cause.HOST_SYNC,
    "aten::masked_fill": Cause.DATA_DEPENDENT_SHAPE,
    "aten::masked_fill_": Cause.DATA_DEPENDENT_SHAPE,
}
"""Operations whose backward asks on the host where zeros are, or selects by a mask; not so under a
mode."""
_ENGINE = "_engine_run_backward"  # private
_SPECTRAL = (2, -2, "nuc")
"""Norms that are made of singular values."""


def _uses_spectrum(name: str, *args: Any, **kwargs: Any) -> bool:
    """Return True if a function of ``torch.linalg`` computes singular values or eigenvalues, and in
    a way that depends on modes.
    """
    if torch.is_inference_mode_enabled() or not args:
        return False
    if name in ("svdvals", "eigvalsh", "matrix_rank"):
        return True
    given = args[1] if len(args) > 1 else kwargs.get("p" if name == "cond" else "ord")
    if name == "cond":
        return given is None or given in _SPECTRAL
    if name == "norm":
        dim = args[2] if len(args) > 2 else kwargs.get("dim")
        if dim is None:
            dim = range(args[0].dim())
        if isinstance(dim, int) or len(dim) != 2:
            return False
    return given in _SPECTRAL


def _is_nuclear(*args: Any, **kwargs: Any) -> bool:
    """Return True if ``torch.norm`` computes a nuclear norm in a way that depends on modes."""
    kind = args[1] if len(args) > 1 else kwargs.get("p")
    return bool(kind == "nuc") and not torch.is_inference_mode_enabled()


_HOST_CHECKED = Cause.HOST_CHECKED_LINEAR_ALGEBRA
_LINALG = ("svdvals", "eigvalsh", "matrix_rank", "cond", "norm", "matrix_norm")


class ModeDependent(ReplacingDetector):
    """Lets a watched step compute what eager computes, and reports such operations.

    From an operation on whose backward depends on modes, the backward runs without our mode. So do
    ``ctc_loss`` if it has a gradient, because its lengths may lie on the host, and what
    ``torch.linalg`` makes of singular values and eigenvalues. In inference mode these functions
    reach the mode in one piece, and then nothing is to be done.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._is_met = False
        """Whether the step has run an operation with such a backward."""

    def around_step(self) -> contextlib.AbstractContextManager[None]:
        return self.replacing()

    def replace(self, replaced: contextlib.ExitStack) -> None:
        if (engine := getattr(torch.autograd, _ENGINE, None)) is not None:
            replaced.enter_context(patch.object(torch.autograd, _ENGINE, self._engine(engine)))
        leave = self._leaving_mode
        ctc_loss = leave(torch.ctc_loss, Cause.HOST_SYNC, "aten::ctc_loss", _differentiates)
        functions = {"ctc_loss": (torch.ctc_loss, ctc_loss)}
        for name in _LINALG:
            original = getattr(torch.linalg, name)
            depends = functools.partial(_uses_spectrum, name)
            function = leave(original, _HOST_CHECKED, f"aten::linalg_{name}", depends)
            functions[name] = (original, function)
        replaced.enter_context(replaced_where_imported(functions))
        norm = leave(torch.norm, _HOST_CHECKED, "aten::linalg_norm", _is_nuclear)
        replaced.enter_context(patch.object(torch, "norm", norm))

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        name = function._schema.name
        if name in _BACKWARD and _has_gradient(args[2:] if "masked" in name else args):
            self._is_met = True
            self.watch.report(_BACKWARD[name], f"the gradient of {name}")

    def _engine(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._is_met:
                return original(*args, **kwargs)
            with self.watch.run.mode_left():
                return original(*args, **kwargs)

        return run

    def _leaving_mode(
        self,
        original: Callable[..., Any],
        cause: Cause,
        operation: str,
        depends: Callable[..., bool],
    ) -> Callable[..., Any]:
        """Return a function that reports, and leaves our mode, if the result depends on modes."""

        def function(*args: Any, **kwargs: Any) -> Any:
            if not depends(*args, **kwargs):
                return original(*args, **kwargs)
            self.watch.report(cause, operation)
            with self.watch.run.mode_left():
                return original(*args, **kwargs)

        return function


def _differentiates(log_probs: Tensor, *_: Any, **__: Any) -> bool:
    return _has_gradient(log_probs)


def _has_gradient(arguments: Any) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors_in(arguments))
