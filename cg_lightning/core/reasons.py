"""Why a step runs in a lower mode than asked: one record for detectors, counters and messages."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

from cg_lightning.core.causes import REMEDIES_OF_OPERATIONS, Cause


class Status(enum.Enum):
    """Why a step runs in a lower mode although nothing in its code is the cause.

    Users and loggers read the values.
    """

    WARM_UP = "warm-up"
    INERT = "callback inert"
    NO_KEY = "batch without a key"
    GRADIENTS = "gradients enabled"
    CLOSURE_HOOK = "hook inside the closure"
    CONTEXT = "context around the step"
    LOADER_ITERATOR = "dataloader_iter"
    NO_TARGET = "no submodule to capture"
    CAPTURE_FAILED = "capture failed"
    VERIFICATION = "replay differed"
    EVICTED = "evicted"
    CHANGED = "changed since the capture"
    UNPROFITABLE = "captures do not pay"
    PADDED_IN_PIECES = "not padded as a whole"
    VALUE_READ = "value of the batch read"
    TIMED = "timed against its graph"
    NO_GAIN = "no gain"
    TOO_SHORT = "stage too short"

    @property
    def remedy(self) -> str:
        """What the user can do about it. Empty if there is nothing to do."""
        return _REMEDIES.get(self, "")


_REMEDIES = {
    Status.NO_KEY: "give the step tensors, plain values and containers of them",
    Status.GRADIENTS: "evaluate with Trainer(inference_mode=True), without enable_grad",
    Status.CLOSURE_HOOK: "use on_after_backward or on_before_optimizer_step instead",
    Status.CONTEXT: "enter it in the step; instead of autocast, set the Trainer's precision",
    Status.LOADER_ITERATOR: "take a batch in the step, not dataloader_iter",
    Status.NO_TARGET: "put the layers into submodules with parameters",
    Status.CAPTURE_FAILED: "remove what the message names, or choose a lower mode",
    Status.VERIFICATION: "keep the value that differs in an attribute or in the batch",
    Status.EVICTED: "raise max_graphs or max_graph_bytes, or use fewer shapes",
    Status.CHANGED: (
        "in a hook, write what varies into a buffer in place: self.x.fill_(value); "
        "or change it between epochs only"
    ),
    Status.PADDED_IN_PIECES: "give the dataloader batches of a captured size",
    Status.VALUE_READ: "make what varies a tensor, or leave it out of the batch",
    Status.UNPROFITABLE: (
        "make what varies a tensor: of the batch, or a buffer that a hook writes in place; "
        "or leave it out of the batch"
    ),
    Status.NO_GAIN: "lower min_saving, or set min_saving=0 to keep every graph",
    Status.TOO_SHORT: "set min_saving=0 to capture all the same",
}


class Changed(str):
    """A sentence that says what has changed, with both values, and that knows its subject.

    Args:
        subject: What has changed, without its values: ``self.scale``.
        text: The sentence: ``self.scale: now 2.0, before 1.0``. None: the subject says it all.
        location: The user's line that reads it, as ``file:line``. Empty if it is not known.
        cause: Why the code of the step reads it, if that is known. Then its remedy is shown.
    """

    subject: str
    location: str
    cause: Cause | None

    def __new__(  # noqa: D102
        cls, subject: str, text: str | None = None, location: str = "", cause: Cause | None = None
    ) -> Changed:
        self = super().__new__(cls, subject if text is None else text)
        self.subject = subject
        self.location = location
        self.cause = cause
        return self

    def __getnewargs__(self) -> tuple[str, str, str, Cause | None]:  # type: ignore[override]
        return self.subject, str(self), self.location, self.cause

    def after(self, prefix: str) -> Changed:
        """Return the same sentence with a prefix."""
        return Changed(f"{prefix}{self.subject}", f"{prefix}{self}", self.location, self.cause)

    def at(self, location: str) -> Changed:
        """Return the same change, with the user's line that reads the value."""
        return Changed(self.subject, str(self), location, self.cause)


