"""Methods that copy from the device to the host: ``x.cpu()``, ``x.to("cpu")``, ``x.item()``."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

Answer = Callable[[Tensor, Callable[[], Tensor]], Tensor]
"""Returns the copy. Its arguments are the tensor and a function that makes the copy."""
AnswerNumber = Callable[[Tensor, FrameType, Callable[[], Any]], Any]
"""Returns the number. Its arguments are the tensor, the frame that reads it, and a function that
reads it."""


@contextlib.contextmanager
def answered_copies_to_host(device: torch.device, answer: Answer) -> Iterator[None]:
    """Answer the copies of this thread. Those that do not wait, or that convert, are not answered.

    Args:
        device: The device of the graphs. If it is the CPU, ``to`` copies nothing.
        answer: Makes the copies.
    """
    thread = threading.get_ident()

    def replaced(name: str) -> Callable[..., Tensor]:
        original = getattr(Tensor, name)

        @functools.wraps(original)
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            is_answered = threading.get_ident() == thread and tensor.device.type == device.type
            if is_answered and (_names_host(args, kwargs) if name == "to" else not args):
                return answer(tensor, lambda: original(tensor, *args, **kwargs))
            return original(tensor, *args, **kwargs)  # type: ignore[no-any-return]

        return method

    with contextlib.ExitStack() as stack:
        for name in ("cpu",) if device.type == "cpu" else ("cpu", "to"):
            stack.enter_context(patch.object(Tensor, name, replaced(name)))
        yield


@contextlib.contextmanager
def answered_numbers(answer: AnswerNumber) -> Iterator[None]:
    """Answer ``x.item()`` for this thread, where Python code calls it."""
    thread, original = threading.get_ident(), Tensor.item

    @functools.wraps(original)
    def item(tensor: Tensor) -> Any:
        if threading.get_ident() != thread:
            return original(tensor)
        return answer(tensor, sys._getframe(1), lambda: original(tensor))

    with patch.object(Tensor, "item", item):
        yield


def _names_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = [*args, *kwargs.values()]
    if len(given) != 1 or set(kwargs) - {"device"} or not isinstance(given[0], (str, torch.device)):
        return False
    return torch.device(given[0]).type == "cpu"
