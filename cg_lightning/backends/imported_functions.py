"""Functions of PyTorch, replaced in each module that has imported them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Function = Callable[..., Any]


@contextlib.contextmanager
def replaced_where_imported(functions: Mapping[str, tuple[Function, Function]]) -> Iterator[None]:
    """Replace functions of ``torch``, also after ``from torch import tensor``.

    Modules that are imported meanwhile get the originals at the end. Each watched step and each
    capture looks through all modules, so this must be quick.

    Args:
        functions: The original and its replacement, by the name of the original.
    """
    replaced: list[tuple[Any, str]] = []
    imported = set(sys.modules)
    try:
        for module in list(sys.modules.values()):
            names: dict[str, Any] = getattr(module, "__dict__", {})
            for name in functions:
                if name in names and names[name] is functions[name][0]:
                    setattr(module, name, functions[name][1])
                    replaced.append((module, name))
        yield
    finally:
        for module, name in replaced:
            setattr(module, name, functions[name][0])
        put_back_in_others(imported, functions.values())


def put_back_in_others(imported: set[str], functions: Iterable[tuple[Function, Function]]) -> None:
    """Put originals back in modules that were imported while these functions were replaced.

    Args:
        imported: The names of the modules that were there before.
        functions: Pairs of an original and its replacement.
    """
    pairs = list(functions)
    for path in sys.modules.keys() - imported:
        members: dict[str, Any] = getattr(sys.modules[path], "__dict__", {})
        for name, value in list(members.items()):
            for original, replacement in pairs:
                if value is replacement:
                    members[name] = original
