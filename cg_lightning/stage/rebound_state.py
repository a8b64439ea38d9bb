"""What the attributes of a module refer to, before a step and after."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

from cg_lightning.stage.module_attributes import (
    attributes_of,
    class_values,
    is_plain_object,
    is_same_value,
    names_of_frameworks,
    scripted_attributes,
)

_MOST_ITEMS = 100
"""Items of a container that are compared."""


def state_of(module: nn.Module) -> dict[str, Any]:
    """What the module's attributes refer to, those of its classes too, and how long its containers are."""
    state: dict[str, Any] = {}
    for name, value in class_values(module):
        state.update({name: value, **{f"{name}{key}": item for key, item in _inside(value)}})
    for name, value in {**vars(module), **scripted_attributes(module)}.items():
        if name == "_metric_attributes":
            continue  # Lightning's cache of the names of metrics, made by the first ``self.log``
        if name in ("_parameters", "_buffers", "_modules"):
            state.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            state[name] = value
            if name not in names_of_frameworks():
                state.update({f"{name}{key}": item for key, item in _inside(value)})
    return state


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container or a plain object of the user's holds: a step may change it, and a graph would not."""
    if isinstance(value, (list, tuple, set, dict)):
        yield "'s length", len(value)
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in itertools.islice(value.items(), _MOST_ITEMS))
    elif isinstance(value, list):
        yield from ((f"[{index}]", item) for index, item in enumerate(value[:_MOST_ITEMS]))
    elif is_plain_object(value):
        yield from ((f".{name}", item) for name, item in attributes_of(value).items())


def changed_names(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two results of :func:`state_of`."""
    missing = object()
    return [name for name in {**before, **after} if not is_same_value(before.get(name, missing), after.get(name, missing))]
