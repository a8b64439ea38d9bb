"""The user's code that runs inside a closure, between its step and its backward.

It may change weights or activations, or read what the backward computes later. A graph holds the
step and the backward together, so such code keeps the closure eager. Code is harmless if its
instructions show that it does nothing, or nothing but ``optimizer.zero_grad``.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterable
from types import CodeType, FunctionType

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer

from cg_lightning.core.reasons import Reason, Status

_CALLBACK_HOOKS = ("on_before_zero_grad", "on_before_backward")
_MODULE_HOOKS = (*_CALLBACK_HOOKS, "optimizer_zero_grad", "backward")
"""Hooks that run between the step and its backward."""
_OPTIMIZER = 3
"""The place of the optimizer among the parameters of ``optimizer_zero_grad``."""
_OF_NOTHING = {
    *("RESUME", "NOP", "CACHE", "COPY_FREE_VARS", "POP_TOP"),
    *("LOAD_CONST", "LOAD_SMALL_INT", "RETURN_CONST", "RETURN_VALUE"),
}
_OF_CALLS = {"PUSH_NULL", "PRECALL", "CALL", "KW_NAMES", "CALL_KW"}
_LOADS = {"LOAD_FAST", "LOAD_FAST_BORROW"}
_ATTRIBUTES = {"LOAD_METHOD", "LOAD_ATTR"}
_saved_tensors_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)  # private: what packs each tensor that a backward needs


def can_notice_packing() -> bool:
    """Return True if this version of PyTorch shows whether ``saved_tensors_hooks`` is entered."""
    return _saved_tensors_hooks is not None


def why_not_closed(
    trainer: Trainer,
    module: LightningModule,
    parameters: dict[str, nn.Parameter],
    modules: Iterable[nn.Module],
) -> Reason | None:
    """Return the code of the user's that runs between a step and its backward; None if none does.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        parameters: Its parameters by name.
        modules: The module and its submodules.
    """
    for owner in trainer.callbacks:  # type: ignore[attr-defined]
        for name in _CALLBACK_HOOKS:
            if _is_overridden(owner, Callback, name):
                return _hook(f"{type(owner).__name__}.{name}")
    for name in _MODULE_HOOKS:
        if _is_overridden(module, LightningModule, name):
            return _hook(f"{type(module).__name__}.{name}")
    for optimizer in trainer.optimizers:
        if _is_overridden(optimizer, Optimizer, "zero_grad"):
            return _hook(f"{type(optimizer).__name__}.zero_grad")
    for name, parameter in parameters.items():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return _hook(f"a gradient hook of {name}")
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return _hook("a global backward hook")
    for each in modules:
        if each._backward_hooks or each._backward_pre_hooks:
            return _hook(f"a backward hook of {type(each).__name__}")
    if _saved_tensors_hooks is not None and _saved_tensors_hooks(True) is not None:
        return _hook("saved_tensors_hooks")
    return None


def _hook(words: str) -> Reason:
    return Reason(Status.CLOSURE_HOOK, f"{Status.CLOSURE_HOOK.value}: {words}")


def _is_overridden(owner: object, base: type, name: str) -> bool:
    """Return True if a hook is not that of Lightning, and may do what its own does not."""
    if name in vars(owner):
        hook, is_method = vars(owner)[name], False
    else:
        hook, is_method = getattr(type(owner), name, None), True
        if hook is getattr(base, name):
            return False
    if type(hook) is not FunctionType or name == "backward":
        return True
    if name == "zero_grad":
        return not set(hook.__code__.co_names) <= {"super", name}
    if name == "optimizer_zero_grad":
        return not (is_method and _only_zeroes(hook.__code__))
    return not _does_nothing(hook.__code__)


@functools.lru_cache(maxsize=256)
def _does_nothing(code: CodeType) -> bool:
    return all(step.opname in _OF_NOTHING for step in dis.get_instructions(code))


@functools.lru_cache(maxsize=256)
def _only_zeroes(code: CodeType) -> bool:
    """Return True if a method does nothing but call ``zero_grad`` of its optimizer."""
    if code.co_argcount <= _OPTIMIZER:
        return False
    optimizer = code.co_varnames[_OPTIMIZER]
    for step in dis.get_instructions(code):
        if step.opname in _LOADS:
            is_known = step.argval == optimizer
        elif step.opname in _ATTRIBUTES:
            is_known = step.argval == "zero_grad"
        else:
            is_known = step.opname in _OF_NOTHING or step.opname in _OF_CALLS
        if not is_known:
            return False
    return True
