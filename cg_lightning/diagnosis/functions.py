"""The function objects of the frames of reported calls, and what they hold.

A frame has the code of its function and the values of its free variables, but not the function
itself. The function is searched for by its name: among the globals, in the classes of its first
argument, and below decorators there. If it is at neither place (a lambda, a function that a
function has returned), or if others of its kind may run in its place (two closures of one factory),
the garbage collector is asked who refers to the code (30 ms for 400,000 objects).
"""

from __future__ import annotations

import gc
import inspect
import types
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from cg_lightning.guards.sources import MISSING, CacheWrapper, Source
from cg_lightning.modules.kinds import is_lightning_module, is_our_file, is_user_file

_MOST_WRAPPERS = 10
_IGNORED = "__class__"
"""What ``super()`` closes over."""


def closes_over(code: CodeType) -> tuple[str, ...]:
    """Return the names that the functions with this code have closed over."""
    return tuple([name for name in code.co_freevars if name != _IGNORED])


def _inner(function: Any) -> Iterator[Any]:
    """Yield a function, and those that decorators have wrapped."""
    for _ in range(_MOST_WRAPPERS):
        if function is None or function is MISSING:
            return
        yield function
        for name in ("__wrapped__", "__func__", "fget", "func"):
            if (inner := getattr(function, name, None)) is not None:
                break
        function = inner


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    if not (code.co_argcount or code.co_flags & inspect.CO_VARARGS):  # called without arguments
        return None
    first = frame.f_locals.get(code.co_varnames[0])
    if isinstance(first, tuple) and first and not code.co_argcount:
        return first[0]
    return first


def _places(frame: FrameType) -> Iterator[Source]:
    """Yield where a function with the name of a frame's code may be."""
    name = frame.f_code.co_name
    yield Source(frame.f_globals, name, name)
    first = _first_argument(frame)
    for cls in first.__mro__ if isinstance(first, type) else type(first).__mro__:
        yield Source(cls, name, f"{cls.__name__}.{name}")


class FoundFunctions(NamedTuple):
    """The functions that have the code of a frame."""

    functions: Sequence[FunctionType]
    caches: list[Any]
    """The caches around them."""
    places: list[Source]
    """Where another function can be put, and would be called."""
    is_hidden: bool = False
    """Whether the function that runs may be another one, which ``gc.freeze`` has hidden."""


def find_functions(
    frame: FrameType, from_before: Sequence[FunctionType] | None = None
) -> FoundFunctions:
    """Return the functions that have the code of a frame at its start.

    If the step itself makes functions with this code, ``from_before`` has those that are older.
    """
    code = frame.f_code
    caches: list[Any] = []
    places: list[Source] = []
    for function, caches, place in _named_functions(frame):
        places = _replaceable(frame, place)
        if from_before is None and _is_only_one(function):
            return FoundFunctions([function], caches, places)
        break
    may_hold = closes_over(code) or code.co_argcount or code.co_kwonlyargcount
    if not may_hold:
        return FoundFunctions([], caches, places)
    if from_before is not None:
        return FoundFunctions(from_before, caches, places)
    referrers = [each for each in gc.get_referrers(code) if isinstance(each, FunctionType)]
    is_found = any(is_running(each, frame) for each in referrers)
    return FoundFunctions(referrers, caches, places, not is_found and gc.get_freeze_count() > 0)


def _named_functions(frame: FrameType) -> Iterator[tuple[FunctionType, list[Any], Source]]:
    """Yield functions with the code of a frame, the caches around them, and where they are."""
    for place in _places(frame):
        caches: list[Any] = []
        for function in _inner(place.value()):
            if isinstance(function, CacheWrapper):
                caches.append(function)
            elif isinstance(function, FunctionType) and function.__code__ is frame.f_code:
                yield function, caches, place
                break


def _is_only_one(function: FunctionType) -> bool:
    """Return True if every function with this code holds the same."""
    if closes_over(function.__code__):
        return False
    has_defaults = function.__defaults__ or function.__kwdefaults__
    return not (has_defaults and "<locals>" in function.__qualname__)


def users_functions() -> dict[int, list[FunctionType]]:
    """Return all functions of the user's by the ids of their code."""
    found: dict[int, list[FunctionType]] = {}
    for each in gc.get_objects():
        # to read ``__code__`` is an audit event, so others are left out before
        if type(each) is FunctionType and is_user_file(each.__globals__.get("__file__") or ""):
            found.setdefault(id(each.__code__), []).append(each)
    return found


def _replaceable(frame: FrameType, place: Source) -> list[Source]:
    """Return the places where a function was found; none while it is intercepted."""
    named = place.value()
    if isinstance(named, FunctionType) and is_our_file(named.__code__.co_filename):
        return []
    first = _first_argument(frame)
    is_method = place.holder is not frame.f_globals
    if is_method and is_lightning_module(first):
        # of other modules, it is seen when a method is set; see guards/written_settings.py
        return [place, Source(first, place.name, f"self.{place.name}")]
    return [place]


def is_running(function: FunctionType, frame: FrameType) -> bool:
    """Return whether a frame is of this function: its free variables are what is in the cells."""
    values = frame.f_locals
    for name, cell in zip(frame.f_code.co_freevars, function.__closure__ or (), strict=False):
        source = Source(cell, name, name)
        if source.value() is not values.get(name, source.value()):
            return False
    return True


def sources_of_function(function: FunctionType) -> list[Source]:
    """Return what a function holds: what it has closed over, defaults, and attributes."""
    name = function.__name__
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    found = [
        Source(cell, free, f"closure {free} of {name}") for free, cell in cells if free != _IGNORED
    ]
    if function.__defaults__:
        found.append(Source(function, "__defaults__", f"defaults of {name}"))
    if function.__kwdefaults__:
        found.append(Source(function, "__kwdefaults__", f"keyword defaults of {name}"))
    return [*found, source_of_attributes(function)]


def source_of_attributes(function: FunctionType) -> Source:
    """Return the attributes of a function as a source."""
    return Source(function, "__dict__", f"attributes of {function.__name__}")


def source_of_cache(function: Any) -> Source:
    """Return a source that changes when the body of a function with a cache runs."""
    return Source(function, "misses", f"cache of {getattr(function, '__name__', 'a function')}")


def codes_inside(code: CodeType) -> list[CodeType]:
    """Return the code of the functions that a function makes."""
    return [each for each in code.co_consts if isinstance(each, types.CodeType)]


def is_only_called_here(code: CodeType) -> bool:
    """Return whether a function is called where it is made: a comprehension, not a lambda."""
    return code.co_name.startswith("<") and code.co_name != "<lambda>"
