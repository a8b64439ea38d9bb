"""How the functions on the stack use the result of a call that they make."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
import torchmetrics

from cg_lightning.metrics.support import following_instructions
from cg_lightning.modules.kinds import is_our_file

_WATCHER = str(Path(__file__).with_name("watcher.py"))
_TORCH = f"{Path(torch.__file__).parent}/"
_TORCHMETRICS = f"{Path(torchmetrics.__file__).parent}/"


def callers() -> Iterator[FrameType]:
    """Yield the frames of the watched step, the innermost first: neither ours nor PyTorch's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _WATCHER and frame.f_code.co_name == "watch":
            return
        if not (is_our_file(file) or file.startswith(_TORCH)):
            yield frame
        frame = frame.f_back


def is_reader_ours(reader: FrameType) -> bool:
    """Return True if this package itself reads an attribute, through ``modules()`` for one."""
    frame: FrameType | None = reader
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, _TORCHMETRICS)):
        frame = frame.f_back
    return frame is not None and is_our_file(frame.f_code.co_filename)


def is_search_for_modules(reader: FrameType) -> bool:
    """Return True if an attribute is read only to list modules, as in the first ``self.log``.

    Metrics in a set read their states for their hash.
    """
    return reader.f_code.co_name in ("named_modules", "__hash__") and (
        reader.f_code.co_filename.startswith((_TORCH, _TORCHMETRICS))
    )


def is_value_dropped(frame: FrameType) -> bool:
    """Return True if nothing reads the result of the call that ``frame`` has made.

    It is dropped at once, or stored in a local variable that the function never reads.
    """
    after = following_instructions(frame.f_code).get(frame.f_lasti)
    if after is None:
        return False
    if after.opname == "POP_TOP":
        return True
    if after.opname != "STORE_FAST":
        return False
    name = after.argval
    names = frame.f_code.co_names
    return not ({"locals", "eval", "exec", "vars", "dir"} & set(names)) and not any(
        name == step.argval or (isinstance(step.argval, tuple) and name in step.argval)
        for step in dis.get_instructions(frame.f_code)
        if step.opname not in ("STORE_FAST", "DELETE_FAST")
    )
