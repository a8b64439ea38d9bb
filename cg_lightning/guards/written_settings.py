"""Settings of submodules (``eps``, ``p``, ``threshold``) that are set during a stage.

A network has hundreds of settings, so all of them are compared only once a stage. During a stage,
writes to attributes are intercepted, and the few settings that were written are compared before
each replay. A write to ``vars(layer)`` cannot be intercepted: the guard of the module sees that the
dictionary has changed, and reports the setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.guards.sources import DerivedNamespace, Source, describe_change
from cg_lightning.modules.attributes import is_same_value, names_of_frameworks, value_in_class
from cg_lightning.modules.interception import Interception, ModuleHandler, can_intercept
from cg_lightning.modules.kinds import (
    is_lightning_module,
    is_metric,
    is_user_module,
    namespace_of,
)


class _Written(NamedTuple):
    source: Source
    before: Any
    """The value before it was set for the first time."""


_Key = tuple[int, str]
"""The id of the module, and the name."""


class _Class(DerivedNamespace):
    """The class of a module, which is an attribute that is in no namespace."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def get(self, name: str, default: Any) -> Any:
        """Return the class."""
        return type(self._module)


class WrittenSettings:
    """Records each setting that is written while :meth:`install` is in effect.

    Only modules are intercepted whose settings belong to the guards of a graph, so eager steps
    cost nothing.
    """

    def __init__(self) -> None:
        self.written: dict[_Key, _Written] = {}
        self._modules: dict[int, tuple[str, nn.Module]] = {}
        self._interceptions: dict[int, Interception] = {}
        self._is_installed = False

    def add(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Intercept some modules, which have these paths, from now on."""
        for path, module in modules:
            if _can_be_seen(module):
                self._modules.setdefault(id(module), (path, module))
        if self._is_installed:
            self.install()

    def install(self) -> None:
        """Intercept writes from now on; idempotent."""
        self._is_installed = True
        for key, (path, module) in self._modules.items():
            if key not in self._interceptions:
                handler = _Handler(self.written, path, module)
                self._interceptions[key] = Interception(module, handler)

    def remove(self) -> None:
        """Leave no trace in any module. What was noted is kept for the next stage."""
        self._is_installed = False
        for interception in self._interceptions.values():
            interception.remove()
        self._interceptions.clear()

    def clear(self) -> None:
        """Forget all modules and what was noted. Nothing made by :meth:`frozen` may be used."""
        was_installed = self._is_installed
        self.remove()
        self._is_installed = was_installed
        self._modules.clear()
        self.written = {}

    def note(self, module: nn.Module, name: str, before: Any) -> None:
        """Note a setting that was written, as if the write had been intercepted."""
        if (id(module), name) not in self.written and id(module) in self._modules:
            path = self._modules[id(module)][0]
            source = Source(module, name, ".".join(filter(None, ["self", path, name])))
            self.written[id(module), name] = _Written(source, before)

    def contains(self, modules: Iterable[tuple[str, nn.Module]]) -> bool:
        """Return whether it intercepts all of these modules that can be intercepted."""
        return all(id(module) in self._modules for _, module in modules if _can_be_seen(module))

    def frozen(self, modules: Sequence[tuple[str, nn.Module]]) -> FrozenSettings:
        """Return guards that expect the current settings of modules, which have these paths."""
        self.add(modules)
        return FrozenSettings(self.written, [module for _, module in modules])


def _can_be_seen(module: nn.Module) -> bool:
    # Lightning itself sets attributes of a LightningModule in each step
    return can_intercept(module) and not is_lightning_module(module)


class FrozenSettings:
    """Compares settings that were written with their values when this was made.

    Args:
        written: All settings that were written until now, and that are from now on.
        modules: The modules whose settings are compared.
    """

    def __init__(self, written: dict[_Key, _Written], modules: Iterable[nn.Module]) -> None:
        self.written = written
        """All settings that were written. As long as it is empty, all of them hold."""
        self._modules = set(map(id, modules))
        self._values = {key: each.source.value() for key, each in written.items()}

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Compare settings of these modules as well."""
        self._modules.update(map(id, modules))

    def hold(self) -> bool:
        """Return whether all settings have the values that they had."""
        return not self.explain()

    def explain(self) -> Changed:
        """Return what has changed: ``self.net.drop.p: now 0.5, before 0.1``; empty if nothing."""
        for key, (source, before) in self.written.items():
            if key[0] in self._modules:
                expected, now = self._values.get(key, before), source.value()
                if not is_same_value(expected, now):
                    return describe_change(source.path, now, expected)
        return NO_CHANGE


class _Handler(ModuleHandler):
    """Notes the settings of one module that are set."""

    def __init__(self, written: dict[_Key, _Written], path: str, module: nn.Module) -> None:
        self._written = written
        self._path = path
        self._module = module
        self._is_metric = is_metric(module)

    def on_write(self, name: str, value: Any) -> None:
        """See :class:`~cg_lightning.modules.interception.ModuleHandler`."""
        is_state = self._is_metric and (name[:1] == "_" or isinstance(value, Tensor))
        if is_state and name not in ("__class__", "__dict__"):
            return  # each update makes a dozen such writes
        if name == "__dict__":  # changes the version of the old one, so that guards look
            attributes = namespace_of(self._module)
            attributes[name] = None
            del attributes[name]
        if (id(self._module), name) in self._written:
            return
        holder = _Class(self._module) if name == "__class__" else self._module
        source = Source(holder, name, ".".join(filter(None, ["self", self._path, name])))
        before = source.value()
        if not is_same_value(before, value) and self._is_setting(name, value):
            self._written[id(self._module), name] = _Written(source, before)

    def _is_setting(self, name: str, value: Any) -> bool:
        """Return whether an epoch compares it (``layer_settings`` in ``modules/attributes.py``)."""
        module = self._module
        if name == "__class__":
            return True
        if name in names_of_frameworks(module):
            return False
        if self._is_metric:
            return is_plain_value(value) and not name.startswith("_")
        return not is_user_module(module) or callable(value_in_class(type(module), name))
