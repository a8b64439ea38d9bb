"""Texts of PyTorch that decide something, because PyTorch has no type for what they tell.

No other file compares texts of PyTorch. ``tests/test_texts_of_pytorch.py`` makes PyTorch write each
of them, so a version that words one otherwise fails there (torch 2.8 to 2.13).
"""

from __future__ import annotations

SYNC_WARNING = "called a synchronizing CUDA operation"
"""A part of the warning of the sync debug mode, which is a plain ``UserWarning``."""
_RECOMPILE = "fail_on_recompile"
"""The stance's public name. Its error is a plain ``RuntimeError``."""
_CUSOLVER = "cusolver"
"""The library's name. Its errors have the types of other errors of linear algebra."""


def is_sync_warning(message: object) -> bool:
    """Return True if PyTorch's sync debug mode warns of a call that waits for the device."""
    return SYNC_WARNING in str(message)


def needs_compilation(error: BaseException) -> bool:
    """Return True if the stance "fail_on_recompile" has stopped ``torch.compile``."""
    return _RECOMPILE in str(error)


def is_of_cusolver(error: BaseException) -> bool:
    """Return True if a call of cuSOLVER has failed."""
    return _CUSOLVER in str(error)
