"""Facts about the frame of a call: whose code runs, and with which arguments."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from types import FrameType
from typing import Any

from cg_lightning.diagnosis.names_in_code import NamesInCode
from cg_lightning.guards.value_kinds import reads_unseen
from cg_lightning.modules.interception import BESIDE_ALL
from cg_lightning.modules.kinds import is_user_file

_CLASS_OF = frozenset({"type", "__class__"})
"""How a function asks for the class of an object."""
_LOOK_AT_ANYTHING = frozenset({"type", "id", "callable", "suppress", "eval", "exec"})
_NO_FILE = "<string>"
"""The file of code that is run from a text."""
_OF_NAMED_TUPLE = "namedtuple_"
"""How the globals of the constructor of a named tuple are called, which Python itself makes."""


def is_users_code(frame: FrameType) -> bool:
    """Return whether code is the user's. Code without a file is that of the module around it."""
    file = frame.f_code.co_filename
    if file == _NO_FILE:
        if str(frame.f_globals.get("__name__")).startswith(_OF_NAMED_TUPLE):
            return False
        file = frame.f_globals.get("__file__") or file
    return is_user_file(file)


def is_generated(frame: FrameType) -> bool:
    """Return whether a dataclass has made the method that runs."""
    code = frame.f_code
    if code.co_filename != _NO_FILE or not code.co_argcount:
        return False
    if not code.co_qualname.startswith("__create_fn__"):
        return False
    first = frame.f_locals.get(code.co_varnames[0])
    classes = (first if isinstance(first, type) else type(first)).__mro__
    return any("__dataclass_fields__" in vars(each) for each in classes)


def namespaces_given(frame: FrameType) -> Iterator[Any]:
    """Yield classes and modules among the arguments; also the class that ``type(self)`` gives."""
    code = frame.f_code
    is_named = code.co_argcount or code.co_kwonlyargcount
    asks_for_class = is_named and not _CLASS_OF.isdisjoint(code.co_names)
    for index, value in enumerate(_arguments(frame)):
        if isinstance(value, (type, types.ModuleType)):
            yield value
        elif asks_for_class and index == 0:
            yield type(value)


def classes_given(frame: FrameType) -> list[type]:
    """Return the classes among the arguments, and those of the other arguments."""
    return [each if isinstance(each, type) else type(each) for each in _arguments(frame)]


def _arguments(frame: FrameType) -> Iterator[Any]:
    """Yield all arguments: those with names first, then what is in ``*args`` and ``**kwargs``."""
    code, values = frame.f_code, frame.f_locals
    at = code.co_argcount + code.co_kwonlyargcount
    yield from map(values.get, code.co_varnames[:at])
    if code.co_flags & inspect.CO_VARARGS:
        yield from values.get(code.co_varnames[at], ())
        at += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        yield from values.get(code.co_varnames[at], {}).values()


def may_read_modules_unseen(names: NamesInCode, frame: FrameType) -> bool:
    """Return whether a function may read any module without an interception.

    A look-up of a module's own class reads this module, whose attributes all count as read.
    """
    code = names.code
    if code.co_name == "__getattribute__":
        return False
    loaded = [value for _, value in names.loaded(frame.f_locals)]
    texts = {each for each in (*code.co_consts, *loaded) if isinstance(each, str)}
    if not BESIDE_ALL.isdisjoint((*code.co_names, *texts)) or "__dict__" in texts:
        return True
    return any(map(reads_unseen, loaded))


def may_use_unseen(names: NamesInCode) -> bool:
    """Return whether a function may handle an error, or may look at any object."""
    if not _LOOK_AT_ANYTHING.isdisjoint(names.code.co_names):
        return True
    if names.kinds_compared() is None:
        return True
    return names.opnames.count("PUSH_EXC_INFO") > names.opnames.count("WITH_EXCEPT_START")
