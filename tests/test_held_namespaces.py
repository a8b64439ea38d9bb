"""Values of modules, classes and loggers that a step reaches through another value.

Those of a library are compared by the names in the code of the step, and all of them if that code
reads attributes by names that it computes.
"""

from __future__ import annotations

import abc
import colorsys
import decimal
import functools
import logging
import operator
import string
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import Harness, predict
from tests.test_changes_in_mid_stage import Changes, Part, Runs, attribute
from tests.test_closed_world import reasons

LIBRARY = colorsys
"""A module of Python's library."""
OF_LIBRARY = string.Formatter
"""A class of it."""
BY_HAND = types.ModuleType("made_by_hand")
"""A module without a file."""
SETTINGS = [{"verify_replays": 0}, {"mode": "PIECEWISE", "verify_replays": 0}]


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


class Config:
    scale = 1.0


class Outer:
    inner = Config


GLOBALS: dict[str, Any] = {}
LOG = logging.getLogger("tests.held_namespaces")
HANDLER = logging.NullHandler()
NUMBER = decimal.Decimal(1)


@pytest.fixture(autouse=True)
def values_of_namespaces(monkeypatch) -> Iterator[None]:
    for namespace in (LIBRARY, OF_LIBRARY, BY_HAND):
        monkeypatch.setattr(namespace, "scale", 1.0, raising=False)
        monkeypatch.setattr(namespace, "items", [1.0], raising=False)
    monkeypatch.setitem(sys.modules, "made_by_hand", BY_HAND)
    monkeypatch.setattr(Config, "scale", 1.0)
    with decimal.localcontext():
        yield
    LOG.handlers.clear()
    LOG.propagate = True
    HANDLER.setLevel(0)


def closes_over(namespace: Any) -> Any:
    return lambda: namespace


NAMESPACES = {"library": LIBRARY, "class": OF_LIBRARY, "by hand": BY_HAND}
HELD: dict[str, Callable[[Any], tuple[Any, Callable[[Any], Any]]]] = {
    "attribute": lambda space: (space, lambda held: held),
    "list": lambda space: ([space], lambda held: held[0]),
    "object": lambda space: (Holder(space), lambda held: held.held),
    "dictionary": lambda space: ({"a": {"b": space}}, lambda held: held["a"]["b"]),
    "partial": lambda space: (functools.partial(int, space), lambda held: held.args[0]),
    "closure": lambda space: (closes_over(space), lambda held: held()),
    "global": lambda space: (
        GLOBALS.__setitem__("a", space),
        lambda held: GLOBALS["a"],
    ),
}
"""Makes what is held, and a function that reads the namespace in it."""
NAME = "sca"
READ: dict[str, Callable[[Any], float]] = {
    "attribute": lambda space: space.scale,
    "getattr": lambda space: getattr(space, "scale"),  # noqa: B009
    "computed": lambda space: getattr(space, NAME + "le"),
    "default": lambda space: getattr(space, NAME + "le", 0.0),
    "attrgetter": lambda space: operator.attrgetter(NAME + "le")(space),
    "format": lambda space: float("{0.scale}".format(space)),  # noqa: UP030, UP032
    "computed format": lambda space: float(("{0." + NAME + "le}").format(space)),
    "item": lambda space: space.items[0],
}


def compare(
    harness: Harness,
    held: Callable[[], Any],
    use: Callable[[Any, Tensor], Tensor],
    change: Callable[[Any, bool], Any],
    **settings: Any,
) -> Any:
    callback = harness.callback(warmup_steps=1, **settings)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(48, 8)), batch_size=4
    )
    module = Runs(Part(held, use))
    seen = []
    for extra in ([callback], []):
        change(module.part, False)
        trainer = harness.trainer(*extra, Changes(change))
        seen.append(predict(loader)(trainer, module))
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other), reasons(callback)
    assert len({float(each.abs().sum()) for each in seen[1]}) == 12
    return callback


def sets(namespace: Any, is_item: bool = False) -> Callable[[Any, bool], None]:
    def change(_: Any, is_on: bool) -> None:
        if is_item:
            namespace.items[0] = 3.0 if is_on else 1.0
        else:
            namespace.scale = 3.0 if is_on else 1.0

    return change


@pytest.mark.in_turn("how")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("read", list(READ))
@pytest.mark.parametrize("how", list(HELD))
@pytest.mark.parametrize("name", list(NAMESPACES))
def test_values_of_namespaces_that_are_held(harness, name, how, read, settings):
    namespace, get = NAMESPACES[name], READ[read]
    held, inside = HELD[how](namespace)
    use = lambda self, x: x * get(inside(self.held))
    callback = compare(harness, lambda: held, use, sets(namespace, read == "item"), **settings)
    mode = settings.get("mode", "FULL")
    assert callback.stats.steps[mode] >= 4, callback.summary()


def imports(_: Any, x: Tensor) -> Tensor:
    import made_by_hand

    return x * made_by_hand.scale * made_by_hand.items[0]


