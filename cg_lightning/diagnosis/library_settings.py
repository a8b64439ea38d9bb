"""Settings that functions of PyTorch read in Python. They are in no key, so they are guarded.

What is hard here: the first call of compiled code turns the checks of distributions off, for the
whole process. Eager steps after that raise no error, and steps from graphs must not either.
"""

from __future__ import annotations

from types import CodeType

import torch
from torch.distributions import Distribution

from cg_lightning.guards.sources import Source

_FAST_PATH_FILE = torch.backends.mha.__file__
_SETTINGS = (
    Source(Distribution, "_validate_args", "Distribution._validate_args"),
    Source(
        vars(torch.backends.mha), "_is_fastpath_enabled", "torch.backends.mha._is_fastpath_enabled"
    ),
)


def has_settings(file: str) -> bool:
    """Return whether a file of others may have functions that read one of the settings."""
    return file == _FAST_PATH_FILE or "/distributions/" in file.replace("\\", "/")


def settings_read_by(code: CodeType) -> list[Source]:
    """Return the settings that a function names."""
    return [setting for setting in _SETTINGS if setting.name in code.co_names]
