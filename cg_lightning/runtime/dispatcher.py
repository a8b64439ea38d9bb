"""Who decides in which mode a step runs."""

from __future__ import annotations

from typing import NamedTuple

from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.modes import CUDAGraphMode

UNKNOWN_KEY = "unknown key"


class Dispatch(NamedTuple):
    """What a step is to run in, and why not higher (empty where it runs FULL)."""

    runtime_mode: CUDAGraphMode
    batch_descriptor: BatchDescriptor
    reason: str


class CUDAGraphDispatcher:
    """Owns the valid keys of each mode, and the reasons for the keys that are not.

    A key is valid once it was added. :meth:`dispatch` prefers FULL to PIECEWISE to NONE. It neither captures nor counts
    warm-ups, and it never looks at a batch.
    """

    def __init__(self) -> None:
        self.cudagraph_keys: dict[CUDAGraphMode, set[BatchDescriptor]] = {
            CUDAGraphMode.FULL: set(),
            CUDAGraphMode.PIECEWISE: set(),
        }
        self._decisions: dict[BatchDescriptor, Dispatch] = {}

    def add_cudagraph_key(
        self, mode: CUDAGraphMode, descriptor: BatchDescriptor, reason: str = ""
    ) -> None:
        """Makes ``descriptor`` valid in ``mode``; ``reason`` says why not in a higher one.

        Raises:
            ValueError: ``mode`` is neither PIECEWISE nor FULL.
        """
        self._keys(mode).add(descriptor)
        self._decide(descriptor, reason)

    def refuse(self, mode: CUDAGraphMode, descriptor: BatchDescriptor, reason: str) -> None:
        """Makes ``descriptor`` invalid in ``mode``, and remembers why."""
        self._keys(mode).discard(descriptor)
        self._decide(descriptor, reason)

    def _decide(self, descriptor: BatchDescriptor, reason: str) -> None:
        valid = (mode for mode, keys in self.cudagraph_keys.items() if descriptor in keys)
        self._decisions[descriptor] = Dispatch(next(valid, CUDAGraphMode.NONE), descriptor, reason)

    def dispatch(self, descriptor: BatchDescriptor) -> Dispatch:
        """Gives the highest mode that ``descriptor`` is valid in.

        The descriptor in the result is equal to the one given, but the object that was added: looking it up is cheaper.
        """
        return self._decisions.get(descriptor) or Dispatch(
            CUDAGraphMode.NONE, descriptor, UNKNOWN_KEY
        )

    def clear(self) -> None:
        """Forgets every key."""
        self._decisions.clear()
        for keys in self.cudagraph_keys.values():
            keys.clear()

    def _keys(self, mode: CUDAGraphMode) -> set[BatchDescriptor]:
        try:
            return self.cudagraph_keys[mode]
        except KeyError:
            raise ValueError(f"Keys are PIECEWISE or FULL, not {mode}.") from None
