"""Findings, and where in the user's code something happened."""

from __future__ import annotations

import dataclasses
import functools
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from cg_lightning.core.causes import REMEDIES_OF_OPERATIONS, Cause
from cg_lightning.core.lines import Elsewhere, file_and_line, line_of
from cg_lightning.core.reasons import Reason
from cg_lightning.modules.kinds import is_our_file, is_user_file

_WATCHER = str(Path(__file__).with_name("watcher.py"))
_PACKAGES = [Path(path) for key in ("purelib", "platlib") if (path := sysconfig.get_path(key))]
_FRAMEWORKS = ("torch", "functorch", "lightning", "pytorch_lightning", "lightning_fabric")
_WRAPPERS = ("torchmetrics/metric.py", "torchmetrics/collections.py")
"""Files of torchmetrics that only wrap what a metric does."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One reason why a step, or a submodule that it calls, cannot run from a graph."""

    cause: Cause
    operation: str
    """What was called or changed, such as ``aten::item``."""
    module: str
    """Dotted path of the innermost module that was running; empty for the step itself."""
    location: str
    """The user's own line, as ``file:line``; or a member of :class:`Elsewhere`."""
    library_location: str = ""
    """The line of a library that the user's line called, such as ``transformers/utils.py:12``.

    Empty if the user's own code did it.
    """
    is_known_before: bool = False
    """True for a read of a value that is known before the step, so a graph may contain it."""
    is_of_logging: bool = False
    """True if Lightning itself did it, in ``self.log``."""

    @property
    def remedy(self) -> str:
        """What a user can do about it."""
        return REMEDIES_OF_OPERATIONS.get(self.operation, self.cause.remedy)

    @property
    def where(self) -> str:
        """The user's line, and the library's if there is one."""
        return str(Location(self.location, self.library_location))

    def reason(self) -> Reason:
        """Return the reason of a step."""
        return Reason(
            self.cause,
            str(self),
            line_of(self.location),
            operation=self.operation,
            submodule=self.module,
            library_location=self.library_location,
        )

    def __str__(self) -> str:
        module = f" in {self.module}" if self.module else ""
        return f"{self.cause.value}: {self.operation}{module} ({self.where})"


class Location(NamedTuple):
    """Where something happens in the user's code."""

    user: str
    """The user's line, or a member of :class:`Elsewhere`."""
    library: str
    """The line of the library that the user's line called; empty if there is none."""

    def is_in_library(self, name: str) -> bool:
        """Whether a library of this name does it."""
        return self.library.split("/")[0] == name

    def __str__(self) -> str:
        return f"{self.user}, in {self.library}" if self.library else self.user


@functools.lru_cache(maxsize=8192)
def _package_path(file: str) -> str | None:
    """Return the path of an installed file relative to its packages; None for other files."""
    for packages in _PACKAGES:
        if file.startswith(f"{packages}/"):
            return Path(file).relative_to(packages).as_posix()
    return None


@functools.lru_cache(maxsize=8192)
def _library_path(file: str) -> str | None:
    """Return the short path of a library's file; None if it does not help users."""
    path = None if is_our_file(file) else _package_path(file)
    if path is None or path.split("/")[0] in _FRAMEWORKS or path in _WRAPPERS:
        return None
    return path


def find_location() -> Location:
    """Return the user's innermost line, and the innermost line of a library that it called.

    torch, Lightning, the wrappers of torchmetrics, the standard library and this package are no
    such libraries. What PyTorch does by itself, as in the backward, has no line of the user's.
    """
    return Location(*_find_lines(traceback.walk_stack(sys._getframe(1))))


def find_line() -> str:
    """Return the user's innermost line; empty if no frame of the user's is on the stack.

    It makes no named tuple, whose code would count as code that a watched step runs.
    """
    user, _ = _find_lines(traceback.walk_stack(sys._getframe(1)))
    return line_of(user)


def location_of(error: BaseException) -> Location | None:
    """Return the user's innermost line that an error came through, and the library's.

    None if it came through no line of the user's.
    """
    found = None
    cause: BaseException | None = error
    while cause is not None:
        lines = _find_lines(reversed(list(traceback.walk_tb(cause.__traceback__))))
        if line_of(lines[0]):
            found = Location(*lines)
        cause = cause.__cause__
    return found


def _find_lines(frames: Iterable[tuple[FrameType, int]]) -> tuple[str, str]:
    """Return the user's line and the library's, from frames and their lines, innermost first."""
    library = ""
    for frame, line in frames:
        file = frame.f_code.co_filename
        if not library and file == _WATCHER and frame.f_code.co_name == "watch":
            break  # what follows has started the step
        if is_user_file(file):
            return file_and_line(file, line), library
        if not library and (path := _library_path(file)) is not None:
            library = f"{path}:{line}"
    return Elsewhere.UNKNOWN, library


_AT_WORK = ("torch/serialization.py", "torch/hub.py", "torch/utils/tensorboard/")
"""Files of PyTorch in which it opens what the user asks for."""
_BESIDES = ("linecache.py", "warnings.py", "logging/__init__.py", "inspect.py", "traceback.py")
"""Files of Python: sources for messages, and what other detectors watch."""


def is_called_by_step(*detector: str) -> bool:
    """Whether the user's code, or a library that it calls, does what a detector has just noticed.

    Otherwise it is PyTorch, Lightning, an import or this package that does it for itself.

    Args:
        detector: The files of the detector, whose own frames come first.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in detector:
        frame = frame.f_back
    return is_step_calling(frame)


def is_step_calling(frame: FrameType | None) -> bool:
    """Whether the user's code, or a library that it calls, does what a frame does now."""
    while frame is not None:
        calls = _calls_for_step(frame.f_code.co_filename)
        if calls is not None:
            return calls
        frame = frame.f_back
    return False


def may_call_for_step(file: str) -> bool:
    """Whether code in this file may do something for the user's code, or for a library of it."""
    return _calls_for_step(file) is not False


@functools.lru_cache(maxsize=8192)
def _calls_for_step(file: str) -> bool | None:
    """Whether it does; None for the standard library, which works for its callers."""
    if is_user_file(file):
        return True
    if is_our_file(file) or file.startswith("<frozen importlib") or file.endswith(_BESIDES):
        return False
    path = _package_path(file)
    if path is None:
        return None
    return path.split("/")[0] not in _FRAMEWORKS or path.startswith(_AT_WORK)


def reading_frame(frame: FrameType | None = None) -> FrameType | None:
    """Return the innermost frame, from ``frame`` or the caller's on, that is not ours."""
    frame = frame or sys._getframe(1)
    while frame is not None and is_our_file(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def is_read_by_user() -> bool:
    """Return whether the innermost function that is not ours is the user's, and not torch's."""
    frame = reading_frame()
    return frame is not None and is_user_file(frame.f_code.co_filename)
