"""The contents of values that a watched step reads or changes."""

from __future__ import annotations

from typing import Any

from cg_lightning.guards.values import FrozenValues


class UnreadableError(Exception):
    """The contents of a value cannot be read; the message says why."""


def look_into(value: Any, path: str = "") -> FrozenValues:
    """Store the contents of a value, whose name is ``path``.

    Raises:
        UnreadableError: Reading the value raised an error, as for a closed file.
    """
    try:
        return FrozenValues([value], [path])
    except Exception as error:
        words = f"cannot be looked into: {type(error).__name__}: {error}"
        raise UnreadableError(words) from error
