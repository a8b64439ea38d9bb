"""Checks of values that a graph computes on the device, and that are read later."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cg_lightning.core.tree import flatten, rebuild


@dataclasses.dataclass
class DeferredCheck:
    """One call that graphs check: whether eager would have refused it, and the arguments of the first such call."""

    call: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """Their tensors are copies, which graphs write together with the flag."""
    leaves: list[Any]
    flag: Tensor
    may_pass: bool = False
    """Whether eager may only warn."""
    dropped: bool = False
    """Whether its graph is gone."""

    @classmethod
    def of(
        cls, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> DeferredCheck:
        """Makes room for a call with arguments like these."""
        with torch.inference_mode(False):
            given = flatten((args, kwargs))[0]
            device = next(leaf.device for leaf in given if isinstance(leaf, Tensor))
            leaves = [
                torch.empty_like(leaf, requires_grad=False) if isinstance(leaf, Tensor) else leaf
                for leaf in given
            ]
            flag = torch.zeros((), dtype=torch.bool, device=device)
        return cls(call, rebuild((args, kwargs), iter(leaves)), leaves, flag)

    def write(self, condition: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sets the flag and keeps the arguments where ``condition`` holds for the first time; nothing waits for it."""
        first = condition & ~self.flag
        for kept, given in zip(self.leaves, flatten((args, kwargs))[0], strict=True):
            if isinstance(given, Tensor):
                kept.copy_(torch.where(first, given, kept))
        self.flag.logical_or_(condition)


_Seen = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class CheckedCalls:
    """The calls of one capture that are checked, in order.

    A check needs memory from outside the capture. So a step is captured twice: the first time shows which calls there are.

    Args:
        checks: What the first capture showed; None in the first one.
    """

    def __init__(self, checks: list[DeferredCheck] | None = None) -> None:
        self._checks = checks
        self._call: _Seen | None = None
        self._is_refused = False
        self.seen: list[_Seen] = []

    @contextlib.contextmanager
    def during(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """Conditions noted inside belong to this call; where calls nest, to the outermost."""
        if self._call is not None:
            yield
            return
        self._call, self._is_refused = (call, args, kwargs), False
        try:
            yield
            if self._is_refused:
                self.seen.append(self._call)
        finally:
            self._call = None

    def refuse_if(self, condition: Tensor, *values: Tensor) -> None:
        """Notes a condition, a tensor of one bool, under which eager would raise.

        Where it is met, ``values`` are set to 0: eager does not get to what comes next, and a value that is out of bounds
        there would end the process.
        """
        assert self._call is not None
        self._is_refused = True
        if self._checks is not None:
            _, args, kwargs = self._call
            self._checks[len(self.seen)].write(condition, args, kwargs)
        for tensor in values:
            tensor.masked_fill_(condition, 0)

    def repeat_if(self, condition: Tensor) -> None:
        """Notes a condition under which eager would warn, so that it does when the call is made once more."""
        self.refuse_if(condition)
        if self._checks is not None:
            self._checks[len(self.seen)].may_pass = True


class DeferredChecks:
    """All checks of one run.

    Where a condition was met in a graph, the call is made once more, eagerly, with the arguments that met it: so the error
    that is raised is eager's own.
    """

    def __init__(self) -> None:
        self._checks: list[DeferredCheck] = []

    def add(self, checks: list[DeferredCheck]) -> None:
        """Takes the checks of a new graph."""
        self._checks.extend(checks)

    def close(self) -> None:
        """Lets go of all checks, met or not."""
        self._checks.clear()

    def raise_if_met(self) -> None:
        """Waits for the device.

        Raises:
            Exception: What eager would have raised since the last time, of its type and with its text.
        """
        if not self._checks or not bool(torch.stack([check.flag for check in self._checks]).any()):
            self._checks = [check for check in self._checks if not check.dropped]
            return
        met = [check for check in self._checks if bool(check.flag)]
        for check in met:
            check.flag.zero_()
        for check in met:
            args, kwargs = check.arguments
            check.call(*args, **kwargs)
        assert all(check.may_pass for check in met), "a check was met that eager does not have"
