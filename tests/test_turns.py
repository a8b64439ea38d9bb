"""Each case of the default set runs in one setting, and each setting has cases."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from tests.turns import takes_its_turn

SETTINGS = [{"a": 1}, {"a": 2}, pytest.param({"a": 3}, marks=pytest.mark.exhaustive), {"a": 4}]
PAIRS = [("FULL", 0), ("FULL", 2), ("PIECEWISE", 0)]


def chosen(name: str, /, **given: list[Any]) -> list[dict[str, Any]]:
    """Return the parameters of the tests that take their turn, as pytest would collect them."""
    marks = [
        pytest.mark.parametrize(names.replace("_and_", ", "), values)
        for names, values in given.items()
    ]
    turn = pytest.mark.in_turn(name).mark
    found = []
    for values in itertools.product(*given.values()):
        parameters: dict[str, Any] = {}
        for names, value in zip(given, values, strict=True):
            value = value.values[0] if hasattr(value, "marks") else value
            several = "_and_" in names
            parameters |= dict(
                zip(names.split("_and_"), value if several else (value,), strict=True)
            )
        item: Any = SimpleNamespace(
            callspec=SimpleNamespace(params=parameters),
            get_closest_marker=lambda _: turn,
            iter_markers=lambda _: [each.mark for each in marks],
        )
        if takes_its_turn(item):
            found.append(parameters)
    return found


def test_each_case_once_and_each_setting():
    found = chosen("settings", settings=SETTINGS, name=list("abcdef"))
    assert [each["name"] for each in sorted(found, key=lambda each: each["name"])] == list("abcdef")
    counts = [sum(each["settings"] is one for each in found) for one in SETTINGS]
    assert counts == [2, 2, 0, 2]


def test_several_names_of_one_mark_and_several_marks():
    found = chosen("mode", mode_and_verify=PAIRS, make_and_do=PAIRS, inside=[False, True])
    assert len(found) == 6
    cases = {(each["make"], each["do"], each["inside"]) for each in found}
    assert len(cases) == 6
    assert {(each["mode"], each["verify"]) for each in found} == set(PAIRS)


def test_without_the_mark_all_run():
    assert takes_its_turn(SimpleNamespace(get_closest_marker=lambda _: None))  # type: ignore[arg-type]
