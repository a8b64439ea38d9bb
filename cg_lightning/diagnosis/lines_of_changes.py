"""The line of a step that changes an object, a global or a closure, or that names something.

No event reports such a change: only the comparison after the step shows it. So the code that the
step has run is searched for instructions that can make the change. A line is named only if it is
the only one.
"""

from __future__ import annotations

import dis
import itertools
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType

from cg_lightning.core.lines import file_and_line
from cg_lightning.guards.frozen_parts import ChangedPlace

_SETS = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF")
_SETS_BY_TEXT = frozenset({"setattr", "delattr"})
_SETS_ITEM = ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
_METHODS = frozenset(
    {
        *("append", "appendleft", "extend", "extendleft", "insert", "add", "update", "setdefault"),
        *("pop", "popleft", "popitem", "remove", "discard", "clear", "sort", "reverse", "rotate"),
        *("put", "put_nowait", "get_nowait", "write", "writelines", "subtract", "move_to_end"),
        *("__setitem__", "__delitem__", "__setattr__", "__iadd__", "set", "fill", "cache_clear"),
    }
)
"""Methods that change the container or object that has them."""
_FUNCTIONS = frozenset({"next", "heappush", "heappop", "insort", "shuffle"})
"""Functions that change an argument."""


def line_that_changes(codes: Iterable[CodeType], places: Sequence[ChangedPlace]) -> str:
    """Return the only line of some code that changes one of some places; empty if none is."""
    found = {
        file_and_line(code.co_filename, line): None
        for code in codes
        for line, steps in _lines(code)
        if any(_changes(steps, place) for place in places)
    }
    return next(iter(found)) if len(found) == 1 else ""


def line_that_names(codes: Iterable[CodeType], names: frozenset[str]) -> str:
    """Return the first line of some code with one of some names; empty if there is none."""
    for code in codes:
        if not names.isdisjoint(code.co_names):
            for line, steps in _lines(code):
                if any(step.argval in names for step in steps if isinstance(step.argval, str)):
                    return file_and_line(code.co_filename, line)
    return ""


def _lines(code: CodeType) -> Iterator[tuple[int, list[dis.Instruction]]]:
    """Yield the instructions of each line, in the order in which they stand."""
    line, numbered = code.co_firstlineno, []
    for step in dis.get_instructions(code):
        positions = step.positions
        line = (positions.lineno if positions is not None else None) or line
        numbered.append((line, step))
    for number, steps in itertools.groupby(numbered, key=lambda pair: pair[0]):
        yield number, [step for _, step in steps]


def _changes(steps: Sequence[dis.Instruction], place: ChangedPlace) -> bool:
    if any(step.opname in _SETS and step.argval == place.name for step in steps):
        return True
    names = {step.argval for step in steps if isinstance(step.argval, str)}
    if place.is_set:
        return place.name in names and not _SETS_BY_TEXT.isdisjoint(names)
    for index, step in enumerate(steps):
        if step.opname.startswith("LOAD_") and step.argval == place.name:
            if not _FUNCTIONS.isdisjoint(names):
                return True
            return any(
                later.opname in _SETS_ITEM
                or (later.opname in ("LOAD_ATTR", "LOAD_METHOD") and later.argval in _METHODS)
                for later in steps[index + 1 :]
            )
    return False
