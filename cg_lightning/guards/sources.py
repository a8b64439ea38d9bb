"""Sources: where a value comes from that a step reads in Python, so that a graph freezes it."""

from __future__ import annotations

import abc
import dataclasses
import functools
import os
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.reasons import Changed
from cg_lightning.guards.trainer_values import TrainerTypes, TrainerValues
from cg_lightning.modules.attributes import names_of_users, slots_of

MISSING: Any = type("Missing", (), {"__repr__": lambda _: "not there"})()
"""The value of a source whose holder has no such name."""


class _Cell:
    """A cell in the closure of a function, as a namespace of one name."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def get(self, _: str, default: Any) -> Any:
        """Return the value; ``default`` if there is none yet."""
        try:
            return self._cell.cell_contents
        except ValueError:  # empty
            return default


class _Function:
    """The state of a function: ``__defaults__``, ``__kwdefaults__``, and ``__dict__``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def get(self, name: str, default: Any) -> Any:
        """Return the attribute with this name."""
        return getattr(self._function, name, default)


class _Cache:
    """How often a function with ``functools.cache`` was computed, as a namespace of one name."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def get(self, _: str, __: Any) -> Any:
        """Return how often it was computed."""
        return self._function.cache_info().misses


CacheWrapper = type(functools.lru_cache(len))
_VIEWS: dict[type, Callable[[Any], Any]] = {
    types.CellType: _Cell,
    types.FunctionType: _Function,
    CacheWrapper: _Cache,
}


ALL_NAMES = "__dict__"
"""The name of a source that has the names of all attributes that the user has set."""


class _Slots:
    """The slots of a module as a namespace, and the names of all that the user has set."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def get(self, name: str, default: Any) -> Any:
        """Return the value in a slot, or the names; ``default`` if the slot is empty."""
        if name == ALL_NAMES:
            users = names_of_users(self._module)
            return ", ".join([each for each in vars(self._module) if each in users])
        try:
            return object.__getattribute__(self._module, name)
        except AttributeError:
            return default


class DerivedNamespace:
    """A namespace that computes its values."""

    def get(self, name: str, default: Any) -> Any:
        """Return the value with this name; ``default`` if there is none."""
        raise NotImplementedError


class _Environment(DerivedNamespace):
    """The environment variables, which are encoded in the dictionary behind ``os.environ``."""

    def get(self, name: str, default: Any) -> Any:
        """Return a variable."""
        return os.environ.get(name, default)


ENVIRONMENT = _Environment()
"""``os.environ`` as a holder."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A name in a namespace: an attribute of a module, class or function, or a global.

    Two sources are the same if their keys are. A source refers to the namespace and not to the
    value, which is looked up each time.
    """

    holder: Any
    """The module, class or object whose ``vars()`` have the name, or a dictionary of globals.

    Or a cell of a closure, a function (for its attributes), a function with a cache, an object that
    refers to a Trainer, or a :class:`DerivedNamespace`.
    """
    name: str
    path: str
    """As the user would write it: ``self.net.scale``, ``Config.scale``, ``FACTOR``."""
    line: str = ""
    """The user's line that reads it first, as ``file:line``. Empty if none does."""

    @property
    def key(self) -> tuple[int, str]:
        """The identity of the source."""
        return (id(self.holder), self.name)

    @property
    def namespace(self) -> Any:
        """The mapping that has the name; the same object each time."""
        if isinstance(self.holder, (dict, DerivedNamespace)) or self.belongs_to_trainer:
            return self.holder
        cls: type = type(self.holder)
        if isinstance(self.holder, nn.Module) and self.name in (ALL_NAMES, *slots_of(cls)):
            return _Slots(self.holder)
        view = _VIEWS.get(cls)
        return vars(self.holder) if view is None else view(self.holder)

    @property
    def belongs_to_function(self) -> bool:
        """Whether a function holds the value, instead of a namespace that a user sees."""
        return type(self.holder) in _VIEWS

    @property
    def is_bare_function(self) -> bool:
        """Whether it is the attributes of a function that has none yet."""
        is_function = type(self.holder) is types.FunctionType
        return is_function and self.name == "__dict__" and not vars(self.holder)

    @property
    def belongs_to_trainer(self) -> bool:
        """Whether the Trainer has the value, instead of a part of the module."""
        return isinstance(self.holder, (TrainerValues, TrainerTypes))

    def value(self) -> Any:
        """The current value; :data:`MISSING` if there is no such name."""
        return self.namespace.get(self.name, MISSING)

    def __str__(self) -> str:
        return self.path


class _Registrations(DerivedNamespace):
    """The classes that are registered with abstract ones: Python counts them."""

    def get(self, _: str, __: Any) -> Any:
        """Return how often a class was registered."""
        return abc.get_cache_token()


REGISTRATIONS = Source(_Registrations(), "count", "classes registered with abstract ones")
"""What ``isinstance`` depends on for an abstract class."""


class LibrarySource(Source):
    """What a library has under a name. It is compared by identity.

    What :class:`LibraryCode` compares already is compared once an epoch here.
    """


_MOST_CHARACTERS = 60


def shorten(value: Any) -> str:
    """Return a short text for a value in a message; a tensor's values are not read."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    text = repr(value) if is_plain_value(value) else ""
    if not text:
        try:
            text = repr(value)
        except Exception as error:  # a user's __repr__ must not end the run
            text = f"<{type(value).__name__}: {type(error).__name__}>"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


def describe_change(path: str, now: Any, before: Any) -> Changed:
    """Return what changed, with both values: ``self.scale: now 2.0, before 1.0``."""
    texts = (shorten(now), shorten(before))
    if texts[0] == texts[1]:
        return Changed(path, f"{path}: another object, {texts[0]}")
    return Changed(path, f"{path}: now {texts[0]}, before {texts[1]}")
