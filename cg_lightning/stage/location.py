"""Where in the user's own code something happened."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import FrameType

_OURS = str(Path(__file__).resolve().parent.parent)
_LIBRARIES = tuple({path for key in ("stdlib", "purelib", "platlib") if (path := sysconfig.get_path(key))})


def users_location() -> str:
    """Gives ``file:line`` of the innermost frame outside libraries and this package; the demo counts as the user's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        library = name.startswith(("<frozen", *_LIBRARIES))
        ours = name.startswith(_OURS) and not name.startswith(f"{_OURS}/app")
        if not library and not ours:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"
