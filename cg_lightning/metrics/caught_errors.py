"""Whether the code that runs now would catch an error: such an error must not come later."""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType

_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "cg_lightning")
"""They catch errors of a step only to raise them again."""
_OUTSIDE = ("cg_lightning.runtime.", "cg_lightning.offline")
_INSIDE = "cg_lightning.runtime.submodule_runner"


def may_be_caught() -> bool:
    """Return True if a ``try`` or ``with`` of the step is around what runs now.

    A ``with`` may swallow errors as well: ``contextlib.suppress``.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_OUTSIDE) and module != _INSIDE:
            return False
        if module.split(".")[0] not in _FRAMEWORKS and is_exception_handled(frame):
            return True
        frame = frame.f_back
    return False


def is_exception_handled(frame: FrameType) -> bool:
    """Return True if ``frame`` is inside ``try`` or ``with``."""
    return _is_handled(frame.f_code, frame.f_lasti)


@functools.lru_cache(maxsize=4096)
def _is_handled(code: CodeType, offset: int) -> bool:
    steps = dis.Bytecode(code)
    handlers = {step.offset for step in steps if step.opname == "PUSH_EXC_INFO"}
    entries = steps.exception_entries  # type: ignore[attr-defined]  # typeshed lacks it
    for _ in entries:
        target = next((each.target for each in entries if each.start <= offset < each.end), None)
        if target is None:
            return False
        if target in handlers:
            return True
        offset = target  # it cleans up, and raises the error again: what is around handles it
    return False
