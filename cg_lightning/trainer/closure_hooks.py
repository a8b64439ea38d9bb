"""The user's code that runs inside a closure, between its step and its backward.

Lightning calls, all with gradients enabled and without autocast::

    training_step
    on_before_zero_grad(optimizer)  # of callbacks, then of the module; .grad: of earlier backwards
    optimizer_zero_grad             # these two only for the first of the accumulated batches
    on_before_backward(loss)        # likewise; .grad: cleared; the loss is scaled
    backward
    on_after_backward()

``self.log`` belongs to the hook that runs. Such code may change weights or activations, or read
what the backward computes later. So a graph, which holds step and backward together, holds the
hooks between them as well (``training_step.py``): they are watched like the step. ``training.py``
calls ``on_after_backward`` and ``optimizer_zero_grad`` after each replay.

What keeps a closure eager:

- A hook that uses its ``trainer`` or ``optimizer``, or the callback that it belongs to, other than
  for ``self.log``: a watched step sees what modules, globals and closures hold, and not these.
- An ``optimizer_zero_grad`` that does more than to call ``optimizer.zero_grad``, and all code that
  autograd or the optimizer calls.

Hooks whose instructions show that they do nothing are left out.
"""

from __future__ import annotations

import dis
import functools
import inspect
import operator
from collections.abc import Iterable
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer

from cg_lightning.core.descriptor import Fixed
from cg_lightning.core.reasons import Reason, Status

BEFORE_ZERO_GRAD, BEFORE_BACKWARD = "on_before_zero_grad", "on_before_backward"
HOOKS_OF_GRAPHS = (BEFORE_ZERO_GRAD, BEFORE_BACKWARD)
"""Hooks between a step and its backward that a graph can hold."""
_OTHERS = ("optimizer_zero_grad", "backward")
"""Hooks of the module there that it cannot."""
_LOGGING = ("log", "log_dict")
"""What Lightning gives each callback: methods of the module."""
_READING_LOCALS = frozenset({"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe"})
"""What reads local variables without naming them."""
_IN_CONTEXT = torch.no_grad()(lambda: None).__code__
"""The code around a function with a decorator such as ``torch.no_grad()``."""
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


class ClosureHook(NamedTuple):
    """A hook of the user's that a graph of the closure holds."""

    owner: Any
    """The module or a callback."""
    name: str
    function: FunctionType
    """What Lightning calls, without its owner."""
    code: CodeType
    """The user's code in it."""

    @property
    def words(self) -> str:
        """The hook as the user would write it."""
        return f"{type(self.owner).__name__}.{self.name}"

    def run(self, trainer: Trainer, module: LightningModule, loss: Tensor | None) -> None:
        """Call the hook.

        Args:
            trainer: The Trainer.
            module: The LightningModule.
            loss: The loss; None: the hook gets the optimizer.
        """
        argument = trainer.optimizers[0] if loss is None else loss
        if self.owner is module:
            getattr(module, self.name)(argument)
            return
        attributes = vars(self.owner)
        given = ((name, attributes.get(name)) for name in _LOGGING)
        before = {name: each for name, each in given if getattr(each, "__self__", None) is module}
        # those that Lightning has given it are older than what observes calls of ``module.log``
        attributes.update({name: getattr(module, name) for name in before})
        try:
            getattr(self.owner, self.name)(trainer, module, argument)
        finally:
            attributes.update(before)


class _Key:
    """What tells hooks from others. To hash code takes longer than to look for hooks."""

    def __init__(self, hooks: Iterable[ClosureHook]) -> None:
        self._hooks = [(hook.words, hook.function, hook.code) for hook in hooks]
        self._hash = hash(tuple(self._hooks))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Key) and self._hooks == other._hooks)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return " and ".join(words for words, *_ in self._hooks) or "no hook"


class FoundHooks(NamedTuple):
    """The user's hooks between a step and its backward."""

    hooks: list[ClosureHook]
    """In the order in which they run."""
    key: Fixed
    """What a key must hold of them."""
    reason: Reason | None = None
    """Why a graph cannot hold all of them; None if it can."""


