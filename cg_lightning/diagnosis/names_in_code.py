"""What the instructions of a function name: globals, what it imports, names that it computes."""

from __future__ import annotations

import dis
import enum
import importlib.util
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple

from cg_lightning.core.lines import file_and_line

_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_CALLS = ("CALL", "PRECALL")
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_LOOKS_UP = frozenset({"getattr", "hasattr"})
_READ_BY_NAME = frozenset(
    {
        *("attrgetter", "methodcaller", "format_map", "vformat", "getmembers", "getmembers_static"),
        *("getattr_static", "vars", "__dict__", "dir", "__getattribute__"),
    }
)
"""By which code reads attributes whose names it need not mention."""
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+$")
_WRITES_TEXT = frozenset({"str", "repr", "format", "array2string", "array_repr", "array_str"})
_FORMATS = frozenset({"format", "__format__", "format_map", "vformat", "format_field"})
_HAS_SPEC = 4  # in the argument of the instruction
_CHANGES = frozenset({"setattr", "delattr", "vars"})
_GLOBALS_OF_FRAMES = frozenset({"f_globals", "f_builtins", "__globals__"})
"""How a function gets a namespace of globals from a frame or a function."""


class ImportedName(NamedTuple):
    """A module that a function imports, and the name that it takes from it."""

    module: types.ModuleType
    name: str
    """Empty: the module itself."""


class ComputedNames(NamedTuple):
    """A use of a namespace by names that the instructions do not show."""

    namespace: Any
    words: str
    """How it is used: ``getattr``, ``__dict__``."""
    line: int
    only_reads_one: bool
    """Whether it only looks one name up."""


def names_of(code: CodeType) -> tuple[str, ...]:
    """Return all names in some code, also those of a text: ``getattr(type(self), "scale")``.

    A text to format has names in it, and so has one for ``attrgetter``: ``"{0.scale}"``, ``"a.b"``.
    """
    texts = [each for each in code.co_consts if isinstance(each, str)]
    inside = [_IDENTIFIER.findall(each) for each in texts if "{" in each or _DOTTED.match(each)]
    return (*code.co_names, *texts, *itertools.chain.from_iterable(inside))


