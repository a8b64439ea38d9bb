"""Capture one call of a step or of a submodule, with remedies if the capture fails."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from cg_lightning.backends import GraphBackend
from cg_lightning.backends.capture_scope import autocast_cache_emptied
from cg_lightning.capture.attempt import Attempt
from cg_lightning.capture.cache import GraphCache
from cg_lightning.capture.call import CaptureTarget, GraphCall
from cg_lightning.capture.entry import GraphEntry
from cg_lightning.capture.static_inputs import StaticInputs
from cg_lightning.core.causes import Cause
from cg_lightning.core.errors import (
    CaptureError,
    OutOfGraphMemoryError,
    RecompileNeededError,
    StateLeftError,
)
from cg_lightning.core.forward_context import ForwardContext, override_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import Settings
from cg_lightning.core.tree import rebuild
from cg_lightning.effects.step_state import HeldByModules, StepState
from cg_lightning.guards.guard_set import GuardSet
from cg_lightning.guards.values import addresses_of
from cg_lightning.modules.compilation import Compilation
from cg_lightning.modules.compiled import is_compiled, is_compiled_by_callback

T = TypeVar("T")

# only before the first capture of a process, because it takes longer than ten captures
_collect_once = functools.cache(gc.collect)


WatchCompiled = Callable[[nn.Module, Callable[[], Any], Any], GuardSet]
"""Runs a call of a module as it is written, on a batch. Returns the values that it reads."""


class WrittenTensors(Protocol):
    """Tensors, other than buffers, that steps were seen to write to."""

    def now(self) -> list[Tensor]:
        """Return the current tensors."""


class Capturer:
    """Captures calls for one session.

    Args:
        backend: Captures and replays.
        settings: The options.
        cache: All graphs of the session.
        written: Tensors, other than buffers, that steps write to.
        watch_compiled: Tells what compiled code reads. None: it is not asked.
        compilation: Compiles, which is no part of the time of a capture. None: nothing does.
    """

    def __init__(
        self,
        backend: GraphBackend,
        settings: Settings,
        cache: GraphCache,
        written: WrittenTensors,
        watch_compiled: WatchCompiled | None = None,
        compilation: Compilation | None = None,
    ) -> None:
        self._watch_compiled = watch_compiled
        self._compilation = compilation
        self._backend = backend
        self.settings = settings
        self.cache = cache
        self._written = written

    def capture(self, target: CaptureTarget, call: GraphCall) -> GraphEntry:
        """Capture ``call``. The capture computes nothing; only a replay of the entry does.

        If the first attempt fails and the cause has a remedy, the remedy is applied and the call is
        captured once more.

        Raises:
            CaptureError: The call could not be captured. State is as before, but all other graphs
                were dropped, because the device got a new random generator that they do not use.
            ValueReadError: The call could not be captured without values that its key leaves out.
            StateLeftError: The capture left graph memory in an attribute. State is as before.
            UnkeyableBatchError: A tensor is on another device, or overlaps itself.
        """
        if not self.settings.capture_options.gc_disable:
            _collect_once()
        began = time.perf_counter() - self._compile_seconds()
        # before the capture: to look for modules takes the hash of metrics, which reads their
        # states
        compiled = [module for module in target.module.modules() if is_compiled(module)]
        if compiled:
            if not all(map(is_compiled_by_callback, compiled)):
                self._guard_compiled(target, call)
            self._compile_ahead(target, call)
        held = HeldByModules(target.module, target.effects)
        try:
            entry = self._attempt(target, call, bool(compiled))
        except CaptureError as error:
            had_others = self.cache.drop_all()
            if isinstance(error, RecompileNeededError):
                self._compile_ahead(target, call)
            elif isinstance(error, OutOfGraphMemoryError) and had_others:
                gc.collect()
            else:
                raise
            entry = self._attempt(target, call, bool(compiled))
        if left := held.left():
            held.restore()
            self._backend.synchronize()
            entry.drop()
            raise StateLeftError(f"{Cause.STATE_REBOUND.value}: {left}, in the capture of a graph")
        seconds = time.perf_counter() - self._compile_seconds() - began
        target.record.captured(seconds, entry.num_bytes, target.changed)
        return entry

    def _compile_seconds(self) -> float:
        return 0.0 if self._compilation is None else self._compilation.seconds

    def capture_to_compare(
        self, target: CaptureTarget, call: GraphCall, around: Callable[..., Any]
    ) -> GraphEntry | None:
        """Capture ``call`` once more, for one replay. State is as before; it is not counted.

        Args:
            target: The target.
            call: The call, of which there is a graph.
            around: Returns the function of the call with what is to be captured besides.

        Returns:
            A graph, which the caller drops; None for compiled code.

        Raises:
            CaptureError: The call could not be captured; all other graphs were dropped.
        """
        if any(map(is_compiled, target.module.modules())):
            return None
        held = HeldByModules(target.module, target.effects)
        try:
            return self._attempt(
                target, dataclasses.replace(call, function=around(call.function)), False
            )
        except CaptureError:
            self.cache.drop_all()
            raise
        finally:
            held.restore()

    def _attempt(self, target: CaptureTarget, call: GraphCall, has_compiled: bool) -> GraphEntry:
        inputs = self._static_inputs(target, call)
        return Attempt(self._backend, self.settings, inputs, target, call, has_compiled).entry()

    def _compile_ahead(self, target: CaptureTarget, call: GraphCall) -> None:
        """Run the call once with static inputs, so that ``torch.compile`` compiles before it.

        The run is necessary because ``torch.compile`` may compile again for static inputs: those of
        the loader can be inference tensors, and autocast's cache can be on.
        """
        inputs = self._static_inputs(target, call)
        self._rehearse(target, call, functools.partial(call.run_with, inputs.leaves))

    def _guard_compiled(self, target: CaptureTarget, call: GraphCall) -> None:
        """Run the call once as it is written, to guard what its compiled code reads.

        A watched step cannot see that, because it runs the user's compiled code compiled.
        """
        if self._watch_compiled is None or target.guards is None:
            return
        inputs = self._static_inputs(target, call)
        tree = rebuild(call.tree, iter(inputs.leaves))
        run = functools.partial(call.run_on, tree)
        watch = functools.partial(self._watch_compiled, target.module, run, tree)
        target.guards.of_compiled = self._rehearse(target, call, watch)

    def _rehearse(self, target: CaptureTarget, call: GraphCall, run: Callable[[], T]) -> T:
        """Run a function that runs the call, and restore all state."""
        before = StepState(
            target.module,
            self._backend,
            target.effects,
            self._written.now(),
            changes=target.side_effects.changes,
        )
        context = ForwardContext(CUDAGraphMode.NONE, call.descriptor)
        with autocast_cache_emptied(), override_forward_context(context):
            try:
                if target.effects is None:
                    return run()
                result: T = target.effects.rehearse(run, target.side_effects.late)
                return result
            finally:
                before.restore()

    def _static_inputs(self, target: CaptureTarget, call: GraphCall) -> StaticInputs:
        given_out = [
            tensor
            for entry in (self.cache.entries() if target.reads_in_place else ())
            for tensor in entry.given_out
        ]
        inputs = StaticInputs(call.leaves, call.tree, self._backend.device, addresses_of(given_out))
        inputs.copy_from(call.leaves)
        return inputs