class ClosureHooks:
    """Looks for the user's hooks between a step and its backward.

    It decides again only if something has changed.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._owners: list[Any] = []
        self._seen: list[Any] = []
        """What the hooks of the owners were, and what these log with."""
        self._found: tuple[FoundHooks, FoundHooks]

    def find(self, is_zeroing: bool) -> FoundHooks:
        """Return the hooks, or why they keep a closure eager.

        Args:
            is_zeroing: Whether the closure sets gradients to zero.
        """
        owners = [*self._trainer.callbacks, self._module]  # type: ignore[attr-defined]
        seen: list[Any] = []
        for owner in owners:
            attributes, cls = vars(owner), type(owner)
            seen.append(attributes.get(_LOGGING[0]))
            for name in HOOKS_OF_GRAPHS:
                hook = attributes[name] if name in attributes else getattr(cls, name)
                code = _code_of(hook)
                seen += (hook, code, _code_of(_inner(hook)) if code is _IN_CONTEXT else None)
        if not (
            len(owners) == len(self._owners)
            and all(map(operator.is_, owners, self._owners))
            and all(map(operator.is_, seen, self._seen))
        ):
            self._owners, self._seen = owners, seen
            self._found = self._decide(owners)
        return self._found[is_zeroing]

    def are_those_of(self, key: Fixed, is_zeroing: bool) -> bool:
        """Return True if the hooks are still those of a key, as :meth:`find` has returned it."""
        found = self.find(is_zeroing)
        return found.reason is None and found.key.value == key.value

    def _decide(self, owners: list[Any]) -> tuple[FoundHooks, FoundHooks]:
        """Return what is found for closures that leave gradients, and that set them to zero."""
        hooks = []
        for name in HOOKS_OF_GRAPHS:
            for owner in owners:
                base = LightningModule if owner is self._module else Callback
                if _is_overridden(owner, base, name):
                    hook = _watched(owner, name, self._module)
                    if hook is None:
                        reason = _hook(f"{type(owner).__name__}.{name}")
                        return (FoundHooks([], Fixed(_Key([])), reason),) * 2
                    hooks.append(hook)
        later = [hook for hook in hooks if hook.name != BEFORE_ZERO_GRAD]
        return FoundHooks(later, Fixed(_Key(later))), FoundHooks(hooks, Fixed(_Key(hooks)))


def why_not_closed(
    trainer: Trainer,
    module: LightningModule,
    parameters: dict[str, nn.Parameter],
    modules: Iterable[nn.Module],
) -> Reason | None:
    """Return other code of the user's that runs between a step and its backward; None if none does.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        parameters: Its parameters by name.
        modules: The module and its submodules.
    """
    for name in _OTHERS:
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


def _watched(owner: Any, name: str, module: nn.Module) -> ClosureHook | None:
    """Return a hook if a watched closure sees all that it reads; otherwise None."""
    is_method = name not in vars(owner)
    spaces = map(vars, type(owner).__mro__) if is_method else [vars(owner)]
    function: Any = next(space[name] for space in spaces if name in space)
    if type(function) is not FunctionType:  # a staticmethod, for example
        return None
    inner = _inner(function)
    if type(inner) is not FunctionType:
        return None
    given = ["loss" if name == BEFORE_BACKWARD else "optimizer"]
    if owner is not module:
        given = ["trainer", "module", *given]
    if is_method:
        given = ["module" if owner is module else "self", *given]
    may_log = owner is not module and is_method and _logs_as_usual(owner, module)
    if _uses_more(inner.__code__, tuple(given), may_log):
        return None
    return ClosureHook(owner, name, function, inner.__code__)


def _code_of(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _inner(function: Any) -> Any:
    """Return the function inside decorators such as ``torch.no_grad()``."""
    while _code_of(function) is _IN_CONTEXT:
        function = function.__wrapped__
    return function


def _logs_as_usual(owner: Any, module: nn.Module) -> bool:
    """Return True if ``log`` of a callback is that of the module."""
    cls: Any = type(owner)
    if cls.__getattribute__ is not object.__getattribute__:
        return False
    if any(hasattr(cls, name) for name in _LOGGING):
        return False
    methods = [vars(owner).get(name) for name in _LOGGING]
    return all(type(each) is MethodType and each.__self__ is module for each in methods)


@functools.lru_cache(maxsize=256)
def _uses_more(code: CodeType, given: tuple[str, ...], may_log: bool) -> bool:
    """Return True if a hook uses an argument of which a watched closure does not see all.

    Args:
        code: The code of the hook.
        given: What its arguments are.
        may_log: Whether it may call ``self.log``.
    """
    arguments = code.co_varnames[: code.co_argcount]
    kinds = dict(zip(arguments, given, strict=False))  # others have defaults
    hidden = {name for name, kind in kinds.items() if kind not in ("module", "loss")}
    if len(given) > len(arguments):
        if not code.co_flags & inspect.CO_VARARGS:  # the call will fail
            return True
        hidden.add(code.co_varnames[code.co_argcount + code.co_kwonlyargcount])
    if not hidden:
        return False
    unnamed = _READING_LOCALS if "self" not in given else {*_READING_LOCALS, "super"}
    if hidden.intersection(code.co_cellvars) or unnamed.intersection(code.co_names):
        return True
    steps = list(dis.get_instructions(code))
    for step, following in zip(steps, [*steps[1:], steps[-1]], strict=True):
        if "FAST" not in step.opname:
            continue
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if used := hidden.intersection(names):
            is_log = following.opname in _ATTRIBUTES and following.argval in _LOGGING
            is_self = len(names) == 1 and kinds.get(*used) == "self"
            if not (may_log and is_self and is_log):
                return True
    return False
