"""Expressions that the source of a step only compares, and with what."""

from __future__ import annotations

import ast

from cg_lightning.diagnosis.conditions import ARITHMETIC, COMPARISONS, MIRRORED, constant
from cg_lightning.diagnosis.definitions import Parents
from cg_lightning.guards.comparisons import Comparison


def _is_number(node: ast.expr) -> bool:
    return constant(node) is not None


def _is_pair(left: ast.expr, sign: ast.cmpop, right: ast.expr, node: ast.AST) -> bool:
    """Whether ``left sign right`` only compares ``node``, which is one of the two."""
    if isinstance(sign, (ast.Is, ast.IsNot)):
        other = right if node is left else left
        return isinstance(other, ast.Constant) and other.value is None
    if isinstance(sign, (ast.In, ast.NotIn)):  # a set asks for the hash
        is_list = node is left and isinstance(right, (ast.List, ast.Tuple))
        return is_list and all(map(_is_number, right.elts))  # type: ignore[attr-defined]
    return type(sign) in COMPARISONS and (node is left or _is_number(left))


def is_only_compared(node: ast.AST, parents: Parents) -> bool:
    """Return whether an expression is only compared, so its value has no other use."""
    outer = parents[node]
    while isinstance(outer, ast.BinOp) and outer.left is node:
        if type(outer.op) not in ARITHMETIC:
            return False
        node, outer = outer, parents[outer]
    if isinstance(outer, ast.Compare):
        operands = [outer.left, *outer.comparators]
        pairs = zip(operands, outer.ops, operands[1:], strict=False)
        return all(_is_pair(*pair, node) for pair in pairs if node in (pair[0], pair[2]))
    return is_test(node, parents)


def is_test(node: ast.AST, parents: Parents) -> bool:
    """Return whether only the truth of an expression is used: ``if``, ``not``, ``and``."""
    outer = parents[node]
    while isinstance(outer, ast.BoolOp):
        node, outer = outer, parents[outer]
    if isinstance(outer, ast.UnaryOp):
        return isinstance(outer.op, ast.Not)
    if isinstance(outer, (ast.If, ast.IfExp, ast.While, ast.Assert)):
        return outer.test is node
    return isinstance(outer, ast.comprehension) and node in outer.ifs


def comparisons_with_constants(node: ast.AST, parents: Parents) -> list[Comparison] | None:
    """Return how an expression is compared, if it is compared with constants only; else None."""
    if not is_only_compared(node, parents):
        return None
    outer, arithmetic = parents[node], []
    while isinstance(outer, ast.BinOp):
        operand = constant(outer.right)
        if type(operand) is not int:
            return None
        arithmetic.append((ARITHMETIC[type(outer.op)], operand))
        node, outer = outer, parents[outer]
    if not isinstance(outer, ast.Compare):
        return [Comparison(tuple(arithmetic), "!=", 0)]
    operands = [outer.left, *outer.comparators]
    found: list[Comparison] = []
    for left, sign, right in zip(operands, outer.ops, operands[1:], strict=False):
        if node not in (left, right) or isinstance(sign, (ast.Is, ast.IsNot)):
            continue
        other = right if node is left else left
        is_list = isinstance(other, (ast.List, ast.Tuple))
        text = "==" if is_list else COMPARISONS[type(sign)]
        text = text if node is left else MIRRORED[text]
        for value in map(constant, other.elts if is_list else [other]):  # type: ignore[attr-defined]
            if value is None:
                return None
            found.append(Comparison(tuple(arithmetic), text, value))
    return found
