"""What has to hold before the first batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cg_lightning.modules.compiled import is_compiled_as_a_whole, is_graphed_by_compiler

_RESHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


def why_inert(trainer: Trainer, module: nn.Module) -> str:
    """Gives the reason why nothing of this module can run from graphs under this Trainer; empty where it can."""
    if isinstance(trainer.strategy, _RESHARDING):
        return f"{type(trainer.strategy).__name__} moves parameters between steps, so graphs would read stale memory"
    if is_compiled_as_a_whole(module):
        return "the LightningModule was compiled as a whole; compile its submodules instead: self.net = torch.compile(self.net)"
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_traceable_wrapper_subclass(tensor):
            return f"{name} is a {type(tensor).__name__}, whose memory cannot be watched"
    return ""


def check_not_graphed_already(module: LightningModule) -> None:
    """Raises:
    ValueError: The LightningModule was compiled with a mode that uses CUDA graphs itself.
    """
    context: dict[str, Any] = getattr(module, "_compiler_ctx", None) or {}
    config = getattr(context.get("dynamo_ctx"), "compiler_config", None) or {}
    if config.get("triton.cudagraphs") or is_graphed_by_compiler(module):
        raise ValueError(
            f"{type(module).__name__} was compiled by torch.compile with CUDA graphs of its own (mode='reduce-overhead' or "
            f"'max-autotune'). Compile it with mode='default' or 'max-autotune-no-cudagraphs', or remove CUDAGraphCallback."
        )
