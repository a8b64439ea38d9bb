"""Where in the user's own code something happened."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import FrameType

_OURS = str(Path(__file__).resolve().parent.parent)
_LIBRARIES = tuple({path for key in ("stdlib", "purelib", "platlib") if (path := sysconfig.get_path(key))})


def _is_library(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(("<frozen", *_LIBRARIES))


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(_OURS) and not name.startswith(f"{_OURS}/app")


def users_location() -> str:
    """Gives ``file:line`` of the innermost frame outside libraries and this package; the demo counts as the user's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (_is_library(frame) or _is_ours(frame)):
        frame = frame.f_back
    return "unknown" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def is_called_by_user() -> bool:
    """Whether the innermost frame outside this package is none of a library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    return frame is not None and not _is_library(frame)
