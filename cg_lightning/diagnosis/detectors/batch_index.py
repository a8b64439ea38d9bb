"""Whether a step does anything with the number of its batch, rather than passing it on."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import nn


def _definition(function: Callable[..., Any]) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source: defined in a shell, built, or compiled
        return None
    return tree.body[0] if tree.body and isinstance(tree.body[0], ast.FunctionDef) else None


def _called_step(
    call: ast.Call, owner: type, module: nn.Module
) -> tuple[Callable[..., Any], type] | None:
    """The method, and the class that defines it, of ``self.name(...)`` or ``super().name(...)``."""
    if not isinstance(call.func, ast.Attribute):
        return None
    name, target = call.func.attr, call.func.value
    if isinstance(target, ast.Name) and target.id == "self":
        order = type(module).__mro__
    elif (
        isinstance(target, ast.Call)
        and isinstance(target.func, ast.Name)
        and target.func.id == "super"
    ):
        order = type(module).__mro__
        order = order[order.index(owner) + 1 :]
    else:
        return None
    return next(((vars(cls)[name], cls) for cls in order if callable(vars(cls).get(name))), None)


def _loads(code: CodeType, name: str) -> bool:
    loads = (
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname.startswith("LOAD")
    )
    return any(name == value or (isinstance(value, tuple) and name in value) for value in loads)


def _uses_in_varargs(code: CodeType, position: int, is_decorator: bool) -> bool:
    """Whether a function may do anything with an argument that is one of its ``*args``; a decorator passes them on."""
    if not code.co_flags & inspect.CO_VARARGS:
        return False
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(code)))))
    except (OSError, TypeError, SyntaxError):
        return True
    name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
    harmless = {id(node.value) for node in nodes if isinstance(node, ast.Starred) and is_decorator}
    before = range(position - code.co_argcount)
    for node in nodes:  # ``args[0]``, in the step that Lightning predicts with by default
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and node.slice.value in before
        ):
            harmless.add(id(node.value))
    return any(
        isinstance(node, ast.Name) and node.id == name and id(node) not in harmless
        for node in nodes
    )


def _uses(
    function: Callable[..., Any], owner: type, module: nn.Module, position: int, depth: int = 0
) -> bool:
    if isinstance(function, staticmethod):
        return True
    if isinstance(function, functools.partialmethod):
        return _uses(function.func, owner, module, position + len(function.args), depth + 1)
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        code = getattr(function, "__code__", None)
        if (
            code is None
            or position < code.co_argcount
            or _uses_in_varargs(code, position, is_decorator=True)
        ):
            return True
        function = inner
    code = getattr(function, "__code__", None)
    if code is None:
        return True
    if position >= code.co_argcount:
        return _uses_in_varargs(code, position, is_decorator=False)
    name = code.co_varnames[position]
    if not _loads(code, name):
        return False
    definition = _definition(function)
    if definition is None or depth > 5:
        return True
    passed_on: set[int] = set()
    for node in ast.walk(definition):
        if not isinstance(node, ast.Call) or any(
            isinstance(argument, ast.Starred) for argument in node.args
        ):
            continue
        for index, argument in enumerate(node.args):
            if (
                isinstance(argument, ast.Name)
                and argument.id == name
                and (found := _called_step(node, owner, module))
            ):
                passed_on.add(id(argument))
                if _uses(*found, module, index + 1, depth + 1):
                    return True
    loads = (
        n
        for n in ast.walk(definition)
        if isinstance(n, ast.Name) and n.id == name and id(n) not in passed_on
    )
    return any(isinstance(node.ctx, ast.Load) for node in loads)


def uses_batch_index(module: nn.Module, step_name: str) -> bool:
    """Whether the step may do something with ``batch_idx``, its second argument; True where nobody can tell.

    It reads byte code and source: ``self.validation_step(batch, batch_idx)`` passes it on, and is followed.
    """
    if step_name in vars(module):  # a step of the instance, compiled for instance
        return True
    for cls in type(module).__mro__:
        if step_name in vars(cls):
            return _uses(vars(cls)[step_name], cls, module, 2)
    return False
