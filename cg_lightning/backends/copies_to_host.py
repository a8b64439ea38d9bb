"""Methods that copy from the device to the host: ``x.cpu()``, ``x.to("cpu")``, ``x.item()``, ..."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

Answer = Callable[[Tensor, Callable[[], Tensor]], Tensor]
"""Returns the copy. Its arguments are the tensor and a function that makes the copy."""
AnswerRead = Callable[[Tensor, str, FrameType, Callable[[], Any]], Any]
"""Returns the value. Its arguments are the tensor, the name of the method, the frame that calls it,
and a function that reads the value."""


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
def answered_reads(methods: Iterable[str], answer: AnswerRead) -> Iterator[None]:
    """Answer methods without arguments of this thread, such as ``x.item()``."""
    thread = threading.get_ident()

    def replaced(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        @functools.wraps(original)
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs or threading.get_ident() != thread:
                return original(tensor, *args, **kwargs)
            return answer(tensor, name, sys._getframe(1), lambda: original(tensor))

        return method

    with contextlib.ExitStack() as stack:
        for name in methods:
            stack.enter_context(patch.object(Tensor, name, replaced(name)))
        yield


def _names_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = [*args, *kwargs.values()]
    if len(given) != 1 or set(kwargs) - {"device"} or not isinstance(given[0], (str, torch.device)):
        return False
    return torch.device(given[0]).type == "cpu"
