"""Find out if the graphs of a step save time: compare steps from graphs with eager ones.

What is hard here is noise: other processes, first replays that wait for the device, eager steps
after a pause. So a saving is known in one of two ways:

- At a first look, the usual replay is much faster than the fastest warm-up step. No step runs
  eagerly for it.
- Otherwise steps run eagerly and from graphs in turn, in blocks. The first step of each block is
  left out, because what it costs depends on the step before it. Of medians and fastest steps, the
  pair that is better for graphs counts. So occasional slow replays do not drop a graph.

Nothing here waits for the device. A stopwatch is read when the device has passed it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from cg_lightning.backends.base import Stopwatch
from cg_lightning.report.records import Saving

FIRST_LOOK = 6
"""Number of steps from graphs before the first look."""
CLEAR_SAVING = 0.25
"""A saving that noise in eager warm-up steps cannot explain."""
BLOCK = 4
"""Number of steps that run in the same way. The first one is not counted."""
BLOCKS = 4
"""Number of blocks: eager, from graphs, eager, from graphs."""


class StepTimes:
    """The time of one step and of its submodules.

    Args:
        make: Makes a stopwatch: that of the backend.
        began: The value of ``time.perf_counter()`` when the host began the step.
    """

    def __init__(self, make: Callable[[float], Stopwatch | None], began: float) -> None:
        self._make = make
        self._whole = self.begin(began)
        self.pieces: defaultdict[Any, list[Stopwatch]] = defaultdict(list)
        """The time of each call of a submodule, by the runner of the submodule."""

    def begin(self, began: float) -> Stopwatch:
        """Begin to take the time of a call. The arguments are those of the class."""
        stopwatch = self._make(began)
        assert stopwatch is not None, "times are taken only if those of the backend mean something"
        return stopwatch

    def stop(self) -> None:
        """End the step."""
        self._whole.stop()

    def seconds(self) -> float | None:
        """Return the time of the step. None: the device is not done with it."""
        return self._whole.seconds()


class Trial:
    """Compares the times of one variant of a key.

    Args:
        min_saving: The share of a step's time that graphs must save.
        warm_up: Times of eager warm-up steps of the key, without those that count the calls of
            submodules. The caller may still add some. Without any, times are compared in turn.
    """

    def __init__(self, min_saving: float, warm_up: list[StepTimes]) -> None:
        self.min_saving = min_saving
        self.compares_again = False
        """Whether the comparison was started once more, for fewer submodules."""
        self._eager = warm_up
        self._graph: list[StepTimes] = []
        self._position: int | None = None  # in the comparison; None before it

    def wants_eager(self) -> bool:
        """Return True if the next step is to run eagerly."""
        position = self._position
        return position is not None and position < BLOCKS * BLOCK and not position // BLOCK % 2

    def least_steps(self) -> int:
        """Return the number of steps below which no comparison can pay, this one included.

        Those of the comparison itself, and as many as it runs eagerly.
        """
        left = BLOCKS * BLOCK - (self._position or 0)
        return left + left // 2

    def restart(self) -> None:
        """Forget all times, because there will be other graphs."""
        self._eager, self._graph, self._position = [], [], None

    def compare(self) -> None:
        """Begin to run steps eagerly and from graphs in turn."""
        self.compares_again = self._position is not None
        self._eager, self._graph, self._position = [], [], 0

    def add(self, times: StepTimes, is_eager: bool) -> None:
        """Add a step that has just run.

        Args:
            times: Its time.
            is_eager: Whether it ran eagerly, and not from graphs.
        """
        if self._position is None:
            if not is_eager and len(self._graph) < FIRST_LOOK:
                self._graph.append(times)
            return
        if self._position == BLOCKS * BLOCK or is_eager is not self.wants_eager():
            return
        if self._position % BLOCK:
            (self._eager if is_eager else self._graph).append(times)
        self._position += 1

    def saving(self) -> Saving | None:
        """Return what graphs save. None: more steps must run, or the device is not done."""
        if self._position is not None and self._position < BLOCKS * BLOCK:
            return None
        eager, graph = _seconds(self._eager), _seconds(self._graph)
        if eager is None or graph is None:
            return None
        if self._position is not None:
            return _compare(eager, graph)
        if len(graph) < FIRST_LOOK:
            return None
        first = Saving(min(eager), median(graph)) if eager else None
        if first is not None and first.share >= max(CLEAR_SAVING, self.min_saving):
            return first
        self.compare()
        return None

    def savings_of_pieces(self) -> dict[Any, Saving]:
        """Return what the graphs of each submodule save, if it ran in both ways."""
        eager, graph = _seconds_of_pieces(self._eager), _seconds_of_pieces(self._graph)
        return {piece: _compare(eager[piece], graph[piece]) for piece in graph if piece in eager}


def _compare(eager: Sequence[float], graph: Sequence[float]) -> Saving:
    usual, fastest = Saving(median(eager), median(graph)), Saving(min(eager), min(graph))
    return max(usual, fastest, key=lambda saving: saving.share)


def _seconds(timed: Sequence[StepTimes] | Sequence[Stopwatch]) -> list[float] | None:
    """Return the time of each step or call. None: the device is not done with one of them."""
    seconds = [each.seconds() for each in timed]
    known = [each for each in seconds if each is not None]
    return known if len(known) == len(seconds) else None


def _seconds_of_pieces(steps: Sequence[StepTimes]) -> dict[Any, list[float]]:
    found: defaultdict[Any, list[float]] = defaultdict(list)
    for step in steps:
        for piece, calls in step.pieces.items():
            seconds = _seconds(calls)
            if seconds is not None:
                found[piece].append(sum(seconds))
    return found
