"""Functions that write or show text, and are not replaced: their calls are reported.

``Printing`` replaces ``print`` and the ``write`` of ``sys.stdout``, and reports them itself. Here
are functions that other modules keep (``from os import write``), or that write without these two.
"""

from __future__ import annotations

import io
import logging
import warnings
from logging import handlers
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

from cg_lightning.diagnosis.findings import is_step_calling
from cg_lightning.modules.kinds import is_user_file

_IN_C = {
    "posix": frozenset(
        {"write", "writev", "pwrite", "pwritev", "sendfile", "splice", "copy_file_range"}
    ),
    "syslog": frozenset({"syslog", "openlog", "closelog", "setlogmask"}),
    "sys": frozenset({"audit"}),
}
"""Names of functions by module."""
_OF_FILES = frozenset({"write", "writelines"})
_FILES = (io.FileIO, io.BufferedWriter, io.BufferedRandom, io.BufferedRWPair, io.TextIOWrapper)
NAMES_OF_WRITES = _OF_FILES.union(*_IN_C.values())
"""Functions of C with other names are none of these."""
_METHODS = ("handle", "emit", "callHandlers")
_OURS = Path(__file__).parent.parent
_STAND_INS = frozenset(
    str(_OURS / file) for file in ("diagnosis/detectors/printing.py", "backends/cuda.py")
)
"""Our files with functions that replace and call one that writes or shows text."""
_WARNINGS = warnings.formatwarning.__code__.co_filename


def _methods_of_logging() -> dict[CodeType, str]:
    classes = [
        each
        for module in (logging, handlers)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, (logging.Logger, logging.Handler))
    ]
    return {
        function.__code__: "logging"
        for each in classes
        for function in map(vars(each).get, _METHODS)
        if isinstance(function, FunctionType)
    }


# private: a library may have replaced the public one, as ``logging.captureWarnings`` does
_SHOWS_WARNINGS = (warnings.showwarning, getattr(warnings, "_showwarning_orig", None))
_IN_PYTHON = _methods_of_logging() | {
    function.__code__: "warnings.showwarning"
    for function in _SHOWS_WARNINGS
    if isinstance(function, FunctionType)
}
_FILES_OF_WRITES = frozenset(code.co_filename for code in _IN_PYTHON)
_BY_ID = {id(code): name for code, name in _IN_PYTHON.items()}
"""By identity: while Python reports calls, the code has other instructions in it."""


def write_in_c(function: Any, caller: FrameType) -> str:
    """Return the name of a function of C that writes or shows text; empty for all others."""
    name = getattr(function, "__name__", "")
    if name not in NAMES_OF_WRITES:
        return ""
    module = getattr(function, "__module__", None) or ""
    if name in _IN_C.get(module, ()):
        is_for_step = is_step_calling(caller)
        if name == "audit":  # Python reports its own events, too
            is_for_step = is_user_file(caller.f_code.co_filename)
        return f"{module.replace('posix', 'os')}.{name}" if is_for_step else ""
    is_of_file = name in _OF_FILES and isinstance(getattr(function, "__self__", None), _FILES)
    return f"file.{name}" if is_of_file and is_step_calling(caller) else ""


def write_in_python(code: CodeType) -> str:
    """Return the name of such a function of Python's library; empty if it is none."""
    return _BY_ID.get(id(code), "")


def has_writes(file: str) -> bool:
    """Return whether a file has such functions."""
    return file in _FILES_OF_WRITES


def is_called_by_user(frame: FrameType | None) -> bool:
    """Return whether the user's code, and no library, has called what prints or logs here."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _WARNINGS:  # Python shows a warning: ``Printing`` receives each
            return False
        if not (has_writes(file) or file in _STAND_INS):
            return is_user_file(file)
        frame = frame.f_back
    return False
