"""Whether a step does anything with the number of its batch, other than passing it on."""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

from torch import nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.stages import STEP_METHODS
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import UNKNOWN


class BatchIndex(Detector):
    """Reports a step of a LightningModule that uses ``batch_idx``: a graph would freeze it.

    It reads code, so it finds nothing in a step that no stage of the forward context names.
    """

    causes = (Cause.BATCH_INDEX_USED,)

    def around_step(self) -> AbstractContextManager[None]:
        """See :class:`~cg_lightning.diagnosis.detector.Detector`."""
        context = current_forward_context()
        key = None if context is None else context.batch_descriptor
        name = None if key is None else STEP_METHODS.get(key.stage or "")
        if self.watch.is_lightning and name is not None:
            location = find_use_of_batch_index(self.watch.root, name)
            if location is not None:
                self.watch.report(Cause.BATCH_INDEX_USED, name, location=location)
        return contextlib.nullcontext()


def _definition(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """Returns the definition of a function, with the line numbers of its file."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(lines))), first - 1)
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
        order = module.__class__.__mro__
    elif (
        isinstance(target, ast.Call)
        and isinstance(target.func, ast.Name)
        and target.func.id == "super"
    ):
        order = module.__class__.__mro__
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
    """Whether a function may use an argument that is one of its ``*args``.

    A decorator passes them on as ``*args``.
    """
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


def _line_of(code: CodeType | None, line: int | None = None) -> str:
    return UNKNOWN if code is None else f"{code.co_filename}:{line or code.co_firstlineno}"


def _find_use(
    function: Callable[..., Any], owner: type, module: nn.Module, position: int, depth: int = 0
) -> str | None:
    """Returns the line that uses the argument at ``position``, or else that of the function."""
    if isinstance(function, functools.partialmethod):
        return _find_use(function.func, owner, module, position + len(function.args), depth + 1)
    code = getattr(function, "__code__", None)
    if isinstance(function, staticmethod):
        return _line_of(getattr(function.__func__, "__code__", None))
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        if (
            code is None
            or position < code.co_argcount
            or _uses_in_varargs(code, position, is_decorator=True)
        ):
            return _line_of(code)
        function = inner
        code = getattr(function, "__code__", None)
    if code is None:
        return UNKNOWN
    if position >= code.co_argcount:
        used = _uses_in_varargs(code, position, is_decorator=False)
        return _line_of(code) if used else None
    name = code.co_varnames[position]
    if not _loads(code, name):
        return None
    definition = _definition(function)
    if definition is None or depth > 5:
        return _line_of(code)
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
                if (location := _find_use(*found, module, index + 1, depth + 1)) is not None:
                    return location
    lines = [
        node.lineno
        for node in ast.walk(definition)
        if isinstance(node, ast.Name) and node.id == name and id(node) not in passed_on
        if isinstance(node.ctx, ast.Load)
    ]
    return _line_of(code, min(lines)) if lines else None


def find_use_of_batch_index(module: nn.Module, step_name: str) -> str | None:
    """Returns the line of a step that does something with ``batch_idx``, its second argument.

    It reads byte code and source: ``self.validation_step(batch, batch_idx)`` passes it on, and is
    followed. If nobody can tell, that counts as a use. None: it is not used.
    """
    if step_name in vars(module):  # a step of the instance, compiled for instance
        return _line_of(getattr(inspect.unwrap(vars(module)[step_name]), "__code__", None))
    for cls in module.__class__.__mro__:
        if step_name in vars(cls):
            return _find_use(vars(cls)[step_name], cls, module, 2)
    return None


def uses_batch_index(module: nn.Module, step_name: str) -> bool:
    """Whether a step may do something with ``batch_idx``; see :func:`find_use_of_batch_index`."""
    return find_use_of_batch_index(module, step_name) is not None
