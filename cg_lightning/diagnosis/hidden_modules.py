"""Modules that are no submodules: in a list, in an object, behind a global or a closure.

Reads of their attributes cannot be observed, so all of their attributes count as read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from cg_lightning.diagnosis.contents import look_into
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.guards.sources import MISSING, DerivedNamespace, Source
from cg_lightning.guards.value_kinds import holds_nothing
from cg_lightning.metrics.members import ATTRIBUTES_OF_METRICS, state_names
from cg_lightning.modules.attributes import user_attributes
from cg_lightning.modules.kinds import is_metric


def hidden_modules(watch: StepWatch, found: Collection[nn.Module]) -> list[nn.Module]:
    """Return the modules inside some modules, without those that the step's module contains."""
    inside = {id(child): child for module in found for child in module.modules()}
    return [child for key, child in inside.items() if key not in watch.inside_root]


def sources_in(modules: Iterable[nn.Module], path: str) -> list[Source]:
    """Return the attributes of modules, as sources. ``path`` names what holds the modules."""
    modules = list(modules)
    if not modules:
        return []
    found = [
        Source(module, name, f"{path}: {type(module).__name__}.{name}")
        for module in modules
        for name in _attributes(module)
    ]
    number = Source(_Attributes(modules), "number", f"{path}: the number of attributes of modules")
    return [*found, number]


class _Attributes(DerivedNamespace):
    """The number of attributes of some modules: a step may ask for one that is new.

    One that is removed is a source of its own.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        spaces = [vars(module) for module in modules]
        tables = [space[name] for space in spaces for name in _TABLES]
        self._spaces = [*spaces, *tables]

    def get(self, name: str, default: Any) -> int:
        """Return the number."""
        return sum(map(len, self._spaces))


_TABLES = ("_parameters", "_buffers", "_modules")


def _attributes(module: nn.Module) -> list[str]:
    if not is_metric(module):
        return user_attributes(module)
    known = ATTRIBUTES_OF_METRICS | state_names(module)
    return [name for name in vars(module) if name not in known]


def opaque_in(watch: StepWatch, sources: Iterable[Source]) -> list[str]:
    """Return the values whose contents cannot be compared.

    Raises:
        UnreadableError: Reading a value raised an error.
    """
    found: list[str] = []
    for source in sources:
        value = source.value()
        if value is not MISSING and not holds_nothing(value):
            found += watch.look_at(look_into(value, source.path))
    return found
