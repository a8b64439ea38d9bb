"""Whether random numbers were drawn where a graph cannot follow."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class HostRandomness:
    """Remembers the states of the generators of Python, NumPy and (where steps run elsewhere) PyTorch's CPU.

    Args:
        device_type: Where steps run: its own generator is no concern.
    """

    def __init__(self, device_type: str) -> None:
        self._with_torch = device_type != "cpu"
        self._before = self._states()

    def _states(self) -> list[Any]:
        states: list[Any] = [random.getstate()]
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            name, keys, *rest = numpy.random.get_state()
            states.append((name, keys.tobytes(), *rest))
        if self._with_torch:
            states.append(torch.get_rng_state().numpy().tobytes())
        return states

    def was_drawn(self) -> bool:
        """Whether any of them moved since."""
        return self._states() != self._before
