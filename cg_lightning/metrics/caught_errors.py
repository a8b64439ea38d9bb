"""Whether the code that runs now would catch an error: such an error must not come later."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import CodeType, FrameType

_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "cg_lightning")
"""They catch errors of a step only to raise them again."""
_OUTSIDE = ("cg_lightning.runtime.", "cg_lightning.offline")
_INSIDE = "cg_lightning.runtime.submodule_runner"


def may_be_caught() -> bool:
    """Return True if a ``try`` or ``with`` of the step is around what runs now.

    A ``with`` may swallow errors as well: ``contextlib.suppress``. Before Python 3.11, code does
    not tell, so the answer is True.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_OUTSIDE) and module != _INSIDE:
            return False
        if module.split(".")[0] not in _FRAMEWORKS and _is_guarded(frame.f_code, frame.f_lasti):
            return True
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=4096)
def _is_guarded(code: CodeType, instruction: int) -> bool:
    table = getattr(code, "co_exceptiontable", None)
    if table is None:
        return True
    numbers = _numbers(table)
    # each entry: start, length and target in code units, and a depth
    for start in numbers:
        length, _, _ = next(numbers), next(numbers), next(numbers)
        if 2 * start <= instruction < 2 * (start + length):
            return True
    return False


def _numbers(table: bytes) -> Iterator[int]:
    """Yield the numbers of an exception table: six bits a byte, bit 6 says that more follow."""
    number = 0
    for byte in table:
        number = number << 6 | byte & 63
        if not byte & 64:
            yield number
            number = 0