class NamesInCode:
    """The names that the code of a frame mentions."""

    def __init__(self, frame: FrameType) -> None:
        self.code: CodeType = frame.f_code
        self._globals = frame.f_globals
        self._steps = list(dis.get_instructions(self.code))
        self.names = names_of(self.code)
        self.globals = {s.argval for s in self._steps if s.opname.endswith("_GLOBAL")}
        self.opnames = [step.opname for step in self._steps]
        self.imports_unknown = False
        """Whether it imports a module that is not loaded yet."""
        self.imports_objects: list[str] = []
        """Names under which it imports what is no module: others have put it there."""
        self.imported: list[ImportedName] = []
        self._locals: dict[str, Any] = {}
        """The variables to which it assigns modules that it imports."""
        for index, step in enumerate(self._steps):
            if step.opname == "IMPORT_NAME":
                self._note_import(index)
            elif self._function_before(index) == "__import__" and self._is_text(index):
                self._note_module(str(step.argval))

    def lines(self) -> dict[str, str]:
        """Return the first line that reads each name that is no local variable: ``file:line``."""
        file, found = self.code.co_filename, dict[str, str]()
        for step in self._steps:
            is_local = "FAST" in step.opname or step.opname.startswith("STORE_")
            line = None if step.positions is None else step.positions.lineno
            if line is not None and isinstance(step.argval, str) and not is_local:
                found.setdefault(step.argval, file_and_line(file, line))
        return found

    def may_be_missing(self) -> tuple[set[str], set[str]]:
        """Return names that a namespace may lack: those that are set, and those asked for."""
        is_set = {step.argval for step in self._steps if step.opname == "STORE_ATTR"}
        if _LOOKS_UP.isdisjoint(self.code.co_names):
            return is_set, set()
        return is_set, {each for each in self.names if each.isidentifier()} - {*self.code.co_names}

    def kinds_compared(self) -> list[type] | None:
        """Return the classes of what it compares by ``is``; None if one of them is not known.

        Constants and members of enums are left out.
        """
        found: list[type] = []
        for index, step in enumerate(self._steps):
            if step.opname == "IS_OP" and not self._is_constant_before(index):
                value = self._loaded_before(index)
                if value is None:
                    return None
                found.append(type(value))
        return found

    def _is_constant_before(self, index: int) -> bool:
        before = self._steps[index - 1]
        if before.opname == "LOAD_CONST" or index < 2:
            return before.opname == "LOAD_CONST"
        holder = self._value_of(self._steps[index - 2], {})
        return before.opname == "LOAD_ATTR" and isinstance(holder, enum.EnumMeta)

    def _loaded_before(self, index: int) -> Any:
        """Return a global, or what a module has: ``torch.float32``. None if it is neither."""
        step = self._steps[index - 1]
        if step.opname == "LOAD_ATTR" and index > 1:
            holder = self._loaded_before(index - 1)
            return vars(holder).get(step.argval) if isinstance(holder, types.ModuleType) else None
        return self._value_of(step, {})

    def writes_text(self) -> bool:
        """Return whether the function may write a value as text."""
        is_formatted = any(name.startswith("FORMAT_") for name in self.opnames)
        return is_formatted or not _WRITES_TEXT.isdisjoint(self.code.co_names)

    def writes_as_told(self) -> bool:
        """Return whether it may write a value by a format: ``f"{x:n}"``, ``format(x, "n")``."""
        if not _FORMATS.isdisjoint(self.code.co_names):
            return True
        return any(
            step.opname == "FORMAT_WITH_SPEC"  # from 3.13 on
            or (step.opname == "FORMAT_VALUE" and bool((step.arg or 0) & _HAS_SPEC))
            for step in self._steps
        )

    def reads_by_name(self) -> bool:
        """Return whether it may read attributes of any object by names that it does not mention."""
        if not _READ_BY_NAME.isdisjoint(self.code.co_names):
            return True
        for index, step in enumerate(self._steps):
            is_global = step.opname.endswith("_GLOBAL")
            if is_global and step.argval in _LOOKS_UP and not self._looks_up_a_text(index):
                return True
            is_method = step.opname in _ATTRIBUTES and step.argval == "format"
            if is_method and self._steps[index - 1].opname != "LOAD_CONST":
                return True
        return False

    def _looks_up_a_text(self, index: int) -> bool:
        """Return whether ``getattr``, loaded here, is called for a name that is a constant."""
        if not (self._steps[index].arg or 0) & 1:  # it is not called here
            return False
        depth, second = 0, ""  # how many arguments there are, and what has made the second one
        for step in self._steps[index + 1 :]:
            if step.opcode in _JUMPS or depth < 0:
                return False
            if step.opname == "CALL" and step.arg == depth:
                return second == "LOAD_CONST"
            if step.opname == "PRECALL":
                continue
            before, depth = depth, depth + dis.stack_effect(step.opcode, step.arg)
            if before == 1 and depth > 1:
                second = step.opname
        return False

    def passed_on(self, arguments: Mapping[str, Any]) -> Iterator[types.ModuleType]:
        """Yield modules that it loads and of which it names no attribute: others may read them.

        Args:
            arguments: As for :meth:`computed`.
        """
        for index, step in enumerate(self._steps):
            value = self._value_of(step, arguments) if step.opname.startswith("LOAD_") else None
            if isinstance(value, types.ModuleType):
                value, after = self._follow(index, value)
                is_read = after < len(self._steps) and self._steps[after].opname in _ATTRIBUTES
                if isinstance(value, types.ModuleType) and not is_read:
                    yield value

    def sets_globals(self) -> set[str]:
        """Return the globals that the function sets."""
        return {step.argval for step in self._steps if step.opname == "STORE_GLOBAL"}

    def computed(
        self, arguments: Mapping[str, Any], is_users: Callable[[Any], bool]
    ) -> Iterator[ComputedNames]:
        """Yield uses of the user's namespaces, and of ``sys.modules``, by names unknown here.

        Args:
            arguments: What the function was called with, by name. They are not kept: the batch may
                be one of them.
            is_users: Returns True for a namespace of the user's.
        """
        line = self.code.co_firstlineno
        for index, step in enumerate(self._steps):
            line = getattr(step, "line_number", step.starts_line) or line  # from 3.13 on
            if step.opname in _ATTRIBUTES and step.argval in _GLOBALS_OF_FRAMES:
                yield ComputedNames(None, step.argval, line, False)
            elif step.opname.startswith("LOAD_"):
                value = self._value_of(step, arguments)
                found = self._computed_at(index, value, line, is_users)
                if found is not None:
                    yield found

    def _computed_at(
        self, index: int, value: Any, line: int, is_users: Callable[[Any], bool]
    ) -> ComputedNames | None:
        steps = self._steps
        if steps[index].argval == "__import__" and not self._is_text(index + 1):
            return ComputedNames(None, "__import__", line, False)
        if value is sys.modules:
            return ComputedNames(None, "sys.modules", line, False)
        if not isinstance(value, (types.ModuleType, type)):
            return None
        value, after = self._follow(index, value)
        if after == len(steps):
            return None
        is_attribute = steps[after].opname in _ATTRIBUTES
        if is_attribute and vars(value).get(steps[after].argval) is sys.modules:
            return ComputedNames(None, "sys.modules", line, False)
        if steps[after].opname in _ATTRIBUTES and steps[after].argval == "__dict__":
            return ComputedNames(value, "__dict__", line, not is_users(value))
        function = self._function_before(index)
        is_known = self._is_text(after)
        if function in _CHANGES and not (is_known and function != "vars"):
            return ComputedNames(value, function, line, not is_users(value))
        if function in _LOOKS_UP and not is_known:
            return ComputedNames(value, function, line, True)
        return None

    def _follow(self, index: int, value: Any) -> tuple[Any, int]:
        """Return the namespace inside a loaded one that is used, and where the code goes on."""
        after = index + 1
        while after < len(self._steps) and self._steps[after].opname in _ATTRIBUTES:
            inner = vars(value).get(self._steps[after].argval)
            if not isinstance(inner, (types.ModuleType, type)):
                break
            value, after = inner, after + 1
        return value, after

    def loaded(self, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield names and values that are loaded from modules and classes: ``os.getcwd``.

        Args:
            arguments: As for :meth:`computed`.
        """
        for index, step in enumerate(self._steps):
            value = self._value_of(step, arguments) if step.opname.startswith("LOAD_") else None
            if isinstance(value, (types.ModuleType, type)):
                yield str(step.argval), value
                value, after = self._follow(index, value)
                kind: type = type(value)
                if after < len(self._steps) and self._steps[after].opname in _ATTRIBUTES:
                    name = self._steps[after].argval
                    found = vars(value).get(name, vars(kind).get(name))
                    yield f"{value.__name__}.{name}", found
            elif value is not None:
                yield str(step.argval), value

    def looked_up(self) -> Iterator[tuple[Any, str]]:
        """Yield global namespaces, and names that are looked up there: ``hasattr(torch, "a")``."""
        for index, step in enumerate(self._steps):
            if self._function_before(index) not in _LOOKS_UP:
                continue
            value = self._value_of(step, {})
            if isinstance(value, (types.ModuleType, type)):
                value, after = self._follow(index, value)
                if self._is_text(after):
                    yield value, str(self._steps[after].argval)

    def _is_text(self, index: int) -> bool:
        """Return whether an argument is a text of the code, and not the beginning of more."""
        steps = self._steps[index : index + 3]
        if not steps or steps[0].opname != "LOAD_CONST":
            return False
        return any(
            step.opname.startswith(_CALLS)
            and all(each.opname.startswith("LOAD_") for each in steps[1:number])
            and not any(each.opname in _ATTRIBUTES for each in steps[1:number])
            for number, step in enumerate(steps)
        )

    def _function_before(self, index: int) -> str:
        """Return the name of the function whose first argument is loaded here, if it is global."""
        before = self._steps[index - 1] if index else None
        is_global = before is not None and before.opname == "LOAD_GLOBAL"
        return str(before.argval) if before is not None and is_global else ""

    def _value_of(self, step: dis.Instruction, arguments: Mapping[str, Any]) -> Any:
        """Return what an instruction loads, if it is a global, an argument or an import."""
        name = step.argval
        if step.opname == "LOAD_GLOBAL":
            return self._globals.get(name)
        if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")):
            return self._locals.get(name, arguments.get(name))
        return None

    def _note_module(self, name: str) -> types.ModuleType | None:
        """Note that the function imports a module. Return the module if it is already loaded."""
        module = sys.modules.get(name)
        if module is not None and not isinstance(module, types.ModuleType):
            self.imports_objects.append(name)
            return None
        if module is None:
            self.imports_unknown = True
            return None
        self.imported.append(ImportedName(module, ""))
        return module

    def _note_import(self, index: int) -> None:
        level, names = (_constant(self._steps, index - back) for back in (2, 1))
        step = self._steps[index]
        package = self._globals.get("__package__") or ""
        try:
            name = importlib.util.resolve_name("." * (level or 0) + step.argval, package)
        except ImportError:  # Python raises it when the step comes here
            return
        module = self._note_module(name)
        if module is None:
            return
        after = self._steps[index + 1 :]
        if not names:  # ``import a.b`` assigns ``a``, and ``import a.b as c`` assigns ``b``
            top = self._note_module(name.split(".")[0])
            is_named = bool(after) and after[0].opname == "IMPORT_FROM"
            stores = [each for each in after if each.opname.startswith("STORE_")][:1]
            for store in stores:
                self._locals[store.argval] = module if is_named else top
            return
        for each in names:
            value = vars(module).get(each, sys.modules.get(f"{name}.{each}"))
            if isinstance(value, types.ModuleType):
                self.imported.append(ImportedName(value, ""))
            else:
                self.imported.append(ImportedName(module, each))
        for load, store in itertools.pairwise(after):
            if load.opname == "POP_TOP":
                break
            if load.opname == "IMPORT_FROM":
                self._locals[store.argval] = vars(module).get(load.argval)


def _constant(steps: Sequence[dis.Instruction], index: int) -> Any:
    return steps[index].argval if index >= 0 else None
