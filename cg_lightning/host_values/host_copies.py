"""The tensors of a batch on the host, after the batch was copied to the device.

A read on the device waits for all queued work, the replay of the step before included. The host has
the same bits, and reads them without a wait.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from cg_lightning.host_values.exact_operations import MOST_ELEMENTS, is_plain


class HostCopies:
    """The small tensors of the last batch, on the host.

    They are valid only if the tensors on the device have not been written to since the copy. The
    caller of :meth:`note` must know that.
    """

    def __init__(self) -> None:
        self.are_wanted = False
        """True once a step reads host values. Until then no copies are needed."""
        self._copies: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def note(self, on_host: Sequence[Any], on_device: Sequence[Any]) -> None:
        """Forget the last batch, and store a new one: its leaves before and after the copy."""
        self._copies = {
            id(copied): (weakref.ref(copied), source)
            for source, copied in zip(on_host, on_device, strict=True)
            if isinstance(source, Tensor) and isinstance(copied, Tensor)
            if _is_copy(source, copied)
        }

    def clear(self) -> None:
        """Forget the last batch."""
        self._copies = {}

    def of(self, leaves: Sequence[Any], places: Iterable[int]) -> dict[int, Tensor] | None:
        """Return some leaves of a batch as the host has them, by their place.

        None if the host does not have all of them.
        """
        found: dict[int, Tensor] = {}
        for place in places:
            copied, source = self._copies.get(id(leaves[place]), (None, None))
            if copied is None or source is None or copied() is not leaves[place]:
                return None
            found[place] = source
        return found


def _is_copy(source: Tensor, copied: Tensor) -> bool:
    return (
        source is not copied
        and source.device.type == "cpu"
        and is_plain(source)
        and is_plain(copied)
        and source.numel() <= MOST_ELEMENTS
        and (source.shape, source.dtype) == (copied.shape, copied.dtype)
    )
