"""The modes a step can run in."""

from __future__ import annotations

import enum


class CUDAGraphMode(enum.Enum):
    """How graphs are used. The words are vLLM's (``vllm/config/compilation.py``).

    ``NONE``, ``PIECEWISE`` and ``FULL`` are *runtime modes*: one step runs in one of them.
    ``FULL_AND_PIECEWISE`` is a policy: FULL if the step allows it, otherwise PIECEWISE. vLLM's
    ``FULL_DECODE_ONLY`` does not exist, because evaluation steps have no decode phase.

    Example::

        >>> from cg_lightning import CUDAGraphMode
        >>> CUDAGraphMode.parse("full_and_piecewise").has_piecewise_cudagraphs()
        True
        >>> CUDAGraphMode.FULL_AND_PIECEWISE.is_valid_runtime_mode()
        False
    """

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_AND_PIECEWISE = (FULL, PIECEWISE)

    @classmethod
    def parse(cls, mode: CUDAGraphMode | str) -> CUDAGraphMode:
        """Return the member for a member or for its name in upper or lower case.

        Raises:
            ValueError: ``mode`` is neither. The message lists the choices.
        """
        if isinstance(mode, cls):
            return mode
        member = cls.__members__.get(mode.upper()) if isinstance(mode, str) else None
        if member is None:
            raise ValueError(
                f"mode={mode!r} is not a CUDAGraphMode; choose one of {', '.join(cls.__members__)}."
            )
        return member

    def is_valid_runtime_mode(self) -> bool:
        """Return True if a single step can run in this mode."""
        return not isinstance(self.value, tuple)

    def has_full_cudagraphs(self) -> bool:
        """Return True if whole steps may run from graphs."""
        return self in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_AND_PIECEWISE)

    def has_piecewise_cudagraphs(self) -> bool:
        """Return True if submodules may run from graphs."""
        return self in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE)
