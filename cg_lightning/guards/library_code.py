"""Functions that steps run. If one is replaced, a graph still runs the old one.

What is hard here: a step calls thousands of functions of libraries, and any of them may be replaced
in mid-stage (``torch.relu = mine``, ``nn.Linear.forward = mine``). To compare all of them takes a
hundred microseconds. So the versions of their namespaces are compared, which PyTorch counts for its
own guards, and the functions themselves only after a version has changed.
"""

from __future__ import annotations

import builtins
import gc
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.guards import audit_events
from cg_lightning.guards.sources import MISSING
from cg_lightning.modules.interception import without_interceptions
from cg_lightning.modules.kinds import class_has, is_users_namespace


def always_new(_: dict[str, Any]) -> object:
    """Return a version that no dictionary has had, so that its contents are compared each time."""
    return object()


# private, the guards of Dynamo: the version of a dictionary, which changes with each change of it
version_of: Callable[[dict[str, Any]], object] = getattr(
    getattr(torch._C._dynamo, "guards", None), "dict_version", always_new
)
_COMPARED = (builtins, torch, functional, Tensor)
"""Namespaces that all steps use."""
_CODE = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, type),
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType),
    *(property, classmethod, staticmethod),
)
_Namespace = types.ModuleType | type


def dictionary_of(namespace: _Namespace) -> dict[str, Any]:
    """Return the dictionary with what a module or class has."""
    found = vars(namespace)
    # that of a class is behind a view
    return found if isinstance(found, dict) else gc.get_referents(found)[0]


def _code_in(namespace: _Namespace) -> dict[str, Any]:
    """Return functions, classes and descriptors; not those that we put there.

    Of a class of the user's, all other names are among them, because it may get more of them. Names
    of Python's own are not: ``copy`` keeps ``__slotnames__`` there.
    """
    found = without_interceptions(namespace)
    if is_users_namespace(namespace):
        return {
            name: value if _is_code(value) else None
            for name, value in found.items()
            if not name.startswith("__") or _is_code(value)
        }
    # PyTorch sets ``Storage`` with the default data type, which keys have
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, _CODE) and not (namespace is torch and name == "Storage")
    }


def _is_code(value: Any) -> bool:
    kind: type = type(value)  # ``isinstance`` asks the value as well, which may raise
    return issubclass(kind, _CODE) or class_has(kind, "__get__")


def is_code(value: Any) -> bool:
    """Return whether a value is a function, a class, a property or a module."""
    return isinstance(value, (*_CODE, types.ModuleType))


def is_compared(namespace: Any) -> bool:
    """Return whether :class:`LibraryCode` compares a namespace for all modules."""
    return any(namespace is each for each in _COMPARED)


class LibraryCode:
    """Compares the functions that steps of some modules may call.

    These are Python's own, those of ``torch``, ``torch.nn.functional`` and ``torch.Tensor``, those
    of the modules' classes, and those of the user's classes that steps use. It also finds functions
    and classes anywhere that are changed in place (``function.__code__ = ...``).

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        audit_events.listen()
        self._namespaces: list[_Namespace] = []
        self._code: list[dict[str, Any]] = []
        self.dictionaries: list[dict[str, Any]] = []
        """The namespaces that are compared."""
        self.versions: list[Any] = []
        """Their versions. As long as they are these, no function was replaced."""
        self._add(_COMPARED)
        self.add_classes(map(type, modules))
        self.rewritten = audit_events.rewritten()
        """The functions that were changed in place."""
        self.number = len(self.rewritten)
        """How many there were at first."""

    def add_classes(self, classes: Iterable[type]) -> None:
        """Compare further classes from now on. What is compared already has to stay as it was."""
        # by id: a class of the user's may have no hash
        bases = {id(cls): cls for each in classes for cls in each.__mro__}.values()
        self._add(cls for cls in bases if issubclass(cls, nn.Module) or is_users_namespace(cls))

    def _add(self, namespaces: Iterable[_Namespace]) -> None:
        known = set(map(id, self._namespaces))
        new = [each for each in namespaces if id(each) not in known]
        self._namespaces += new
        self._code += map(_code_in, new)
        dictionaries = list(map(dictionary_of, new))
        self.dictionaries += dictionaries
        self.versions += map(version_of, dictionaries)

    def holds(self) -> bool:
        """Return whether no function was replaced, and none was changed in place."""
        if len(self.rewritten) != self.number:
            return False
        versions = list(map(version_of, self.dictionaries))
        for index, (now, before) in enumerate(zip(versions, self.versions, strict=True)):
            if now != before and self._replaced_in(index):
                return False
        self.versions = versions
        return True

    def explain(self) -> Changed:
        """Return what was replaced; empty if nothing was."""
        if len(self.rewritten) != self.number:
            return Changed(self.rewritten[self.number])
        for index, namespace in enumerate(self._namespaces):
            if name := self._replaced_in(index):
                return Changed(f"{namespace.__name__}.{name}")
        return NO_CHANGE

    def _replaced_in(self, index: int) -> str:
        """Return the name of what was replaced in a namespace; empty if nothing was."""
        now, before = _code_in(self._namespaces[index]), self._code[index]
        changed = (
            name
            for name in {**before, **now}
            if before.get(name, MISSING) is not now.get(name, MISSING)
        )
        return next(changed, "")
