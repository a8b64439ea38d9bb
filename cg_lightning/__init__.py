"""CUDA graphs for the evaluation loops of PyTorch Lightning."""

from cg_lightning.callback import CUDAGraphCallback
from cg_lightning.capture.graph import (
    compilation_counter,
    set_cudagraph_capturing_enabled,
    validate_cudagraph_capturing_enabled,
    weak_ref_tensors,
)
from cg_lightning.capture.wrapper import CUDAGraphEntry, CUDAGraphWrapper
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import (
    CaptureError,
    CUDAGraphError,
    IllegalOperationError,
    UnkeyableBatchError,
    VerificationError,
)
from cg_lightning.core.forward_context import (
    ForwardContext,
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
    set_forward_context,
)
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import CUDAGraphOptions
from cg_lightning.diagnose import diagnose
from cg_lightning.diagnosis.report import Diagnosis
from cg_lightning.graphed import Graphed, graphed
from cg_lightning.runtime.dispatcher import CUDAGraphDispatcher

__all__ = [
    "BatchDescriptor",
    "CUDAGraphCallback",
    "CUDAGraphDispatcher",
    "CUDAGraphEntry",
    "CUDAGraphError",
    "CUDAGraphMode",
    "CUDAGraphOptions",
    "CUDAGraphWrapper",
    "CaptureError",
    "Diagnosis",
    "ForwardContext",
    "Graphed",
    "IllegalOperationError",
    "UnkeyableBatchError",
    "VerificationError",
    "compilation_counter",
    "diagnose",
    "get_forward_context",
    "graphed",
    "is_forward_context_available",
    "override_forward_context",
    "set_cudagraph_capturing_enabled",
    "set_forward_context",
    "validate_cudagraph_capturing_enabled",
    "weak_ref_tensors",
]
