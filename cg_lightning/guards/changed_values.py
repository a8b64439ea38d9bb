"""Kinds of values that a step changes and never reads.

The contents of such a value do not matter to a graph, but its kind does: a list and an object of
the user's may both have ``append``, with different effects.
"""

from __future__ import annotations

import collections
import enum
from typing import Any

from torch import Tensor

from cg_lightning.guards.sources import DerivedNamespace
from cg_lightning.guards.value_kinds import ValueKind, kind_of


class _KindOfTotal(enum.Enum):
    NUMBER = "a number or a tensor"

    def __repr__(self) -> str:  # as users read it
        return repr(self.value)


NUMBER = _KindOfTotal.NUMBER
"""The kind of a total, which may begin as 0 and become a tensor. Python adds to both."""
LISTS = (list, collections.deque)
MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict)
_NUMBERS = (bool, int, float, complex, Tensor)


def kind_to_change(value: Any) -> Any:
    """Return the kind of a value that a step changes; None if the effect of a change is not known.

    Subclasses of lists and other containers may have methods of their own, so they have no kind.
    """
    cls: type = type(value)
    if cls in _NUMBERS:
        return NUMBER
    if cls in (*LISTS, *MAPPINGS, str) or is_plain_object(value):
        return cls
    return None


def is_plain_object(value: Any) -> bool:
    """Return whether an object keeps attributes, and reads and sets them in the usual way."""
    cls: Any = type(value)
    return (
        kind_of(value) is ValueKind.OBJECT
        and cls.__getattribute__ is object.__getattribute__
        and cls.__setattr__ is object.__setattr__
        and hasattr(value, "__dict__")
    )


class KindsToChange(DerivedNamespace):
    """The kinds of the values in a namespace, as a namespace.

    Args:
        namespace: The attributes of a module.
    """

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace

    def get(self, name: str, default: Any) -> Any:
        """Return the kind of a value."""
        value = self._namespace.get(name, default)
        return default if value is default else kind_to_change(value)
