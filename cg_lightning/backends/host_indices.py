"""Lists and arrays of the host that index a tensor: ``x[:, [-1, 0]]``.

What is hard here: PyTorch makes a tensor of the list and copies it to the device before it
dispatches an operation. If a function replaces ``Tensor.__getitem__``, code in C takes every tensor
for a sequence, also after the function was restored: ``torch.tensor([one, other])`` then fails for
tensors without a dimension. So captures enter a ``TorchFunctionMode`` if the watched step has used
such an index, and watched steps read the instruction that runs.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cg_lightning.backends.tensor_makers import (
    CAN_WORK_BESIDE,
    MOST_VALUES,
    count_plain,
    made_on_host,
)

AnswerIndex = Callable[[Tensor], Tensor]
Place = tuple[int, int]
_INDICES = (torch.int8, torch.int16, torch.int32, torch.int64)
# private. Without it, attention would notice the mode, so no index is answered
_without_our_mode = getattr(torch.overrides, "_pop_mode_temporarily", None)


@contextlib.contextmanager
def answered_indices(device: torch.device, answer: AnswerIndex) -> Iterator[None]:
    """While this is entered, ``answer`` replaces lists and arrays that index tensors of ``device``.

    Attention must not notice the mode: it would leave its fast path.
    """
    if _without_our_mode is None or not CAN_WORK_BESIDE:
        yield
        return
    original = torch.overrides.has_torch_function
    mode, thread = _IndexMode(device, answer), threading.get_ident()

    def has_torch_function(arguments: Any) -> bool:
        if mode.is_left or threading.get_ident() != thread:
            return original(arguments)
        with _without_our_mode():
            return original(arguments)

    with patch.object(torch.overrides, "has_torch_function", has_torch_function), mode:
        yield


class _IndexMode(TorchFunctionMode):
    def __init__(self, device: torch.device, answer: AnswerIndex) -> None:
        super().__init__()
        self._device = device
        self._answer = answer
        self.is_left = False
        """Whether a function runs inside which PyTorch has left the mode."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        before, self.is_left = self.is_left, True
        try:
            if func is Tensor.__getitem__ or func is Tensor.__setitem__:
                tensor, index, *value = args
                if isinstance(tensor, Tensor) and tensor.device == self._device:
                    args = (tensor, self._without_lists(index), *value)
            return func(*args, **(kwargs or {}))
        finally:
            self.is_left = before

    def _without_lists(self, index: Any) -> Any:
        if type(index) is tuple:
            return tuple([self._tensor_of(item) for item in index])
        # PyTorch takes a list of lists for a tuple
        return (
            self._tensor_of(index) if getattr(index, "ndim", 1) == 1 and _is_flat(index) else index
        )

    def _tensor_of(self, item: Any) -> Any:
        value = index_on_host(item)
        return item if value is None else self._answer(value)


def _is_flat(index: Any) -> bool:
    return not isinstance(index, (list, tuple)) or not any(hasattr(i, "__len__") for i in index)


def index_on_host(item: Any) -> Tensor | None:
    """Return the tensor that PyTorch makes of one index; None if it makes none, or is not known."""
    if not hasattr(item, "__len__") or count_plain(item, shares_memory=False) > MOST_VALUES:
        return None
    value = made_on_host(item)
    if value.dtype is torch.bool and value.dim():
        return value
    # an empty list has no type
    return value.long() if value.dim() and (value.dtype in _INDICES or not value.numel()) else None


def place_of_indexing() -> Place | None:
    """Return frame and offset of the indexing instruction that runs; None if none runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame = frame.f_back
    if frame is None or not _indexes(frame.f_code, frame.f_lasti):
        return None
    return id(frame), frame.f_lasti


_BETWEEN = (
    *("cg_lightning.", "contextlib", "warnings"),
    *("torch.utils._", "torch._ops", "torch._compile", "torch._dynamo"),
)
"""Modules whose functions run between an indexing instruction and a detector."""


@functools.lru_cache(maxsize=4096)
def _indexes(code: CodeType, offset: int) -> bool:
    step = next((each for each in dis.get_instructions(code) if each.offset == offset), None)
    if step is None:
        return False
    # from Python 3.14 on, it is ``BINARY_OP`` with ``[]``
    return step.opname in ("BINARY_SUBSCR", "STORE_SUBSCR") or step.argrepr == "[]"
