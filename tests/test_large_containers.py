"""Containers with many items are compared before each replay, as small ones are."""

from __future__ import annotations

import array
import collections
import enum
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from cg_lightning.guards.identity import SameItems
from cg_lightning.guards.sources import MISSING
from tests.test_held_namespaces import SETTINGS, Holder, compare

NUMBER = 5000


def sets_item(part: Any, is_on: bool) -> None:
    part.held[7] = 3.0 if is_on else 1.0


def sets_text(part: Any, is_on: bool) -> None:
    part.held[7] = "3" if is_on else "1"


def adds_member(part: Any, is_on: bool) -> None:
    (part.held.add if is_on else part.held.discard)("new")


def sets_attribute(part: Any, is_on: bool) -> None:
    part.held[7].held = 3.0 if is_on else 1.0


def sets_inner(part: Any, is_on: bool) -> None:
    part.held[7]["a"] = 3.0 if is_on else 1.0


def sets_inner_text(part: Any, is_on: bool) -> None:
    for texts in part.held[6], part.held[NUMBER - 1]:
        texts[0] = "3" if is_on else "1"


def sets_byte(part: Any, is_on: bool) -> None:
    part.held[7] = 3 if is_on else 1


def fills_cache(part: Any, is_on: bool) -> None:
    part.held.factor = 3.0 if is_on else 1.0
    part.held.of.cache_clear()
    for number in range(300):
        part.held.of(number)


class Cached:
    def __init__(self) -> None:
        self.factor = 1.0
        self.of = functools.cache(lambda number: self.factor + number)


item: Callable[[Any, Tensor], Tensor] = lambda self, x: x * self.held[7]
CASES: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "list": (lambda: [1.0] * NUMBER, item, sets_item),
    "texts": (lambda: ["1"] * NUMBER, lambda self, x: x * float(self.held[7]), sets_text),
    "deque": (lambda: collections.deque([1.0] * NUMBER), item, sets_item),
    "dictionary": (lambda: dict.fromkeys(range(NUMBER), 1.0), item, sets_item),
    "ordered": (
        lambda: collections.OrderedDict.fromkeys(range(NUMBER), 1.0),
        item,
        sets_item,
    ),
    "defaultdict": (
        lambda: collections.defaultdict(float, dict.fromkeys(range(NUMBER), 1.0)),
        item,
        sets_item,
    ),
    "counter": (lambda: collections.Counter(range(NUMBER)), item, sets_item),
    "lists of texts": (
        lambda: [["1", "2"] for _ in range(NUMBER)],
        lambda self, x: x * float(self.held[6][0]) * float(self.held[-1][0]),
        sets_inner_text,
    ),
    "set": (
        lambda: set(map(str, range(NUMBER))),
        lambda self, x: x * (1.0 + ("new" in self.held)),
        adds_member,
    ),
    "bytearray": (lambda: bytearray([1] * NUMBER), item, sets_byte),
    "array": (lambda: array.array("d", [1.0] * NUMBER), item, sets_item),
    "numpy": (lambda: np.ones(NUMBER), lambda self, x: x * float(self.held[7]), sets_item),
    "objects": (
        lambda: [Holder(1.0) for _ in range(NUMBER)],
        lambda self, x: x * self.held[7].held,
        sets_attribute,
    ),
    "dictionaries": (
        lambda: [{"a": 1.0} for _ in range(NUMBER)],
        lambda self, x: x * self.held[7]["a"],
        sets_inner,
    ),
    "cache": (Cached, lambda self, x: x * self.held.of(0), fills_cache),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("name", list(CASES))
def test_an_item_changes_in_mid_stage(harness, name, settings):
    make, use, change = CASES[name]
    callback = compare(harness, make, use, change, **settings)
    assert callback.stats.steps[settings.get("mode", "FULL")] >= 4, callback.summary()


def test_a_large_dictionary_that_was_written_and_is_the_same_holds():
    items = {str(number): number for number in range(100)}
    same = SameItems(MISSING)
    assert same.add(items)
    items["new"] = 1
    assert not same.hold()
    del items["new"]
    assert same.hold()
    assert same.hold()
    items["7"] = True
    assert not same.hold()


class One(enum.StrEnum):
    """Equals a text, and is none."""

    SEVEN = "7"


@pytest.mark.parametrize("number", [100, 5000])
@pytest.mark.parametrize("other", ["3", 3, None, np.ones(2)])
def test_large_lists_of_texts(other, number):
    texts = list(map(str, range(number)))
    same = SameItems(MISSING)
    assert same.add(texts)
    before, texts[7] = texts[7], other
    assert not same.hold()
    texts[7] = before
    assert same.hold()
    texts.append("a")
    assert not same.hold()


def test_a_text_that_equals_another_object():
    texts = list(map(str, range(3000)))
    same = SameItems(MISSING)
    assert same.add(texts)
    texts[7] = One.SEVEN
    assert not same.hold()


class OwnTuple(tuple[float, ...]):
    """A tuple that has attributes as well."""


def in_list() -> list[OwnTuple]:
    own = OwnTuple([1.0])
    own.scale = 1.0
    return [own]


def sets_scale(part: Any, is_on: bool) -> None:
    part.held[0].scale = 3.0 if is_on else 1.0


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
def test_an_attribute_of_a_tuple_in_a_list(harness, settings):
    use = lambda self, x: x * self.held[0].scale * self.held[0][0]
    compare(harness, in_list, use, sets_scale, **settings)


def sets_flag(part: Any, is_on: bool) -> None:
    part.held.setflags(write=not is_on)


def sets_order(part: Any, is_on: bool) -> None:
    part.held.strides = (8, 16) if is_on else (16, 8)


@pytest.mark.parametrize(
    ("use", "change"),
    [
        (lambda self, x: x * (1.0 + self.held.flags.writeable), sets_flag),
        (lambda self, x: x * float(self.held.strides[0]), sets_order),
    ],
    ids=["flags", "strides"],
)
@pytest.mark.filterwarnings("ignore:.*strides:DeprecationWarning")
def test_how_an_array_lies_in_its_memory(harness, use, change):
    compare(harness, lambda: np.ones((2, 2)), use, change, verify_replays=0)


def sets_cause(part: Any, is_on: bool) -> None:
    part.held.__cause__ = KeyError() if is_on else None


def sets_number(part: Any, is_on: bool) -> None:
    part.held.errno = 3 if is_on else 1


def sets_notes(part: Any, is_on: bool) -> None:
    if is_on:
        part.held.add_note("a")
    elif hasattr(part.held, "__notes__"):
        del part.held.__notes__


@pytest.mark.parametrize(
    ("use", "change"),
    [
        (lambda self, x: x * (1.0 + (self.held.__cause__ is not None)), sets_cause),
        (lambda self, x: x * self.held.errno, sets_number),
        (lambda self, x: x * (1.0 + len(getattr(self.held, "__notes__", ()))), sets_notes),
    ],
    ids=["cause", "number", "notes"],
)
def test_parts_of_an_error(harness, use, change):
    callback = compare(harness, lambda: OSError(1, "a"), use, change, verify_replays=0)
    assert callback.stats.steps["FULL"] >= 4, callback.summary()
