"""State that a step changes in objects, globals and closures is reported with the line."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cg_lightning import diagnose
from cg_lightning.core.causes import Cause
from cg_lightning.core.lines import Elsewhere
from tests.harness import features, predict
from tests.models import Body, Predictor

COUNT = 0
SEEN: list[int] = []
CACHE: dict[str, int] = {}


class Meter:
    """A nested object, with another one inside."""

    def __init__(self) -> None:
        self.total = 0
        self.values: list[int] = []
        self.inner = collections.Counter({"n": 0})

    def update(self) -> int:
        self.total += 1  # here: in a method
        return self.total

    def keep(self) -> int:
        self.values.append(1)  # here: a list in an object
        return len(self.values)


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Settings:
    """Its attributes are those of a class."""

    steps = 0


class Keeps(Predictor):
    def __init__(self, step: Callable[[Keeps], int]) -> None:
        super().__init__(Body())
        self.meter, self.slotted = Meter(), Slotted()
        self.items, self.table = [0], {"n": 0}
        self.step = step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]) * self.step(self)


def in_a_method(self: Keeps) -> int:
    return self.meter.update()


def a_list_in_an_object(self: Keeps) -> int:
    return self.meter.keep()


def an_attribute_of_an_object(self: Keeps) -> int:
    self.meter.total += 1  # here: an attribute of an object
    return self.meter.total


def an_entry_in_an_object(self: Keeps) -> int:
    self.meter.inner["n"] += 1  # here: an entry in an object
    return self.meter.inner["n"]


def a_slot(self: Keeps) -> int:
    self.slotted.n += 1  # here: a slot
    return self.slotted.n


def a_slot_by_name(self: Keeps) -> int:
    setattr(self.slotted, "n", self.slotted.n + 1)  # noqa: B010  # here: a slot by name
    return self.slotted.n


def a_list(self: Keeps) -> int:
    self.items.insert(0, len(self.items))  # here: a list
    return self.items[0]


def an_entry(self: Keeps) -> int:
    self.table["n"] = self.table["n"] + 1  # here: an entry
    return self.table["n"]


def an_entry_twice(self: Keeps) -> int:
    self.table["n"] += 1
    self.table["n"] += 2
    return self.table["n"]


def a_global(self: Keeps) -> int:
    global COUNT
    COUNT += 1  # here: a global
    return COUNT


def a_list_in_a_global(self: Keeps) -> int:
    SEEN.append(1)  # here: a list in a global
    return len(SEEN)


def an_entry_in_a_global(self: Keeps) -> int:
    CACHE["n"] = CACHE.get("n", 0) + 1  # here: an entry in a global
    return CACHE["n"]


def an_attribute_of_a_class(self: Keeps) -> int:
    Settings.steps += 1  # here: an attribute of a class
    return Settings.steps


def make_closures() -> tuple[Callable[[Keeps], int], Callable[[Keeps], int]]:
    number, numbers = 0, [0]

    def a_closure(self: Keeps) -> int:
        nonlocal number
        number += 1  # here: a closure
        return number

    def a_list_in_a_closure(self: Keeps) -> int:
        numbers.append(1)  # here: a list in a closure
        return len(numbers)

    return a_closure, a_list_in_a_closure


a_closure, a_list_in_a_closure = make_closures()
STEPS = [
    *(in_a_method, a_list_in_an_object, an_attribute_of_an_object, an_entry_in_an_object),
    *(a_slot, a_slot_by_name, a_list, an_entry, a_global, a_list_in_a_global),
    *(an_entry_in_a_global, an_attribute_of_a_class, a_closure, a_list_in_a_closure),
]


@pytest.fixture
def _as_at_first():
    global COUNT
    COUNT, Settings.steps = 0, 0
    SEEN.clear()
    CACHE.clear()


def line_of(step: Callable[[Keeps], int]) -> str:
    with open(__file__, encoding="utf-8") as file:
        marker = f"# here: {step.__name__.replace('_', ' ')}\n"
        (line,) = [number for number, text in enumerate(file, 1) if text.endswith(marker)]
    return f"{__file__}:{line}"


def run(harness, step: Callable[[Keeps], int]) -> Any:
    """Run it in the default mode; no copy, since globals and closures have none."""
    callback = harness.callback()
    harness.trainer(callback).predict(Keeps(step), features(40))
    assert callback.stats.steps["PIECEWISE"] > 0, callback.summary()
    (record,) = [each for each in callback.stats.reasons if each.mode == "PIECEWISE"]
    assert record.reason.kind is Cause.STATE_REBOUND
    return record.reason


@pytest.mark.usefixtures("_as_at_first")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_the_line_that_changes_state_is_named(harness, step):
    reason = run(harness, step)
    assert reason.location == line_of(step), reason
    assert f"({reason.location})" in reason.text


@pytest.mark.parametrize("step", [in_a_method, a_list, an_entry, a_slot])
def test_steps_compute_what_they_compute_eagerly(harness, step):
    callback = harness.compare(Keeps(step), predict(features(40)))
    assert callback.stats.steps["PIECEWISE"] > 0


def test_one_of_several_lines_is_not_guessed(harness):
    """The line that reads the value is known."""
    reason = run(harness, an_entry_twice)
    code = an_entry_twice.__code__
    assert reason.location == f"{code.co_filename}:{code.co_firstlineno + 3}"


@dataclasses.dataclass
class Fields:
    x: Tensor
    label: Any = None
    more: list[Any] = dataclasses.field(default_factory=list)


def sets_a_field(batch: Fields) -> None:
    batch.label = batch.x  # here: sets a field


def sets_a_field_by_name(batch: Fields) -> None:
    setattr(batch, "label", batch.x)  # noqa: B010  # here: sets a field by name


def appends_to_a_field(batch: Fields) -> None:
    batch.more.append(batch.x)  # here: appends to a field


class OfFields(nn.Module):
    def __init__(self, change: Callable[[Fields], None]) -> None:
        super().__init__()
        self.change = change

    def forward(self, batch: Fields) -> Tensor:
        self.change(batch)
        return batch.x * 2


@pytest.mark.parametrize("change", [sets_a_field, sets_a_field_by_name, appends_to_a_field])
def test_the_line_that_changes_the_batch_is_named(change):
    found = diagnose(OfFields(change), [Fields(torch.ones(2, 3))])
    changed = [each for each in found.findings if each.cause is Cause.INPUT_MUTATED]
    assert changed
    assert {each.location for each in changed} == {line_of(change)}


def test_one_of_two_lines_that_set_a_field_is_not_guessed():
    def change(batch: Fields) -> None:
        batch.label = 1
        batch.label = 2

    found = diagnose(OfFields(change), [Fields(torch.ones(2, 3))])
    assert Elsewhere.AT_THE_END in {each.location for each in found.findings}


def test_only_code_that_has_run_counts():
    from cg_lightning.diagnosis.lines_of_changes import line_that_changes
    from cg_lightning.guards.frozen_parts import ChangedPlace

    place = ChangedPlace("total", is_set=True)
    codes = [Meter.update.__code__, Meter.keep.__code__]
    assert line_that_changes(codes, [place]) == line_of(in_a_method)
    assert line_that_changes([Meter.keep.__code__], [place]) == ""
    assert line_that_changes([*codes, an_attribute_of_an_object.__code__], [place]) == ""
