"""Where a step uses one of its arguments, read from byte code and source.

The world is closed, so each doubt counts as a use. An argument is not used where it is
deleted, or passed on to a function that does not use it, and it is only *compared* where the source
has it at the left of an operator or of a comparison: ``batch_idx % self.every == 0``,
``if batch_idx``. ``cg_lightning/guards/comparisons.py`` guards such comparisons. Everything else
uses the value: ``isinstance``, ``int(batch_idx)``, an f-string, an index, an argument of a function
without source code.

A use in a branch has no effect in steps that do not take it:
``if batch_idx % 50 == 0: print(f"batch {batch_idx}")``. So each use has the conditions under which
its line may run (``conditions.py``).
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.lines import Elsewhere, file_and_line
from cg_lightning.diagnosis.compared_expressions import is_only_compared
from cg_lightning.diagnosis.conditions import OTHER_FRAMES, BranchCondition, ConditionsOf
from cg_lightning.diagnosis.definitions import Definition, Parents, definition_of, parents_in

_MOST_CALLS = 5
"""How deep an argument is followed into the functions to which it is passed on."""
_MOST_USES = 16
"""How many uses in branches are distinguished."""
_READ_ALL = ("locals", "eval", "exec")
_READ_FRAMES = ("_getframe", "currentframe")
_READ_ALL_WITHOUT_ARGUMENTS = ("vars", "dir")


class ArgumentUse(NamedTuple):
    """A line that uses an argument for more than comparisons."""

    line: str
    conditions: tuple[BranchCondition, ...] = ()
    """All of them hold if the line runs."""


class _Callee(NamedTuple):
    """A function that is called, and how many of its first parameters the call does not give."""

    function: Any
    owner: type | None
    """The class that defines it, where its ``self`` is the module."""
    offset: int


class _Scope(NamedTuple):
    """A function whose source is searched."""

    function: Any  # a FunctionType, which mypy would bind to the tuple
    owner: type | None
    """The class that defines it, where its ``self`` is the module."""
    depth: int
    """Number of calls between the step and the function."""

    def line(self, number: int | None = None) -> str:
        """Return a line of the function; None: its first one."""
        return _line_of(self.function, number)


def _line_of(function: Any, line: int | None = None) -> str:
    code: CodeType | None = getattr(function, "__code__", None)
    return (
        Elsewhere.UNKNOWN
        if code is None
        else file_and_line(code.co_filename, line or code.co_firstlineno)
    )


def _names(code: CodeType, name: str, *kinds: str) -> bool:
    """Whether an instruction of these kinds, such as ``LOAD``, has a name."""
    named = (
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname.startswith(kinds)
    )
    # newer Pythons have instructions for two names
    return any(name == value or (isinstance(value, tuple) and name in value) for value in named)


def _reads_all_locals(code: CodeType) -> bool:
    """Whether a function may read its arguments without naming them."""
    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    if names.intersection(_READ_ALL) or set(code.co_names).intersection(_READ_FRAMES):
        return True
    if not names.intersection(_READ_ALL_WITHOUT_ARGUMENTS):
        return False
    definition = definition_of(code)
    return definition is None or any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _READ_ALL_WITHOUT_ARGUMENTS
        and not node.args
        for node in ast.walk(definition)
    )


def _class_around(function: FunctionType) -> Any:
    """Return the class whose ``super()`` a function means."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    return next((cell.cell_contents for name, cell in cells if name == "__class__"), None)


def _name_of(decorator: Callable[..., Any], function: Callable[..., Any]) -> str | None:
    """Return the name by which a decorator knows the function that it has closed over."""
    cells = getattr(decorator, "__closure__", None) or ()
    names = decorator.__code__.co_freevars
    found = [name for name, cell in zip(names, cells, strict=False) if _cell_is(cell, function)]
    return found[0] if found else None


def _cell_is(cell: types.CellType, value: Any) -> bool:
    """Whether a cell holds this very object."""
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


def _calls_with_all(
    code: CodeType, definition: Definition | None
) -> Iterator[tuple[ast.Call, int]]:
    """Yield the calls that are given all of ``*args``, and the position of its first item there."""
    if definition is None or not code.co_flags & inspect.CO_VARARGS:
        return
    parents = parents_in(definition)
    for call in ast.walk(definition):
        if not isinstance(call, ast.Call) or _is_in_other_frame(call, definition, parents):
            continue
        starred = [each for each in call.args if isinstance(each, ast.Starred)]
        if len(starred) == 1 and _is_name(starred[0].value, _name_of_varargs(code)):
            yield call, call.args.index(starred[0])


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _calls_name(name: str | None, call: ast.Call) -> bool:
    return name is not None and _is_name(call.func, name)


def _name_of_varargs(code: CodeType) -> str:
    return code.co_varnames[code.co_argcount + code.co_kwonlyargcount]


