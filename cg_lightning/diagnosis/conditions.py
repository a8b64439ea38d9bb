"""Under which comparisons of an argument a line of a function runs, read from its source.

``if batch_idx % 50 == 0: print(f"batch {batch_idx}")`` prints in few steps only. In all others, the
line does nothing with the number, because it does not run.

A :class:`BranchCondition` follows from the branches around the line: it must hold if the line runs.
Constants are known from the source. What an attribute of the module is (``self.every``) is looked
up before the step, which may set it. So after the step, the comparisons that it has really made
must not contradict (:meth:`BranchCondition.may_have_held`).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from cg_lightning.diagnosis.definitions import Parents
from cg_lightning.guards.comparisons import Comparison

ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Mod: "%",
}
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
OTHER_FRAMES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.GeneratorExp, ast.ClassDef)
"""Nodes whose code runs later, or in another namespace."""
_LEAVE = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def constant(node: ast.expr) -> int | float | None:
    """Return the number that an expression is, if it is a constant."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = constant(node.operand)
        return None if value is None else -value
    if not isinstance(node, ast.Constant):
        return None
    return node.value if type(node.value) in (int, float) else None  # type: ignore[return-value]


class BranchCondition(NamedTuple):
    """Comparisons of an argument. At least one of them has the result that is stored here."""

    outcomes: tuple[tuple[Comparison, bool], ...]
    is_constant: bool
    """False if an operand is an attribute of the module."""

    def holds(self, number: int) -> bool:
        """Return whether the condition holds for a number."""
        return any(each.outcome(number) is outcome for each, outcome in self.outcomes)

    def may_have_held(self, made: dict[Comparison, bool]) -> bool:
        """Return whether it may have held in a step which made these comparisons.

        The step may have compared with another operand than the one that was looked up.
        """
        enabling = {(_shape(each), outcome) for each, outcome in self.outcomes}
        return any((_shape(each), outcome) in enabling for each, outcome in made.items())


def _shape(comparison: Comparison) -> tuple[Any, ...]:
    return (*[sign for sign, _ in comparison.arithmetic], comparison.comparison)