def by_its_own_name(_: Any, x: Tensor) -> Tensor:
    return x * BY_HAND.scale * BY_HAND.items[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("use", [imports, by_its_own_name])
@pytest.mark.parametrize("is_item", [False, True])
def test_a_module_without_a_file(harness, use, is_item, settings):
    compare(harness, lambda: None, use, sets(BY_HAND, is_item), **settings)


def given(space: Any, x: Tensor) -> Tensor:
    return x * space.scale


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("name", list(NAMESPACES))
def test_a_function_is_given_the_namespace(harness, name, settings):
    namespace = NAMESPACES[name]
    use = lambda self, x: given(self.held, x)
    compare(harness, lambda: namespace, use, sets(namespace), **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize(
    "use",
    [
        lambda self, x: x * self.held(Config),
        lambda self, x: x * functools.partial(getattr, Config)("scale"),
        lambda self, x: x * next(map(getattr, [Config], [NAME + "le"])),
        lambda self, x: x * float(string.Formatter().format("{0." + NAME + "le}", Config)),
        lambda self, x: x * float(("{a." + NAME + "le}").format_map({"a": Config})),
        lambda self, x: x * operator.attrgetter("inner.scale")(Outer),
        lambda self, x: x * operator.attrgetter("inner." + NAME + "le")(Outer),
    ],
    ids=["held", "partial", "map", "Formatter", "format_map", "dotted", "computed and dotted"],
)
def test_values_of_a_class_of_the_users_read_by_computed_names(harness, use, settings):
    compare(harness, lambda: operator.attrgetter(NAME + "le"), use, sets(Config), **settings)


def precision(_: Any, is_on: bool) -> None:
    decimal.getcontext().prec = 3 if is_on else 28


def rounding(_: Any, is_on: bool) -> None:
    decimal.getcontext().rounding = decimal.ROUND_UP if is_on else decimal.ROUND_DOWN


def exchanged(_: Any, is_on: bool) -> None:
    decimal.setcontext(decimal.Context(prec=3 if is_on else 28))


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize("change", [precision, rounding, exchanged])
@pytest.mark.parametrize(
    "use",
    [
        lambda self, x: x * float(self.held[0] / 3),
        lambda self, x: x * float(NUMBER / 3),
        lambda self, x: x * float(decimal.Decimal(1) / decimal.Decimal(3)),
    ],
    ids=["held", "global", "named"],
)
def test_the_context_of_decimal(harness, use, change, settings):
    callback = compare(harness, lambda: [decimal.Decimal(1)], use, change, **settings)
    assert callback.stats.steps[settings.get("mode", "FULL")] >= 3, callback.summary()


def handler(part: Any, is_on: bool) -> None:
    (LOG.addHandler if is_on else LOG.removeHandler)(HANDLER)


def propagates(_: Any, is_on: bool) -> None:
    LOG.propagate = not is_on


def level(_: Any, is_on: bool) -> None:
    HANDLER.setLevel(10 if is_on else 0)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
@pytest.mark.parametrize(
    ("use", "change"),
    [
        (lambda self, x: x * (1.0 + len(LOG.handlers)), handler),
        (lambda self, x: x * (1.0 + len(self.held.handlers)), handler),
        (lambda self, x: x * (1.0 + LOG.hasHandlers()), propagates),
        (lambda self, x: x * (1.0 + LOG.propagate), propagates),
        (lambda self, x: x * (1.0 + HANDLER.level), level),
    ],
    ids=["handlers", "held", "hasHandlers", "propagate", "level of a handler"],
)
def test_handlers_of_loggers(harness, use, change, settings):
    LOG.propagate = True
    compare(harness, lambda: LOG, use, change, **settings)


def test_a_logger_costs_no_graph(harness):
    use = lambda self, x: (LOG.debug("shown to nobody"), x * 2)[1]
    callback = compare(harness, lambda: None, use, lambda *_: None)
    assert callback.stats.steps["FULL"] >= 9, callback.summary()


def chain(length: int) -> Any:
    """Return a class of a library that leads to as many others, and back to itself."""
    classes = [type("Link", (), {"__module__": "string", "scale": 1.0}) for _ in range(length)]
    for index, each in enumerate(classes):
        each.next = classes[(index + 1) % length]
    return classes[0]


def test_namespaces_that_lead_far_and_back(harness):
    use = lambda self, x: x * getattr(self.held, "scale" if len(x) else "next")
    callback = compare(harness, lambda: chain(1500), use, attribute("scale"))
    assert callback.stats.steps["FULL"] >= 3, callback.summary()


class Abstract(abc.ABC):  # noqa: B024
    scale = 1.0


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: each.get("mode", "FULL"))
def test_an_abstract_class_read_by_computed_names(harness, settings):
    use = lambda self, x: x * getattr(Abstract, "".join(("sc", "ale")))
    callback = compare(harness, lambda: Abstract, use, attribute("scale"), **settings)
    assert callback.stats.steps[settings.get("mode", "FULL")] >= 3, callback.summary()
