"""The source of a function as a tree, if it is the source of the code that runs.

A file may have been edited since it was imported. A tree of other code would prove nothing, so the
file is compiled again, and the function must come out equal in every instruction and line.
"""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import warnings
from collections.abc import Iterator
from types import CodeType, FrameType

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Parents = dict[ast.AST, ast.AST]
"""Each node of a tree, with the node around it."""
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield value
            yield from _codes_in(value)


@functools.lru_cache(maxsize=32)
def _compiled(file: str, text: str) -> tuple[ast.Module, list[CodeType]] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python has shown them when the file was imported
            tree = ast.parse(text, file)
            code = compile(text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):  # a magic of a notebook, for example
        return None
    return tree, list(_codes_in(code))


def _first_line(node: Definition) -> int:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return min([node.lineno, *[decorator.lineno for decorator in decorators]])


@functools.lru_cache(maxsize=256)
def _find(code: CodeType, text: str) -> Definition | None:
    compiled = _compiled(code.co_filename, text)
    if compiled is None:
        return None
    tree, codes = compiled
    if sum(code == other for other in codes) != 1:
        return None
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, _DEFINITIONS)
        and _first_line(node) == code.co_firstlineno
        and getattr(node, "name", "<lambda>") == code.co_name
    ]
    return found[0] if len(found) == 1 else None


def definition_of(code: CodeType) -> Definition | None:
    """Return the definition of a function, with the line numbers of its file.

    None if there is no source (a shell, built code), or if the source is that of other code.
    """
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename))
    return _find(code, text) if text else None


def node_at(frame: FrameType) -> tuple[ast.AST | None, Parents]:
    """Return the expression that a frame evaluates now, and the parents of all nodes around it.

    None if the source is not known.
    """
    return node_of(frame.f_code, frame.f_lasti)


def node_of(code: CodeType, offset: int) -> tuple[ast.AST | None, Parents]:
    """Return the expression of the instruction at an offset, as :func:`node_at` does."""
    definition = definition_of(code)
    if definition is None:
        return None, {}
    here = next(itertools.islice(code.co_positions(), offset // 2, None))
    found = [
        node
        for node in ast.walk(definition)
        if isinstance(node, ast.expr)
        and (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == here
    ]
    return (found[0], parents_in(definition)) if len(found) == 1 else (None, {})


def parents_in(tree: ast.AST) -> Parents:
    """Return the parent of each node of a tree."""
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
