"""Conditions that are checked before the first batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization import automatic
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cg_lightning.core.stages import EVALUATING, STEP_METHODS
from cg_lightning.modules.compiled import (
    is_compiled,
    is_compiled_as_a_whole,
    is_graphed_by_compiler,
)
from cg_lightning.modules.kinds import is_lightnings_own, lightning_class
from cg_lightning.trainer.closure_hooks import can_notice_packing
from cg_lightning.trainer.node_hooks import can_notice_hooks

ANOMALY = "detect_anomaly=True checks each operation of the backward"
_RESHARDING = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")
_TRAINING = ("training_step", "post_training_step", "backward", "pre_backward", "post_backward")
"""Methods of a strategy that run in a closure."""


def why_inert(trainer: Trainer, module: nn.Module) -> str:
    """Return why this Trainer cannot run this module from graphs. Empty if it can."""
    strategy = trainer.strategy
    if lightning_class(type(strategy), *_RESHARDING):
        return (
            f"{type(strategy).__name__} moves parameters between steps, so graphs would read stale "
            "memory"
        )
    if reason := _why_no_steps(strategy):
        return reason
    if is_compiled_as_a_whole(module):
        return (
            "the LightningModule was compiled as a whole; compile its submodules instead: "
            "self.net = torch.compile(self.net)"
        )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_traceable_wrapper_subclass(tensor):
            return f"{name} is a {type(tensor).__name__}, whose memory cannot be watched"
    return ""


def _why_no_steps(strategy: Strategy) -> str:
    """Return why the steps of this strategy cannot be intercepted. Empty if they can."""
    cls = type(strategy)
    for name in [STEP_METHODS[stage] for stage in EVALUATING]:
        if not is_lightnings_own(strategy, name):
            return (
                f"{cls.__name__}.{name} is not Lightning's own, so it may do more than run the step"
            )
    if not hasattr(strategy, "_forward_redirection"):  # private, in Lightning since 2.1
        return f"{cls.__name__} calls a wrapped module in a way that is not known here"
    return ""


def why_no_training(trainer: Trainer, module: LightningModule) -> str:
    """Return why no closure of this training can run from a graph. Empty if one can.

    Call it when the optimizers exist, and after :func:`why_inert`.
    """
    strategy, precision = trainer.strategy, trainer.precision_plugin
    loop = getattr(trainer.fit_loop.epoch_loop, "automatic_optimization", None)
    if not module.automatic_optimization:
        return "automatic_optimization=False: manual optimization has no closure"
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            return f"{type(optimizer).__name__} calls the closure several times an iteration"
    if torch.is_anomaly_enabled():
        return ANOMALY
    for name, child in module.named_modules():
        if is_compiled(child):
            return f"{name} is compiled, and the backward of compiled code cannot be watched"
    if reason := _why_not_reduced(trainer, module):
        return reason
    if lightning_class(type(precision), "Precision", "MixedPrecision") is not type(precision):
        return f"{type(precision).__name__} is a precision whose backward is not known here"
    for name in _TRAINING:
        if not is_lightnings_own(strategy, name):
            return f"{type(strategy).__name__}.{name} is not Lightning's own"
    if not (can_notice_hooks() and can_notice_packing()):
        return (
            "this version of PyTorch adds hooks of autograd's nodes in a way that is not known here"
        )
    # private, in Lightning since 2.0
    if not hasattr(loop, "_make_closure") or not hasattr(automatic, "Closure"):
        return "this version of Lightning makes closures in a way that is not known here"
    return ""


def _why_not_reduced(trainer: Trainer, module: LightningModule) -> str:
    """Return why the gradients of graphs cannot be reduced over all ranks. Empty if they can."""
    wrapper = trainer.strategy.model
    if wrapper is module:
        name = type(trainer.strategy).__name__
        return f"{name} has several processes without DDP" if trainer.world_size > 1 else ""
    if type(wrapper) is not DistributedDataParallel:
        return f"{type(wrapper).__name__} wraps the module in a way that is not known here"
    if wrapper.mixed_precision is not None:
        return "mixed_precision of DDP replaces parameters during a step"
    return ""


def check_not_graphed_already(module: LightningModule) -> None:
    """Check that the module does not use CUDA graphs already.

    Raises:
        ValueError: The LightningModule was compiled with a mode that uses CUDA graphs.
    """
    context: dict[str, Any] = getattr(module, "_compiler_ctx", None) or {}
    config = getattr(context.get("dynamo_ctx"), "compiler_config", None) or {}
    if config.get("triton.cudagraphs") or is_graphed_by_compiler(module):
        raise ValueError(
            f"{type(module).__name__} was compiled by torch.compile with CUDA graphs of its own "
            "(mode='reduce-overhead' or 'max-autotune'). Compile it with mode='default' or "
            "'max-autotune-no-cudagraphs', or remove CUDAGraphCallback."
        )
