"""Says offline what could run from graphs, and what stands in the way."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from cg_lightning.backends import check_backend, resolve_backend
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.forward_context import (
    ForwardContext,
    StepInProgress,
    override_forward_context,
)
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.stages import STEP_METHODS
from cg_lightning.diagnosis.detectors.batch_index import uses_batch_index
from cg_lightning.diagnosis.report import Diagnosis
from cg_lightning.diagnosis.watched_step import Finding
from cg_lightning.diagnosis.watcher import Observer


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _runner(module: nn.Module, batch: Any, stage: str) -> Callable[[], Any]:
    if not isinstance(module, LightningModule):
        args, kwargs = _arguments(batch)
        return lambda: module(*args, **kwargs)
    step = getattr(module, STEP_METHODS[stage])
    takes_index = len(inspect.signature(step).parameters) > 1
    return lambda: step(batch, 0) if takes_index else step(batch)


def diagnose(
    module: nn.Module, batch: Any, *, stage: str = "predict", backend: str = "auto"
) -> Diagnosis:
    """Runs a copy of ``module`` once on ``batch``, and says what of it could run from graphs. Needs no GPU.

    Args:
        module: A LightningModule runs the step of ``stage``, with or without a Trainer. Any other module is called on the
            batch: a tuple or list spreads into positional, a mapping into keyword arguments.
        batch: One batch, on the device of the module.
        stage: ``validate``, ``test`` or ``predict``.
        backend: As in :class:`~cg_lightning.CUDAGraphCallback`; the rules are those of CUDA graphs on each.

    Raises:
        ValueError: ``stage`` or ``backend`` is unknown. What the module itself raises comes through unchanged.
    """
    check_backend(backend)
    if stage not in STEP_METHODS:
        raise ValueError(f"stage={stage!r} is unknown; choose one of {', '.join(STEP_METHODS)}.")
    lightning = isinstance(module, LightningModule)
    module, batch = copy.deepcopy((module, batch))
    module.eval()
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    watching = resolve_backend("auto" if device.type == "cuda" else "recorder", device)
    assert watching is not None
    unkeyable = ""
    with torch.inference_mode():
        try:
            key = BatchDescriptor.from_batch(batch, stage=stage)
        except UnkeyableBatchError as error:
            key, unkeyable = BatchDescriptor(stage=stage), str(error)
        observer = Observer(
            module,
            device.type,
            watching.noticing_host_syncs,
            {"log": Cause.LOGGED, "log_dict": Cause.LOGGED, "print": Cause.PRINTED}
            if lightning
            else {},
            run_effects=not lightning,
        )
        with override_forward_context(
            ForwardContext(CUDAGraphMode.NONE, key, step=StepInProgress())
        ):
            _, observation = observer.observe(_runner(module, batch, stage), batch)
    findings = list(observation.findings)
    if lightning and uses_batch_index(module, STEP_METHODS[stage]):
        name = STEP_METHODS[stage]
        code = inspect.unwrap(getattr(type(module), name)).__code__
        findings.append(
            Finding(Cause.BATCH_INDEX_USED, name, "", f"{code.co_filename}:{code.co_firstlineno}")
        )
    return Diagnosis(findings, unkeyable, observation)
