"""The random generators of the host, which a graph cannot follow."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class HostRandomState:
    """Remembers the states of the generators of Python, of NumPy where it is loaded, and of PyTorch's CPU."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._module: Any = sys.modules.get("numpy")
        self._numpy = self._module.random.get_state() if self._module is not None else None

    def restore(self) -> None:
        """Puts the states back."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._module is not None:
            self._module.random.set_state(self._numpy)

    def was_drawn(self, device_type: str) -> bool:
        """Whether any generator moved since; PyTorch's is no concern where the steps themselves run on the CPU."""
        now = HostRandomState()
        if now._python != self._python or now._plain_numpy() != self._plain_numpy():
            return True
        return device_type != "cpu" and not torch.equal(now._torch, self._torch)

    def _plain_numpy(self) -> tuple[Any, ...]:
        if self._numpy is None:
            return ()
        name, keys, *rest = self._numpy
        return (name, keys.tobytes(), *rest)
