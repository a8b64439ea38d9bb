"""Whether another capture pays for itself."""

from __future__ import annotations

from cg_lightning.core.reasons import Reason, Status

CAPTURE_COST = 4
"""Approximate cost of one capture, in eager steps."""
WATCH_COST = 2
"""Approximate cost of watching one step, in eager steps, once what it costs at first is paid."""
CREDIT = 16
"""What a family of keys may spend before its graphs have saved anything, in eager steps."""
FIRST_WAIT = 10
"""Steps that an overdrawn family runs eagerly before it may spend once more; doubled each time."""


class CaptureLedger:
    """Keeps the account of one family of keys: equal shapes, any plain values, any guarded values.

    A capture costs 4 steps, a watched step 2, and each step that runs from a graph earns 1. A family that has spent its credit
    of 16 without earning it back runs eagerly for 10 steps, may then spend once more, waits for 20, 40, ... So keys that never
    come again, a module that changes with each step, and more shapes than there may be graphs cost little in the long run.
    """

    def __init__(self) -> None:
        self.balance = CREDIT
        self._status = Status.UNPROFITABLE
        self._why = "its keys do not come again"
        self._waiting = 0
        self._next_wait = FIRST_WAIT

    def may_spend(self) -> bool:
        """Return whether the family may watch or capture in this step. While it may not, each call is one step of waiting."""
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

    def earn(self) -> None:
        """Take what one step from a graph saves."""
        if self.balance < CREDIT:
            self.balance += 1
            if self.balance == CREDIT:
                self._next_wait = FIRST_WAIT

    def note(self, status: Status, why: str) -> None:
        """Store for what the family has to spend: what varies, or that a graph was evicted."""
        if why:
            self._status, self._why = status, why

    def reason(self) -> Reason:
        """Return why the family may not spend now."""
        return Reason(self._status, f"not captured, since it would not pay: {self._why}")
