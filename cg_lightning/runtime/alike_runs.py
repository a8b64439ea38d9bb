"""Runs of steps that may go the way of a watched one, so that they need not be watched."""

from __future__ import annotations

from typing import Any

import torch

from cg_lightning.capture.call import GraphCall
from cg_lightning.core.equality import copy_of, same_leaf
from cg_lightning.diagnosis.way import Way, WayRecorder
from cg_lightning.host_values.path import ReadPath
from cg_lightning.runtime.ahead import CaptureAhead
from cg_lightning.runtime.alike_steps import AlikeSteps
from cg_lightning.runtime.eager_run import EagerRun
from cg_lightning.runtime.keys import KeyState, Variant
from cg_lightning.runtime.session import Session


class AlikeRuns:
    """Runs steps of one stage for their way, and adopts what watched steps have shown.

    Args:
        session: The runtime state of the module.
        ahead: Undoes runs that the user must not see.
        alike: The watched steps and their ways.
        ways: Traces runs.
    """

    def __init__(
        self, session: Session, ahead: CaptureAhead, alike: AlikeSteps, ways: WayRecorder
    ) -> None:
        self._session = session
        self._dispatcher = session.target.dispatcher
        self._ahead = ahead
        self._alike = alike
        self._ways = ways

    def run(self, call: GraphCall) -> Any:
        """Run a step eagerly. If it went the way of a watched one, its key need not be watched.

        Args:
            call: The step.

        Returns:
            Its output.
        """
        output, way = self._traced(call)
        if not self._adopt(call, way):
            self._alike.note_unlike(call.descriptor, way)
        return output

    def _traced(self, call: GraphCall) -> tuple[Any, Way | None]:
        """Run a step. It has no way if it changes anything: a function of C shows no code."""
        eager = EagerRun(call, self._session, self._ways)
        given = [(leaf, copy_of(leaf)) for leaf in call.leaves if isinstance(leaf, torch.Tensor)]
        output = eager.call.run()
        is_same = not eager.effect and all(same_leaf(leaf, value) for leaf, value in given)
        return output, eager.way if is_same else None

    def note_watched(self, state: KeyState, call: GraphCall) -> None:
        """Note the way of a step that was just watched: later steps may go the same way."""
        variant = state.variants[0]
        assert variant.path is None or isinstance(variant.path, ReadPath)
        try:
            with self._session.compilation.outside_captures():
                _, way = self._ahead.rehearse(call, lambda: self._ways.run(call.run))
        except Exception:  # of a step that cannot run twice: others are watched as well
            return
        if variant.guards.check():
            self._alike.note(call.descriptor, variant, variant.path, way)

    def prepare(self, padded: GraphCall) -> None:
        """Find out if the step with the padded batch goes the way of a watched one.

        Then it need not be watched. It runs once for its way, and once for its host values.
        """
        if not self._alike.knows(padded.descriptor):
            return
        try:
            _, way = self._ahead.rehearse(padded, lambda: self._traced(padded))
        except Exception:  # the watched step will fail for the same reason, and report it
            return
        if self._adopt(padded, way):
            self._dispatcher.ran_before(self._dispatcher.state(padded.descriptor.fields), runs=2)

    def _adopt(self, call: GraphCall, way: Way | None) -> bool:
        """Give the key of a step what a watched step has shown that went the same way.

        If only one shape of this way has shown its host values, the step runs once more for them.
        It does nothing else, as the watched one.

        Args:
            call: The step, which has run.
            way: Its way.

        Returns:
            Whether there is such a step.
        """
        if way is None or not self._alike.has_gone(call.descriptor, way):
            return False
        found = self._alike.find_of_all_shapes(call.descriptor, call.leaves, way)
        if found is None:
            found = self._found_by_host_values(call, way)
        if found is None:
            return False
        known, path = found
        variant = Variant(known.guards, list(known.modes), watched=known.watched, path=path)
        state = self._dispatcher.state(call.descriptor.fields, call.descriptor)
        self._dispatcher.add_variant(state, variant)
        return True

    def _found_by_host_values(
        self, call: GraphCall, way: Way
    ) -> tuple[Variant, ReadPath | None] | None:
        """Return a watched step that went the same way, and what the call reads on the host."""
        watcher = self._session.watcher
        path = self._ahead.rehearse(call, lambda: watcher.host_values(call.run, call.tree))
        found = self._alike.find(call.descriptor, call.leaves, way, path)
        if found is None or (found[1] is None) != (path is None):
            return None
        if path is not None:
            path.use(self._session.host_copies)
        return found[0], path
