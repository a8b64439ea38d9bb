"""Compile the networks of a module for the time of a stage."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import nn

from cg_lightning.backends.capture_scope import autocast_cache_emptied
from cg_lightning.modules.compiled import BY_CALLBACK, COMPILED_IN_PLACE, is_compiled
from cg_lightning.modules.kinds import is_metric
from cg_lightning.report.counts import Counts

_AS_IT_IS = contextlib.nullcontext()


class Compilation:
    """Runs submodules under ``torch.compile`` while it is installed.

    The compiled calls are kept, so a later :meth:`install` compiles nothing again. Compiled are the
    largest submodules that have parameters and a ``forward``. It does *not* compile metrics,
    ``torch.jit`` modules, modules that the user has compiled, or the step itself.

    Args:
        arguments: Arguments of ``torch.compile``. None: nothing is compiled.
        stats: Counts the time of each compilation.
        only_captures: Whether steps that have no graph run as they are written: batches of many
            shapes are padded to few, and only for these is anything compiled.
    """

    def __init__(
        self, arguments: Mapping[str, Any] | None, stats: Counts, *, only_captures: bool = False
    ) -> None:
        self._arguments = arguments
        self._only_captures = only_captures
        self._stats = stats
        self._clock = _CompileClock(self._add_time)
        self.seconds = 0.0
        """The time that all compilations have taken."""
        self._calls: dict[nn.Module, Any] = {}
        self._installed: list[nn.Module] = []
        if arguments is not None:
            _start_compiler()

    def install(self, root: nn.Module) -> None:
        """Run the submodules of ``root`` compiled; idempotent."""
        if self._arguments is None:
            return
        for module in _networks(root):
            if module not in self._calls:
                self._calls[module] = _compiled(module, self._arguments)
            vars(module)[COMPILED_IN_PLACE] = self._calls[module]
            self._installed.append(module)
        self._clock.start()

    def compile_again(self) -> None:
        """Compile all submodules again at their next call, because a value has changed.

        Dynamo does not guard all that it reads: with torch 2.11, constants of classes are missing.
        """
        for module in self._installed:
            assert self._arguments is not None
            self._calls[module] = _compiled(module, self._arguments)
            vars(module)[COMPILED_IN_PLACE] = self._calls[module]

    def remove(self) -> None:
        """Let all submodules run as they are written; idempotent."""
        self._clock.stop()
        self._let_go()

    def _let_go(self) -> None:
        for module in self._installed:
            vars(module).pop(COMPILED_IN_PLACE, None)
        self._installed.clear()

    def _add_time(self, seconds: float) -> None:
        self.seconds += seconds
        self._stats.compiled(seconds)

    def outside_captures(self) -> contextlib.AbstractContextManager[None]:
        """Is entered while a step runs that has no graph."""
        return self.suspended() if self._only_captures and self._installed else _AS_IT_IS

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let all submodules run as they are written inside, to compare with eager."""
        installed = list(self._installed)
        self._let_go()
        try:
            yield
        finally:
            for module in installed:
                vars(module)[COMPILED_IN_PLACE] = self._calls[module]
            self._installed = installed


class _CompileClock:
    """Takes the time of compilations, by private callbacks of the compiler, if it has them."""

    def __init__(self, add_time: Callable[[float], None]) -> None:
        self._add_time = add_time
        self._began: float | None = None
        self._remove: contextlib.ExitStack | None = None

    def start(self) -> None:
        """Take times from now on; idempotent."""
        callbacks: Any = sys.modules.get("torch._dynamo.callback")
        handler: Any = getattr(callbacks, "callback_handler", None)
        if self._remove is not None or not hasattr(handler, "register_start_callback"):
            return
        self._remove = contextlib.ExitStack()
        handler.register_start_callback(self._begin)
        self._remove.callback(handler.remove_start_callback, self._begin)
        handler.register_end_callback(self._end)
        self._remove.callback(handler.remove_end_callback, self._end)

    def stop(self) -> None:
        """Take no more times; idempotent."""
        if self._remove is not None:
            self._remove.close()
            self._remove = self._began = None

    def _begin(self, *_: Any) -> None:
        self._began = perf_counter()

    def _end(self, *_: Any) -> None:
        if self._began is not None:
            self._add_time(perf_counter() - self._began)
            self._began = None


@functools.cache
def _start_compiler() -> None:
    """Let the compiler replace functions of PyTorch now: later it would be a change of a module."""
    torch.compile(lambda: None, backend="eager")()


def _compiled(module: nn.Module, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the compiled call of a module.

    The compiler skips functions of torch, so ``module.compile()`` of a ``Linear`` or ``Sequential``
    compiles nothing (torch 2.13). It keeps its results, and their limit, for each code object, so
    each module gets one of its own. It also compiles again for another state of the autocast
    cache, which is off in captures.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    # a function that is given another code would count as a change of the user's
    code, cells = call.__code__.replace(), call.__closure__
    own = types.FunctionType(code, call.__globals__, closure=cells)
    compiled = torch.compile(own, **arguments)

    @functools.wraps(compiled)
    def call_compiled(*args: Any, **kwargs: Any) -> Any:
        with autocast_cache_emptied():
            return compiled(*args, **kwargs)

    setattr(call_compiled, BY_CALLBACK, True)
    return call_compiled


def _networks(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules to compile."""
    for child in root.children():
        is_scripted = "training" not in vars(child)
        if is_metric(child) or is_compiled(child) or is_scripted:
            continue
        if type(child).forward is nn.Module.forward:  # a ModuleList, for example
            yield from _networks(child)
        elif next(child.parameters(), None) is not None:
            yield child
