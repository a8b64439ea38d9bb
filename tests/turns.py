"""Settings that take turns: a case runs in one of them by default, and in all on a GPU.

``@pytest.mark.in_turn("settings")`` names the first argument of a ``parametrize``. Each case has
its turn, so the default set has all cases and all settings. ``-m exhaustive`` runs the other pairs.
"""

from __future__ import annotations

from typing import Any

import pytest

_WITH_MARKS = type(pytest.param(None))


def _names(mark: pytest.Mark) -> list[str]:
    names = mark.args[0]
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]


def _values(mark: pytest.Mark) -> list[tuple[tuple[Any, ...], bool]]:
    """Return the values of each set of parameters, and whether it is exhaustive anyway."""
    found = []
    for each in mark.args[1]:
        if isinstance(each, _WITH_MARKS):
            found.append((each.values, any(one.name == "exhaustive" for one in each.marks)))
        else:
            found.append((tuple(each) if len(_names(mark)) > 1 else (each,), False))
    return found


def _index(mark: pytest.Mark, parameters: dict[str, Any]) -> int:
    """Return the index of a test's own values, among those not exhaustive; else -1."""
    own = [parameters[name] for name in _names(mark)]
    index = 0
    for values, is_exhaustive in _values(mark):
        if all(one is other for one, other in zip(own, values, strict=True)):
            return -1 if is_exhaustive else index
        index += not is_exhaustive
    raise AssertionError(f"{own} are no values of {mark}")


def takes_its_turn(item: pytest.Item) -> bool:
    """Return whether a test belongs to the default set, as far as its turn decides it."""
    turn = item.get_closest_marker("in_turn")
    if turn is None:
        return True
    (name,) = turn.args
    parameters: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
    given = {_names(mark)[0]: mark for mark in item.iter_markers("parametrize")}
    settings = given.pop(name)
    case = sum(_index(mark, parameters) for mark in given.values())
    turns = sum(not is_exhaustive for _, is_exhaustive in _values(settings))
    return _index(settings, parameters) == case % turns
