"""Intercepts calls of one module object without leaving a trace in it."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import jit, nn

Handler = Callable[..., Any]


class _InterceptedMethod:
    """Gives the handler in place of a method, also where the instance has an attribute of that name (compiled steps)."""

    def __init__(self, name: str, handler: Handler) -> None:
        self._name = name
        self._handler = handler

    def __get__(self, module: nn.Module | None, _: type | None = None) -> Any:
        return self if module is None else self._handler

    def __set__(self, module: nn.Module, value: Any) -> None:
        raise AttributeError(
            f"{self._name} cannot be replaced while CUDAGraphCallback runs it from graphs; replace it before the stage, "
            f"or leave the stage out of CUDAGraphCallback(stages=...)."
        )


def can_intercept(module: nn.Module) -> bool:
    """Whether calls of ``module`` go through Python; those of a ScriptModule's children do not."""
    return not isinstance(module, jit.ScriptModule)


_set_class: Callable[[nn.Module, type], None] = object.__dict__["__class__"].__set__


def plain_class(module: nn.Module) -> type:
    """The class that ``module`` has without us."""
    return next(
        cls for cls in type(module).__mro__ if "_cg_lightning_interception" not in cls.__dict__
    )


@contextlib.contextmanager
def _as_plain(module: nn.Module) -> Iterator[None]:
    ours = type(module)
    for cls in ours.__mro__:
        if (interception := cls.__dict__.get("_cg_lightning_interception")) is not None:
            interception.before_copy()
    _set_class(module, plain_class(module))
    try:
        yield
    finally:
        _set_class(module, ours)


def _reduce_ex(module: nn.Module, protocol: Any) -> Any:
    with _as_plain(module):
        return module.__reduce_ex__(protocol)


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> Any:
    with _as_plain(module):
        return copy.deepcopy(module, memo)


def _forwarding_metaclass(plain: type) -> type:
    """A metaclass for a class that passes on what is assigned to it: ``type(self).counter += 1`` in a step is meant for
    the user's class.
    """

    def assign(_: type, name: str, value: Any) -> None:
        setattr(plain, name, value)

    return type("InterceptedType", (type(plain),), {"__setattr__": assign})


