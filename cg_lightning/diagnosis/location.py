"""Where in the user's own code something happened."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import FrameType

_OURS = str(Path(__file__).resolve().parent.parent)
_LIBRARIES = tuple(
    {path for key in ("stdlib", "purelib", "platlib") if (path := sysconfig.get_path(key))}
)


def _is_library(file: str) -> bool:
    return file.startswith(("<frozen", *_LIBRARIES))


def _is_ours(file: str) -> bool:
    return file.startswith(_OURS) and not file.startswith(f"{_OURS}/app")


def is_of_user(file: str) -> bool:
    """Whether code in this file is none of a library or of this package; the demo counts as the user's."""
    return not _is_library(file) and not _is_ours(file)


def users_location() -> str:
    """Gives ``file:line`` of the innermost frame that is the user's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_of_user(frame.f_code.co_filename):
        frame = frame.f_back
    return "unknown" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
