"""Where in the user's own code something happened."""

from __future__ import annotations

import sys
from types import FrameType

from cg_lightning.modules.kinds import is_user_file


def users_location() -> str:
    """Gives ``file:line`` of the innermost frame that is the user's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return "unknown" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
