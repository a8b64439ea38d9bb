"""How a line uses an attribute that it reads or sets, found in its source.

A step may change values that it never reads: ``self.outputs.append(loss)``, ``self.total += 1``. A
replay can make such a change again, with any contents of the list. The source must show that the
line does not use the value otherwise: in a variable, a call or a comparison.
"""

from __future__ import annotations

import ast
import enum
import functools
from types import CodeType, FrameType
from typing import Any, NamedTuple

from cg_lightning.diagnosis.definitions import Parents, node_of

_FILLING = {"append": 1, "appendleft": 1, "extend": 1, "__setitem__": 2}
"""Methods of containers that fill them, and how many arguments they have. They return None."""


class Use(enum.Enum):
    """What a line does with the value of an attribute."""

    FILL = "a list gets one more item, or an entry is set"
    ADD = "something is added to a number, or to whatever is there"
    CALL = "a method is called, and nothing is done with its result"
    OTHER = "anything else: its value may decide what the step computes"


def use_of(code: CodeType, offset: int) -> Use:
    """Return what a line does with an attribute that an instruction reads.

    ``self.x.append(y)``, ``self.x.extend(ys)``, ``self.x[k] = y`` and ``self.x.y = z`` fill,
    ``self.x += 1`` and ``self.x.y["k"] += 1`` add, ``self.x.update(y)`` calls.

    Args:
        code: The code of the function that reads the attribute.
        offset: Where in it the instruction is.
    """
    node, parents = node_of(code, offset)
    if not isinstance(node, ast.Attribute):
        return Use.OTHER
    while (use := _use_by_statement(node, parents)) is None:
        outer = parents.get(node)
        if isinstance(outer, ast.Attribute):
            if _is_filling_call(outer, parents):
                return Use.FILL
            if _is_statement(outer, parents):
                return Use.CALL
        elif not (isinstance(outer, ast.Subscript) and outer.value is node):
            return Use.OTHER
        node = outer
    return use


class Entry(NamedTuple):
    """A place in the value of an attribute: ``self.x["a"].b``."""

    steps: tuple[tuple[bool, Any], ...]
    """Keys, or (False) names of attributes."""
    is_set: bool
    """Whether the line sets it."""


def entry_of(frame: FrameType) -> Entry | None:
    """Return the place that a line reads or sets in an attribute; None for the value itself.

    Args:
        frame: The frame that reads the attribute now.
    """
    found = _steps_at(frame.f_code, frame.f_lasti)
    if found is None:
        return None
    steps: list[tuple[bool, Any]] = []
    for step in found[0]:
        if isinstance(step, str):
            steps.append((False, step))
        elif isinstance(step, ast.Constant):
            steps.append((True, step.value))
        elif isinstance(step, ast.Name) and type(frame.f_locals.get(step.id)) in (str, int):
            steps.append((True, frame.f_locals[step.id]))
        else:
            break
    is_whole = len(steps) == len(found[0])
    return Entry(tuple(steps), found[1] and is_whole) if steps else None


@functools.lru_cache(maxsize=1024)
def _steps_at(code: CodeType, offset: int) -> tuple[list[ast.expr | str], bool] | None:
    """Return the steps from an attribute on, and whether the line sets what is there."""
    node, parents = node_of(code, offset)
    if not isinstance(node, ast.Attribute):
        return None
    steps: list[ast.expr | str] = []
    while (outer := parents.get(node)) is not None:
        if isinstance(outer, ast.Attribute):
            if outer.attr == "__setitem__" and _is_filling_call(outer, parents):
                return [*steps, parents[outer].args[0]], True  # type: ignore[attr-defined]
            steps.append(outer.attr)
        elif isinstance(outer, ast.Subscript) and outer.value is node:
            steps.append(outer.slice)
        else:
            break
        node = outer
    return steps, _use_by_statement(node, parents) is Use.FILL


def adds_to(code: CodeType, offset: int) -> bool:
    """Return whether an instruction sets an attribute in a line such as ``self.x += 1``."""
    node, parents = node_of(code, offset)
    return isinstance(node, ast.Attribute) and isinstance(parents.get(node), ast.AugAssign)


def _use_by_statement(node: ast.AST, parents: Parents) -> Use | None:
    """What the statement does of which ``node`` is the target; None if it is no target."""
    statement = parents.get(node)
    if isinstance(statement, ast.AugAssign) and statement.target is node:
        return Use.ADD if isinstance(statement.op, ast.Add) else Use.OTHER
    if isinstance(statement, ast.Assign) and node in statement.targets:
        return Use.FILL
    return None


def _is_filling_call(method: ast.Attribute, parents: Parents) -> bool:
    """Whether a method that fills a container is called, in a statement or as a whole lambda."""
    call = parents.get(method)
    return (
        isinstance(call, ast.Call)
        and call.func is method
        and isinstance(parents.get(call), (ast.Expr, ast.Lambda))
        and len(call.args) == _FILLING.get(method.attr)
        and not call.keywords
        and not any(isinstance(each, ast.Starred) for each in call.args)
    )


def _is_statement(method: ast.Attribute, parents: Parents) -> bool:
    """Whether ``method`` is called in a statement of its own."""
    call = parents.get(method)
    is_called = isinstance(call, ast.Call) and call.func is method
    return is_called and isinstance(parents.get(call), ast.Expr)  # type: ignore[arg-type]
