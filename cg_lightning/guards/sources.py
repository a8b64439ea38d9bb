"""Where a value comes from that a step reads in Python, and that a graph therefore freezes."""

from __future__ import annotations

import dataclasses
from typing import Any

MISSING: Any = type("Missing", (), {"__repr__": lambda _: "not there"})()
"""The value of a source whose holder has no such name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A name in a namespace: an attribute of a module, of a class, or a global.

    Two sources are the same if their :attr:`key` is. It holds the namespace, not the value: what the name refers to is
    looked up each time.
    """

    holder: Any
    """The module, class or object whose ``vars()`` have the name, or the dictionary of a module's globals."""
    name: str
    path: str
    """As the user would write it: ``self.net.scale``, ``Config.scale``, ``FACTOR``."""

    @property
    def key(self) -> tuple[int, str]:
        """What tells this source from others."""
        return (id(self.holder), self.name)

    @property
    def namespace(self) -> Any:
        """The mapping that has the name; the same object each time."""
        return self.holder if isinstance(self.holder, dict) else vars(self.holder)

    def value(self) -> Any:
        """What the name refers to now; :data:`MISSING` if there is no such name."""
        return self.namespace.get(self.name, MISSING)

    def __str__(self) -> str:
        return self.path
