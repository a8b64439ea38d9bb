"""Levels of loggers that a step asks for, as in ``LOG.debug(...)``, and whether they have handlers.

A message below the level is not shown. If the level changes, eager steps show it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import CodeType, FrameType

from cg_lightning.diagnosis.writes import is_called_by_user
from cg_lightning.guards.sources import Source

_ASKS = {
    id(method.__code__)
    for method in (logging.Logger.isEnabledFor, logging.Logger.getEffectiveLevel)
}
_ASKS_FOR_HANDLERS = id(logging.Logger.hasHandlers.__code__)
"""By identity: while Python reports calls, the code has other instructions in it."""


def asks_for_level(code: CodeType) -> bool:
    """Return whether it is the code of a method that asks for the level or handlers of a logger."""
    return id(code) in _ASKS or id(code) == _ASKS_FOR_HANDLERS


def level_asked_for(frame: FrameType) -> Iterator[Source]:
    """Yield the sources of the level that the user's code asks for; nothing for other functions."""
    if not (asks_for_level(frame.f_code) and is_called_by_user(frame.f_back)):
        return
    logger: logging.Logger | None = frame.f_locals["self"]
    assert logger is not None
    name = f"logger {logger.name}"
    yield Source(logger.manager, "_disable", "logging.disable")
    yield Source(logger, "disabled", f"{name}: disabled")
    names = ("handlers", "propagate") if id(frame.f_code) == _ASKS_FOR_HANDLERS else ("level",)
    while logger is not None:
        for each in names:
            yield Source(logger, each, f"logger {logger.name}: {each}")
        yield Source(logger, "parent", f"logger {logger.name}: parent")
        logger = logger.parent
