"""Functions of PyTorch, replaced in each module that has imported them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
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
        for path in sys.modules.keys() - imported:
            _put_back(getattr(sys.modules[path], "__dict__", {}), functions)


def _put_back(members: dict[str, Any], functions: Mapping[str, tuple[Function, Function]]) -> None:
    for original, replacement in functions.values():
        for name, value in list(members.items()):
            if value is replacement:
                members[name] = original
