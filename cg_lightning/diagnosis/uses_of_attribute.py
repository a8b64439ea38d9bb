"""What a line does with an attribute that it reads or sets, read from its source.

A step may change what it never looks at: ``self.outputs.append(loss)``, ``self.total += 1``. A
replay can do such a change again, whatever is in the list by then. The source must show that the
value goes nowhere else: into no variable, no call, no comparison.
"""

from __future__ import annotations

import ast
import enum
from types import CodeType

from cg_lightning.diagnosis.definitions import node_of

Parents = dict[ast.AST, ast.AST]


class Use(enum.Enum):
    """What a line does with the value of an attribute."""

    FILL = "a list gets one more item, or an entry is set"
    ADD = "something is added to a number, or to whatever is there"
    OTHER = "anything else: its value may decide what the step computes"


def use_of(code: CodeType, offset: int) -> Use:
    """Return what a line does with an attribute that an instruction reads.

    ``self.x.append(y)``, ``self.x[k] = y`` and ``self.x.y = z`` fill, ``self.x += 1`` and
    ``self.x.y["k"] += 1`` add.

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
            if outer.attr == "append" and _is_call_without_result(outer, parents):
                return Use.FILL
        elif not (isinstance(outer, ast.Subscript) and outer.value is node):
            return Use.OTHER
        node = outer
    return use


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


def _is_call_without_result(method: ast.Attribute, parents: Parents) -> bool:
    """Whether ``method`` is called with one argument, in a statement of its own."""
    call = parents.get(method)
    return (
        isinstance(call, ast.Call)
        and call.func is method
        and isinstance(parents.get(call), ast.Expr)
        and len(call.args) == 1
        and not call.keywords
        and not isinstance(call.args[0], ast.Starred)
    )
