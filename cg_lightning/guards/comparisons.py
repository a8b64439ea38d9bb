"""Comparisons of a number that a step makes, and their outcomes, which are guarded.

``batch_idx`` is another number in each batch, so its value cannot be guarded. In
``if batch_idx % 10 == 0`` it only decides which branch is taken. So a graph is used while all
comparisons of its step have the outcomes of the watched step.

Which comparisons a step makes is recorded while it is watched: it gets a :class:`ComparedNumber`.
The other operand (``self.every``) is read and guarded as everything else. So as long as the
outcomes are equal, the step takes the same path and makes the same comparisons.

What is hard here: neither the number nor the source code is enough. Code in C (``x * batch_idx``,
``names[batch_idx]``, ``range(batch_idx)``, ``"%d" % batch_idx``) reads the value of an ``int`` and
calls no method of it. The source code does not give the value of ``self.every``. So the source code
must show that the number occurs only at the left of an operator, where Python calls the number
first (``cg_lightning/diagnosis/uses_of_argument.py``), and the number records the other operand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from cg_lightning.core.causes import Cause
from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.guards.sources import Source

ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
"""Arithmetic that a number may go through before it is compared, by its sign."""
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
"""Comparisons, by their sign."""
MOST_COMPARISONS = 32
"""Maximum number of comparisons of one number in one step."""


class Comparison(NamedTuple):
    """One comparison: ``batch_idx % 10 == 0`` is ``(("%", 10),), "==", 0``."""

    arithmetic: tuple[tuple[str, int], ...]
    comparison: str
    operand: Any

    def outcome(self, number: int) -> bool:
        """Return the outcome for a number."""
        for sign, operand in self.arithmetic:
            number = ARITHMETIC[sign](number, operand)
        return COMPARISONS[self.comparison](number, self.operand)

    def describe(self, name: str) -> str:
        """Return it as the user wrote it, but with values: ``batch_idx % 10 == 0``."""
        for sign, operand in self.arithmetic:
            name = f"{name} {sign} {operand!r}"
        return f"{name} {self.comparison} {self.operand!r}"


class ComparisonNotes:
    """The comparisons of one number in one watched step.

    Args:
        used: Is called with any other use of the number: ``== Tensor``.
    """

    def __init__(self, used: Callable[[str], None]) -> None:
        self.outcomes: dict[Comparison, bool] = {}
        self.used = used

    def compared(self, comparison: Comparison, outcome: bool) -> None:
        """Note one comparison."""
        if len(self.outcomes) == MOST_COMPARISONS and comparison not in self.outcomes:
            self.used(f"in more than {MOST_COMPARISONS} comparisons")
            return
        self.outcomes[comparison] = outcome


class ComparedNumber(int):
    """A number that records its comparisons. For code in C it is an ordinary ``int``."""

    _notes: ComparisonNotes
    _arithmetic: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, number: int, notes: ComparisonNotes) -> ComparedNumber:
        """Return a number that records its comparisons in ``notes``."""
        return cls(number)._with(notes, ())

    def _with(
        self, notes: ComparisonNotes, arithmetic: tuple[tuple[str, int], ...]
    ) -> ComparedNumber:
        self._notes, self._arithmetic = notes, arithmetic
        return self

    def __bool__(self) -> bool:
        return bool(self != 0)

    def __hash__(self) -> int:  # for a set or a dictionary: few comparisons follow, or none
        self._notes.used("hash")
        return super().__hash__()


def _arithmetic_method(sign: str) -> Callable[[ComparedNumber, Any], Any]:
    original = getattr(int, f"__{ARITHMETIC[sign].__name__}__")

    def method(self: ComparedNumber, other: Any) -> Any:
        result = original(self, other)
        if type(other) not in (int, bool) or type(result) is not int:
            self._notes.used(f"{sign} {type(other).__name__}")
            return result
        return ComparedNumber(result)._with(self._notes, (*self._arithmetic, (sign, other)))

    return method


def _comparison_method(sign: str) -> Callable[[ComparedNumber, Any], Any]:
    original = getattr(int, f"__{COMPARISONS[sign].__name__}__")

    def method(self: ComparedNumber, other: Any) -> Any:
        if type(other) not in (int, bool, float):
            self._notes.used(f"{sign} {type(other).__name__}")
            return original(self, other)
        comparison = Comparison(self._arithmetic, sign, other)
        outcome = COMPARISONS[sign](int(self), other)
        self._notes.compared(comparison, outcome)
        return outcome

    return method


for _sign, _function in ARITHMETIC.items():
    setattr(ComparedNumber, f"__{_function.__name__}__", _arithmetic_method(_sign))
for _sign, _function in COMPARISONS.items():
    setattr(ComparedNumber, f"__{_function.__name__}__", _comparison_method(_sign))


class Condition(Protocol):
    """A condition for the use of a graph, besides the values that it has frozen."""

    @property
    def key(self) -> Any:
        """The identity of the condition."""

    def holds(self) -> bool:
        """Return whether it holds."""

    def explain(self) -> Changed:
        """Return the change; empty if the condition holds."""


class ComparedSource:
    """A number whose comparisons must have the outcomes of the watched step.

    Args:
        source: Where the number is now.
        outcomes: The outcomes in the watched step.
        cause: Has the remedy for steps whose comparisons have other outcomes.
    """

    def __init__(
        self, source: Source, outcomes: dict[Comparison, bool], cause: Cause | None = None
    ) -> None:
        self._source = source
        self._cause = cause
        self._outcomes = list(outcomes.items())
        self.key = (*source.key, *outcomes)
        """The identity of the condition."""

    @classmethod
    def now(cls, source: Source, comparisons: Iterable[Comparison]) -> ComparedSource:
        """Return one with the outcomes for the number that is there now."""
        number = source.value()
        return cls(source, {each: each.outcome(number) for each in comparisons})

    def holds(self) -> bool:
        """Return whether all outcomes are the same."""
        number = self._source.value()
        for comparison, outcome in self._outcomes:  # noqa: SIM110  # a generator takes longer
            if comparison.outcome(number) is not outcome:
                return False
        return True

    def explain(self) -> Changed:
        """Return the first outcome that differs: ``batch_idx == 0: now False, before True``."""
        number = self._source.value()
        for comparison, outcome in self._outcomes:
            if comparison.outcome(number) is not outcome:
                text = comparison.describe(self._source.path)
                words = f"{text}: now {not outcome}, before {outcome}"
                return Changed(text, words, self._source.line, self._cause)
        return NO_CHANGE