class ModuleHandler:
    """What is done in place of, or before, what a module does (shim: the real one comes with the other interception)."""

    def on_call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs in place of ``module(*args, **kwargs)``; ``original`` calls the module."""
        return original(*args, **kwargs)

    def on_read(self, name: str) -> None:
        """Runs before an attribute is read."""

    def on_write(self, name: str, value: Any) -> None:
        """Runs before an attribute is set."""

    def get_missing(self, name: str) -> Any:
        """Gives an attribute that the module does not have, or raises AttributeError."""
        raise AttributeError(name)

    def before_copy(self) -> None:
        """Runs before the module is pickled or copied."""

    def overrides(self, name: str) -> bool:
        """Whether a subclass defines this method."""
        return getattr(type(self), name) is not getattr(ModuleHandler, name)


class Interception:
    """Swaps the class of one module object for a subclass whose methods are handlers.

    Parametrizations and FSDP2 of PyTorch do the same. The module keeps its ``__dict__``, its children and its
    ``isinstance``; pickles and deep copies are made as of the plain class, so they run their own weights. Interceptions of
    one module nest, and are removed in any order.

    Args:
        module: The module.
        handler: In place of all the others (shim).
        call: Takes the arguments of ``module(...)``, hooks and compiled calls included.
        methods: Handlers by method name.
        on_read: Called with the name of each attribute, other than parameters, buffers and children, that is read.
        on_write: Called with name and new value of each attribute that is set, before it is.
        get_missing: Gives attributes that the module does not have, or raises AttributeError.
        before_copy: Called before the module is pickled or copied.
    """

    def __init__(
        self,
        module: nn.Module,
        handler: ModuleHandler | None = None,
        *,
        call: Handler | None = None,
        methods: dict[str, Handler] | None = None,
        on_read: Callable[[str], None] | None = None,
        on_write: Callable[[str, Any], None] | None = None,
        get_missing: Callable[[str], Any] | None = None,
        before_copy: Callable[[], None] = lambda: None,
    ) -> None:
        assert can_intercept(module)
        self._in_place: Any = None
        if handler is not None:
            if handler.overrides("on_call"):
                call = functools.partial(_call_handler, self, handler)
            on_read = handler.on_read if handler.overrides("on_read") else None
            on_write = handler.on_write if handler.overrides("on_write") else None
            get_missing = handler.get_missing if handler.overrides("get_missing") else None
            before_copy = handler.before_copy
            if call is not None and getattr(module, "_compiled_call_impl", None) is not None:
                from cg_lightning.modules.compiled import CompiledCallInterception

                self._in_place = CompiledCallInterception(module, call)
                return
        self.before_copy = before_copy
        self._module = module
        self._original = original = type(module)
        plain = plain_class(module)
        namespace: dict[str, Any] = {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "__class__": property(
                lambda _: plain, _set_class
            ),  # pickle compares it with the class it writes
            "__reduce_ex__": _reduce_ex,
            "_cg_lightning_interception": self,
        }
        if hasattr(plain, "__deepcopy__"):
            namespace["__deepcopy__"] = _deepcopy
        if call is not None:

            def call_module(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if (
                    torch.compiler.is_compiling()
                ):  # code of the user's that calls the module is compiled, and we are not
                    return original.__call__(self, *args, **kwargs)
                return call(*args, **kwargs)

            namespace["__call__"] = call_module
        if on_read is not None:

            def read(self: nn.Module, name: str) -> Any:
                on_read(name)
                return original.__getattribute__(self, name)

            namespace["__getattribute__"] = read
        if on_write is not None:

            def write(self: nn.Module, name: str, value: Any) -> None:
                on_write(name, value)
                original.__setattr__(self, name, value)

            namespace["__setattr__"] = write
        if get_missing is not None:

            def missing(self: nn.Module, name: str) -> Any:
                try:
                    return get_missing(name)
                except AttributeError:
                    return original.__getattr__(self, name)

            namespace["__getattr__"] = missing
        for name, method in (methods or {}).items():
            namespace[name] = _InterceptedMethod(name, method)
        # a class made as a direct subclass would run the user's __init_subclass__, which may register it
        ours = types.new_class(
            plain.__name__,
            (nn.Module,),
            {"metaclass": _forwarding_metaclass(plain)},
            lambda ns: ns.update(namespace),
        )
        type.__setattr__(ours, "__bases__", (original,))
        self._ours = ours
        self._put_there = set(namespace) - {"__module__", "__qualname__", "__doc__", "__class__"}
        _set_class(module, ours)

    def call_original(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module as if it were not intercepted here."""
        if self._in_place is not None:
            return self._in_place.call_original(*args, **kwargs)
        return self._original.__call__(self._module, *args, **kwargs)

    def suspend(self) -> None:
        """Puts back the class; idempotent. A class that somebody else has since put in its place stays."""
        if self._in_place is not None:
            self._in_place.suspend()
            return
        current = type(self._module)
        if current is self._ours:
            _set_class(self._module, self._original)
            return
        while (above := current.__dict__.get("_cg_lightning_interception")) is not None:
            if above._original is self._ours:
                above._original = self._original
                type.__setattr__(current, "__bases__", (self._original,))
                return
            current = above._original

    def resume(self) -> bool:
        """Intercepts again after :meth:`suspend`; False where the module has another class by now.

        Code that ``torch.compile`` has made checks for the class of the modules that it uses: with one that is new at each
        validation it would be compiled anew each time.
        """
        if self._in_place is not None:
            return bool(self._in_place.resume())
        if type(self._module) is self._original:
            _set_class(self._module, self._ours)
        return type(self._module) is self._ours

    def remove(self) -> None:
        """As :meth:`suspend`, for good. A class is part of a cycle of references: what its methods refer to would live until
        garbage is collected.
        """
        self.suspend()
        if self._in_place is not None:
            return
        for name in self._put_there:
            type.__delattr__(self._ours, name)
        self._put_there = set()


def _call_handler(
    interception: Interception, handler: ModuleHandler, *args: Any, **kwargs: Any
) -> Any:
    return handler.on_call(interception.call_original, args, kwargs)


@contextlib.contextmanager
def replaced_method(
    module: nn.Module, name: str, replacement: Callable[..., Any]
) -> Iterator[None]:
    """Calls ``replacement`` in place of a method, with the original bound method as first argument (shim)."""
    original = getattr(module, name)
    interception = Interception(module, methods={name: functools.partial(replacement, original)})
    try:
        yield
    finally:
        interception.remove()