def _uses_in_varargs(
    code: CodeType, position: int, is_followed: Callable[[ast.Call], bool]
) -> bool:
    """Whether a function may use an argument that is one of its ``*args``.

    A call for which ``is_followed`` is True may be given all of them.
    """
    if not code.co_flags & inspect.CO_VARARGS:
        return False
    definition = definition_of(code)
    if definition is None:
        return True
    nodes = list(ast.walk(definition))
    harmless = {
        id(argument.value)
        for node in nodes
        if isinstance(node, ast.Call) and is_followed(node)
        for argument in node.args
        if isinstance(argument, ast.Starred)
    }
    before = range(position - code.co_argcount)
    for node in nodes:  # ``args[0]``, in the step that Lightning predicts with by default
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and node.slice.value in before
        ):
            harmless.add(id(node.value))
    name = _name_of_varargs(code)
    return any(
        isinstance(node, ast.Name) and node.id == name and id(node) not in harmless
        for node in nodes
    )


def _is_in_other_frame(node: ast.AST, definition: Definition, parents: Parents) -> bool:
    while (node := parents[node]) is not definition:
        if isinstance(node, OTHER_FRAMES):
            return True
    return False


class ArgumentUses:
    """Searches the steps of one module for uses of an argument."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.compared_at: str | None = None
        """The first line that compares the argument."""

    def find(self, step_name: str, position: int) -> list[ArgumentUse]:
        """Return the lines that use an argument for more than comparisons.

        If there is one that may run in any step, it is the last one: nothing else counts. The
        position of the argument is that in a call of the method, from 0.
        """
        found: list[ArgumentUse] = []
        for use in self._find(step_name, position):
            is_one_too_many = len(found) == _MOST_USES
            found.append(ArgumentUse(use.line) if is_one_too_many else use)
            if not found[-1].conditions:
                break
        return found

    def _find(self, step_name: str, position: int) -> Iterator[ArgumentUse]:
        callee = self._method(step_name, type(self._module).__mro__)
        if callee is None:
            return
        if callee.offset == 0 and not self._holds_nothing_unseen(callee.function):
            yield ArgumentUse(_line_of(inspect.unwrap(callee.function)))
            return
        yield from self._find_at(callee, callee.offset + position, 0)

    def _holds_nothing_unseen(self, step: Any) -> bool:
        """Whether what a step on the instance reads is seen: functions, and methods of the module.

        A method of another object reads that object, and a partial function has values of its own.
        """
        if isinstance(step, functools.partial) and not step.keywords:
            values = [value for value in step.args if value is not self._module]
            return all(map(is_plain_value, values)) and self._holds_nothing_unseen(step.func)
        if isinstance(step, types.MethodType):
            return step.__self__ is self._module
        return isinstance(step, FunctionType)

    def _method(self, name: str, order: tuple[type, ...]) -> _Callee | None:
        """Return what ``self.name`` is."""
        cls = type(self._module)
        if name in vars(self._module):  # set on the instance
            return _Callee(vars(self._module)[name], cls, 0)
        owner = next((each for each in order if name in vars(each)), None)
        return None if owner is None else _Callee(vars(owner)[name], owner, 1)

    def _find_at(self, callee: _Callee, position: int, depth: int) -> Iterator[ArgumentUse]:
        """Yield the lines that use the argument at ``position``, or else that of the function."""
        function, owner = callee.function, callee.owner
        inner: _Callee | None = None
        if isinstance(function, types.MethodType):
            is_own = function.__self__ is self._module
            inner = _Callee(function.__func__, type(self._module) if is_own else None, 0)
            yield from self._find_at(inner, position + 1 - callee.offset, depth)
            return
        if isinstance(function, functools.partialmethod):
            inner = _Callee(function.func, owner, 0)
        elif isinstance(function, functools.partial) and not callee.offset:
            inner = _Callee(function.func, None, 0)
        if inner is not None:
            yield from self._find_at(inner, position + len(function.args), depth + 1)
            return
        code = getattr(function, "__code__", None)
        if isinstance(function, staticmethod):
            yield ArgumentUse(_line_of(function.__func__))
            return
        while (wrapped := getattr(function, "__wrapped__", None)) is not None:
            name = _name_of(function, wrapped)
            if (
                code is None
                or position < code.co_argcount
                or _reads_all_locals(code)
                or _uses_in_varargs(code, position, functools.partial(_calls_name, name))
            ):
                yield ArgumentUse(_line_of(function))
                return
            function = wrapped
            code = getattr(function, "__code__", None)
        if code is None or not isinstance(function, FunctionType):
            yield ArgumentUse(_line_of(function))
        elif position >= code.co_argcount:
            yield from self._find_in_varargs(_Scope(function, owner, depth), position)
        else:
            scope = _Scope(function, owner, depth)
            yield from self._find_named(scope, code.co_varnames[position])

    def _find_in_varargs(self, scope: _Scope, position: int) -> Iterator[ArgumentUse]:
        """Yield the lines that use an argument which is one of the ``*args``."""
        code = scope.function.__code__
        definition = definition_of(code)
        if _reads_all_locals(code) or scope.depth > _MOST_CALLS:
            yield ArgumentUse(scope.line())
            return
        followed: set[int] = set()
        for call, index in _calls_with_all(code, definition):
            callee = self._callee(call, scope)
            if callee is None:
                continue
            inner = callee.offset + index + position - code.co_argcount
            yield from self._find_at(callee, inner, scope.depth + 1)
            followed.add(id(call))
        if _uses_in_varargs(code, position, lambda call: id(call) in followed):
            yield ArgumentUse(scope.line())

    def _find_named(self, scope: _Scope, name: str) -> Iterator[ArgumentUse]:
        """Yield the lines that use the argument with this name."""
        code = scope.function.__code__
        if _reads_all_locals(code):
            yield ArgumentUse(scope.line())
            return
        if not _names(code, name, "LOAD"):
            return
        definition = definition_of(code)
        if definition is None or scope.depth > _MOST_CALLS:
            yield ArgumentUse(scope.line())
            return
        parents = parents_in(definition)
        own_self = self._module if self._has_own_self(scope) else None
        conditions = ConditionsOf(name, own_self)
        for node in ast.walk(definition):
            if not isinstance(node, ast.Name) or node.id != name or isinstance(node.ctx, ast.Del):
                continue
            uses = list(self._uses_by(node, definition, parents, scope))
            # a name that is set again may be another number where it is compared
            is_set = uses and _names(code, name, "STORE", "DELETE")
            around = [] if is_set else conditions.around(node, definition, parents)
            for use in uses:
                yield ArgumentUse(use.line, (*around, *use.conditions))

    def _uses_by(
        self, node: ast.Name, definition: Definition, parents: Parents, scope: _Scope
    ) -> Iterator[ArgumentUse]:
        """Yield the uses of an argument by the expression that names it."""
        here = ArgumentUse(scope.line(node.lineno))
        if isinstance(node.ctx, ast.Store):
            if isinstance(parents[node], ast.AugAssign):
                yield here
        elif _is_in_other_frame(node, definition, parents):
            yield here
        elif is_only_compared(node, parents):
            self.compared_at = self.compared_at or here.line
        else:
            inside = self._find_passed_on(node, parents, scope)
            yield from [here] if inside is None else inside

    def _find_passed_on(
        self, node: ast.Name, parents: Parents, scope: _Scope
    ) -> Iterator[ArgumentUse] | None:
        """Return the uses by the function that is given the argument; None if it is not known."""
        outer = parents[node]
        keyword = outer if isinstance(outer, ast.keyword) else None
        call = parents[outer] if keyword is not None else outer
        if not isinstance(call, ast.Call) or call.func is node:
            return None
        callee = self._callee(call, scope)
        if callee is None:
            return None
        if keyword is None:
            index = call.args.index(node)
            if any(isinstance(argument, ast.Starred) for argument in call.args[:index]):
                return None
            return self._find_at(callee, callee.offset + index, scope.depth + 1)
        inner = callee.function
        if not isinstance(inner, FunctionType) or hasattr(inner, "__wrapped__"):
            return None
        code = inner.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if keyword.arg is None or keyword.arg not in names:
            return None
        return self._find_named(_Scope(inner, callee.owner, scope.depth + 1), keyword.arg)

    def _callee(self, call: ast.Call, scope: _Scope) -> _Callee | None:
        """Return what ``self.name()``, ``super().name()`` or ``name()`` calls, if it is known."""
        function, called = scope.function, call.func
        code = function.__code__
        if isinstance(called, ast.Name):
            if called.id in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
                return None
            found: Callable[..., Any] | None = function.__globals__.get(called.id)
            return _Callee(found, None, 0) if isinstance(found, FunctionType) else None
        if not isinstance(called, ast.Attribute):
            return None
        target, order = called.value, type(self._module).__mro__
        if isinstance(target, ast.Name):
            if target.id != "self" or not self._has_own_self(scope):
                return None
            return self._method(called.attr, order)
        if (
            isinstance(target, ast.Call)
            and isinstance(target.func, ast.Name)
            and target.func.id == "super"
            and not target.args
            and (defined_in := _class_around(function)) in order
            and self._has_own_self(scope)
        ):
            after = order[order.index(defined_in) + 1 :]
            cls = next((each for each in after if called.attr in vars(each)), None)
            return None if cls is None else _Callee(vars(cls)[called.attr], cls, 1)
        return None

    def _has_own_self(self, scope: _Scope) -> bool:
        """Whether ``self`` is the first argument of a method of the module, and nothing else."""
        code = scope.function.__code__
        is_first = scope.owner is not None and code.co_argcount and code.co_varnames[0] == "self"
        return bool(is_first) and not _names(code, "self", "STORE", "DELETE")
