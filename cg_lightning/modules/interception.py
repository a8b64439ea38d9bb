"""Intercept calls and attributes of one module object, and change neither the object nor its type.

What is hard here: Python looks up special methods (``__call__``, ``__getattribute__``, ...) in
the class of an object, so an attribute of the object itself cannot intercept them.

What was tried: another class for an intercepted module. Then ``type(net) is nn.Linear`` is False,
registries and strict metaclasses see an unknown class, and Dynamo compiles again. Classes with
``__slots__``, or with ``ABC`` or ``Generic`` as first base, raise an error.

What is done instead: while any module is intercepted, the class that *defines* the method (for
example ``nn.Module`` for ``__call__``) has a function of ours in its place. The function looks up
``id(self)`` in a table, and calls the original for every other module. The last interception that
is removed restores the original. Each class has its own table, because a method may call that of
its base class (``super().__call__``), which must not find the same module again.

What must not be changed:
- ``torch._dynamo`` must be imported before the first function is placed. At its import it stores
  ``nn.Module.__call__`` and ``__getattr__``, and later compares the current functions with them.
- The functions must call ``is_compiling()`` before they read a table, so that Dynamo never guards
  on a table. ``__getattr__`` is an exception: it must return state even then.
- The one function for a class and method is reused: compiled code may guard on it.
- After a graph break, Dynamo compiles each called frame. It is told to skip ours (``skip_code``),
  because a compiled ``__getattribute__`` calls itself without end. If Dynamo would compile the
  callee, our function calls the original, so that no handler is compiled.
- Class attributes are set with ``type.__setattr__``, because a user's metaclass may forbid it.
- ``__call__`` is placed in the class that defines it, because Dynamo compares ``type(m).__call__``
  with ``nn.Module.__call__``. All other methods are placed in the most derived class of torch,
  Lightning or torchmetrics, where they slow down the fewest modules.
- Functions are placed once for each stage and watched step, not for each call: Python 3.13 does
  not cache a class after about 1000 changes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import jit, nn
from torch.compiler import is_compiling

from cg_lightning.modules.compiled import is_compiled
from cg_lightning.modules.kinds import is_user_class

_get_thread = threading.get_ident
# private; returns the compiler of called frames; None or False outside compiled code
_compiler: Callable[[], Any] = getattr(
    torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None
)
_lock = threading.RLock()
BESIDE_INTERCEPTIONS = frozenset({"__getattribute__", "getattr_static"})
"""By which a function reads an attribute of a module, and no interception sees it."""
BESIDE_ALL = BESIDE_INTERCEPTIONS | {
    *("__getstate__", "__reduce__", "__reduce_ex__"),
    *("get_referents", "get_referrers", "get_objects"),
}
"""The same, and by which it reads all attributes."""
_GLOBALS_OF_MODULE = vars(nn.modules.module)
"""Those of the code of ``nn.Module``: at each call it reads hooks and tables of its own."""


class ModuleHandler:
    """Handles the events of one intercepted module. A subclass overrides the methods it needs.

    A method that is not overridden costs nothing. Only the thread that made the interception calls
    a handler. The exceptions are :meth:`get_missing` and :meth:`before_copy`, which every thread
    calls, because they return or move state.
    """

    def on_call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Replace ``module(*args, **kwargs)``, including its hooks and compiled code.

        Args:
            original: Calls the next inner handler, and finally the module.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        return original(*args, **kwargs)

    def on_read(self, name: str) -> None:
        """Called before an attribute, other than a parameter, buffer or child, is read.

        It is not called for private attributes that the code of ``nn.Module`` reads.
        """

    def on_write(self, name: str, value: Any) -> None:
        """Called before an attribute is set."""

    def get_missing(self, name: str) -> Any:
        """Return an attribute that neither the module nor its class has.

        It is called before the module's own ``__getattr__``.

        Raises:
            AttributeError: The handler does not have the attribute either.
        """
        raise AttributeError(name)

    def before_copy(self) -> None:
        """Called before the module is pickled or copied, possibly more than once."""


class _Entry(NamedTuple):
    module: Any  # keeps the module, or whoever listens, alive, and with it its id
    thread: int
    handler: Any

    def is_of_this_thread(self) -> bool:
        return self.thread == _get_thread()


_Table = dict[int, tuple[_Entry, ...]]
_Function = Callable[..., Any]


def _handlers(entries: tuple[_Entry, ...]) -> tuple[Any, ...]:
    """Return the handlers of this thread, the outermost last."""
    return tuple([entry.handler for entry in entries if entry.is_of_this_thread()])


def _call_module(
    original: _Function,
    module: nn.Module,
    handlers: tuple[ModuleHandler, ...],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if handlers:
        inner = functools.partial(_call_module, original, module, handlers[:-1])
        return handlers[-1].on_call(inner, args, kwargs)
    if is_compiled(module):
        with suspended():
            return original(module, *args, **kwargs)
    return original(module, *args, **kwargs)


def _call_replacements(
    original: _Function,
    module: nn.Module,
    replacements: tuple[_Function, ...],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not replacements:
        return original(module, *args, **kwargs)
    inner = functools.partial(_call_replacements, original, module, replacements[:-1])
    return replacements[-1](inner, *args, **kwargs)


def _is_member(module: nn.Module, name: str) -> bool:
    attributes = object.__getattribute__(module, "__dict__")
    return (  # no generator: a watched step asks thousands of times
        name in attributes.get("_parameters", ())
        or name in attributes.get("_buffers", ())
        or name in attributes.get("_modules", ())
    )


def _call_function(original: _Function, table: _Table) -> _Function:
    def __call__(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if is_compiling() or (entries := table.get(id(self))) is None or callable(_compiler()):
            return original(self, *args, **kwargs)
        return _call_module(original, self, _handlers(entries), *args, **kwargs)

    return __call__


def _read_function(original: _Function, table: _Table) -> _Function:
    def __getattribute__(self: nn.Module, name: str) -> Any:  # noqa: N807
        if is_compiling() or (entries := table.get(id(self))) is None or callable(_compiler()):
            return original(self, name)
        if name[0] == "_" and sys._getframe(1).f_globals is _GLOBALS_OF_MODULE:
            return original(self, name)
        if not _is_member(self, name):
            thread = _get_thread()
            for entry in reversed(entries):
                if entry.thread == thread:
                    # no wrapper around this call: handlers read caller frames
                    entry.handler.on_read(name)
        return original(self, name)

    return __getattribute__


def _write_function(original: _Function, table: _Table) -> _Function:
    def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        if not is_compiling() and (entries := table.get(id(self))) and not callable(_compiler()):
            thread = _get_thread()
            for entry in reversed(entries):  # a metric makes a dozen writes in each update
                if entry.thread == thread:
                    entry.handler.on_write(name, value)
        original(self, name, value)

    return __setattr__


def _missing_function(original: _Function, table: _Table) -> _Function:
    def __getattr__(self: nn.Module, name: str) -> Any:  # noqa: N807
        for entry in reversed(table.get(id(self), ())):
            with contextlib.suppress(AttributeError):
                return entry.handler.get_missing(name)
        return original(self, name)

    return __getattr__


def _copy_function(original: _Function, table: _Table) -> _Function:
    def copy(self: nn.Module, /, *args: Any) -> Any:
        for entry in reversed(table.get(id(self), ())):
            entry.handler.before_copy()
        return original(self, *args)

    return copy


def _method_function(original: _Function, table: _Table) -> _Function:
    def method(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or (entries := table.get(id(self))) is None or callable(_compiler()):
            return original(self, *args, **kwargs)
        return _call_replacements(original, self, _handlers(entries), *args, **kwargs)

    return method


def _heard_function(original: _Function, table: _Table) -> _Function:
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        for entries in tuple(table.values()):
            for entry in entries:
                entry.handler(self)
        return original(self, *args, **kwargs)

    return method


_MAKERS: dict[str, Callable[[_Function, _Table], _Function]] = {
    "__call__": _call_function,
    "__getattribute__": _read_function,
    "__setattr__": _write_function,
    "__getattr__": _missing_function,
    "__reduce_ex__": _copy_function,
    "__getstate__": _copy_function,
    "__deepcopy__": _copy_function,
    "__copy__": _copy_function,
    "record_stream": _heard_function,
    "_share_cuda_": _heard_function,
}
_USES_OF_MEMORY = ((torch.Tensor, "record_stream"), (torch.UntypedStorage, "_share_cuda_"))
"""The second one is private."""
_SPECIAL_METHODS = {
    "on_call": ("__call__",),
    "on_read": ("__getattribute__",),
    "on_write": ("__setattr__",),
    "get_missing": ("__getattr__",),
    "before_copy": ("__reduce_ex__", "__getstate__", "__deepcopy__", "__copy__"),
}
"""The special methods for each method of a handler; the last two only if a class defines them."""
_ABSENT = object()


class _Patch:
    """Replaces one method of one class by a function of ours while its table has modules."""

    def __init__(self, cls: type, name: str) -> None:
        self._cls = cls
        self._name = name
        self._before: Any = _ABSENT
        self._function: _Function | None = None
        self._is_put = False
        self.table: _Table = {}

    def add(self, entry: _Entry) -> None:
        """Add an entry. It becomes the outermost one of its module."""
        with _lock:
            self.table[id(entry.module)] = (*self.table.get(id(entry.module), ()), entry)
            self.update()

    def discard(self, entry: _Entry) -> None:
        """Remove an entry; idempotent."""
        with _lock:
            entries = self.table.get(id(entry.module), ())
            left = tuple([other for other in entries if other is not entry])
            if left:
                self.table[id(entry.module)] = left
            else:
                self.table.pop(id(entry.module), None)
            self.update()

    def update(self) -> None:
        """Place or remove the function, depending on the table and on suspensions."""
        current = vars(self._cls).get(self._name, _ABSENT)
        is_in_place = self._function is not None and current is self._function
        is_wanted = bool(self.table) and not _suspensions
        if is_wanted and not (is_in_place or self._is_wrapped(current)):
            if self._function is None or current is not self._before:
                self._before = current
                self._function = self._make(current)
            type.__setattr__(self._cls, self._name, self._function)
            self._is_put = True
        elif is_in_place and not is_wanted:
            self._is_put = False
            if self._before is _ABSENT:
                type.__delattr__(self._cls, self._name)
            else:
                type.__setattr__(self._cls, self._name, self._before)

    def as_written(self, function: Any) -> Any:
        """Return the earlier function for ours; any other one as it is."""
        is_ours = function is self._function and isinstance(self._before, types.FunctionType)
        return self._before if is_ours else function

    def take_out(self, found: dict[str, Any]) -> None:
        """Restore the earlier function in a copy of the namespace of the class."""
        if self._function is not None and found.get(self._name) is self._function:
            if self._before is _ABSENT:
                del found[self._name]
            else:
                found[self._name] = self._before

    def _is_wrapped(self, current: Any) -> bool:
        """Return True if other code has wrapped our function in the meantime."""
        return self._is_put and current is not self._before

    def _make(self, before: Any) -> _Function:
        original = self._original(before)
        if original is not before:
            _keep_from_compiler(original)
        function = _MAKERS.get(self._name, _method_function)(original, self.table)
        _keep_from_compiler(function)
        return functools.update_wrapper(function, original) if original is before else function

    def _original(self, before: Any) -> _Function:
        cls, name = self._cls, self._name
        if isinstance(before, types.FunctionType):
            return before
        if before is _ABSENT:

            def inherited(self: Any, /, *args: Any, **kwargs: Any) -> Any:
                return getattr(super(cls, self), name)(*args, **kwargs)

            return inherited

        def bound(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            function = before.__get__(self, type(self)) if hasattr(before, "__get__") else before
            return function(*args, **kwargs)

        return bound


_patches: dict[tuple[type, str], _Patch] = {}
_suspensions = 0


def without_interceptions(namespace: Any) -> dict[str, Any]:
    """Return what a class or a module contains, as if nothing was intercepted."""
    found = dict(vars(namespace))
    for (cls, _), patch in list(_patches.items()):
        if cls is namespace:
            patch.take_out(found)
    return found


def without_interception(value: Any) -> Any:
    """Return a bound method as it is when nothing is intercepted, and any other value as such.

    A watched step may return one: ``return self.log_dict``.
    """
    if type(value) is types.MethodType:
        for patch in list(_patches.values()):
            function = patch.as_written(value.__func__)
            if function is not value.__func__:
                return types.MethodType(function, value.__self__)
    return value


def _keep_from_compiler(function: _Function) -> None:
    """Tell Dynamo not to compile a function of ours, which it may reach after a graph break."""
    from torch._dynamo import eval_frame  # imports all of it (see the top of this file)

    eval_frame.skip_code(function.__code__)


def _patch(cls: type, name: str) -> _Patch:
    return _patches.setdefault((cls, name), _Patch(cls, name))


def _class_to_patch(module: nn.Module, name: str) -> type | None:
    """Return the class in which a function is found by all lookups of a special method."""
    order = type(module).__mro__
    definer = next((cls for cls in order if name in vars(cls)), None)
    if definer is None or (definer is nn.Module and name == "__call__"):
        return definer
    if definer in (object, nn.Module):
        return next(cls for cls in order if issubclass(cls, nn.Module) and not is_user_class(cls))
    return definer


def can_intercept(module: nn.Module) -> bool:
    """Return True if calls of ``module`` go through Python. A ScriptModule's calls do not."""
    return not isinstance(module, jit.ScriptModule)


