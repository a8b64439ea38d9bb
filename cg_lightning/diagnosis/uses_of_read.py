"""What a step does with a value that it reads from a tensor: ``x.item()``, ``x.cpu().numpy()``.

The world is closed. The source must show that the value is only passed on:

- kept: ``self.losses.append(loss.item())``, ``self.preds.append(y.cpu().numpy())``,
  ``self.preds.extend(y.tolist())``, ``self.last = y.item()``, ``self.sum += y.item()``
- given to a method of a plain object that only accumulates: ``self.meter.update(loss.item(), 4)``
- returned by the step itself
- logged: ``self.log("loss", loss.item())``, ``self.log_dict({"loss": loss.item()})``

It may be in a list, tuple or dictionary first, or have a name that is used for nothing else. None
of this runs code of the user's with the value: what it is appended to is a list, for example, and
a method that accumulates is called after the replay.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from cg_lightning.diagnosis.accumulators import accumulates
from cg_lightning.diagnosis.definitions import Parents, node_of
from cg_lightning.guards.changed_values import LISTS, MAPPINGS, is_plain_object
from cg_lightning.modules.kinds import is_framework_file, is_our_file, is_user_class, namespace_of

_READ_ALL = frozenset({"locals", "vars", "eval", "exec", "dir", "_getframe", "currentframe"})
_NUMBERS = (bool, int, float, complex)
_APPEND, _EXTEND, _ADD, _SET, _LOG, _CALL = "append", "extend", "+=", "=", "log", "()"
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_KINDS = {"item": "number", "tolist": "list", "numpy": "array"}


class _End(NamedTuple):
    """Where a value ends up, other than in the output of the step."""

    how: str
    owner: str
    """The name of the module: ``self``."""
    attribute: str = ""
    is_inside: bool = False
    """Whether it is in an entry of the attribute: ``self.sums["loss"] += loss.item()``."""
    method: str = ""
    """The method that is called."""


class ReadUse(NamedTuple):
    """What a line does with the value that it reads."""

    ends: tuple[_End, ...]
    is_returned: bool

    def is_harmless(self, frame: FrameType, root: nn.Module, inside: frozenset[int]) -> bool:
        """Return whether no code of the user's runs with the value.

        Args:
            frame: The frame that reads it.
            root: The module whose step runs; its ``log`` is Lightning's own.
            inside: The ids of this module and of those inside it, other than metrics.
        """
        if self.is_returned and not _is_frame_of_step(frame):
            return False
        for end in self.ends:
            owner = frame.f_locals.get(end.owner)
            if id(owner) not in inside or (end.how == _LOG and owner is not root):
                return False
            if end.how != _LOG and not _is_plain_target(owner, end):
                return False
        return True

    def targets(self, frame: FrameType) -> list[tuple[int, str]]:
        """Return the ids of modules, and the names of their attributes, that get the value."""
        ends = [end for end in self.ends if end.how != _LOG]
        return [(id(frame.f_locals[end.owner]), end.attribute) for end in ends]

    @property
    def is_logged(self) -> bool:
        """Whether it is logged."""
        return any(end.how == _LOG for end in self.ends)


def _is_frame_of_step(frame: FrameType) -> bool:
    """Return whether a frame is that of the step.

    No module has called it, and no code but that of frameworks, which only pass its result on.
    """
    outer = frame.f_back
    while outer is not None:
        file, name = outer.f_code.co_filename, outer.f_code.co_name
        if is_our_file(file):
            if name in ("watch", "on_call"):
                return name == "watch"
        elif not is_framework_file(file):
            return False
        outer = outer.f_back
    return False


def _is_plain_target(owner: Any, end: _End) -> bool:
    names = ("__setattr__", "__getattribute__")
    if any(is_user_class(_definer(type(owner), name)) for name in names):
        return False
    if inspect.getattr_static(type(owner), end.attribute, None) is not None:
        return False  # a property, for example
    value = namespace_of(owner).get(end.attribute)
    if end.how == _CALL:
        return is_plain_object(value) and accumulates(type(value), end.method)
    if not end.is_inside:
        if end.how == _APPEND:
            return type(value) in LISTS
        if end.how == _EXTEND:
            return type(value) is list
        return end.how == _SET or type(value) in _NUMBERS
    is_container = type(value) in (*LISTS, *MAPPINGS) and end.how != _EXTEND
    return is_container and all(map(_is_plain, _values(value)))


def _definer(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))


def _is_plain(value: Any) -> bool:
    if type(value) in (*LISTS, *MAPPINGS):
        return all(map(_is_plain, _values(value)))
    return isinstance(value, (Tensor, np.ndarray)) or type(value) in _NUMBERS or value is None


def _values(container: Any) -> Iterator[Any]:
    return iter(container.values() if isinstance(container, dict) else container)


@functools.lru_cache(maxsize=1024)
def use_of_read(code: CodeType, offset: int) -> ReadUse | None:
    """Return what a line does with the result of the call at an offset; None if it may read it."""
    node, parents = node_of(code, offset)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    if node.func.attr not in _KINDS:
        return None
    found = list(_ends(node, parents, _KINDS[node.func.attr], frozenset()))
    if None in found:
        return None
    ends = tuple(dict.fromkeys(end for end in found if isinstance(end, _End)))
    return ReadUse(ends, "returned" in found)


def _ends(node: ast.AST, parents: Parents, what: str, names: frozenset[str]) -> Iterator[Any]:
    """Yield where a value ends up: an end, or "returned"; None if it may be read.

    Args:
        node: The value.
        parents: The parents of all nodes.
        what: "number", "list" or "array"; "dict" for a dictionary of numbers; or "other".
        names: The names that are known already.
    """
    outer = parents.get(node)
    while isinstance(outer, (ast.Dict, ast.List, ast.Tuple)) and _is_loaded(outer):
        if isinstance(outer, ast.Dict):
            if node in outer.keys or None in outer.keys:
                break
            what = "dict" if what == "number" else "other"
        else:
            what = "other"
        node, outer = outer, parents.get(outer)
    if isinstance(outer, ast.keyword):
        node, outer = outer, parents.get(outer)
    if isinstance(outer, ast.Return):
        yield "returned"
    elif isinstance(outer, ast.Call):
        yield _end_of_call(node, outer, parents, what)
    elif isinstance(outer, ast.AugAssign) and outer.value is node:
        how = {"number": _ADD, "list": _EXTEND}.get(what)
        is_sum = how is not None and isinstance(outer.op, ast.Add)
        yield _end_of_target(outer.target, how) if is_sum else None  # type: ignore[arg-type]
    elif isinstance(outer, (ast.Assign, ast.AnnAssign)) and outer.value is node:
        for target in outer.targets if isinstance(outer, ast.Assign) else [outer.target]:
            if isinstance(target, ast.Name):
                yield from _ends_of_name(target, parents, what, names)
            else:
                yield _end_of_target(target, _SET)
    else:
        yield None


def _is_loaded(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", ast.Load()), ast.Load)


def _end_of_call(node: ast.AST, call: ast.Call, parents: Parents, what: str) -> _End | None:
    function = call.func
    if not isinstance(function, ast.Attribute) or any(
        isinstance(each, ast.Starred) for each in call.args
    ):
        return None
    is_statement = isinstance(parents.get(call), ast.Expr)
    if function.attr in (_APPEND, _EXTEND) and call.args == [node] and not call.keywords:
        is_known = is_statement and (function.attr == _APPEND or what == "list")
        return _end_of_target(function.value, function.attr) if is_known else None
    if what == "number" and is_statement:
        end = _end_of_target(function.value, _CALL)
        if end is not None and not end.is_inside:
            return end._replace(method=function.attr)
    name, position, kind = {
        "log": ("value", 1, "number"),
        "log_dict": ("dictionary", 0, "dict"),
    }.get(function.attr, ("", 0, ""))
    is_given = node in call.args and call.args.index(node) == position
    is_given |= isinstance(node, ast.keyword) and node.arg == name
    if what == kind and is_given and isinstance(function.value, ast.Name):
        return _End(_LOG, function.value.id)
    return None


def _end_of_target(target: ast.AST, how: str) -> _End | None:
    """Return the end for ``self.x`` and ``self.x[...]``; None for any other target."""
    is_inside = False
    while isinstance(target, ast.Subscript) and isinstance(target.slice, (ast.Constant, ast.Name)):
        target, is_inside = target.value, True
    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
        return _End(how, target.value.id, target.attr, is_inside)
    return None


def _ends_of_name(
    target: ast.Name, parents: Parents, what: str, names: frozenset[str]
) -> Iterator[Any]:
    """Yield where the value of a variable ends up."""
    name = target.id
    if name in names:
        return
    definition: ast.AST = target
    while definition in parents:
        definition = parents[definition]
    for node in ast.walk(definition):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield None
        if isinstance(node, ast.Attribute) and node.attr in _READ_ALL:
            yield None
        if not isinstance(node, ast.Name):
            continue
        is_it = node.id == name
        is_unknown = is_it and (_is_added_to(node, parents) or _is_inside(node, parents))
        if node.id in _READ_ALL or is_unknown:
            yield None
        elif is_it and isinstance(node.ctx, ast.Load):
            yield from _ends(node, parents, what, names | {name})


def _is_inside(node: ast.AST, parents: Parents) -> bool:
    """Return whether a name is in a function or class inside the one that reads the value."""
    node = parents[node]
    while not isinstance(node, _SCOPES):
        node = parents[node]
    return node in parents


def _is_added_to(node: ast.Name, parents: Parents) -> bool:
    outer = parents.get(node)
    return isinstance(outer, ast.AugAssign) and outer.target is node
