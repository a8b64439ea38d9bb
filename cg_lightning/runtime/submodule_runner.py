"""A submodule whose calls run from graphs where the step is in mode PIECEWISE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from cg_lightning.capture.cache import EvictedError
from cg_lightning.core.descriptor import BatchDescriptor, KnownDescriptors
from cg_lightning.core.errors import CaptureError, UnkeyableBatchError, VerificationError
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.guards.module_guard import ModuleState
from cg_lightning.modules.interception import Interception, ModuleHandler
from cg_lightning.runtime.call_key import describe_call
from cg_lightning.runtime.graphed_call import GraphedCall, GraphSettings
from cg_lightning.runtime.verifier import report_difference


class PiecewiseTarget(ModuleHandler):
    """Intercepts one submodule, and runs its calls from graphs.

    It does so in steps whose key it was allowed for: where a watched step called it, and found nothing that a graph would
    freeze. A call has a key of its own, made of its arguments: they may differ in shape for batches that do not. Like a step it
    runs eagerly until its key is warm. Outside a step, in mode NONE, under gradients and inside a capture it is eager; so it is
    where the step has changed the submodule before it calls it.

    Args:
        path: Dotted path of the submodule; empty for the LightningModule itself.
        module: The submodule.
        warmup_steps: Eager runs of a key before its capture.
        settings: What all graphs of one run share.
    """

    def __init__(
        self, path: str, module: nn.Module, warmup_steps: int, settings: GraphSettings
    ) -> None:
        self.path = path
        self.module = module
        self.reasons: dict[BatchDescriptor | None, str] = {}
        """Why the calls of a key run eagerly; None stands for all that have no key."""
        self._warmup_steps = warmup_steps
        self._settings = settings
        self._allowed: set[BatchDescriptor] = set()
        self._sights: Counter[BatchDescriptor] = Counter()
        self._graphed = GraphedCall(
            path or "forward", self._invoke, module, CUDAGraphMode.PIECEWISE, settings
        )
        self._interception: Interception | None = None
        self._original: Callable[..., Any] = module
        self._state = ModuleState(module)
        self._known: KnownDescriptors = {}

    def watch(self, reads: list[tuple[Any, str]]) -> None:
        """As :meth:`ModuleState.watch`."""
        self._state.watch(reads)

    def remember(self) -> None:
        """At the start of a step, when there are no graphs: takes the submodule as it is now for that of the next ones."""
        self._state.remember()

    def note_sights(self, descriptors: Iterable[BatchDescriptor], sights: int) -> None:
        """Notes how often calls with these keys ran before they were intercepted."""
        for descriptor in descriptors:
            self._sights[descriptor] = max(self._sights[descriptor], sights)

    def note_findings(self, step: BatchDescriptor, findings: list[str] | None) -> None:
        """Allows the calls in steps with this key, or forbids them; None: the watched step did not call it."""
        if findings:
            self.reasons[step] = f"{self.path}: {findings[0]}"
        elif findings is not None:
            self._allowed.add(step)

    def install(self) -> None:
        """Intercepts the submodule from now on; idempotent."""
        if self._interception is None:
            self._interception = Interception(self.module, self)

    def remove(self) -> None:
        """Leaves no trace in the submodule; its graphs are kept for the next stage."""
        if self._interception is not None:
            self._interception.remove()
            self._interception = None

    def _invoke(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = arguments
        return self._original(*args, **kwargs)

    def on_call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a call from a graph where it may, else as it is."""
        outer, self._original = self._original, original  # a module may call itself
        try:
            return self._call(args, kwargs)
        finally:
            self._original = outer

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = current_forward_context()
        if (
            context is None
            or context.calls is None
            or context.batch_descriptor is None
            or torch.is_grad_enabled()
        ):
            return self._original(*args, **kwargs)
        mode = context.cudagraph_runtime_mode
        if mode is CUDAGraphMode.FULL or self._settings.backend.is_capturing():
            return self._original(*args, **kwargs)
        if mode is CUDAGraphMode.PIECEWISE and context.batch_descriptor not in self._allowed:
            return self._original(*args, **kwargs)
        try:
            number, training = context.next_call(self), self._state.training_flags()
            descriptor, leaves = describe_call(
                training, number, context.batch_descriptor, args, kwargs, self._known
            )
        except UnkeyableBatchError as error:
            self.reasons[None] = f"{self.path}: {error}"
            return self._original(*args, **kwargs)
        warm = self._sights[descriptor] >= self._warmup_steps
        if mode is CUDAGraphMode.NONE or not warm:
            self._sights[descriptor] += 1
            return self._original(*args, **kwargs)
        if descriptor in self.reasons:
            return self._original(*args, **kwargs)
        if not self._state.holds():
            self.reasons[None] = (
                f"{self.path}: the step has changed it, or an attribute that it reads, before the call"
            )
            return self._original(*args, **kwargs)
        try:
            output = self._graphed(descriptor, (args, kwargs), leaves)
            self._known[descriptor.fields] = descriptor
            return output
        except VerificationError as error:
            self.reasons[descriptor] = report_difference(error, self._settings.verification)
            return error.output
        except EvictedError as error:
            self.reasons[None] = f"{self.path}: {error}"
            return self._original(*args, **kwargs)
        except (CaptureError, UnkeyableBatchError) as error:
            self.reasons[descriptor] = f"{self.path}: {error}"
            if isinstance(error, CaptureError) and error.ran_eagerly:
                return error.output
            return self._original(*args, **kwargs)
