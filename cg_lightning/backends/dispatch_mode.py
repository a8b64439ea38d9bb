"""Watches dispatched operations and does not change their results."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# private. Without it, a watched step in inference mode may differ from eager in the last bit
_include_or_exclude = getattr(torch._C, "_SetExcludeDispatchKeyGuard", None)


_AS_IT_IS = contextlib.nullcontext()


def _including(key: str) -> contextlib.AbstractContextManager[Any]:
    """While this is entered, a dispatch key is not excluded."""
    included: contextlib.AbstractContextManager[Any] = _include_or_exclude(  # type: ignore[misc]
        getattr(torch._C.DispatchKey, key), False
    )
    return included


@functools.cache
def _has_kernel(function: OpOverload, key: str) -> bool:
    """Return True if a dispatch key has a kernel for this operation itself.

    What subclasses are asked, such as ``prim::layout``, is no operation of the dispatcher.
    """
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), key)
    except RuntimeError:  # the only way in all versions of PyTorch
        return True


class EagerDispatchMode(TorchDispatchMode):
    """Base class of our dispatch modes. Operations called through :meth:`call` run as in eager.

    Some composite operations arrive in one piece: lstm and einsum in inference mode, and the fast
    path of the encoder layer always. The dispatch keys ADInplaceOrView and Autocast are then
    excluded for the operations inside. As a result, views of parameters do not require grad, and
    ``matmul`` selects its kernel by that; and inner operations are not cast. Therefore
    :meth:`call` includes both keys again, except for operations that they already handled.

    The keys of lazy conjugation and negation are excluded as well. Then kernels read a tensor such
    as ``x.conj()`` as if it were ``x``: ``fft.hfft2`` gives wrong numbers. They are always included
    again.

    The key of autocast is always excluded inside ``__torch_dispatch__``, so the state of autocast
    is observed at ``torch.set_autocast_enabled``.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self._thread = threading.get_ident()
        self._autocast = torch.is_autocast_enabled(device_type)

    @property
    def is_autocast_enabled(self) -> bool:
        """Whether autocast is on; it cannot be asked inside a dispatched operation."""
        return self._autocast

    def __torch_dispatch__(
        self,
        func: OpOverload | HigherOrderOperator,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return what :meth:`dispatch` returns."""
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation that the mode meets."""
        raise NotImplementedError

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Enter the mode."""
        original = torch.set_autocast_enabled

        def set_autocast_enabled(*args: Any) -> None:
            original(*args)
            if threading.get_ident() == self._thread:
                self._autocast = torch.is_autocast_enabled(self.device_type)

        with patch.object(torch, "set_autocast_enabled", set_autocast_enabled), self:
            yield

    def casts_inside(self, function: OpOverload) -> bool:
        """Return True if autocast must cast the operations inside ``function``.

        If autocast has a kernel for ``function`` itself, it already did the cast.
        """
        return self._autocast and not _has_kernel(function, f"Autocast{self.device_type.upper()}")

    def call(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``function`` from inside ``__torch_dispatch__``."""
        if _include_or_exclude is None:
            return function(*args, **kwargs)
        includes_views = torch.is_inference_mode_enabled() and not _has_kernel(
            function, "ADInplaceOrView"
        )
        casts = self.casts_inside(function)
        # nearly all operations take this way, and each microsecond counts
        with (
            _including("Conjugate"),
            _including("Negative"),
            _including("ZeroTensor"),
            _including("ADInplaceOrView") if includes_views else _AS_IT_IS,
        ):
            if not casts:
                return function(*args, **kwargs)
            with _including(f"Autocast{self.device_type.upper()}"):
                return function(*args, **kwargs)
