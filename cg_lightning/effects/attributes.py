"""The attributes of modules, and how to restore them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from cg_lightning.modules.attributes import has_slots, slots_in


class AttributesSnapshot:
    """Stores which objects the attributes refer to. It does *not* copy these objects.

    Args:
        modules: The modules that have the attributes.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        self._slots = [(module, slots_in(module)) for module in modules if has_slots(module)]

    def restore(self) -> None:
        """Restore all attributes, and remove new ones."""
        for attributes, before in self._attributes:
            attributes.clear()
            attributes.update(before)
        for module, held in self._slots:
            for name in slots_in(module).keys() - held.keys():
                object.__delattr__(module, name)
            for name, value in held.items():
                object.__setattr__(module, name, value)
