"""The guards of one graph: the values that its step read in Python, and that it has frozen.

As in Dynamo, each graph has its guards, a lookup takes the first graph whose guards hold, and the
message is made only after a failure.

- ``check()`` runs before each replay, so it is flat: one list of namespaces, one of names, one of
  expected values, compared by identity first. Reading a name is one look-up in a dictionary. No
  attribute of the user's object is read, because that could run the user's code (a property,
  ``__getattr__``).
- Identity is not enough: a list stays the same object when an item is appended. The contents of
  values are compared by :class:`~cg_lightning.guards.values.FrozenValues`, and modules that no
  module tree contains have a guard of their own.
- A value that compares equal is the same only if it is plain (a number, a string, a dtype). Two
  equal tensors at two addresses are different, because a graph reads addresses.
- A name that a module does not have itself is looked up in its class: both places are guarded,
  since an attribute of the instance may come later and hide that of the class.
- ``check_epoch()`` compares values that take too long for each step. It must run before the first
  replay of an epoch, and together with ``check()``, because it does not repeat those comparisons.
- Order: expected values are read when the set is made. It must be made after the step that was
  watched, and before anything else runs: if the step itself changes a value, that is a finding, and
  no graph.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.guards.comparisons import Condition
from cg_lightning.guards.library_code import is_code, is_compared
from cg_lightning.guards.module_guard import ModuleGuard
from cg_lightning.guards.sources import MISSING, LibrarySource, Source, describe_change
from cg_lightning.guards.values import FrozenValues
from cg_lightning.guards.written_settings import FrozenSettings
from cg_lightning.modules.attributes import holding_class, is_same_value


class Unguarded:
    """Guards that never fail: for steps that freeze nothing, and for those without a graph."""

    def check(self) -> bool:
        """Return True."""
        return True

    def check_epoch(self) -> bool:
        """Return True."""
        return True

    def explain(self) -> Changed:
        """Return an empty sentence."""
        return NO_CHANGE


class Guard(NamedTuple):
    """A source and the value that a graph has frozen."""

    source: Source
    namespace: Any
    """The namespace of the source, which is made only once."""
    expected: Any

    @classmethod
    def of(cls, source: Source) -> Guard:
        """Return a guard that expects the current value of a source."""
        namespace = source.namespace
        return cls(source, namespace, namespace.get(source.name, MISSING))

    def value(self) -> Any:
        """Return the current value of the source."""
        return self.namespace.get(self.source.name, MISSING)

    @property
    def is_in_dictionary(self) -> bool:
        """Whether a native look-up finds the value, unless the name is gone."""
        is_there = self.expected is not MISSING
        return is_there and type(self.namespace) in (dict, types.MappingProxyType)


def _with_classes(sources: Iterable[Source]) -> list[Source]:
    found: dict[tuple[int, str], Source] = {}
    for source in sources:
        found.setdefault(source.key, source)
        if isinstance(source.holder, nn.Module):
            cls = holding_class(source.holder, source.name)
            if cls is not None:
                path = f"{cls.__name__}.{source.name}"
                of_class = Source(cls, source.name, path, source.line)
                found.setdefault(of_class.key, of_class)
    return list(found.values())


class GuardSet:
    """Compares values of sources with those of the time when the set was made.

    Args:
        sources: The sources that the step read.
        inside: Modules that the caller guards, or that need no guard.
        compared: Further conditions: outcomes of comparisons, the memory of gradients.
        settings: Settings of submodules; None: they do not matter.
    """

    def __init__(
        self,
        sources: Iterable[Source] = (),
        inside: Iterable[nn.Module] = (),
        compared: Iterable[Condition] = (),
        settings: FrozenSettings | None = None,
    ) -> None:
        self._compared = list(compared)
        self._settings = settings or FrozenSettings({}, ())
        sources = list(sources)
        bare = [each for each in sources if each.is_bare_function]
        self._of_libraries = [Guard.of(each) for each in sources if isinstance(each, LibrarySource)]
        own = [e for e in sources if not (e.is_bare_function or isinstance(e, LibrarySource))]
        self.guards = list(map(Guard.of, _with_classes(own)))
        there = [guard for guard in self.guards if guard.expected is not MISSING]
        self._code = [
            guard
            for guard in self._of_libraries
            if guard.is_in_dictionary
            and not (is_code(guard.expected) and is_compared(guard.source.holder))
        ]
        native = [guard for guard in (*there, *self._code) if guard.is_in_dictionary]
        self._dictionaries = [guard.namespace for guard in native]
        self._names = [guard.source.name for guard in native]
        self._expected = [guard.expected for guard in native]
        self._others = [
            (guard.namespace.get, guard.source.name, guard.expected)
            for guard in self.guards
            if not guard.is_in_dictionary
        ]
        self._contents = FrozenValues(
            [guard.expected for guard in there],
            [guard.source.path for guard in there],
            without_attributes={each.path: each.holder for each in bare},
        )
        known = set(map(id, inside))
        hidden = [module for module in self._contents.modules if id(module) not in known]
        self._hidden = [ModuleGuard(module, backward_hooks=True) for module in hidden]
        for guard in self._hidden:
            guard.check_epoch()  # stores what later ones are compared with
        self._settings.add(self.hidden_modules)
        self._hidden_flags = [guard.flags() for guard in self._hidden]
        self.of_compiled: GuardSet | None = None
        """What compiled code reads, which shows only in a run of its own; None: there is none."""

    @property
    def hidden_modules(self) -> list[nn.Module]:
        """The modules among the values that are no submodules, and all inside them."""
        return [module for guard in self._hidden for module in guard.modules]

    def tensors(self) -> list[Tensor]:
        """Return all guarded tensors."""
        of_modules = [tensor for guard in self._hidden for tensor in guard.tensors]
        return [*self._contents.tensors, *of_modules]

    def containers(self) -> list[Any]:
        """Return all guarded containers."""
        return self._contents.all_containers()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compare."""
        return not (self.guards or self._compared or self._of_libraries) and self._contents.is_empty

    def _are_same_objects(self) -> bool:
        for get, name, expected in self._others:
            if get(name, MISSING) is not expected:
                return False
        try:  # two native calls
            found = map(operator.getitem, self._dictionaries, self._names)
            return all(map(operator.is_, found, self._expected))
        except KeyError:
            return False

    def _values_are_equal(self) -> bool:
        return all(
            is_same_value(guard.expected, guard.value()) for guard in (*self.guards, *self._code)
        )

    def check(self) -> bool:
        """Return whether all guarded values are unchanged."""
        for compared in self._compared:
            if not compared.holds():
                return False
        if self._settings.written and not self._settings.hold():
            return False
        if not self._are_same_objects() and not self._values_are_equal():
            return False
        contents = self._contents
        if any(contents.without_attributes):  # native: each function of the user's has one
            return False
        if contents.has_more and not contents.hold():
            return False
        if self.of_compiled is not None and not self.of_compiled.check():
            return False
        return not self._hidden or all(
            guard.check() and guard.flags() == flags
            for guard, flags in zip(self._hidden, self._hidden_flags, strict=True)
        )

    def changed_sources(self) -> set[tuple[int, str]]:
        """Return the keys of the sources that have another value now. It is slow."""
        return {
            guard.source.key
            for guard in self.guards
            if not is_same_value(guard.expected, guard.value())
        }

    def check_epoch(self) -> bool:
        """Return whether settings of hidden modules are unchanged, and what libraries have.

        Hidden are modules that no module tree contains.
        """
        return (
            all(guard.source.value() is guard.expected for guard in self._of_libraries)
            and all(guard.epoch_failure() is None for guard in self._hidden)
            and (self.of_compiled is None or self.of_compiled.check_epoch())
        )

    def explain(self) -> Changed:
        """Return the change: ``self.scale: now 2.0, before 1.0``.

        Call it only after a check has failed.
        """
        for compared in self._compared:
            if changed := compared.explain():
                return changed
        if changed := self._settings.explain():
            return changed
        for guard in (*self.guards, *self._of_libraries):
            if not is_same_value(guard.expected, value := guard.value()):
                source = guard.source
                return describe_change(source.path, value, guard.expected).at(source.line)
        lines = {guard.source.path: guard.source.line for guard in self.guards}
        if changed := self._contents.explain(lines):
            return changed
        for hidden, flags in zip(self._hidden, self._hidden_flags, strict=True):
            if not hidden.check():
                return hidden.failure().text
            if hidden.flags() != flags:
                what = "another training flag or requires_grad"
                return Changed(f"a module that is no submodule: {what}")
            if (failure := hidden.epoch_failure()) is not None:
                return failure.text
        if self.of_compiled is not None:
            return self.of_compiled.explain()
        return Changed("a value that changed and changed back")
