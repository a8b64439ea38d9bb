"""Kinds of modules, classes and files: metric, user, framework, Lightning."""

from __future__ import annotations

import functools
import sys
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torchmetrics import Metric, MetricCollection

FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "torchmetrics")
_LIGHTNING = ("lightning.", "pytorch_lightning.")
_OURS = str(Path(__file__).resolve().parent.parent)
_WRITTEN_AS_BY_USERS = (f"{_OURS}/app/", f"{_OURS}/bench/")


_MOST_CLASSES = 4096
_Result = TypeVar("_Result")


def once_for_each(function: Callable[[Any], _Result]) -> Callable[[Any], _Result]:
    """Return a function that keeps its results, by the identity of a class or module.

    ``functools.cache`` would ask the user's metaclass, which may find two classes equal, or may
    have no hash.
    """
    known: dict[int, tuple[Any, _Result]] = {}

    @functools.wraps(function)
    def look_up(namespace: Any) -> _Result:
        found = known.get(id(namespace))
        if found is None:
            if len(known) >= _MOST_CLASSES:
                known.clear()
            found = known[id(namespace)] = (namespace, function(namespace))  # nothing gets its id
        return found[1]

    return look_up


def is_metric(module: nn.Module) -> bool:
    """Return True if ``module`` is a metric or a collection of metrics."""
    return isinstance(module, (Metric, MetricCollection))


def is_user_class(cls: type) -> bool:
    """Return True if a class is not from Python, torch, Lightning or torchmetrics."""
    return cls.__module__.split(".")[0] not in ("builtins", "functools", *FRAMEWORKS)


def class_has(cls: type, name: str) -> bool:
    """Return whether a class or its metaclass defines a name.

    ``hasattr`` would ask a ``__getattr__`` of the metaclass, which may have an answer for each name
    or raise any error.
    """
    metaclass: type = type(cls)
    return any(name in vars(each) for each in (*cls.__mro__, *metaclass.__mro__))


def is_value_of_class(value: object) -> bool:
    """Return False for methods, and for descriptors that keep no state of the user's.

    An object of the user's own class is a value, also if it is called or is a descriptor.
    """
    cls = type(value)
    return is_user_class(cls) or not (callable(value) or class_has(cls, "__get__"))


def is_user_module(module: nn.Module) -> bool:
    """Return True if the class of ``module`` is not from torch, Lightning or torchmetrics."""
    return is_user_class(type(module))


def namespace_of(module: nn.Module) -> dict[str, Any]:
    """Return the ``__dict__`` of a module. An interception does not see this read."""
    found: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return found


def lightning_class(cls: type, *names: str) -> type | None:
    """Return the first base of ``cls`` that Lightning defines by one of these names, if any.

    Two packages define them, ``lightning`` and ``pytorch_lightning``. Neither is imported here.
    """
    return next(
        (
            base
            for base in cls.__mro__
            if base.__name__ in names and base.__module__.startswith(_LIGHTNING)
        ),
        None,
    )


def is_lightning_module(module: object) -> bool:
    """Return True for a LightningModule of ``lightning`` or ``pytorch_lightning``."""
    return lightning_class(type(module), "LightningModule") is not None


def is_lightnings_own(owner: object, name: str) -> bool:
    """Return True if Lightning itself defines this method of ``owner``."""
    if name in vars(owner):
        return False
    definer = next((base for base in type(owner).__mro__ if name in vars(base)), None)
    return definer is not None and lightning_class(definer, definer.__name__) is definer


def _folder(package: str) -> str | None:
    file = getattr(sys.modules.get(package), "__file__", None)
    return None if file is None else f"{Path(file).parent}/"


def _is_library(file: str) -> bool:
    """Return True if a file is in a folder of installed libraries or of a framework."""
    installed = [sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")]
    folders = [*installed, *map(_folder, FRAMEWORKS)]
    return file.startswith(("<frozen", *[folder for folder in folders if folder]))


@functools.lru_cache(maxsize=4096)
def is_framework_file(file: str) -> bool:
    """Return True for a file of Python itself, torch, Lightning or torchmetrics."""
    if file.startswith("<frozen"):
        return True
    installed = [sysconfig.get_path(key) for key in ("purelib", "platlib")]
    if any(file.startswith(folder) for folder in map(_folder, FRAMEWORKS) if folder):
        return True
    # the folder of installed libraries is one of Python's
    return file.startswith(sysconfig.get_path("stdlib")) and not file.startswith(tuple(installed))


@functools.lru_cache(maxsize=4096)
def is_our_file(file: str) -> bool:
    """Return True for a file of this package. The demo and the benchmark do not count."""
    return file.startswith(f"{_OURS}/") and not file.startswith(_WRITTEN_AS_BY_USERS)


@functools.lru_cache(maxsize=4096)
def is_user_file(file: str) -> bool:
    """Return True if a file is not from a library or this package.

    The steps and models of the demo and of the benchmark are user's files.
    """
    if file.startswith(_WRITTEN_AS_BY_USERS):
        return True
    return not is_our_file(file) and not _is_library(file)


def is_users_namespace(value: object) -> bool:
    """Return True for a module or class of the user's: ``import config``, ``class Config``."""
    if isinstance(value, type):
        module = sys.modules.get(value.__module__)
        if module is None:  # that of a file may be run without an entry there
            return _is_name_of_users(str(value.__module__))
        value = module
    if not isinstance(value, types.ModuleType):
        return False
    found = vars(value)  # a function ``__getattr__`` of the module must not run
    file = found.get("__file__")
    if isinstance(file, str):
        return is_user_file(file)
    folders = [each for each in found.get("__path__") or () if isinstance(each, str)]
    if folders:  # a package that is a folder only
        return is_user_file(f"{folders[0]}/")
    return _is_name_of_users(str(found.get("__name__")), value)


def _is_name_of_users(name: str, module: types.ModuleType | None = None) -> bool:
    """Return True for the name of a module without a file, unless a library or Python has made it.

    Libraries have parts in C without a file: ``torch._C._nn``.
    """
    root = name.split(".")[0]
    if root in sys.stdlib_module_names:
        return False
    package = sys.modules.get(root)
    return package is None or package is module or is_users_namespace(package)
