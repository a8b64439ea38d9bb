"""Functions whose result no guard can compare: clocks, seeds, counts of memory, facts about files.

They change and keep nothing in Python, but they return another value in each step. The context of
``decimal`` belongs to the thread, and nothing in Python refers to it. A function of a library that
takes no argument (``threading.active_count``) returns state of the library.
"""

from __future__ import annotations

import datetime
import inspect
import os
import random
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch

from cg_lightning.modules.kinds import is_our_file, is_user_file

_OF_PLACES = "storage_offset untyped_storage data_ptr is_pinned _is_view is_set_to"
"""Methods of tensors that return where they are in memory."""
_NAMES_IN_C = {
    "time": """
        time monotonic perf_counter process_time thread_time
        time_ns monotonic_ns perf_counter_ns process_time_ns thread_time_ns
        clock_gettime clock_gettime_ns localtime gmtime ctime asctime
        strftime strptime mktime tzset
    """,
    "posix": """
        times getloadavg urandom getrandom getcwd getcwdb stat lstat access readlink statvfs
        read readv pread preadv lseek fstat fstatvfs isatty umask nice getpriority sched_getaffinity
        getppid uname get_blocking get_inheritable get_terminal_size getxattr listxattr
    """,
    "torch": """
        get_num_threads get_num_interop_threads is_inference
        is_anomaly_enabled is_anomaly_check_nan_enabled
    """,
    "resource": "getrusage getrlimit prlimit",
    "gc": """
        get_count get_stats get_objects isenabled get_threshold
        get_debug get_freeze_count get_referrers
    """,
    "sys": """
        getallocatedblocks getrefcount getrecursionlimit getswitchinterval
        get_int_max_str_digits set_int_max_str_digits _current_frames
    """,
    "_weakref": "getweakrefcount getweakrefs",
    "_thread": "_count stack_size",
    "_signal": "getsignal getitimer sigpending pthread_sigmask",
    "_socket": "getdefaulttimeout gethostname",
    "faulthandler": "is_enabled",
    "_locale": "localeconv setlocale nl_langinfo strcoll strxfrm",
    "_tracemalloc": "get_traced_memory is_tracing get_traceback_limit get_tracemalloc_memory",
    "datetime": """
        now utcnow today strftime strptime timestamp fromtimestamp astimezone
    """,  # by clock, locale or time zone
    "": f"is_inference __subclasses__ {_OF_PLACES}",  # of tensors and of classes
    "decimal": "getcontext setcontext localcontext",  # of the thread
}
_DATES = (datetime.date, datetime.time)
_IN_C = {module: frozenset(names.split()) for module, names in _NAMES_IN_C.items()}
"""Names of functions by module."""
_OF_GENERATORS = frozenset(name for name in vars(torch.Generator) if name[0] != "_")
NAMES_OF_VOLATILE = _OF_GENERATORS.union(*_IN_C.values())
"""Functions of C with other names are none of these."""
_OF_MEMORY = frozenset(
    {
        *("memory_stats", "memory_stats_as_nested_dict", "mem_get_info", "memory_snapshot"),
        *("get_memory_info", "device_memory_used"),
    }
)
_ARE_KNOWN = (
    *("contextlib", "functools", "platform", "site", "sysconfig", "typing", "inspect", "copy"),
    *("lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"),
    *("torch.cuda", "torch.distributed", "torch.compiler", "torch.jit", "torch._jit_internal"),
    *("torch.accelerator", "torch.mps", "torch.xpu", "torch.mtia", "torch.cpu", "torch.random"),
    *("torch._dynamo", "torch.overrides", "torch.utils._device"),
)
"""Modules whose functions without arguments return what keys or guards have, or constants."""
_PREFIXES = tuple(f"{name}." for name in _ARE_KNOWN)
_TAKES_MORE = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
_IN_KEYS = frozenset(
    {
        *("are_deterministic_algorithms_enabled", "get_float32_matmul_precision"),
        *("get_default_device", "is_available", "get_fastpath_enabled"),
        *("geterr", "get_printoptions"),
        *("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled"),
        "cudnn_sdp_enabled",
    }
)
"""Functions of PyTorch and NumPy without arguments of which keys or guards know the result."""
_GET_VARIABLE = type(os.environ).__getitem__.__code__
_ALL_VARIABLES = {getattr(type(os.environ), name).__code__ for name in ("__iter__", "__len__")}
_SEED = random.Random.seed.__code__
_RANDOM_FILE = "torch/random.py"
_TEXT_FILE = "torch/_tensor_str.py"
_MEMORY_FILES = ("torch/cuda/memory.py", "torch/accelerator/memory.py")
_FILES_OF_TORCH = (*_MEMORY_FILES, _RANDOM_FILE, _TEXT_FILE)
_CALL_THEM = (*_FILES_OF_TORCH, "torch/_tensor.py")


