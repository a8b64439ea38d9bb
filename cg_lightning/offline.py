"""Find offline what can run from graphs, and what prevents it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cg_lightning.backends import GraphBackend, check_backend, resolve_backend
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.forward_context import (
    ForwardContext,
    StepInProgress,
    override_forward_context,
)
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import BackendName, EvaluatingStageName
from cg_lightning.core.stages import EVALUATING, STEP_METHODS
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.report import Diagnosis
from cg_lightning.diagnosis.watcher import StepWatcher
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.effects.step_state import HostRandomState
from cg_lightning.modules.kinds import is_lightning_module, lightning_class

_LOOKS = 3
"""The callback's default warm-up. It watches at most this many steps."""
_STOPPED = object()
_NO_TRAINER = (
    "The step stopped where it read self.trainer, because there is no Trainer. The rest of the "
    "step was not watched."
)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _lacks_a_trainer(module: nn.Module, error: BaseException) -> bool:
    """Return True if the exception comes from ``self.trainer`` of a module without a Trainer."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    cls = lightning_class(type(module), "LightningModule")
    trainer: property | None = vars(cls).get("trainer")
    return trainer is not None and frames[-1].f_code is trainer.fget.__code__  # type: ignore[union-attr]


def _runner(module: nn.Module, batch: Any, stage: str) -> Callable[..., Any]:
    """Return a callable that runs the step. It returns ``_STOPPED`` if the step needs a Trainer."""
    if not is_lightning_module(module):
        args, kwargs = _arguments(batch)
        return lambda: module(*args, **kwargs)
    step = getattr(module, STEP_METHODS[stage])
    takes_index = len(inspect.signature(step).parameters) > 1

    def run(batch_idx: int) -> Any:
        try:
            return step(batch, batch_idx) if takes_index else step(batch)
        except RuntimeError as error:
            if _lacks_a_trainer(module, error):
                return _STOPPED
            raise

    return run


def _copy_of(module: nn.Module) -> nn.Module:
    """Return a copy, with gradients and attributes of parameters, which PyTorch does not copy."""
    copied = copy.deepcopy(module)
    for tensor, other in zip(module.parameters(), copied.parameters(), strict=True):
        for name, value in vars(tensor).items():
            vars(other).setdefault(name, copy.deepcopy(value))
        if tensor.grad is not None:
            other.grad = tensor.grad.detach().clone()
    return copied


def _copy_of_batch(batch: Any) -> Any:
    """Return a copy of a batch, which a step may change in place."""
    # a nested tensor without a layout of its own has a clone, and no deep copy
    nested = {id(tensor): tensor.clone() for tensor in tensors_in(batch) if tensor.is_nested}
    return copy.deepcopy(batch, nested)


@contextlib.contextmanager
def _random_state_kept(backend: GraphBackend) -> Iterator[None]:
    host, device = HostRandomState(), backend.get_random_state()
    try:
        yield
    finally:
        host.restore()
        backend.set_random_state(device)


def diagnose(
    module: nn.Module,
    batch: Any,
    *,
    stage: EvaluatingStageName = "predict",
    backend: BackendName = "auto",
) -> Diagnosis:
    """Run a copy of ``module`` on ``batch``, and return what prevents graphs.

    It needs no GPU and no Trainer. The copy runs once. If the run did one-time work, such as
    filling a cache, the copy runs up to twice more, as the callback does in its warm-up.
    ``self.log`` and ``self.print`` have no effect, and no random number is consumed. It does *not*
    capture anything, does *not* change ``module``, and does *not* see other batches. What the step
    changes elsewhere (globals, files) stays changed; a step that uses files runs once only.

    Example::

        >>> import torch
        >>> from cg_lightning import diagnose
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x * 2 if x.sum().item() > 0 else x
        >>> found = diagnose(Net(), torch.ones(4, 3))
        >>> [(finding.cause.value, finding.remedy) for finding in found.findings]
        [('host sync', 'log or append the tensor itself, read it after the epoch')]
        >>> diagnose(torch.nn.Linear(3, 2), torch.ones(4, 3)).capturable()
        True

    Args:
        module: A LightningModule, also one of ``pytorch_lightning``, runs the step of ``stage``,
            with or without a Trainer. Any other module is called on the batch: a tuple or list
            becomes positional arguments, a mapping becomes keyword arguments.
        batch: One batch, on the device of the module, with tensors of any shape.
        stage: ``validate``, ``test`` or ``predict``.
        backend: As in :class:`~cg_lightning.CUDAGraphCallback`. The rules are those of CUDA graphs
            for every backend.

    Returns:
        The findings, as a :class:`~cg_lightning.Diagnosis`.

    Raises:
        ValueError: ``module`` is no module, ``stage`` or ``backend`` is unknown, or the
            LightningModule has no step of its own for ``stage``. An exception of the module itself
            is raised unchanged, with one exception: a step that reads ``self.trainer`` without a
            Trainer stops there, and :attr:`Diagnosis.stopped <cg_lightning.Diagnosis>` says so.
    """
    check_backend(backend)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"diagnose(module, batch): expected an nn.Module, not a {type(module).__name__}; "
            "call it in the forward of a module."
        )
    if stage not in EVALUATING:
        raise ValueError(f"stage={stage!r} is unknown; choose one of {', '.join(EVALUATING)}.")
    if is_lightning_module(module):
        _check_step(module, stage)
    try:
        with torch.inference_mode():
            return _look(module, batch, stage)
    except RuntimeError:  # it may be that of a step which computes gradients
        with torch.no_grad():
            return _look(module, batch, stage)


def _check_step(module: nn.Module, stage: str) -> None:
    """Raise ValueError if a LightningModule has no step of its own for ``stage``."""
    base = lightning_class(type(module), "LightningModule")

    def has(name: str) -> bool:
        return name in vars(module) or getattr(type(module), name) is not getattr(base, name)

    name = STEP_METHODS[stage]
    if has(name) or (stage == "predict" and has("forward")):
        return
    missing = f"{name} and no forward" if stage == "predict" else name
    others = [each for each in EVALUATING if has(STEP_METHODS[each])]
    raise ValueError(
        f"stage={stage!r}: {type(module).__name__} has no {missing} of its own; "
        f"choose a stage that it has: {', '.join(others) or 'none'}."
    )


def _look(module: nn.Module, batch: Any, stage: str) -> Diagnosis:
    """Watch the step of a copy, as often as it may show less."""
    module = _copy_of(module)
    module.eval()
    is_lightning = is_lightning_module(module)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    watching = resolve_backend("auto" if device.type == "cuda" else "recorder", device)
    assert watching is not None
    unkeyable = ""
    index = (0,) if is_lightning else ()
    effects = ModuleEffects(module, device, sync_free=True) if is_lightning else None
    watcher = StepWatcher(module, watching, effects=effects, run_logging=not is_lightning)
    with _random_state_kept(watching):
        key = BatchDescriptor(stage=stage if is_lightning else None)
        try:
            key = BatchDescriptor.from_batch(batch, stage=key.stage)
        except UnkeyableBatchError as error:
            unkeyable = str(error)
        for _ in range(_LOOKS):
            given = _copy_of_batch(batch)
            with override_forward_context(
                ForwardContext(CUDAGraphMode.NONE, key, step=StepInProgress())
            ):
                output, watched = watcher.watch(_runner(module, given, stage), given, index)
            stopped = output is _STOPPED
            is_outside = any(finding.cause is Cause.WORLD for finding in watched.findings)
            if stopped or is_outside or not watched.needs_second_look:
                break
    return Diagnosis(
        list(watched.findings), unkeyable, watched, stopped=_NO_TRAINER if stopped else ""
    )
