"""Settings of PyTorch and NumPy that are in no key, so they are guarded.

PyTorch reads some of them in Python. Others are kept in C, and only functions return them.

What is hard here: the first call of compiled code turns the checks of distributions off, for the
whole process. Eager steps after that raise no error, and steps from graphs must not either.
"""

from __future__ import annotations

import decimal
import locale
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

import torch
from torch import functional
from torch.amp import autocast_mode
from torch.backends import opt_einsum
from torch.distributions import Distribution
from torch.nn.utils import parametrize

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.guards.sources import DerivedNamespace, Source

_FAST_PATH_FILE = torch.backends.mha.__file__


class _SettingsOfTorch(DerivedNamespace):
    """Settings of PyTorch by the names of the functions that return them."""

    def __init__(self, functions: dict[str, Callable[[], Any]]) -> None:
        self.functions = functions

    def get(self, name: str, default: Any) -> Any:
        """Return what a function returns now."""
        value = self.functions[name]()
        return value if is_plain_value(value) else repr(value)


def _autocast_types() -> str:
    return " ".join([str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")])


_IN_C = (
    *("_get_mkldnn_enabled", "_get_mkldnn_deterministic", "_get_nnpack_enabled", "_get_warnAlways"),
    *("_get_deterministic_algorithms_warn_only", "_get_deterministic_fill_uninitialized_memory"),
    *("_get_qengine", "_get_linalg_preferred_backend", "_get_blas_preferred_backend"),
    *("_get_overrideable_sdp_enabled", "is_autocast_cache_enabled"),
    *("_cuda_get_cudnn_benchmark_limit", "_get_cudnn_depthwise_kernel", "_get_onednn_allow_tf32"),
    *("_get_sm_carveout_experimental", "_get_fa3_sdp_enabled"),
)
"""Functions of ``torch._C``, private and public, that take no argument. Keys have the others."""
_OF_TORCH = {name: getattr(torch._C, name) for name in _IN_C if hasattr(torch._C, name)}
_get_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)  # private
_PRECISIONS = (
    *(("generic", "all"), ("cuda", "all"), ("mkldnn", "all")),
    *(("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
)
"""Keys have those of kernels of the device."""


def _precisions() -> str:
    return " ".join([_get_precision(*each) for each in _PRECISIONS])


_TORCH = _SettingsOfTorch(
    {**_OF_TORCH, "get_autocast_dtype": _autocast_types, "fp32_precision": _precisions}
)
_PRECISION = Source(_TORCH, "fp32_precision", "torch.backends.fp32_precision")
_SETTINGS = (
    Source(Distribution, "_validate_args", "Distribution._validate_args"),
    Source(
        vars(torch.backends.mha), "_is_fastpath_enabled", "torch.backends.mha._is_fastpath_enabled"
    ),
    Source(vars(parametrize), "_cache_enabled", "torch.nn.utils.parametrize.cached()"),  # private
    Source(_TORCH, "get_autocast_dtype", "torch.get_autocast_dtype()"),
    Source(_TORCH, "is_autocast_cache_enabled", "torch.is_autocast_cache_enabled()"),
)
_EINSUM = functional.einsum.__code__
_CONTRACTION = vars(opt_einsum)["m"].__dict__  # the module is replaced by an object
_OF_EINSUM = [
    Source(_CONTRACTION, name, f"torch.backends.opt_einsum.{name}")
    for name in ("enabled", "strategy")
    if name in _CONTRACTION
]
_FILES = (functional.__file__, _FAST_PATH_FILE, autocast_mode.__file__, parametrize.__file__)


def has_settings(file: str) -> bool:
    """Return whether a file of others may have functions that read one of the settings."""
    return file in _FILES or "/distributions/" in file.replace("\\", "/")


def settings_read_by(code: CodeType) -> list[Source]:
    """Return the settings that a function names."""
    if code is _EINSUM:
        return _OF_EINSUM
    found = [setting for setting in _SETTINGS if setting.name in code.co_names]
    return found if _DECIMAL.isdisjoint(code.co_names) else [*found, *CONTEXT_OF_DECIMAL]


WARN = frozenset({"warn", "warn_explicit"})
"""The functions of C whose warnings are shown, raised or dropped, as filters say."""
FILTERS = Source(vars(warnings), "filters", "warnings.filters")


def setting_returned_by(function: Any) -> Source | None:
    """Return the setting of PyTorch that a function or a property returns.

    Args:
        function: A function, or what ``torch.backends`` has for a setting.
    """
    if _get_precision is not None and _is_of_precision(function):
        return _PRECISION
    if type(function).__module__ == torch.backends.__name__:
        function = vars(function).get("getter")
        if isinstance(function, types.FunctionType):  # ``def _get_enabled(): return enabled``
            for read in function.__code__.co_names[-1:]:
                if read in function.__globals__:
                    path = f"{function.__module__}.{read}"
                    return Source(function.__globals__, read, path)
    if isinstance(function, property) and isinstance(function.fget, types.FunctionType):
        names = function.fget.__code__.co_names  # ``return torch._C._get_...()``
        function = getattr(torch._C, names[-1], None) if names else None
    if not isinstance(function, types.BuiltinFunctionType):
        return None
    name = function.__name__
    if name not in _TORCH.functions or function is not getattr(torch._C, name, None):
        return None
    return Source(_TORCH, name, f"torch.{name}()")


def _is_of_precision(function: Any) -> bool:
    if type(function).__module__ == torch.backends.__name__:
        held = vars(function)
        if "getter" not in held:  # ``torch.backends.mkldnn.conv``
            return True
        function = held["getter"]
        code = getattr(function, "__code__", None)
        return code is not None and _get_precision.__name__ in code.co_names
    return function is _get_precision or function is torch.get_float32_matmul_precision


class _Context(DerivedNamespace):
    """The context in which this thread computes with ``decimal``."""

    def get(self, name: str, default: Any) -> Any:
        """Return its flags, or all else."""
        now = decimal.getcontext()
        if name == "flags":
            return repr([each.__name__ for each, is_set in now.flags.items() if is_set])
        traps = [each.__name__ for each, is_set in now.traps.items() if is_set]
        return repr((now.prec, now.rounding, now.Emin, now.Emax, now.capitals, now.clamp, traps))


_CONTEXT = _Context()
FLAGS_OF_DECIMAL = Source(_CONTEXT, "flags", "decimal.getcontext().flags")
CONTEXT_OF_DECIMAL = (Source(_CONTEXT, "settings", "decimal.getcontext()"), FLAGS_OF_DECIMAL)
"""What the arithmetic of ``decimal`` depends on, and the flags that it sets and never clears."""
_DECIMAL = frozenset({"decimal", "Decimal"})


def has_decimal(space: Mapping[str, Any]) -> bool:
    """Return whether functions with these globals may compute with ``decimal``."""
    return not _DECIMAL.isdisjoint(space)


class _Formats(DerivedNamespace):
    """What Python writes numbers and dates by, besides the format itself."""

    def get(self, name: str, default: Any) -> Any:
        """Return the locale or the time zone of the process."""
        if name == "locale":
            return locale.setlocale(locale.LC_ALL)  # it only asks
        return repr((os.environ.get("TZ"), time.tzname, time.timezone, time.altzone))


_FORMATS = _Formats()
LOCALE_AND_ZONE = (
    Source(_FORMATS, "locale", "locale.setlocale(locale.LC_ALL)"),
    Source(_FORMATS, "zone", "time.tzname"),
)
"""What ``f"{x:n}"`` and ``f"{date:%B}"`` depend on. Functions of dates are volatile."""


class _SettingsOfNumPy(DerivedNamespace):
    """Settings of NumPy by the names of the functions that return them."""

    def get(self, name: str, default: Any) -> Any:
        """Return what a function returns now; ``default`` if NumPy is not imported."""
        numpy = sys.modules.get("numpy")
        return default if numpy is None else repr(getattr(numpy, name)())


_NUMPY = _SettingsOfNumPy()
_NAMES_OF_NUMPY = ("geterr", "get_printoptions")


def settings_of_numpy(values: Iterable[Any], writes_text: bool) -> list[Source]:
    """Return settings of NumPy that code may depend on.

    They decide if a division by zero raises an error, and how numbers are written.

    Args:
        values: What the code names.
        writes_text: Whether it writes numbers as text.
    """
    if "numpy" not in sys.modules or not any(map(_is_of_numpy, values)):
        return []
    names = _NAMES_OF_NUMPY if writes_text else _NAMES_OF_NUMPY[:1]
    return [Source(_NUMPY, name, f"numpy.{name}()") for name in names]


def _is_of_numpy(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else type(value).__module__
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        name = value.__module__
    return str(name).split(".")[0] == "numpy"