def volatile_in_c(function: Any) -> str:
    """Return the name of a function of C whose result no guard can compare; otherwise empty."""
    name = getattr(function, "__name__", "")
    if name not in NAMES_OF_VOLATILE:
        return ""
    module = getattr(function, "__module__", None)
    owner = getattr(function, "__self__", None)
    if name == "__subclasses__" or isinstance(owner, torch.Tensor):
        module = ""
    elif isinstance(owner, _DATES) or (isinstance(owner, type) and issubclass(owner, _DATES)):
        module = "datetime"
    if module is None or name not in _IN_C.get(module, ()):
        return ""
    return f"{module}.{name}" if module else name


def tensor_of_address(function: Any) -> Any:
    """Return the tensor whose place in memory a method of C returns; otherwise None."""
    owner = getattr(function, "__self__", None)
    is_place = getattr(function, "__name__", "") in _OF_PLACES.split()
    return owner if is_place and isinstance(owner, torch.Tensor) else None


def method_of_generator(function: Any, caller: FrameType) -> str:
    """Return the name of a method of a random generator; empty if it is none.

    A replay would not seed it, and what is read of its state is another value in each step. What
    functions of PyTorch do to the default generator is seen by ``RandomNumbers``.
    """
    if not isinstance(getattr(function, "__self__", None), torch.Generator):
        return ""
    is_of_torch = caller.f_globals.get("__name__", "").split(".")[0] == "torch"
    return "" if is_of_torch else f"torch.Generator.{function.__name__}"


def seeds_itself(function: Any, caller: FrameType) -> str:
    """Return the name of a generator that the system seeds (``random.Random()``); empty if none."""
    if getattr(function, "__name__", "") != "seed" or caller.f_code is not _SEED:
        return ""
    if caller.f_locals.get("a") is not None:
        return ""
    maker: FrameType | None = caller
    while maker is not None and maker.f_code.co_filename == _SEED.co_filename:
        maker = maker.f_back
    # Python itself makes some, for names of temporary files
    is_users = maker is not None and is_user_file(maker.f_code.co_filename)
    return "random.Random()" if is_users else ""


def returns_library_state(function: Any) -> bool:
    """Return whether a function of a library takes no argument: it returns state of the library."""
    if not isinstance(function, FunctionType) or is_user_file(function.__code__.co_filename):
        return False
    code, module = function.__code__, f"{function.__module__}."
    if code.co_argcount or code.co_kwonlyargcount or code.co_flags & _TAKES_MORE:
        return False
    if function.__name__ in _IN_KEYS and module.startswith(("torch.", "numpy.")):
        return False
    return not is_our_file(code.co_filename) and not module.startswith(_PREFIXES)


def volatile_in_python(code: CodeType) -> str:
    """Return the name of a function of PyTorch that counts memory, has the seed or writes values.

    No dispatch mode sees how a tensor is written as text. Empty for all other functions.
    """
    if code.co_name == "_str" and code.co_filename.endswith(_TEXT_FILE):
        return "torch.Tensor.__repr__"
    if code.co_name == "initial_seed" and code.co_filename.endswith(_RANDOM_FILE):
        return "torch.initial_seed"
    if code.co_name in _OF_MEMORY and code.co_filename.endswith(_MEMORY_FILES):
        return f"torch.cuda.{code.co_name}"
    return ""


def reads_environment(code: CodeType) -> bool:
    """Return whether it is the code of a function that looks variables up in ``os.environ``."""
    return code is _GET_VARIABLE or code in _ALL_VARIABLES


def has_volatile(file: str) -> bool:
    """Return whether a file of PyTorch or Python has volatile functions."""
    return file.endswith(_FILES_OF_TORCH) or file == _GET_VARIABLE.co_filename


def environment_variable(frame: FrameType) -> str:
    """Return the variable that such a function reads; empty if it may read all of them."""
    is_one = frame.f_code is _GET_VARIABLE and frame.f_locals["self"] is os.environ
    name = frame.f_locals["key"] if is_one else ""
    return name if isinstance(name, str) else ""


def caller_of(frame: FrameType) -> FrameType:
    """Return the frame that calls a function of PyTorch, and not the files of that function."""
    caller = frame
    is_text = frame.f_code.co_filename.endswith(_TEXT_FILE)  # detectors replace its methods
    while caller.f_back is not None and (
        caller.f_code.co_filename.endswith(_CALL_THEM)
        or (is_text and is_our_file(caller.f_code.co_filename))
    ):
        caller = caller.f_back
    return caller
