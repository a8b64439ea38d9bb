"""Submodules that run under ``torch.compile``. Compiled code cannot be watched."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from cg_lightning.modules.kinds import is_metric

COMPILED_IN_PLACE = "_compiled_call_impl"
"""Private attribute in which ``module.compile()`` stores the compiled call.

Pickles and copies of a module do not contain it.
"""


BY_CALLBACK = "is_compiled_by_cg_lightning"
"""Attribute of compiled calls that the callback has made."""


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return True if ``module.compile()`` was called."""
    return getattr(module, COMPILED_IN_PLACE, None) is not None


def is_compiled(module: nn.Module) -> bool:
    """Return True if this module runs under ``torch.compile``."""
    # an import takes a second, and without an import nothing is compiled
    dynamo = sys.modules.get("torch._dynamo")
    return is_compiled_in_place(module) or (
        dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    )


def is_compiled_by_callback(module: nn.Module) -> bool:
    """Return True if the callback compiles this module, for the time of a stage."""
    return hasattr(vars(module).get(COMPILED_IN_PLACE), BY_CALLBACK)


def is_graphed_by_compiler(module: nn.Module) -> bool:
    """Return True if ``torch.compile`` runs this module from its own CUDA graphs."""
    if is_compiled_in_place(module):
        config = getattr(module, COMPILED_IN_PLACE).get_compiler_config()
    else:
        config = getattr(getattr(module, "dynamo_ctx", None), "compiler_config", None)
    return bool((config or {}).get("triton.cudagraphs"))


def is_compiled_as_a_whole(module: nn.Module) -> bool:
    """Return True if the LightningModule itself was compiled."""
    return getattr(module, "_compiler_ctx", None) is not None or is_compiled_in_place(module)


def modules_inside(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the dotted paths and modules inside a compiled module."""
    for name, child in module.named_modules(prefix=path):
        if child is not module:
            yield name, child


def watchable_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield paths and modules as ``named_modules()`` does, but skip metrics and compiled code.

    A compiled module itself is included, the modules inside it are not.
    """
    compiled = [module for module in root.modules() if module is not root and is_compiled(module)]
    seen = {id(child) for module in compiled for _, child in modules_inside("", module)}
    pending = [("", root)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen or is_metric(module):
            continue
        seen.add(id(module))
        yield path, module
        children = [
            (f"{path}.{name}" if path else name, child) for name, child in module.named_children()
        ]
        pending.extend(reversed(children))
