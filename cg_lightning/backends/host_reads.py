"""Calls that wait for a GPU and that the dispatcher does not show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import dlpack

from cg_lightning.backends.imported_functions import replaced_where_imported, with_notice
from cg_lightning.core.causes import Cause

OnCall = Callable[[Cause, str], None]

TO_DLPACK: Callable[..., Any] = dlpack.to_dlpack  # type: ignore[attr-defined]  # it is public

UNSEEN_READS = ("tolist", "numpy", "__array__")
"""Methods that read a tensor of the host, and that no operation shows."""
_READS = (*UNSEEN_READS, "cpu", "__repr__")
_MAKERS = ("tensor", "as_tensor", "asarray")


def noticed(
    owner: Any, name: str, cause: Cause, on_call: OnCall, unless: Callable[..., bool] | None = None
) -> Callable[..., Any]:
    """Return a function that calls ``on_call``, and then what it replaces.

    Args:
        owner: A module or class.
        name: The name of what is replaced.
        cause: The cause for ``on_call``.
        on_call: Is called by calls of the current thread.
        unless: Returns True for arguments that do not matter. None: all matter.
    """

    def notice(*args: Any, **kwargs: Any) -> None:
        if unless is None or not unless(*args, **kwargs):
            on_call(cause, f"{owner.__name__}.{name}")

    return with_notice(getattr(owner, name), notice)


def _is_on_a_device(tensor: Tensor, *_: Any, **__: Any) -> bool:
    return not tensor.is_cpu


def _stays_on_the_host(*_: Any, device: Any = None, **__: Any) -> bool:
    return device is None


@contextlib.contextmanager
def invisible_calls(on_call: OnCall) -> Iterator[None]:
    """Call ``on_call`` before each such call of this thread. ``on_call`` may raise.

    ``tolist``, ``numpy``, ``cpu`` and ``repr`` of a CPU tensor do not reach the dispatcher, nor
    does what others read of it by DLPack, such as ``numpy.from_dlpack``. A tensor made
    from Python values for a device (``torch.tensor(..., device=...)``) looks to the dispatcher
    like a tensor that stays on the host.
    """
    with contextlib.ExitStack() as stack:
        for name in _READS:
            stack.enter_context(
                patch.object(Tensor, name, noticed(Tensor, name, Cause.HOST_SYNC, on_call))
            )
        shared = noticed(Tensor, "__dlpack__", Cause.HOST_SYNC, on_call, _is_on_a_device)
        stack.enter_context(patch.object(Tensor, "__dlpack__", shared))
        functions = {
            name: (
                getattr(torch, name),
                noticed(torch, name, Cause.TENSOR_FROM_PYTHON, on_call, _stays_on_the_host),
            )
            for name in _MAKERS
        }
        to_dlpack = noticed(dlpack, "to_dlpack", Cause.HOST_SYNC, on_call, _is_on_a_device)
        functions["to_dlpack"] = (TO_DLPACK, to_dlpack)
        stack.enter_context(replaced_where_imported(functions))
        maker = noticed(Tensor, "new_tensor", Cause.TENSOR_FROM_PYTHON, on_call)
        stack.enter_context(patch.object(Tensor, "new_tensor", maker))
        yield
