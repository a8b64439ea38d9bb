"""Mistakes on the command line, each as one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cg_lightning.app import config

_OURS = "cg_lightning"
_NOT_THE_USERS = {
    *(_OURS, "hydra", "omegaconf", "torch", "lightning", "lightning_fabric", "fsspec"),
    *sys.stdlib_module_names,
}
_OF_A_CONFIG = (HydraException, OmegaConfBaseException)
_NOISE = re.compile(
    r"\s*(?:full_key:|object_type=|reference_type=).*|, set env var HYDRA_FULL_ERROR=1.*"
)

_UNKNOWN_OPTION = re.compile(
    r"Could not find '(.*)/([^/]*)'\s+Available options in '.*':((?:\s+\S+)*?)\s+Config search"
)
_UNKNOWN_KEY = re.compile(
    r"Could not override '((?:.*\.)?)([^.']+)'\..*: Key '.*' not in '(\w+Config)'"
)
_OF_OUR_CONSTRUCTORS = re.compile(
    r"Error in call to target 'cg_lightning\..*': ValueError\(([\"'])(.*)\1\)"
)


def sentence_of(error: Exception) -> str:
    """Return the message for a mistake on the command line; empty if the error is another one.

    An error that code of the user's raised, or called what raised it, is no such mistake.

    Args:
        error: What the run raised.
    """
    chain = list(_chain(error))
    frames = [frame for each in chain for frame in _frames(each.__traceback__)]
    if not all(_package(frame) in _NOT_THE_USERS for frame in frames):
        return ""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    kinds = (TypeError, FileNotFoundError, getattr(lightning, "MisconfigurationException", ()))
    ours = sys.modules.get("cg_lightning.core.errors")  # that of strict=True names the user's line
    named = (*_OF_A_CONFIG, ValueError, getattr(ours, "CaptureError", ()))
    is_ours = bool(frames) and _package(list(_frames(error.__traceback__))[-1]) == _OURS
    # a ValueError is how this package names a mistake; other errors in its code are its own
    if not isinstance(error, named) and (is_ours or not isinstance(error, kinds)):
        return ""
    texts = [" ".join(_NOISE.sub("", _unknown_option(str(each))).split()) for each in chain]
    shown = [text for text in dict.fromkeys(texts) if text]
    # the cause is often part of the message of the error
    shown = [text for text in shown if not any(text in other for other in shown if other != text)]
    sentence = _of_constructor(_unknown_key(": ".join(text.rstrip(".:") for text in shown)))
    return sentence if sentence.endswith("?") else f"{sentence}."


def _unknown_option(text: str) -> str:
    """Say ``task=fti is unknown`` in place of Hydra's paragraph with its search path."""
    found = _UNKNOWN_OPTION.search(text)
    if found is None:
        return text
    group, option, known = found.groups()
    return f"{group}={option} is unknown; choose from {', '.join(sorted(known.split()))}"


def _unknown_key(text: str) -> str:
    """Say what is near, where Hydra proposes to add a key that there cannot be."""
    found = _UNKNOWN_KEY.search(text)
    if found is None:
        return text
    path, key, schema = found.groups()
    fields = dataclasses.fields(getattr(config, schema))
    known = [field.name for field in fields if not field.name.startswith("_")]
    near = difflib.get_close_matches(key, known, n=1)
    choice = f"did you mean {path}{near[0]}?" if near else f"choose from {', '.join(known)}"
    return f"{path}{key} is unknown; {choice}"


def _of_constructor(text: str) -> str:
    """Leave out what Hydra says around the sentence of an argument of ours."""
    return _OF_OUR_CONSTRUCTORS.sub(lambda found: found[2].rstrip("."), text)


def without_hydra(traceback: TracebackType | None) -> TracebackType | None:
    """Return a traceback without its first frames, which are those of Hydra and of the command."""
    first = traceback
    while first is not None and (
        _package(first.tb_frame) == "hydra"
        or first.tb_frame.f_globals.get("__name__") in (f"{_OURS}.app.main", "__main__")
    ):
        first = first.tb_next
    return first or traceback


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _package(frame: FrameType) -> str:
    name = str(frame.f_globals.get("__name__", ""))
    return _OURS if name == "__main__" and frame.f_code.co_name == "main" else name.split(".")[0]