class ConditionsOf:
    """Finds the conditions of one argument in one function; its ``self`` may be ``module``."""

    def __init__(self, name: str, module: nn.Module | None) -> None:
        self._name = name
        self._module = module

    def around(self, node: ast.AST, definition: ast.AST, parents: Parents) -> list[BranchCondition]:
        """Return the conditions that hold if a node of a function runs."""
        found: list[BranchCondition] = []
        while node is not definition:
            if isinstance(node, OTHER_FRAMES):
                found.clear()  # a name inside may be another variable
            outer = parents[node]
            found += self._by_branch(outer, node)
            for statements in _blocks(outer):
                if node in statements:
                    found += self._by_leaving(statements[: statements.index(node)])
            node = outer
        return found

    def _by_branch(self, outer: ast.AST, node: ast.AST) -> Iterator[BranchCondition]:
        """Yield the conditions that hold because ``outer`` has taken the branch of ``node``."""
        if isinstance(outer, (ast.If, ast.While, ast.IfExp)) and node is not outer.test:
            body = [outer.body] if isinstance(outer, ast.IfExp) else outer.body
            yield from self._of(outer.test, node in body)
        elif isinstance(outer, ast.BoolOp):
            for value in outer.values[: outer.values.index(node)]:  # type: ignore[arg-type]
                yield from self._of(value, isinstance(outer.op, ast.And))

    def _by_leaving(self, before: Sequence[ast.stmt]) -> Iterator[BranchCondition]:
        """Yield the conditions that hold because the statements before have not left the block."""
        for each in before:
            if isinstance(each, ast.If) and not each.orelse and isinstance(each.body[-1], _LEAVE):
                yield from self._of(each.test, False)

    def _of(self, test: ast.expr, truth: bool) -> Iterator[BranchCondition]:
        """Yield the conditions that hold if an expression is true, or not."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yield from self._of(test.operand, not truth)
        elif isinstance(test, ast.BoolOp):
            if isinstance(test.op, ast.And) is truth:
                for value in test.values:
                    yield from self._of(value, truth)
        elif isinstance(test, ast.Compare):
            yield from self._of_comparison(test, truth)
        elif (number := self._number(test)) is not None:
            outcome = (Comparison(number[0], "!=", 0), truth)
            yield BranchCondition((outcome,), number[1])

    def _of_comparison(self, test: ast.Compare, truth: bool) -> Iterator[BranchCondition]:
        operands = [test.left, *test.comparators]
        pairs = zip(operands, test.ops, operands[1:], strict=False)
        found = [self._pair(*pair) for pair in pairs]
        if truth:
            yield from [each for each in found if each is not None]
        elif all(each is not None and len(each.outcomes) == 1 for each in found):
            inverse = [(one, not out) for each in found if each for one, out in each.outcomes]
            yield BranchCondition(tuple(inverse), all(each.is_constant for each in found if each))
        elif len(found) == 1 and found[0] is not None:  # in a list: none of them
            for one, outcome in found[0].outcomes:
                yield BranchCondition(((one, not outcome),), found[0].is_constant)

    def _pair(self, left: ast.expr, sign: ast.cmpop, right: ast.expr) -> BranchCondition | None:
        """Return the condition that one comparison is true."""
        if isinstance(sign, ast.In) and isinstance(right, (ast.List, ast.Tuple)):
            values: list[ast.expr] = right.elts
            text = "=="
        elif type(sign) in COMPARISONS:
            values, text = [right], COMPARISONS[type(sign)]
        else:
            return None
        number = self._number(left)
        if number is None and len(values) == 1 and type(sign) in COMPARISONS:
            number, values, text = self._number(right), [left], MIRRORED[text]
        if number is None:
            return None
        found: list[tuple[Comparison, bool]] = []
        is_constant = number[1]
        for value in values:
            operand, is_known = self._operand(value)
            if operand is None:
                return None
            found.append((Comparison(number[0], text, operand), True))
            is_constant &= is_known
        return BranchCondition(tuple(found), is_constant)

    def _number(self, node: ast.expr) -> tuple[tuple[tuple[str, int], ...], bool] | None:
        """Return the arithmetic that makes an expression of the argument; None for all others."""
        if isinstance(node, ast.Name):
            return ((), True) if node.id == self._name else None
        if not isinstance(node, ast.BinOp) or type(node.op) not in ARITHMETIC:
            return None
        inner, (operand, is_known) = self._number(node.left), self._operand(node.right)
        is_divisor = isinstance(node.op, (ast.Mod, ast.FloorDiv))
        if inner is None or type(operand) is not int or (is_divisor and operand == 0):
            return None
        return (*inner[0], (ARITHMETIC[type(node.op)], operand)), inner[1] and is_known

    def _operand(self, node: ast.expr) -> tuple[int | float | None, bool]:
        """Return a number, and whether it is a constant."""
        if (value := constant(node)) is not None:
            return value, True
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        is_self = isinstance(node, ast.Name) and node.id == "self"
        if not (is_self and names) or self._module is None:
            return None, False
        found = _look_up(self._module, names)
        return (found if type(found) in (int, float) else None), False


def _look_up(module: nn.Module, names: Iterable[str]) -> Any:
    """Return the value behind ``self.hparams.every``, if no code has to run for it; else None."""
    value: Any = module
    for name in names:
        if isinstance(value, dict):  # the class of ``hparams`` has its entries as attributes
            value = value.get(name)
            continue
        is_property = name == "hparams" and isinstance(value, nn.Module)
        value = inspect.getattr_static(value, "_hparams" if is_property else name, None)
    return value


def _blocks(node: ast.AST) -> Iterator[list[Any]]:
    for field in ("body", "orelse", "finalbody"):
        statements = getattr(node, field, None)
        if isinstance(statements, list):
            yield statements
