"""Errors of this package. A wrong argument raises a plain ``ValueError``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cg_lightning.core.reasons import Reason


class CUDAGraphError(RuntimeError):
    """Base class of the errors of this package. A wrong argument raises ``ValueError`` instead.

    Example::

        >>> from cg_lightning import BatchDescriptor, CUDAGraphError
        >>> try:
        ...     BatchDescriptor.from_batch(object())
        ... except CUDAGraphError as error:
        ...     print(type(error).__name__)
        UnkeyableBatchError
    """


class UnkeyableBatchError(CUDAGraphError):
    """A batch has no :class:`~cg_lightning.BatchDescriptor`, so its step must run eagerly.

    :meth:`BatchDescriptor.from_batch <cg_lightning.BatchDescriptor.from_batch>` raises it. The
    callback catches it and counts the step with this reason; it raises only with ``strict=True``.

    Example::

        >>> from cg_lightning import BatchDescriptor, UnkeyableBatchError
        >>> try:
        ...     BatchDescriptor.from_batch({"image": object()})
        ... except UnkeyableBatchError as error:
        ...     print(error.path)
        batch['image']

    Attributes:
        path: The leaf that cannot be part of a key, such as ``batch['image']``.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} {why}")
        self.path = path


class FindingLike(Protocol):
    """One finding in a :class:`CaptureError`. A ``Finding`` of the diagnosis is one."""

    @property
    def cause(self) -> Any:
        """The kind of obstacle, with its text as ``value``."""

    @property
    def operation(self) -> str:
        """What was called or changed, such as ``aten::item``."""

    @property
    def module(self) -> str:
        """Dotted path of the innermost module that was running; empty for the step itself."""

    @property
    def location(self) -> str:
        """The user's own line, as ``file:line``."""

    @property
    def remedy(self) -> str:
        """What a user can do about it."""


class DiagnosisLike(Protocol):
    """A watched step in a :class:`CaptureError`, as :class:`~cg_lightning.Diagnosis`."""

    @property
    def findings(self) -> Sequence[FindingLike]:
        """What stands in the way of one graph for all of it, in order."""

    def capturable(self, path: str = "") -> bool:
        """Whether the submodule at ``path`` could be one graph; empty: the step."""

    def largest_capturable(self) -> list[str]:
        """Return the paths of the fewest, largest submodules that could be graphs."""


class CaptureError(CUDAGraphError):
    """A graph could not be captured, or (``strict=True``) a step ran in a lower mode than asked.

    If an exception stopped the capture, it is the ``__cause__``. The callback raises this error
    only with ``strict=True``. Otherwise it runs the step in a lower mode and counts the reason.

    Example::

        >>> import torch
        >>> from cg_lightning import BatchDescriptor, CaptureError, CUDAGraphMode
        >>> from cg_lightning import CUDAGraphWrapper, set_forward_context
        >>> full = CUDAGraphMode.FULL
        >>> wrapper = CUDAGraphWrapper(lambda x: x.sum().item(), full, backend="recorder")
        >>> with set_forward_context(full, BatchDescriptor(batch_size=2)):
        ...     try:
        ...         wrapper(torch.ones(2))
        ...     except CaptureError as error:
        ...         print(type(error.__cause__).__name__)
        IllegalOperationError

    Attributes:
        diagnosis: With ``strict=True``, the :class:`~cg_lightning.Diagnosis` of the watched step.
            None if no step was watched.
    """

    def __init__(self, message: str, diagnosis: DiagnosisLike | None = None) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


class RecompileNeededError(CaptureError):
    """A capture stopped because ``torch.compile`` had to compile, which no capture allows."""


class CompiledCodeError(CaptureError):
    """Code that ``torch.compile`` has compiled does what a graph would freeze.

    Args:
        reason: What it does.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class ValueReadError(CaptureError):
    """A captured step read a value of its batch that it was expected to pass on only.

    Args:
        message: What users read.
        leaf: Which leaf of the batch it is; None if that is not known.
        location: The user's line that reads it; empty if it is not known.
    """

    def __init__(self, message: str, leaf: int | None = None, location: str = "") -> None:
        super().__init__(message)
        self.leaf = leaf
        self.location = location


class StateLeftError(CaptureError):
    """A capture left graph memory in an attribute, which later replays would overwrite."""


class OutOfGraphMemoryError(CaptureError):
    """A capture stopped because the device was out of memory."""


class NoRoomError(CaptureError):
    """A graph needs more memory than graphs that are in use have left. It may fit later."""


class NotIndependentError(CaptureError):
    """A padded batch gave another result than eager: rows or positions depend on each other."""


class VerificationError(CUDAGraphError):
    """A replay differed from eager, and its graph was dropped.

    The callback raises it only with ``strict=True``. Otherwise it warns and returns eager's output.

    Example::

        >>> from cg_lightning import VerificationError
        >>> try:
        ...     raise VerificationError("validate step: output is 1.0, eager's is 2.0", 2.0)
        ... except VerificationError as error:
        ...     print(error.output)
        2.0

    Attributes:
        output: The output of the eager run.
    """

    def __init__(self, message: str, output: object) -> None:
        super().__init__(message)
        self.output = output


class IllegalOperationError(CUDAGraphError):
    """A capture on the recorder ran an operation that a CUDA graph cannot contain.

    It is the ``__cause__`` of a :class:`CaptureError`. The message names the operation. On a GPU,
    the cause is an error of CUDA instead.

    Example::

        >>> import torch
        >>> from cg_lightning import CaptureError, IllegalOperationError
        >>> from cg_lightning import BatchDescriptor, CUDAGraphMode, CUDAGraphWrapper
        >>> from cg_lightning import set_forward_context
        >>> full = CUDAGraphMode.FULL
        >>> wrapper = CUDAGraphWrapper(torch.nonzero, full, backend="recorder")
        >>> with set_forward_context(full, BatchDescriptor(batch_size=2)):
        ...     try:
        ...         wrapper(torch.ones(2))
        ...     except CaptureError as error:
        ...         isinstance(error.__cause__, IllegalOperationError)
        True
    """
