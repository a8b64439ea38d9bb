"""The attributes of objects, to put them back."""

from __future__ import annotations

from collections.abc import Iterable


class AttributesSnapshot:
    """Remembers what the attributes of objects refer to; it does *not* copy that.

    Args:
        objects: Objects with a ``__dict__``, which stays the same one.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        self._attributes = [(vars(obj), dict(vars(obj))) for obj in objects]

    def restore(self) -> None:
        """Puts all attributes back, and takes those away that have come since."""
        for living, before in self._attributes:
            living.clear()
            living.update(before)
