"""Hooks that the user adds to nodes of autograd, such as ``AccumulateGrad``, between two closures.

A node is an object of C++: it does not show its hooks, and its class cannot be changed. But PyTorch
adds each hook by a function of Python, which gives the dictionary of all hooks of the node. The
dictionary lives as long as the node.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

_OWNER: Any = getattr(torch.autograd.function, "_HookMixin", None)  # private
_NAME = "_register_hook"


def can_notice_hooks() -> bool:
    """Return True if this version of PyTorch adds hooks in the way that is known here."""
    hooks, added = NodeHooks(), []
    try:
        with torch.inference_mode(False), torch.enable_grad():
            parameters = [torch.zeros((), requires_grad=True) for _ in range(2)]
            nodes: list[Any] = [get_gradient_edge(parameter).node for parameter in parameters]
            nodes[0].register_hook(_do_nothing)
            hooks.install(parameters)  # notices the one that is there
            added.append(len(hooks.of_nodes()))
            nodes[1].register_prehook(_do_nothing)
            added.append(len(hooks.of_nodes()))
    except Exception:  # whatever another version raises
        return False
    finally:
        hooks.remove()
    return added == [1, 2]


@contextlib.contextmanager
def hooks_noted() -> Iterator[list[Any]]:
    """While this is entered, note the hooks that are added to tensors and to nodes."""
    noted: list[Any] = []
    of_nodes: Any = vars(_OWNER)[_NAME]
    of_tensors: Any = Tensor.register_hook

    def register(table: Any, hook: Any) -> Any:
        noted.append(hook)
        return of_nodes.__func__(table, hook)

    def register_hook(tensor: Tensor, hook: Any) -> Any:
        noted.append(hook)
        return of_tensors(tensor, hook)

    with (
        patch.object(_OWNER, _NAME, staticmethod(register)),
        patch.object(Tensor, "register_hook", register_hook),
    ):
        yield noted


class NodeHooks:
    """Knows whether a node of autograd has a hook that was added outside of closures."""

    def __init__(self) -> None:
        self._tables: list[weakref.ref[dict[int, Any]]] = []
        """The hooks of each node that has got one."""
        self._original: staticmethod[..., Any] | None = None
        self.is_in_closure = False
        """Whether a closure runs: a graph holds the hooks that its step adds."""

    def __bool__(self) -> bool:
        """Return True if there is such a hook."""
        return bool(self._tables) and bool(self.of_nodes())

    def of_nodes(self) -> list[dict[int, Any]]:
        """Return the hooks of each node that has some."""
        self._tables = [table for table in self._tables if table() is not None]
        return [found for table in self._tables if (found := table())]

    def install(self, parameters: Iterable[Tensor]) -> None:
        """Notice hooks from now on, and those that nodes of parameters have already.

        Call it only if :func:`can_notice_hooks`.
        """
        if self._original is not None:
            return
        self._original = original = vars(_OWNER)[_NAME]

        def register(table: Any, hook: Any) -> Any:
            found, handle = original.__func__(table, hook)
            if not self.is_in_closure:
                self._note(found)
            return found, handle

        setattr(_OWNER, _NAME, staticmethod(register))
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                node: Any = get_gradient_edge(parameter).node
                node.register_hook(_do_nothing).remove()
                node.register_prehook(_do_nothing).remove()

    def remove(self) -> None:
        """Leave no trace; idempotent."""
        if self._original is not None:
            setattr(_OWNER, _NAME, self._original)
            self._original = None

    def _note(self, table: dict[int, Any]) -> None:
        if all(known() is not table for known in self._tables):
            self._tables.append(weakref.ref(table))


def _do_nothing(*_: Any) -> None:
    pass