class Interception:
    """Calls a handler for the events of one module object, from now on.

    Interceptions of the same module nest: the last one is the outermost. They can be removed in any
    order. ``type(module)``, ``vars(module)``, copies and pickles are not affected. A call that
    Dynamo traces does not reach the handler. A compiled module runs with all interceptions
    :func:`suspended`.

    Args:
        module: The module.
        handler: Handles the events.
    """

    def __init__(self, module: nn.Module, handler: ModuleHandler) -> None:
        assert can_intercept(module)
        self._entry = _Entry(module, _get_thread(), handler)
        self._patches: list[_Patch] = []
        try:
            for method, names in _SPECIAL_METHODS.items():
                if getattr(type(handler), method) is not getattr(ModuleHandler, method):
                    self._add(names)
        except BaseException:
            self.remove()
            raise

    def _add(self, names: tuple[str, ...]) -> None:
        for name in names:
            cls = _class_to_patch(self._entry.module, name)
            if cls is not None:
                patch = _patch(cls, name)
                self._patches.append(patch)
                patch.add(self._entry)

    def remove(self) -> None:
        """Leave no trace; idempotent."""
        for patch in self._patches:
            patch.discard(self._entry)
        self._patches.clear()


def defining_class(module: nn.Module, name: str) -> type:
    """Return the class whose method receives all calls of ``module.name(...)``.

    Overrides must call ``super()``. It is the base-most subclass of ``nn.Module`` that defines the
    method. Mixins that are not modules are skipped, because only ``super()`` reaches them.
    """
    definers = [cls for cls in type(module).__mro__ if name in vars(cls)]
    return ([cls for cls in definers if issubclass(cls, nn.Module)] or definers)[-1]