NO_CHANGE = Changed("")
"""Nothing has changed."""


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a step, or a call of a submodule, ran in a lower mode than asked.

    ``str(reason)`` is the sentence that users read. Compare and count reasons by ``kind``, never by
    text.
    """

    kind: Cause | Status
    """The cause in the code of the step, or the status if the code is not the cause."""
    text: str
    """The whole sentence: the cause, the operation, the submodule and the location."""
    location: str = ""
    """The user's own line as ``file:line``. Empty if there is none."""
    subject: str = ""
    """The text without the values in it, such as those of an attribute. Empty if it has none."""
    behind: Cause | Status | None = None
    """What prevents a capture after the warm-up, if that is known. Then its remedy is shown."""
    operation: str = dataclasses.field(default="", compare=False)
    """The operation that prevents a graph. Empty if there is none, or if it is not known."""
    submodule: str = dataclasses.field(default="", compare=False)
    """Dotted path of the innermost submodule that it happens in. Empty for the step itself."""
    library_location: str = dataclasses.field(default="", compare=False)
    """The line of a library that the user's line called. Empty if the user's own code did it."""
    leaf: int | None = dataclasses.field(default=None, compare=False)
    """The leaf of the batch whose value is read. None if none is, or if it is not known."""

    @classmethod
    def of_change(cls, kind: Status, changed: Changed) -> Reason:
        """Return the reason for a change."""
        line = changed.location
        text = f"{changed} ({line})" if line else str(changed)
        return cls(kind, text, line, subject=changed.subject, behind=changed.cause)

    def of_submodule(self, path: str) -> Reason:
        """Return the same reason for the calls of a submodule.

        Args:
            path: Its dotted path; empty for the LightningModule itself.
        """
        name = path or "forward"
        return dataclasses.replace(
            self,
            text=f"{name}: {self.text}",
            subject=f"{name}: {self.subject}" if self.subject else "",
            submodule=self.submodule or path,
        )

    def because_of(self, why: Reason) -> Reason:
        """Return the reason of a warm-up step, with the reason why no graph of the step follows."""
        text, behind = f"{self}; {why}", why.behind or why.kind
        return dataclasses.replace(why, kind=self.kind, text=text, behind=behind)

    @property
    def topic(self) -> tuple[Cause | Status, str, str]:
        """Equal for reasons that differ only in values. Such reasons are counted together."""
        return (self.kind, self.subject or self.text, self.location)

    @property
    def place(self) -> tuple[Cause | Status, str, str, str]:
        """Equal for reasons of one kind that one operation at one place in the code has."""
        return (self.kind, self.operation, self.submodule, self.location)

    @property
    def remedy(self) -> str:
        """What the user can do about it. Empty if there is nothing to do."""
        by_operation = REMEDIES_OF_OPERATIONS.get(self.operation)
        return by_operation or (self.behind or self.kind).remedy

    def __str__(self) -> str:
        return self.text


def joined(reasons: Iterable[Reason]) -> Reason | None:
    """Return reasons as one; None if there are none.

    The text has them all; the rest is that of the first one.
    """
    found = list(dict.fromkeys(reasons))
    if len(found) < 2:
        return found[0] if found else None
    text = "; ".join(map(str, found))
    subject = "; ".join([each.subject or each.text for each in found])
    return dataclasses.replace(found[0], text=text, subject=subject)


WARM_UP = Reason(Status.WARM_UP, Status.WARM_UP.value)
"""The reason of every eager step before a capture."""
AUTOCAST = Reason(
    Status.CONTEXT,
    f"{Status.CONTEXT.value}: autocast, which keeps from one step to the next what it has cast",
)
"""The reason of steps for which :func:`~cg_lightning.core.kernel_flags.keeps_casts` holds."""


def seen_by(mode: str) -> Reason:
    """Return the reason of steps around which a mode of the user's class ``mode`` is entered."""
    return Reason(Status.CONTEXT, f"{Status.CONTEXT.value}: {mode} sees what the step calls")
