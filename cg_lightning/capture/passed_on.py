"""Values that differ in each batch, and that a step only passes on.

What is hard here:

- A text is read in many ways, and most of them call no code of this package. So a captured step
  gets a :class:`_StandIn` in its place, which supports no operation. It records each use, also if
  the step catches the error. If there was no use, the graph is right for any text.
- ``type(text)``, and an error of C code that the step catches, are not recorded. A step with such
  code gets no stand-ins (``diagnosis/detectors/global_reads.py``).
- The stand-in is in place only while the step runs, because code after the step may use outputs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from cg_lightning.core.descriptor import is_passed_on
from cg_lightning.core.errors import CaptureError, ValueReadError
from cg_lightning.core.lines import file_and_line
from cg_lightning.modules.kinds import is_user_file


class PassedOnValues:
    """The stand-ins of one captured step.

    Args:
        keys: The leaves of the key of the step: they say which values are passed on.
    """

    def __init__(self, keys: Sequence[Hashable]) -> None:
        self._places = [index for index, key in enumerate(keys) if is_passed_on(key)]
        self._is_step_running = False
        self._read_at: str | None = None
        self._leaf: int | None = None
        """The value that the step has read."""

    @property
    def is_empty(self) -> bool:
        """Whether the step has no such value."""
        return not self._places

    def hidden_in(self, leaves: list[Any]) -> list[Any]:
        """Return the leaves of the batch with stand-ins for the values."""
        if self.is_empty:
            return leaves
        leaves = list(leaves)
        for index in self._places:
            leaves[index] = _StandIn(self, index)
        return leaves

    @contextlib.contextmanager
    def during_step(self) -> Iterator[None]:
        """While this is entered, the step runs.

        Raises:
            ValueReadError: The step has read a value.
        """
        self._is_step_running = True
        try:
            yield
        finally:
            self._is_step_running = False
        if self._read_at is not None:
            raise self._error()

    def cause_of(self, error: CaptureError) -> CaptureError:
        """Return the error to raise after ``error``: a value was read, or may have been."""
        if self.is_empty or type(error) is not CaptureError:
            return error
        return ValueReadError(str(error)) if self._read_at is None else self._error()

    def note_use(self, leaf: int) -> None:
        """Record that a stand-in is used, and raise.

        Args:
            leaf: Its place in the batch.

        Raises:
            ValueReadError: The step uses it.
        """
        if self._is_step_running:
            self._read_at, self._leaf = _users_line(), leaf
            raise self._error()

    def _error(self) -> ValueReadError:
        return ValueReadError(
            "the step reads a value of its batch that is another one in each batch "
            f"({self._read_at}); leave it out of the batch, or make it a tensor",
            self._leaf,
            self._read_at or "",
        )


def _users_line() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return file_and_line(frame.f_code.co_filename, frame.f_lineno)


def _note_use(stand_in: _StandIn) -> None:
    values: PassedOnValues = object.__getattribute__(stand_in, "_values")
    values.note_use(object.__getattribute__(stand_in, "_leaf"))


class _StandIn:
    """Replaces one value. It can only be passed on."""

    __slots__ = ("_leaf", "_values")

    def __init__(self, values: PassedOnValues, leaf: int) -> None:
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_leaf", leaf)

    def __getattribute__(self, name: str) -> Any:
        _note_use(self)
        return object.__getattribute__(self, name)

    def _use(self, *_: Any) -> Any:
        _note_use(self)
        return NotImplemented

    __setattr__ = __delattr__ = __repr__ = __str__ = __format__ = __bytes__ = __fspath__ = _use
    __bool__ = __len__ = __iter__ = __next__ = __reversed__ = __contains__ = __call__ = _use
    __getitem__ = __setitem__ = __delitem__ = __enter__ = __exit__ = __length_hint__ = _use
    __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = __complex__ = __index__ = _use
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _use
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __pow__ = __rpow__ = _use
    __divmod__ = __rdivmod__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _use
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __matmul__ = __rmatmul__ = _use
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = __trunc__ = __floor__ = __ceil__ = _use

    def __eq__(self, other: object) -> bool:
        _note_use(self)
        return self is other

    def __ne__(self, other: object) -> bool:
        _note_use(self)
        return self is not other

    def __hash__(self) -> int:
        _note_use(self)
        return id(self)
