"""Metric states at fixed addresses, which graphs read and write."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cg_lightning.core.errors import CaptureError
from cg_lightning.metrics.deferred_checks import DeferredChecks
from cg_lightning.metrics.members import states_of
from cg_lightning.modules.interception import Interception, ModuleHandler


class MetricState:
    """One tensor state of one metric.

    Its value is stored either among the attributes of the metric, as torchmetrics does it, or in a
    tensor that the latest replay wrote. :class:`MetricStates` moves it from one to the other.
    """

    __slots__ = ("attributes", "graph_tensor", "is_inference", "location", "metric", "name")

    def __init__(self, metric: nn.Module, name: str, device: torch.device) -> None:
        self.metric = metric
        self.name = name
        self.attributes = vars(metric)
        with torch.inference_mode(False):
            self.graph_tensor = torch.empty_like(
                self.attributes[name], device=device, requires_grad=False
            )
        """Static tensor from which graphs read this state, and to which they write it."""
        self.location: Tensor | None = None
        """Static tensor in which the value is stored now; None: it is an attribute of the metric.

        It may be the ``graph_tensor`` of another metric that shares the state.
        """
        self.is_inference = False
        """Whether the value is an inference tensor in eager. The static tensor never is one."""

    def value(self) -> Tensor:
        """Return the value of the state from its current location."""
        value = self.attributes.get(self.name, self.location)
        assert isinstance(value, Tensor)
        return value

    def fits(self) -> bool:
        """Return True if the state still has the shape and dtype of the captured graphs."""
        if self.name not in self.attributes:
            return True
        value = self.attributes[self.name]
        return (
            isinstance(value, Tensor)  # a user may have reset it to a number
            and value.shape == self.graph_tensor.shape
            and value.dtype == self.graph_tensor.dtype
        )

    def move_to_graph(self, tensor: Tensor, is_inference: bool) -> None:
        """Mark the state as stored in a static tensor, which a graph has written."""
        self.attributes.pop(self.name, None)
        self.location, self.is_inference = tensor, is_inference

    def give_back(self, value: Tensor) -> None:
        """Store the state as an attribute again. If an attribute was set in between, it stays."""
        self.attributes.setdefault(self.name, value)
        self.location = None


class WrittenState(NamedTuple):
    """A state that a graph sets."""

    state: MetricState
    tensor: Tensor
    """The static tensor in which it is stored after the step."""
    is_inference: bool | None
    """Whether eager sets it to an inference tensor; None: eager writes to its tensor in place."""


Locations = list[tuple[MetricState, Tensor | None, bool]]
"""Where each state is stored, and whether it is an inference tensor."""


class _StateReader(ModuleHandler):
    """Returns a copy of a state in a static tensor when the attribute is read."""

    def __init__(self, states: MetricStates, metric: nn.Module) -> None:
        self._states = states
        self._metric = metric

    def get_missing(self, name: str) -> Tensor:
        return self._states.read(self._metric, name)

    def before_copy(self) -> None:
        self._states.materialize_all_of(self._metric)


class MetricStates:
    """The states of all metrics of one run that graphs read or write.

    After a replay, a state is *not* among the attributes of its metric. A read makes a copy, which
    becomes the attribute. So later replays do not change a value that the user keeps. The next
    replay copies the attribute into the graph's tensor. Metrics that share a state, such as those
    of a compute group, share the copy.

    Args:
        device: The device of the graphs.
        checks: Deferred checks, which raise before a state is read.
    """

    def __init__(self, device: torch.device, checks: DeferredChecks) -> None:
        self._device = device
        self._checks = checks
        self._states: dict[tuple[int, str], MetricState] = {}
        self._interceptions: dict[int, Interception] = {}
        self.stage_number = 0
        """Number of stages that have ended. At the end of each, all metrics are restored."""
        self.moves = 0
        """Number of moves of all states. If it is unchanged, no state has moved."""

    def of(self, metrics: Iterable[nn.Module]) -> list[MetricState]:
        """Return the tensor states of ``metrics``. The objects are reused as long as they fit.

        Raises:
            CaptureError: A state is no tensor at the moment: it was reset to a number, for example.
        """
        return [
            self._state(metric, name)
            for metric in metrics
            for name, default in states_of(metric).items()
            if isinstance(default, Tensor)
        ]

    def _state(self, metric: nn.Module, name: str) -> MetricState:
        state = self._states.get((id(metric), name))
        if state is None or not state.fits():
            value = vars(metric).get(name)
            if not isinstance(value, Tensor):
                what = f"{type(metric).__name__}.{name} is a {type(value).__name__}"
                raise CaptureError(f"the state {what}, not a tensor")
            state = self._states[id(metric), name] = MetricState(metric, name, self._device)
        return state

    def fits(self, state: MetricState) -> bool:
        """Return True if graphs that use ``state`` are still correct.

        The state must fit now, and must have fitted at every earlier look-up.
        """
        return self._states.get((id(state.metric), state.name)) is state and state.fits()

    def intercept(self, metrics: Iterable[nn.Module]) -> None:
        """Intercept reads of the states of ``metrics`` until the end of the stage."""
        for metric in metrics:
            if id(metric) not in self._interceptions:
                self._interceptions[id(metric)] = Interception(metric, _StateReader(self, metric))

    def read(self, metric: nn.Module, name: str) -> Tensor:
        """Copy a state from its static tensor to the attribute, and return it.

        Raises:
            AttributeError: No state of that name is stored in a static tensor.
        """
        state = self._states.get((id(metric), name))
        if state is None or state.location is None:
            raise AttributeError(name)
        self._checks.raise_if_met()
        if state.location is not None:  # the check itself may have read it
            self.materialize(state.location)
        return state.value()

    def move_to_graph(self, moved: Iterable[WrittenState]) -> None:
        """Mark states as stored in tensors that a graph has written."""
        self.moves += 1
        for state, tensor, is_inference in moved:
            if is_inference is not None:
                state.move_to_graph(tensor, is_inference)
            elif tensor is state.graph_tensor:
                self._move_in_place(state)
            else:
                self._share(state, tensor)

    def _share(self, state: MetricState, tensor: Tensor) -> None:
        """Make a state the same as that of another metric, which was moved before."""
        owner = next(other for other in self._states.values() if other.graph_tensor is tensor)
        if owner.location is None:
            state.attributes[state.name] = owner.attributes[owner.name]
            state.location = None
        else:
            state.move_to_graph(tensor, owner.is_inference)

    def _move_in_place(self, state: MetricState) -> None:
        """Do what eager does: it writes to the tensor of the state.

        Other metrics that have the tensor see the change. So does a user who has kept it; then it
        stays the state, and gets the value of the graph.
        """
        held = [state.attributes.get(state.name)]
        if held[0] is None:
            state.location = state.graph_tensor
            return
        sharers = [
            other for other in self._states.values() if other.attributes.get(other.name) is held[0]
        ]
        for other in sharers:
            del other.attributes[other.name]
        if sys.getrefcount(held[0]) > 2:  # not only the list's, and that of this call
            held[0].copy_(state.graph_tensor)
            for other in sharers:
                other.give_back(held[0])
            return
        for other in sharers:
            other.move_to_graph(state.graph_tensor, held[0].is_inference())
        self.intercept(other.metric for other in sharers)

    def separate(self, written: Iterable[WrittenState]) -> None:
        """Materialize what other metrics share with states that a step sets to new tensors."""
        replaced = {id(tensor) for _, tensor, is_inference in written if is_inference is not None}
        own = {id(state) for state, _, _ in written}
        for state in self._states.values():
            if id(state.location) in replaced and id(state) not in own:
                assert state.location is not None
                self.materialize(state.location)

    def materialize(self, tensor: Tensor) -> None:
        """Copy a static tensor back into the attributes of every metric that shares it."""
        self.moves += 1
        shared_by = [state for state in self._states.values() if state.location is tensor]
        with torch.inference_mode(any(state.is_inference for state in shared_by)):
            value = tensor.clone()
        for state in shared_by:
            state.give_back(value)

    def materialize_all_of(self, metric: nn.Module) -> None:
        """Copy all states of one metric back into its attributes."""
        for state in list(self._states.values()):
            if state.metric is metric and state.location is not None:
                self.materialize(state.location)

    def copy_in(self, moved: Sequence[MetricState]) -> None:
        """Copy states that are stored elsewhere into the tensors that graphs read."""
        used = {id(state.location) for state in self._states.values()}
        for state in moved:
            if id(state.graph_tensor) in used:  # another metric's state is stored there
                self.materialize(state.graph_tensor)
        torch._foreach_copy_(
            [state.graph_tensor for state in moved], [state.value() for state in moved]
        )

    @contextlib.contextmanager
    def held_for_capture(self, metrics: Iterable[nn.Module]) -> Iterator[list[MetricState]]:
        """While this is entered, graph tensors have the values of the states, and no state moves.

        :meth:`read` raises ``AttributeError`` for all states in the meantime. The caller removes
        the states from the attributes, and restores the attributes.
        """
        states = self.of(metrics)
        for state in states:
            if state.location is not None and state.location is not state.graph_tensor:
                self.materialize(state.location)
        for state in states:
            if state.location is None:
                state.graph_tensor.copy_(state.value())
        before = self.locations()
        for state in states:
            state.location = None
        try:
            yield states
        finally:
            self.restore(before)

    def locations(self) -> Locations:
        """Return the location of each state, for :meth:`restore`."""
        return [(state, state.location, state.is_inference) for state in self._states.values()]

    def restore(self, locations: Locations) -> None:
        """Restore the locations of states. The caller restores the attributes."""
        self.moves += 1
        for state, location, is_inference in locations:
            state.location, state.is_inference = location, is_inference

    def tensors(self) -> list[Tensor]:
        """Return the tensors that graphs read and write."""
        return [state.graph_tensor for state in self._states.values()]

    def release(self, check: bool) -> None:
        """Leave no trace in any metric.

        Args:
            check: Read the deferred checks. If one raises, the metrics are restored before its
                exception leaves this method.
        """
        try:
            if check:
                self._checks.raise_if_met()
        finally:
            for state in self._states.values():
                if state.location is not None:
                    self.materialize(state.location)
            for interception in self._interceptions.values():
                interception.remove()
            self._interceptions.clear()
            self.stage_number += 1
            self.moves += 1

    def close(self) -> None:
        """Free the static tensors without the garbage collector. Call it after :meth:`release`."""
        for state in self._states.values():
            del state.graph_tensor
        self._states.clear()
