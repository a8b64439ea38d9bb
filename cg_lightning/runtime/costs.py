"""What watched steps, captures and comparisons cost: constants at first, then what was measured."""

from __future__ import annotations

from math import inf

LEAST_SECONDS = 0.005
"""No step was watched and captured in less: 15 ms for one layer, 75 ms with a loss and logs."""


class CostsOfRuns:
    """The shortest times that the graphs of one module have cost, in all runs of this process.

    The first one of each kind does not count: it also prepares libraries.
    """

    def __init__(self) -> None:
        self._shortest: dict[str, float] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Add a watched step, a capture or a comparison."""
        self._shortest[kind] = min(seconds, self._shortest[kind]) if kind in self._shortest else inf

    def of_first_graph(self, num_comparisons: int) -> float:
        """Return what the first graph of a run costs at least, in seconds."""
        numbers = {"watch": 1, "capture": 1, "comparison": num_comparisons}
        known = [(kind, seconds) for kind, seconds in self._shortest.items() if seconds < inf]
        return max(LEAST_SECONDS, sum(numbers[kind] * seconds for kind, seconds in known))


class MeasuredCosts:
    """The costs of the graphs of one target, as numbers of eager steps.

    A graph saves one eager step for each batch that it serves; a replay counts as if it took no
    time. So a graph that costs 40 eager steps pays from the 40th batch on. The shortest time of
    each kind counts. The first watched step and the first capture do not: they also prepare
    libraries.

    Args:
        start: The cost of the comparison of one more padded shape, until it is measured.
        num_comparisons: Number of replays after a capture that are compared with eager.
    """

    def __init__(self, start: float, num_comparisons: int) -> None:
        self._start = start
        self._num_comparisons = num_comparisons
        self.of_runs = CostsOfRuns()
        """What is known of earlier runs as well."""
        self.num_eager = 0
        """Number of eager steps that did nothing else."""
        self._num_watched = self._num_captures = 0
        self._spent = self._eager_seconds = 0.0
        self._eager = self._watch = self._capture = self._comparison = self._of_padding = inf

    def ran_eagerly(self, seconds: float) -> None:
        """Add the time of an eager step that did nothing else."""
        self.num_eager += 1
        if self.num_eager > 1:  # the first one also prepares libraries
            self._eager_seconds += seconds
        self._eager = min(self._eager, seconds)

    def watched(self, seconds: float) -> None:
        """Add the time of a watched step."""
        self._num_watched += 1
        self.of_runs.add("watch", seconds)
        if self._num_watched > 1:
            self._watch = min(self._watch, seconds)
            self._spent += seconds

    def captured(self, seconds: float) -> None:
        """Add the time of a step whose graph was captured."""
        self._num_captures += 1
        self.of_runs.add("capture", seconds)
        if self._num_captures > 1:
            self._capture = min(self._capture, seconds)
            self._spent += seconds

    def compared(self, seconds: float) -> None:
        """Add the time of a replay that was compared with eager."""
        self._comparison = min(self._comparison, seconds)
        self.of_runs.add("comparison", seconds)
        self._spent += seconds

    def compared_padding(self, seconds: float) -> None:
        """Add the time of a step whose shape was compared with several paddings."""
        self._of_padding = min(self._of_padding, seconds)

    def may_win_back(self, steps_left: float) -> bool:
        """Whether replays that take no time would win back what the first graph costs at least."""
        if self.num_eager < 2:
            return True
        usual = self._eager_seconds / (self.num_eager - 1)
        return steps_left * usual >= self.of_runs.of_first_graph(self._num_comparisons)

    @property
    def lack_eager_step(self) -> bool:
        """Whether a watched step was measured, and no eager one to compare it with."""
        return self._num_watched > 1 and self._eager == inf

    def spent(self) -> float:
        """Return what all graphs have cost so far. 0 if no eager step was measured."""
        return self._in_steps(self._spent) or 0.0

    def of_new_shape(self) -> float | None:
        """Return the cost of a watched step, a capture and comparisons; None: not measured yet.

        As long as nothing was captured twice, it is the cost of the watched step.
        """
        watch = self._in_steps(self._watch)
        return None if watch is None else watch + (self.of_capture() or 0.0)

    def of_capture(self) -> float | None:
        """Return the cost of a capture and of the comparisons after it; None: not measured yet."""
        compared = self._num_comparisons * self._comparison if self._num_comparisons else 0.0
        return self._in_steps(self._capture + compared)

    def of_padded_shape(self) -> float:
        """Return the cost of the comparison of one more shape that is padded."""
        measured = self._in_steps(self._of_padding)
        return self._start if measured is None else measured

    def _in_steps(self, seconds: float) -> float | None:
        return None if inf in (seconds, self._eager) else seconds / self._eager
