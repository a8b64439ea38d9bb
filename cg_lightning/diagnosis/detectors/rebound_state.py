"""What the attributes of a module hold, before a step and after."""

from __future__ import annotations

from typing import Any

from torch import nn

from cg_lightning.guards.values import FrozenValues
from cg_lightning.modules.attributes import (
    class_values,
    is_same_value,
    names_of_frameworks,
    scripted_attributes,
)

_TABLES = ("_parameters", "_buffers", "_modules")


def _values(module: nn.Module) -> dict[str, Any]:
    attributes = {**vars(module), **scripted_attributes(module)}
    attributes.pop(
        "_metric_attributes", None
    )  # Lightning's cache of the names of metrics, made by the first ``self.log``
    members = {
        f"{table}.{name}": member
        for table in _TABLES
        for name, member in attributes.pop(table, {}).items()
    }
    return {**dict(class_values(module)), **attributes, **members}


class ReboundState:
    """Remembers what the attributes of a module and of its classes refer to, and what is in those of the user's.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = _values(module)
        users = set(self._values) - names_of_frameworks(module)
        self._contents = {name: FrozenValues([self._values[name]]) for name in users}

    def changed(self) -> list[str]:
        """Names of the attributes that are others by now, that came or went, or in which something changed."""
        missing, now = object(), _values(self._module)
        changed = [
            name
            for name, value in now.items()
            if not is_same_value(self._values.get(name, missing), value)
        ]
        gone = [name for name in self._values if name not in now]
        inside = [name for name, contents in self._contents.items() if not contents.all_hold()]
        return list(dict.fromkeys([*changed, *gone, *inside]))
