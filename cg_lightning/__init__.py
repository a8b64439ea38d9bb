"""CUDA graphs for the evaluation loops of PyTorch Lightning.

Names are imported when they are first used: torch and Lightning take seconds, and the command's
help and shell completion need neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
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
    from cg_lightning.diagnosis.report import Diagnosis
    from cg_lightning.offline import diagnose
    from cg_lightning.plain_loop import Graphed, graphed
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

_NAMES = {
    "callback": ("CUDAGraphCallback",),
    "capture.graph": (
        "compilation_counter",
        "set_cudagraph_capturing_enabled",
        "validate_cudagraph_capturing_enabled",
        "weak_ref_tensors",
    ),
    "capture.wrapper": ("CUDAGraphEntry", "CUDAGraphWrapper"),
    "core.descriptor": ("BatchDescriptor",),
    "core.errors": (
        "CaptureError",
        "CUDAGraphError",
        "IllegalOperationError",
        "UnkeyableBatchError",
        "VerificationError",
    ),
    "core.forward_context": (
        "ForwardContext",
        "get_forward_context",
        "is_forward_context_available",
        "override_forward_context",
        "set_forward_context",
    ),
    "core.modes": ("CUDAGraphMode",),
    "core.settings": ("CUDAGraphOptions",),
    "diagnosis.report": ("Diagnosis",),
    "offline": ("diagnose",),
    "plain_loop": ("Graphed", "graphed"),
    "runtime.dispatcher": ("CUDAGraphDispatcher",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
"""Where each public name is.

No module may have the name of what it defines, or importing it would hide that.
"""


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("cg-lightning")
    except metadata.PackageNotFoundError:  # a checkout that is on the path, and not installed
        import tomllib
        from pathlib import Path

        project = Path(__file__).parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
