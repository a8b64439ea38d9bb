"""Checks that a graph makes on the device and that are read later."""

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
    """One checked call: a flag that is set if eager would raise, and the arguments of that call."""

    call: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """The arguments of the first call that failed. Graphs write the tensors with the flag."""
    leaves: list[Any]
    """The leaves of the arguments."""
    flag: Tensor
    """A tensor of one bool on the device. True if eager would have raised or warned."""
    may_pass: bool = False
    """True if eager may only warn."""
    dropped: bool = False
    """True if the graph was dropped."""

    @classmethod
    def of(
        cls, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> DeferredCheck:
        """Return a check with memory for arguments like these."""
        with torch.inference_mode(False):
            given = flatten((args, kwargs))[0]
            device = next(leaf.device for leaf in given if isinstance(leaf, Tensor))
            leaves = [
                torch.empty_like(leaf, requires_grad=False) if isinstance(leaf, Tensor) else leaf
                for leaf in given
            ]
            flag = torch.zeros((), dtype=torch.bool, device=device)
        return cls(call, rebuild((args, kwargs), iter(leaves)), leaves, flag)

    def is_of(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Return True if it has memory for these arguments of this call: a tensor and words."""
        if call is not self.call or kwargs:
            return False
        (kept, *words), (given, *others) = self.arguments[0], args
        return words == others and (kept.shape, kept.dtype, kept.device) == (
            *(given.shape, given.dtype, given.device),
        )

    def write(self, condition: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the flag if ``condition`` is True, and store the arguments of the first such call.

        Nothing waits for the device.
        """
        first = condition & ~self.flag
        for kept, given in zip(self.leaves, flatten((args, kwargs))[0], strict=True):
            if isinstance(given, Tensor):
                kept.copy_(torch.where(first, given, kept))
        self.flag.logical_or_(condition)


_Seen = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class CheckedCalls:
    """The checked calls of one capture, in order.

    A check needs memory from outside the capture, and only a capture shows the checked calls. So a
    step with checks is captured twice, unless they are those that were expected.

    Args:
        checks: The checks that the first capture showed, or that are expected in it. None: none.
        are_expected: Whether they are expected only. Then a step may make other ones.
    """

    def __init__(
        self, checks: list[DeferredCheck] | None = None, are_expected: bool = False
    ) -> None:
        self._checks = checks
        self._are_expected = are_expected
        self._has_others = False
        self._call: _Seen | None = None
        self._is_refused = False
        self.seen: list[_Seen] = []

    def have_memory(self) -> bool:
        """Return True if each check has memory."""
        return not self._has_others and len(self.seen) <= len(self._checks or ())

    def _check_of(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> DeferredCheck | None:
        """Return the check with memory for the call under way; None if there is none."""
        if self._checks is None or self._has_others:
            return None
        if self._are_expected:
            fits = len(self.seen) < len(self._checks)
            self._has_others = not (fits and self._checks[len(self.seen)].is_of(call, args, kwargs))
            if self._has_others:
                return None
        return self._checks[len(self.seen)]

    @contextlib.contextmanager
    def during(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """Assign the conditions inside to this call. Nested calls belong to the outermost call."""
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
        """Record a condition under which eager would raise.

        If the condition is True, ``values`` are set to 0, because later code would read a value out
        of bounds, which ends the process. Eager does not reach that code.

        Args:
            condition: A tensor of one bool.
            values: Tensors of any shape.
        """
        assert self._call is not None
        self._is_refused = True
        call, args, kwargs = self._call
        if (check := self._check_of(call, args, kwargs)) is not None:
            check.write(condition, args, kwargs)
        for tensor in values:
            tensor.masked_fill_(condition, 0)

    def repeat_if(self, condition: Tensor) -> None:
        """Record a condition under which eager would warn. The repeated call then warns."""
        self.refuse_if(condition)
        assert self._call is not None
        if (check := self._check_of(*self._call)) is not None:
            check.may_pass = True


class DeferredChecks:
    """All checks of one run.

    If a check has failed in a graph, the call is repeated eagerly with the stored arguments. So the
    error is eager's own.
    """

    def __init__(self) -> None:
        self._checks: list[DeferredCheck] = []

    def add(self, checks: list[DeferredCheck]) -> None:
        """Add the checks of a new graph."""
        self._checks.extend(checks)

    def close(self) -> None:
        """Drop all checks without reading them."""
        self._checks.clear()

    def raise_if_met(self) -> None:
        """Wait for the device, and raise if a check has failed.

        Raises:
            Exception: The error that eager would have raised since the last call of this method,
                with the same type and text.
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
