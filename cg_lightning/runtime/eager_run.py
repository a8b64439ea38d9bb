"""The eager run that the graph of a padded batch is compared with, and what else it does."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from cg_lightning.capture.call import GraphCall
from cg_lightning.core.equality import copy_of, same_leaf
from cg_lightning.core.errors import NotIndependentError
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.way import Way, WayRecorder
from cg_lightning.effects.step_state import HostRandomState, put_back
from cg_lightning.guards.values import has_memory
from cg_lightning.padding.output_cut import OutputCut
from cg_lightning.runtime.session import Session


class EagerRun:
    """Records the output of the eager run of a call, and its side effects.

    Args:
        call: The call.
        session: The runtime state of its module.
        ways: Traces the run.
    """

    def __init__(self, call: GraphCall, session: Session, ways: WayRecorder) -> None:
        self.call = dataclasses.replace(call, function=self._run)
        self.output: Any = None
        self.way: Way | None = None
        """The way of the first run."""
        self._ways = ways
        self._as_written = session.compilation.outside_captures
        self._function = call.function
        self._backend = session.backend
        written = [*session.module.buffers(), *session.written.now()]
        self._before = [(tensor, copy_of(tensor)) for tensor in written]
        self._random_state = session.backend.get_random_state()
        self._host_random_state = HostRandomState()
        self._has_run = False
        self.effect = ""
        """What the run has changed, in words."""

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._has_run:
            return self._function(*args, **kwargs)
        self._has_run = True
        with self._as_written():
            output, self.way = self._ways.run(self._function, *args, **kwargs)
        self.output = output
        if not all(same_leaf(now, before) for now, before in self._before):
            self.effect = "the step writes to a tensor that it keeps"
        elif not torch.equal(self._random_state, self._backend.get_random_state()):
            self.effect = "the step draws random numbers, more of them for a padded batch"
        elif self._host_random_state.was_drawn(self._backend.device.type):
            self.effect = "the step draws random numbers of the host"
        return output

    @contextlib.contextmanager
    def checked_replays(self) -> Iterator[None]:
        """Undo what the replays inside change. The eager run has changed nothing.

        Raises:
            NotIndependentError: They write to what the step keeps, or draw random numbers.
        """
        try:
            yield
        finally:
            self._undo_replays()

    def _undo_replays(self) -> None:
        before, self._before = self._before, []
        changed = [(now, value) for now, value in before if not same_leaf(now, value)]
        draws = not torch.equal(self._random_state, self._backend.get_random_state())
        if not (changed or draws):
            return
        with torch.no_grad():
            for tensor, value in changed:
                put_back(tensor, value)
        self._backend.set_random_state(self._random_state)
        raise NotIndependentError("the step writes to what it keeps, only for the padded batch")

    def check(self) -> None:
        """Check that the call has no side effects.

        Raises:
            NotIndependentError: It has side effects, or a part of its output is a view of
                another part or of the batch. What is cut from the output for a padded batch shares
                no memory.
        """
        if self.effect:
            raise NotIndependentError(self.effect)
        given = {id(tensor) for tensor in tensors_in(self.call.leaves)}
        parts = {id(tensor): tensor for tensor in tensors_in((self.output, self.call.leaves))}
        storages: dict[int, int] = {}
        for key, tensor in parts.items():
            if has_memory(tensor) and tensor.numel():
                other = storages.setdefault(tensor.untyped_storage().data_ptr(), key)
                if other != key and not {key, other} <= given:
                    raise NotIndependentError(
                        "a part of its output is a view of another one, or of the batch"
                    )

    def cut(self) -> OutputCut:
        """Return the shapes to which an output for a padded batch is cut."""
        return OutputCut(self.output)
