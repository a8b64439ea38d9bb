"""The modes a step can run in."""

from __future__ import annotations

import enum


class CUDAGraphMode(enum.Enum):
    """How graphs are used; the words are vLLM's (``vllm/config/compilation.py``).

    ``NONE``, ``PIECEWISE`` and ``FULL`` are *runtime modes*: what one step is run in.
    ``FULL_AND_PIECEWISE`` is a policy: FULL where the step allows it, else PIECEWISE.
    """

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_AND_PIECEWISE = (FULL, PIECEWISE)

    @classmethod
    def parse(cls, mode: CUDAGraphMode | str) -> CUDAGraphMode:
        """Gives the member for a member or its name, in any case.

        Raises:
            ValueError: ``mode`` is neither; the message lists the choices.
        """
        if isinstance(mode, cls):
            return mode
        member = cls.__members__.get(mode.upper()) if isinstance(mode, str) else None
        if member is None:
            raise ValueError(
                f"mode={mode!r} is no CUDAGraphMode; choose one of {', '.join(cls.__members__)}."
            )
        return member

    def is_valid_runtime_mode(self) -> bool:
        """Whether a single step can run in this mode."""
        return not isinstance(self.value, tuple)

    def has_full_cudagraphs(self) -> bool:
        """Whether whole steps may run from a graph."""
        return self in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_AND_PIECEWISE)

    def has_piecewise_cudagraphs(self) -> bool:
        """Whether submodules may run from graphs."""
        return self in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE)
