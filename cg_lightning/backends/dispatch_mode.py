"""Watching dispatched operations without changing what they compute."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# private, so only here: without it a watched step under inference mode may differ from eager in the last bit
_include_or_exclude = getattr(torch._C, "_SetExcludeDispatchKeyGuard", None)


@functools.cache
def _has_kernel(function: OpOverload, key: str) -> bool:
    """Whether a dispatch key does something of its own for this very operation, rather than for what it calls."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), key)


class EagerDispatchMode(TorchDispatchMode):
    """Base of our dispatch modes: operations called through :meth:`call` take the way that they take in eager.

    Composite operations that arrive whole (lstm and einsum under inference mode, the encoder layer's fast path always) do
    so with the dispatch keys ADInplaceOrView and Autocast excluded for all that they call: views of parameters made inside
    no longer require grad, by which ``matmul`` chooses its kernel, and inner operations are not cast. So both keys are
    included again, but for operations that they have already handled. Whether autocast is on cannot be asked inside
    ``__torch_dispatch__``, where its key is always excluded; so it is watched from outside.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self._thread = threading.get_ident()
        self._autocast = torch.is_autocast_enabled(device_type)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Enters the mode."""
        original = torch.set_autocast_enabled

        def set_autocast_enabled(*args: Any) -> None:
            original(*args)
            if threading.get_ident() == self._thread:
                self._autocast = torch.is_autocast_enabled(self.device_type)

        with patch.object(torch, "set_autocast_enabled", set_autocast_enabled), self:
            yield

    def casts_inside(self, function: OpOverload) -> bool:
        """Whether autocast is on for what ``function`` calls; where it casts ``function`` itself, it did so already."""
        return self._autocast and not _has_kernel(function, f"Autocast{self.device_type.upper()}")

    def call(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls ``function`` from inside ``__torch_dispatch__``."""
        if _include_or_exclude is None:
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled() and not _has_kernel(function, "ADInplaceOrView"):
                stack.enter_context(
                    _include_or_exclude(torch._C.DispatchKey.ADInplaceOrView, False)
                )
            if self.casts_inside(function):
                key = getattr(torch._C.DispatchKey, f"Autocast{self.device_type.upper()}")
                stack.enter_context(_include_or_exclude(key, False))
            return function(*args, **kwargs)
