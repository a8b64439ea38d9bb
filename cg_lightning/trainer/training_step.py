"""One training step as a function: what a graph holds of a closure, and what follows it eagerly.

What is hard here:

- **A graph writes no ``.grad``.** It computes the gradients of its backward alone, in new memory,
  as outputs. Afterwards :meth:`TrainingStep.finish` does eagerly what PyTorch does at the end of a
  backward: a parameter without a gradient gets it, to any other gradient it is added in place. So
  a gradient may be set to None, replaced or scaled between two steps, and a reference that the user
  keeps to a gradient behaves as in eager.
- **The order differs, without an effect.** Lightning runs the step, then ``zero_grad``, then the
  backward. Here ``zero_grad`` comes after the backward, which has set all gradients aside.
  Hooks of the user's that run in between are a part of the graph (``closure_hooks.py``). To them,
  gradients are as in eager: an ``on_before_backward`` that reads one gets it cleared.
  A step that reads a gradient, or computes some itself, is therefore no graph
  (``diagnosis/detectors/backward.py``). ``on_after_backward`` is the last thing in a closure, and
  comes last here.
- **One thread.** Detectors and captures belong to a thread, so the backward runs in it, and not in
  the device's own thread.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import BackwardHook
from typing_extensions import override

from cg_lightning.backends import GraphBackend
from cg_lightning.core.closure import (
    ClosureInput,
    ClosureOutput,
    GradientsAside,
    ReplayedOutput,
    UnfinishedClosure,
    add_gradient,
)
from cg_lightning.core.descriptor import Fixed
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.stages import STEP_METHODS, TRAIN
from cg_lightning.core.tree import flatten, rebuild
from cg_lightning.guards.module_guard import ModuleGuard
from cg_lightning.trainer.closure_hooks import (
    BEFORE_BACKWARD,
    BEFORE_ZERO_GRAD,
    HOOKS_OF_GRAPHS,
    ClosureHook,
)
from cg_lightning.trainer.gradient_copies import GradientCopies
from cg_lightning.trainer.node_hooks import hooks_noted

_COLLECTIVES = frozenset(
    {
        *("all_reduce", "all_reduce_coalesced", "broadcast", "all_to_all", "all_to_all_single"),
        *("all_gather", "all_gather_into_tensor", "_all_gather_base", "all_gather_coalesced"),
        *("reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base"),
        *("batch_isend_irecv", "isend", "irecv", "send", "recv", "barrier"),
    }
)
"""Functions that all ranks must call in one order."""
_LOGGING_HOOK = "_current_fx_name"  # private
_BEFORE_BACKWARD = "pre_backward"
"""What a precision does before a backward: it scales the loss, and calls the user's hooks."""
_NO_LOSS = "`training_step` returned `None`. If this was on purpose, ignore this warning..."
"""The warning of Lightning."""


class InterceptedClosure(Closure):
    """Lightning's closure of one batch, which the runner of this package calls.

    Args:
        closure: Lightning's closure.
        arguments: What Lightning gives the step: the batch, then ``batch_idx`` if the step takes
            it.
        run: Runs the closure.
        zero_grad: Sets gradients to zero, as Lightning's closure does after its hooks.
    """

    def __init__(
        self,
        closure: Closure,
        arguments: tuple[Any, ...],
        run: Callable[[InterceptedClosure], ClosureResult],
        zero_grad: Callable[[], None],
    ) -> None:
        super().__init__(closure._step_fn, closure._backward_fn, closure._zero_grad_fn)
        self.arguments = arguments
        self.hooks: Sequence[ClosureHook] = ()
        """The user's hooks between the step and its backward, if a graph holds them."""
        self.hooks_key = Fixed(())
        """What a key must hold of them."""
        self._run = run
        self._zero_grad = zero_grad
        self._is_zeroed = False

    @override
    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        self._is_zeroed = False
        return self._run(self)

    def as_it_is(self) -> ClosureResult:
        """Run the closure as Lightning does."""
        return super().closure()

    def zero_grad(self, hooks_ran: bool, again: bool = False) -> None:
        """Set gradients to zero if Lightning does so for this batch.

        Args:
            hooks_ran: Whether :attr:`hooks` have run.
            again: Whether to do so if it was done.
        """
        if self._zero_grad_fn is None or (self._is_zeroed and not again):
            return
        self._is_zeroed = True
        (self._zero_grad if hooks_ran and self.hooks else self._zero_grad_fn)()