def base_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return the method that :func:`replaced_method` replaces, bypassing the user's overrides."""
    method: Callable[..., Any] = vars(defining_class(module, name))[name].__get__(
        module, type(module)
    )
    return method


@contextlib.contextmanager
def replaced_method(
    module: nn.Module, name: str, replacement: Callable[..., Any], *, cls: type | None = None
) -> Iterator[None]:
    """While this is entered, ``replacement(original, *args, **kwargs)`` replaces a method.

    It applies to one module object and the current thread, and to calls through ``super()`` as
    well. It is placed in the base-most class that defines the method, so the user's overrides still
    run. An attribute of that name in the object itself is not changed. The last of several
    replacements is the outermost.

    Args:
        module: The module.
        name: Name of the method, such as ``log``.
        replacement: Called with the original, bound to the module, and the arguments of the call.
        cls: Place it in this class, which has the method, instead.
    """
    entry = _Entry(module, _get_thread(), replacement)
    patch = _patch(cls or defining_class(module, name), name)
    try:
        patch.add(entry)
        yield
    finally:
        patch.discard(entry)


class UsersOfMemory:
    """Calls a function before another stream or process may use memory, in any thread.

    These are ``tensor.record_stream``, and a queue of ``torch.multiprocessing`` that sends a tensor
    of a GPU. No count of references shows them.

    Args:
        listener: Called with the tensor or its storage.
    """

    def __init__(self, listener: Callable[[Any], None]) -> None:
        self._entry = _Entry(self, _get_thread(), listener)
        self._patches = [_patch(cls, name) for cls, name in _USES_OF_MEMORY]
        for patch in self._patches:
            patch.add(self._entry)

    def remove(self) -> None:
        """Leave no trace; idempotent."""
        for patch in self._patches:
            patch.discard(self._entry)


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """While this is entered, no class has a function of ours, so compiled code runs as without us.

    It applies to the whole process. Handlers of other threads are not called in the meantime.
    """
    _suspend(1)
    try:
        yield
    finally:
        _suspend(-1)


def _suspend(change: int) -> None:
    global _suspensions
    with _lock:
        _suspensions += change
        for patch in _patches.values():
            patch.update()
