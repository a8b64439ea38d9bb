"""Errors of this package. A wrong argument raises a plain ``ValueError``."""

from __future__ import annotations


class CUDAGraphError(RuntimeError):
    """Base class of the errors of this package."""


class UnkeyableBatchError(CUDAGraphError):
    """A batch has no :class:`~cg_lightning.BatchDescriptor`, so its step has to run eagerly.

    Attributes:
        path: The leaf that cannot be part of a key, such as ``batch['image']``.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} {why}")
        self.path = path


class CaptureError(CUDAGraphError):
    """A graph could not be captured, or (``strict=True``) a step ran in a lower mode than asked.

    If an exception stopped the capture, it is the ``__cause__``.

    Attributes:
        diagnosis: With ``strict=True``, the :class:`~cg_lightning.Diagnosis` of the step if it was
            watched.
    """

    def __init__(self, message: str, diagnosis: object = None) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


class RecompileNeededError(CaptureError):
    """A capture stopped because ``torch.compile`` would have had to compile; backends do not allow that in a capture."""


class StateLeftError(CaptureError):
    """A capture left tensors of graph memory in an attribute, where only eager's may be."""


class OutOfGraphMemoryError(CaptureError):
    """A capture stopped because the device had no memory left."""


class VerificationError(CUDAGraphError):
    """A replay differed from eager. Its entry was dropped.

    Attributes:
        output: The output of the eager run.
    """

    def __init__(self, message: str, output: object) -> None:
        super().__init__(message)
        self.output = output


class IllegalOperationError(CUDAGraphError):
    """A capture on the recorder ran an operation that a CUDA graph cannot contain."""
