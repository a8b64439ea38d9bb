"""Modules that are no submodules: in a list, in an object, behind a global or a closure.

Nobody sees what a step reads of them, so all that they hold counts as read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.diagnosis.step_watch import StepWatch, look_into
from cg_lightning.guards.sources import MISSING, Source
from cg_lightning.modules.attributes import plain_attributes
from cg_lightning.modules.kinds import is_metric


def hidden_modules(watch: StepWatch, found: Collection[nn.Module]) -> list[nn.Module]:
    """Returns the modules inside some modules, without those that the step's module contains."""
    inside = {id(child): child for module in found for child in module.modules()}
    return [
        child
        for key, child in inside.items()
        if key not in watch.inside_root and not is_metric(child)
    ]


def sources_in(modules: Iterable[nn.Module], path: str) -> list[Source]:
    """Returns the attributes of some modules, which the value with this name holds."""
    return [
        Source(module, name, f"{path}: {type(module).__name__}.{name}")
        for module in modules
        for name in plain_attributes(module)
    ]


def opaque_in(watch: StepWatch, sources: Iterable[Source]) -> list[str]:
    """Returns what nobody can look into.

    Raises:
        UnreadableError: A value raises something itself.
    """
    found: list[str] = []
    for source in sources:
        value = source.value()
        if value is not MISSING and not is_plain_value(value):
            found += watch.look_at(look_into(value, source.path))
    return found
