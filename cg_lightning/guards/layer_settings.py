"""The settings of all layers and metrics of a module, compared once an epoch."""

from __future__ import annotations

from typing import Any

from torch import nn

from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.guards.sources import MISSING, describe_change
from cg_lightning.modules.attributes import is_same_value, layer_settings

SettingKey = tuple[int, str]
"""The id of a module, and the name of a setting."""


def path_of(root: nn.Module, module_id: int, name: str) -> str:
    """Return the path of an attribute of a module inside ``root``, as the user would write it."""
    paths = {id(module): path for path, module in root.named_modules()}
    return ".".join(["self", *filter(None, [paths.get(module_id, "?"), name])])


class LayerSettings:
    """Compares settings with those of the latest :meth:`take`; before it, all of them hold.

    Args:
        root: The module.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._values: dict[SettingKey, Any] | None = None
        self._held: list[tuple[dict[str, Any], str, Any]] | None = None
        """Attributes of a module, name and object of each setting, for the fast comparison."""
        self._keys: list[SettingKey] = []
        """The keys of these."""

    @property
    def are_taken(self) -> bool:
        """Whether there is anything to compare with."""
        return self._values is not None

    def explain(self) -> Changed:
        """Return the first setting that has changed; empty if none has."""
        before, now = self._values or {}, self._now()
        for key in [*before, *now] if self.are_taken else ():
            if key not in before or key not in now or not is_same_value(before[key], now[key]):
                return describe_change(path_of(self._root, *key), now.get(key), before.get(key))
        return NO_CHANGE

    def take(self) -> None:
        """Expect the current settings from now on."""
        self._values = self._now()
        self._held = None

    def renew(self) -> None:
        """Find the settings of other modules, after some were replaced."""
        if self._held is not None:
            self._hold()

    def hold(self) -> bool:
        """Return True if modules have the same objects as settings as at the latest :meth:`take`.

        It is fast: an equal setting that was set again does not hold.
        """
        if self._held is None:
            self._hold()
        for attributes, name, value in self._held or ():  # faster than all()
            if attributes.get(name, MISSING) is not value:
                return False
        return True

    def changed(self) -> list[SettingKey]:
        """Return the settings that :meth:`hold` missed, and that have another value."""
        before = self._values or {}
        return [
            key
            for key, (attributes, name, value) in zip(self._keys, self._held or (), strict=False)
            if not is_same_value(before.get(key, value), attributes.get(name, MISSING))
        ]

    def take_held(self) -> None:
        """Expect what modules have now. It is fast. Call it only after :meth:`hold`."""
        values = {} if self._values is None else self._values
        for index, (attributes, name, value) in enumerate(self._held or ()):
            if (now := attributes.get(name, MISSING)) is not value:
                assert self._held is not None
                self._held[index] = (attributes, name, now)
                values[self._keys[index]] = now
                if now is MISSING:
                    del values[self._keys[index]]

    def _hold(self) -> None:
        held = [
            (module, name)
            for module in self._root.modules()
            for name in layer_settings(module)
            if name in vars(module) and name != "training"
        ]
        self._held = [(vars(each), name, vars(each)[name]) for each, name in held]
        self._keys = [(id(each), name) for each, name in held]

    def _now(self) -> dict[SettingKey, Any]:
        return {
            (id(module), name): value
            for module in self._root.modules()
            for name, value in layer_settings(module).items()
        }
