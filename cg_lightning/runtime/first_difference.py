"""Look for the first operation in which a replay differs from eager."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cg_lightning.backends import GraphBackend
from cg_lightning.capture.call import CaptureTarget, GraphCall
from cg_lightning.capture.capture import Capturer
from cg_lightning.diagnosis.operation_log import (
    MOST_OPERATIONS,
    Operation,
    OperationLog,
    first_difference,
)

_FIRST = "The first operation that differs"


class FirstDifference:
    """Runs a step again, twice eagerly and once from another graph, and compares operations.

    The graph computes a digest of each tensor that an operation is given or gives, so nothing is
    copied, and nothing waits for the device in a capture. A value that the dropped graph has frozen
    is no part of the new one: it is found among the arguments of the watched step.

    Args:
        capturer: Captures the graph.
        backend: Where it runs.
    """

    def __init__(self, capturer: Capturer, backend: GraphBackend) -> None:
        self._capturer = capturer
        self._backend = backend

    def find(
        self,
        target: CaptureTarget,
        call: GraphCall,
        run: Callable[[GraphCall], Any],
        restore: Callable[[], None],
    ) -> str:
        """Return the first operation that differs, as a sentence; empty if it cannot be told.

        Args:
            target: The step or submodule.
            call: The call whose replay differs from eager.
            run: Runs a call eagerly, so that its side effects can be undone.
            restore: Restores the state before the call. It is called before each run.
        """
        try:
            return self._find(target, call, run, restore)
        except torch.OutOfMemoryError:
            return "No operation is named, because the device has too little memory to compare them"
        except Exception:  # the step, or its capture, now does something else
            return ""

    def _find(
        self,
        target: CaptureTarget,
        call: GraphCall,
        run: Callable[[GraphCall], Any],
        restore: Callable[[], None],
    ) -> str:
        runs: list[list[Operation]] = []
        for _ in range(2):
            restore()
            log = OperationLog(self._backend.device.type)
            run(dataclasses.replace(call, function=log.around(call.function)))
            if log.is_full:
                return f"No operation is named, because there are more than {MOST_OPERATIONS}"
            runs.append(log.read())
        eager, again = runs
        restore()
        found = first_difference(self._graphed(target, call), eager, ("the graph", "eager"))
        if found is None:
            return self._frozen(target.operations, eager)
        noise = first_difference(again, eager, ("one eager run", "another one"))
        if noise is not None and noise.number <= found.number:
            return f"{_FIRST}: {noise.text}, so eager differs from itself"
        return f"{_FIRST}: {found.text}"

    def _frozen(self, watched: Sequence[Operation], eager: Sequence[Operation]) -> str:
        """Return what the dropped graph has frozen, since a new one does not differ from eager."""
        if not watched:
            return ""
        frozen = first_difference(watched, eager, ("the watched step", "this step"))
        if frozen is None:
            return ""
        value = ", so the graph has frozen that value" if frozen.is_value else ""
        return f"{_FIRST}: {frozen.text}{value}"

    def _graphed(self, target: CaptureTarget, call: GraphCall) -> Sequence[Operation]:
        """Return what the operations in a graph of the call are given and give."""
        log = OperationLog(self._backend.device.type)
        entry = self._capturer.capture_to_compare(target, call, log.around)
        if entry is None:
            return []
        try:
            entry.replay(call.leaves, 0, call.tree)
            return log.read()
        finally:
            self._backend.synchronize()
            entry.drop()