class TrainingStep:
    """Runs the step and the backward of one module, without changing any gradient.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        guard: Knows when parameters have been replaced.
        is_reduced: Whether DDP reduces the gradients, whose hooks a backward here must not run.
        backend: The backend of the graphs.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        guard: ModuleGuard,
        is_reduced: bool,
        backend: GraphBackend,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._guard = guard
        self._is_reduced = is_reduced
        self.copies = GradientCopies(backend)
        """The gradients of replays that parameters have."""
        self._named: dict[str, nn.Parameter] = {}
        self._known: list[nn.Module] | None = None

    def compute(
        self,
        given: ClosureInput,
        *args: Any,
        zero_grad: Callable[[], None] | None = None,
        hooks: Sequence[ClosureHook] = (),
        are_hooks_same: Callable[[], bool] = lambda: True,
    ) -> ClosureOutput | UnfinishedClosure:
        """Run the step, the user's hooks that follow it, and the backward.

        Args:
            given: The batch, and the other inputs of the closure.
            args: What Lightning gives the step after the batch.
            zero_grad: What sets gradients to zero before the backward without us.
            hooks: The user's hooks between the step and its backward.
            are_hooks_same: Tells if they are still the user's, after code of the user has run.

        Returns:
            The loss and the gradients. If a graph cannot hold the backward, it has not run yet.
        """
        self.copies.forget()  # gradients of an eager backward need memory, too
        parameters = self.parameters()
        before = _states_of(parameters)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            with hooks_noted() if self._is_reduced else contextlib.nullcontext(()) as noted:
                result = self.run(given, *args)
                loss = result.closure_loss
                if problem := _why_changed("the step", before, parameters):
                    return UnfinishedClosure(result, problem)
                if loss is None:
                    return UnfinishedClosure(result, "the step returns no loss")
                if not are_hooks_same():
                    return UnfinishedClosure(result, "the step changes hooks that follow it")
                ran = self._run_hooks(hooks, BEFORE_ZERO_GRAD, None)
                if ran and not are_hooks_same():
                    problem = f"{ran} changes hooks that follow it"
                    return UnfinishedClosure(result, problem, [BEFORE_ZERO_GRAD])
                problem = _why_changed(ran, before, parameters) if ran else ""
                scaled = loss if given.scale is None else loss * given.scale
                aside = stack.enter_context(self._backward(zero_grad))
                ran = self._run_hooks(hooks, BEFORE_BACKWARD, scaled)
                if aside.are_given or any(p.grad is not None for p in _of(parameters)):
                    aside.give()
                    problem = problem or f"{ran} reads or changes gradients"
                if any(
                    p.requires_grad is not was
                    for p, (was, *_) in zip(_of(parameters), before, strict=True)
                ):
                    problem = problem or f"{ran} changes requires_grad of a parameter"
                reached = _reached(scaled, parameters)
                if not reached:
                    problem = problem or (
                        "the loss depends on a tensor that is no parameter of the module, or on"
                        " none"
                    )
                if self._is_reduced:
                    problem = problem or _why_only_in_ddp(scaled, noted)
            if problem:
                if hooks:
                    result.closure_loss = scaled
                return UnfinishedClosure(result, problem, HOOKS_OF_GRAPHS if hooks else ())
            aside.has_begun = True
            gradients: dict[str, Tensor | None] | None
            if self._is_reduced:
                gradients = _asked_for(scaled, reached)
            else:
                self._module.backward(scaled)
                gradients = None if aside.are_given else _computed(parameters)
        extra = _detached(result.extra)
        if hooks:  # they may have changed the loss in place, but not Lightning's copy
            assert result.loss is not None
            return ClosureOutput(result.loss, extra, gradients)
        return ClosureOutput(loss.detach(), extra, gradients)

    def _run_hooks(self, hooks: Sequence[ClosureHook], name: str, loss: Tensor | None) -> str:
        """Run the hooks with a name; return which these are, in words."""
        ran = [hook for hook in hooks if hook.name == name]
        context = current_forward_context()
        step = None if context is None else context.step
        for hook in ran:
            with contextlib.ExitStack() as stack:
                if step is not None:
                    step.hook = hook.words
                    stack.callback(setattr, step, "hook", "")
                stack.enter_context(logging_in(self._module, name))
                hook.run(self._trainer, self._module, loss)
        return " or ".join(hook.words for hook in ran)

    def run(self, given: ClosureInput, *args: Any) -> ClosureResult:
        """Run the step alone, as Lightning does. The arguments are those of :meth:`compute`."""
        # a capture that failed in the backward has left its name
        with torch.enable_grad(), logging_in(self._module, STEP_METHODS[TRAIN]):
            with self._trainer.precision_plugin.train_step_context():
                output = self._module.training_step(given.batch, *args)
            return ClosureResult.from_training_step_output(output, given.normalize.value)

    @contextlib.contextmanager
    def _backward(self, zero_grad: Callable[[], None] | None) -> Iterator[GradientsAside]:
        """While a backward runs: gradients are aside, and ``self.log`` is that of the backward."""
        aside = GradientsAside(_of(self.parameters()), zero_grad)
        context = current_forward_context()
        step = None if context is None else context.step
        try:
            with (
                contextlib.nullcontext() if step is None else step.in_backward(aside),
                torch.autograd.set_multithreading_enabled(False),
                logging_in(self._module, "backward"),
            ):
                yield aside
        except BaseException:
            if step is not None:
                aside.give()  # in eager, what was computed until now is there as well
            raise
        finally:
            aside.put_back()

    def finish(
        self,
        closure: InterceptedClosure,
        output: ClosureOutput,
        reduce: Callable[[], None] | None = None,
    ) -> ClosureResult:
        """Do what is left of a closure after its step and its backward have run.

        Args:
            closure: Lightning's closure of this iteration.
            output: What was computed.
            reduce: Reduces the gradients of the parameters over the ranks. None: there is one.
        """
        with torch.enable_grad():
            if output.gradients is not None:
                # again: a capture that failed may have done it, and left gradients there
                closure.zero_grad(hooks_ran=True, again=True)
                with torch.no_grad():
                    self._add(output.gradients, isinstance(output, ReplayedOutput))
            if reduce is not None:
                reduce()
            # it calls on_after_backward
            self._trainer.precision_plugin.post_backward(output.loss, self._module)
        # Lightning's method copies the loss; this quotient is a new tensor, so it needs no copy
        result = ClosureResult(None, extra=output.extra)
        result.closure_loss = result.loss = output.loss
        return result

    def finish_as_lightning(
        self, closure: InterceptedClosure, unfinished: UnfinishedClosure
    ) -> ClosureResult:
        """Do what Lightning's closure does after its step."""
        result: ClosureResult = unfinished.result
        with torch.enable_grad():
            if result.closure_loss is None:
                closure.warning_cache.warn(_NO_LOSS)
            closure.zero_grad(BEFORE_ZERO_GRAD in unfinished.ran)
            if closure._backward_fn is not None and result.closure_loss is not None:
                precision = vars(self._trainer.precision_plugin)
                if BEFORE_BACKWARD in unfinished.ran:  # in vars: what Lightning calls with the loss
                    precision[_BEFORE_BACKWARD] = _return_loss
                try:
                    closure._backward_fn(result.closure_loss)
                finally:
                    precision.pop(_BEFORE_BACKWARD, None)
        return result

    def _add(self, gradients: dict[str, Tensor | None], are_copied: bool) -> None:
        """Do what PyTorch does at the end of a backward.

        Args:
            gradients: The new gradients by the names of their parameters.
            are_copied: Whether parameters get copies of them.
        """
        parameters = self.parameters()
        new: dict[str, Tensor] = {}
        targets: list[Tensor] = []
        added: list[Tensor] = []
        for name, gradient in gradients.items():
            assert gradient is not None, "only DDP has to know of such parameters"
            existing = parameters[name].grad
            if existing is None:  # mostly
                new[name] = gradient
            elif existing.layout is gradient.layout is torch.strided:
                targets.append(existing)
                added.append(gradient)
            else:
                add_gradient(parameters[name], gradient)
        given = list(new.values())
        if given and are_copied:
            given = self.copies.make(given)
        for name, gradient in zip(new, given, strict=True):
            parameters[name].grad = gradient
        if not targets:
            return
        if _overlap(targets):  # a grouped sum would lose one of two
            for existing, gradient in zip(targets, added, strict=True):
                existing.add_(gradient)
        else:
            torch._foreach_add_(targets, added)

    def share_gradients(self) -> bool:
        """Return True if two parameters have one gradient, so the order of sums decides bits."""
        return _overlap([p.grad for p in _of(self.parameters()) if p.grad is not None])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the module by name, each once."""
        if self._known is not self._guard.modules:
            self._named = dict(self._module.named_parameters())
            self._known = self._guard.modules
        return self._named


def _of(parameters: dict[str, nn.Parameter]) -> Iterator[nn.Parameter]:
    return iter(parameters.values())


def _return_loss(loss: Tensor, _: LightningModule) -> Tensor:
    """Replace what scales the loss and calls hooks before a backward: both was done."""
    return loss


def _states_of(parameters: dict[str, nn.Parameter]) -> list[tuple[bool, Tensor | None, int]]:
    return [
        (p.requires_grad, p.grad, 0 if p.grad is None else p.grad._version) for p in _of(parameters)
    ]


def _why_changed(
    who: str,
    before: list[tuple[bool, Tensor | None, int]],
    parameters: dict[str, nn.Parameter],
) -> str:
    """Return what has changed parameters in a way that a graph cannot hold; empty: nothing."""
    for (required, gradient, version), now in zip(before, _states_of(parameters), strict=True):
        if gradient is not now[1] or version != now[2]:
            return f"{who} changes gradients itself"
        if required != now[0]:
            return f"{who} changes requires_grad of a parameter"
    return ""


def _overlap(gradients: list[Tensor]) -> bool:
    strided = [each for each in gradients if each.layout is torch.strided and each.numel()]
    addresses = list(map(Tensor.data_ptr, strided))
    return len(set(addresses)) < len(addresses)


def _detached(extra: dict[str, Any]) -> dict[str, Any]:
    """Return what the step returns besides its loss, without the autograd graph."""
    leaves = [
        leaf.detach() if issubclass(type(leaf), Tensor) and leaf.grad_fn is not None else leaf
        for leaf in flatten(extra)[0]
    ]
    detached: dict[str, Any] = rebuild(extra, iter(leaves))
    return detached


def _computed(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def _asked_for(loss: Tensor, reached: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    """Return gradients without running the nodes that set ``.grad``, and the hooks of DDP there."""
    gradients = torch.autograd.grad(loss, list(reached.values()), allow_unused=True)
    return dict(zip(reached, gradients, strict=True))


def _reached(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters that a backward reaches; empty if it reaches other leaves, too."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: set[str] = set()
    for node in _nodes(loss):
        variable = getattr(node, "variable", None)  # of nodes that keep a gradient
        if isinstance(variable, Tensor):
            if id(variable) not in names:
                return {}
            found.add(names[id(variable)])
    return {name: parameter for name, parameter in parameters.items() if name in found}


def _why_only_in_ddp(loss: Tensor, hooks: Iterable[Any]) -> str:
    """Return why DDP itself must run a backward; empty if it need not.

    All ranks must run their collectives in one order, and another rank may run this step eagerly.
    """
    context = current_forward_context()
    if context is not None and context.step is not None and context.step.has_collective:
        return "the step runs a collective, and its backward may run others among those of DDP"
    for hook in chain.from_iterable(map(_with_hooks_of_module, hooks)):
        hook = getattr(hook, "__func__", hook)
        if _calls(hook, _COLLECTIVES):
            name = getattr(hook, "__name__", type(hook).__name__)
            return f"the hook {name} runs a collective, which has its place among those of DDP"
    for node in _nodes(loss):
        if isinstance(node, BackwardCFunction):  # of a function in Python
            function = getattr(type(node), "_forward_cls", None)  # private
            if function is None:
                return "the backward of a function in Python is not known here"
            words = f"the backward of {function.__name__}"
            backwards = [function.backward, function.vjp]
            if any(_calls(each, frozenset({"backward"})) for each in backwards):
                return f"{words} runs another one, which DDP would reduce"
            if any(_calls(each, _COLLECTIVES) for each in backwards):
                return f"{words} runs a collective, which has its place among those of DDP"
    return ""


def _with_hooks_of_module(hook: Any) -> list[Any]:
    """Return a hook of a node, and the backward hooks of a module that it runs, if it does."""
    found = [hook]
    for cell in getattr(hook, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty one
            held = cell.cell_contents
            if isinstance(held, BackwardHook):
                found += (*held.user_hooks, *held.user_pre_hooks)
    return found


def _calls(function: Any, names: frozenset[str], depth: int = 2) -> bool:
    """Return whether a function, or a function that it calls by name, names one of ``names``."""
    function = inspect.unwrap(function)
    if type(function) is not FunctionType:
        return True
    called, space = function.__code__.co_names, function.__globals__
    inner = [each for each in map(space.get, called) if type(each) is FunctionType]
    return not names.isdisjoint(called) or (
        depth > 0 and any(_calls(each, names, depth - 1) for each in inner)
    )


def _nodes(loss: Tensor) -> Iterator[Any]:
    """Yield the nodes that a backward reaches."""
    nodes: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


class logging_in:  # noqa: N801  # a context, and cheaper than a generator
    """While this is entered, ``self.log`` belongs to a hook.

    After an error it still does, as Lightning leaves it.

    Args:
        module: The module that logs.
        hook: The name of the hook.
    """

    __slots__ = ("_attributes", "_before", "_hook")

    def __init__(self, module: LightningModule, hook: str) -> None:
        self._attributes = vars(module)  # setting an attribute of a module takes longer
        self._hook = hook

    def __enter__(self) -> None:
        self._before = self._attributes[_LOGGING_HOOK]
        self._attributes[_LOGGING_HOOK] = self._hook

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._attributes[_LOGGING_HOOK] = self._before
