"""Whether a method only accumulates: ``AverageMeter.update``, in many copies in public code.

Such a method changes its own object by arithmetic with its arguments and with what the object has.
So it can be called again after each replay, whatever is in the object by then. The source must show
it for all branches: a step watches only one. The list of what is allowed is short on purpose. There
is nothing in it by which a method could change an argument, or reach anything but its object.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from types import FunctionType

from torch import Tensor

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.diagnosis.definitions import definition_of

_FUNCTIONS = ("float", "int", "bool", "len", "max", "min", "abs", "sum", "round", "isinstance")
_METHODS = ("item", "detach", "cpu", "clone", "float", "double", "mean", "sum", "size", "numel")
"""Methods of tensors that change nothing."""
_MOST_CALLS = 3
"""How deep calls of methods of the same object are followed."""


def accumulates(cls: type, name: str) -> bool:
    """Return whether a method only accumulates."""
    found = _Method(cls)
    return found.is_allowed(name, 0) and not found.added_to & found.set


class _Method:
    """Reads the source of one method, and of those that it calls of the same object."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.added_to: set[str] = set()
        """Attributes that ``+=`` and the like change, in place if they are tensors."""
        self.set: set[str] = set()
        """Attributes that may be set to an argument."""

    def is_allowed(self, name: str, depth: int) -> bool:
        function = inspect.getattr_static(self.cls, name, None)
        if not isinstance(function, FunctionType) or depth > _MOST_CALLS:
            return False
        code = function.__code__
        definition = definition_of(code)
        if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
            return False
        has_others = code.co_freevars or code.co_flags & (
            inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
        )
        if has_others or code.co_varnames[:1] != ("self",):
            return False
        reader = _Reader(self, function, depth)
        return all(map(reader.allows, definition.body))


class _Reader:
    def __init__(self, method: _Method, function: FunctionType, depth: int) -> None:
        self._method = method
        self._depth = depth
        self._locals = set(function.__code__.co_varnames) - {"self"}
        self._globals = function.__globals__

    def allows(self, node: ast.stmt) -> bool:
        """Return whether a statement is allowed."""
        if isinstance(node, ast.Pass):
            return True
        if isinstance(node, ast.Return):
            return node.value is None or self._is_value(node.value)
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant) or self._is_call(node.value)
        if isinstance(node, ast.If):
            return self._is_value(node.test) and all(map(self.allows, [*node.body, *node.orelse]))
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            return self._is_value(node.value) and self._is_target(node.targets[0], node.value)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute):
            name = self._own(node.target)
            if name is not None:
                self._method.added_to.add(name)
            return name is not None and self._is_value(node.value)
        return False

    def _is_target(self, target: ast.expr, value: ast.expr) -> bool:
        if isinstance(target, ast.Name):
            return target.id != "self"
        if isinstance(target, ast.Subscript):
            name = self._own(target.value)
            return name is not None and self._is_value(target.slice)
        name = self._own(target)
        if name is not None and not isinstance(value, (ast.Constant, ast.BinOp)):
            self._method.set.add(name)
        return name is not None

    def _own(self, node: ast.expr) -> str | None:
        """Return the name of an attribute of the object."""
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return None
        in_class = inspect.getattr_static(self._method.cls, node.attr, None)
        return node.attr if node.value.id == "self" and is_plain_value(in_class) else None

    def _is_value(self, node: ast.expr) -> bool:
        """Return whether an expression is allowed."""
        if isinstance(node, ast.Name):
            return node.id in self._locals
        if isinstance(node, ast.Constant):
            return True
        if isinstance(node, ast.Call):
            return self._is_call(node)
        if isinstance(node, ast.Attribute):
            return self._own(node) is not None
        allowed = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript)
        if not isinstance(node, (*allowed, ast.Tuple, ast.List)):
            return False
        inside = [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
        return all(map(self._is_value, inside))

    def _is_call(self, node: ast.expr) -> bool:
        if not isinstance(node, ast.Call) or node.keywords:
            return False
        called, arguments = node.func, node.args
        if isinstance(called, ast.Name):
            if called.id not in _FUNCTIONS or called.id in self._globals or not self._is_builtin():
                return False
            if called.id == "isinstance":
                arguments = arguments[:1] if self._is_known_class(arguments[-1]) else arguments
            return all(map(self._is_value, arguments))
        if not isinstance(called, ast.Attribute) or not all(map(self._is_value, arguments)):
            return False
        if isinstance(called.value, ast.Name) and called.value.id == "self":
            return self._method.is_allowed(called.attr, self._depth + 1)
        if called.attr == "append":
            return self._own(called.value) is not None
        return called.attr in _METHODS and self._is_value(called.value)

    def _is_builtin(self) -> bool:
        found = self._globals.get("__builtins__", builtins)
        return found is builtins or found is vars(builtins)

    def _is_known_class(self, node: ast.expr) -> bool:
        """Return whether an expression is ``float``, ``int`` or ``torch.Tensor``."""
        if isinstance(node, ast.Tuple):
            return all(map(self._is_known_class, node.elts))
        if isinstance(node, ast.Name):
            named = self._globals.get(node.id, getattr(builtins, node.id, None))
            return node.id not in self._locals and named in (float, int, bool, Tensor)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return getattr(self._globals.get(node.value.id), node.attr, None) is Tensor
        return False
