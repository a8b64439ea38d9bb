"""The account of one family of keys: a capture must pay for itself."""

from __future__ import annotations

from cg_lightning.core.reasons import NO_CHANGE, Changed, Reason, Status

CAPTURE_COST = 4
"""Approximate cost of one capture, in eager steps."""
WATCH_COST = 2
"""Approximate cost of one watched step, in eager steps, without the one-time cost of the first."""
CREDIT = 16
"""Number of eager steps that a family may spend before its graphs have saved anything."""
FIRST_WAIT = 10
"""Number of eager steps before an overdrawn family may spend once more. It doubles each time."""


class CaptureLedger:
    """The account of one family of keys: equal shapes, any plain values, any guarded values.

    A capture costs 4 steps and a watched step costs 2. Each step that runs from a graph earns 1.
    After a family has spent its credit of 16, it runs eagerly for 10 steps and may then spend once
    more. The next waits are 20, 40, ... steps. So the long-run cost is small if keys never repeat,
    if the module changes at every step, or if there are more shapes than graphs are allowed.

    Args:
        credit: The balance at first.
    """

    def __init__(self, credit: int = CREDIT) -> None:
        self.balance = credit
        self.why = NO_CHANGE
        """Why the family spent last: the value that varies, or an eviction. Empty at first."""
        self._status = Status.UNPROFITABLE
        self._reasons: dict[str, Reason] = {}
        self._waiting = 0
        self._next_wait = FIRST_WAIT

    def may_spend(self) -> bool:
        """Return True if the family may watch or capture in this step.

        Call it once for each step, because a call that returns False counts as one step of waiting.
        """
        if self.balance > 0:
            return True
        if self._waiting == 0:
            self._waiting, self._next_wait = self._next_wait, 2 * self._next_wait
            return False
        self._waiting -= 1
        return self._waiting == 0

    def spend(self, steps: int) -> None:
        """Pay for a capture or a watched step."""
        self.balance -= steps

    def overdraw(self) -> None:
        """Let the family wait before it may spend once more."""
        self.balance = min(self.balance, 0)

    def earn(self) -> None:
        """Add the gain of one step that runs from a graph."""
        if self.balance < CREDIT:
            self.balance += 1
            if self.balance == CREDIT:
                self._next_wait = FIRST_WAIT

    def note(self, status: Status, why: Changed) -> None:
        """Store what the family spends on: the value that varies, or an eviction."""
        if why:
            self._status, self.why = status, why
            self._reasons.clear()

    @property
    def varies(self) -> bool:
        """Whether the family spends on a value that varies, and not on too many graphs."""
        return self._status is Status.UNPROFITABLE

    def reason(self, what: str = "not captured") -> Reason:
        """Return why the family may not spend now; the same object until the next :meth:`note`.

        Args:
            what: What follows from it.
        """
        if what not in self._reasons:
            why = self.why or Changed("its keys do not repeat")
            changed = why.after(f"{what}, since it would not pay: ")
            self._reasons[what] = Reason.of_change(self._status, changed)
        return self._reasons[what]
