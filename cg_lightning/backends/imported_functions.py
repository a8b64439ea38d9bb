"""Replace functions of libraries: in one place, or in each module that has imported them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Function = Callable[..., Any]


def with_notice(original: Function, notice: Callable[..., None]) -> Function:
    """Return a function that calls ``notice`` with its arguments, and then ``original``.

    Calls of other threads are not noticed.
    """
    thread = threading.get_ident()

    def function(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            notice(*args, **kwargs)
        return original(*args, **kwargs)

    return function


class _Places:
    """The modules that have given names. To look through all of them takes milliseconds.

    They are looked through again if there are other modules, or one has another number of names.
    """

    def __init__(self) -> None:
        self._modules: list[Any] = []
        self._namespaces: list[Mapping[str, Any]] = []
        self._lengths: list[int] = []
        self._with: dict[str, list[Any]] = {}
        """The modules that have a name."""

    def find(self, names: Iterable[str]) -> list[tuple[Any, str]]:
        """Return pairs of a module and one of these names that it has."""
        wanted = list(names)
        modules = list(sys.modules.values())
        # native: one call for all modules
        if modules != self._modules or list(map(len, self._namespaces)) != self._lengths:
            self._modules = modules
            self._namespaces = [getattr(module, "__dict__", {}) for module in modules]
            self._lengths = list(map(len, self._namespaces))
            self._with = {}
        for name in wanted:
            if name not in self._with:
                pairs = zip(self._modules, self._namespaces, strict=True)
                self._with[name] = [module for module, namespace in pairs if name in namespace]
        return [(module, name) for name in wanted for module in self._with[name]]


_PLACES = _Places()


@contextlib.contextmanager
def replaced_where_imported(functions: Mapping[str, tuple[Function, Function]]) -> Iterator[None]:
    """Replace functions of ``torch``, also after ``from torch import tensor``.

    Modules that are imported meanwhile get the originals at the end.

    Args:
        functions: The original and its replacement, by the name of the original.
    """
    replaced: list[tuple[Any, str]] = []
    imported = list(sys.modules)
    try:
        for module, name in _PLACES.find(functions):
            original, replacement = functions[name]
            if vars(module).get(name) is original:
                setattr(module, name, replacement)
                replaced.append((module, name))
        yield
    finally:
        for module, name in replaced:
            setattr(module, name, functions[name][0])
        put_back_in_others(imported, functions.values())


def put_back_in_others(imported: list[str], functions: Iterable[tuple[Function, Function]]) -> None:
    """Put originals back in modules that were imported while these functions were replaced.

    Args:
        imported: The names of the modules that were imported before.
        functions: Pairs of an original and its replacement.
    """
    if list(sys.modules) == imported:  # the usual case, in native code
        return
    pairs = list(functions)
    for path in sys.modules.keys() - set(imported):
        members: dict[str, Any] = getattr(sys.modules[path], "__dict__", {})
        for name, value in list(members.items()):
            for original, replacement in pairs:
                if value is replacement:
                    members[name] = original
