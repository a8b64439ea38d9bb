"""Metric states at fixed addresses, which graphs read and write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cg_lightning.core.errors import CaptureError
from cg_lightning.metrics.members import states_of
from cg_lightning.modules.interception import Interception, ModuleHandler


class MetricState:
    """One tensor state of one metric.

    Its value is stored either among the attributes of the metric, as torchmetrics does it, or in a
    tensor that the latest replay wrote. :class:`MetricStates` moves it from one to the other.
    """

    __slots__ = ("attributes", "graph_tensor", "location", "metric", "name")

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

    def value(self) -> Tensor:
        """Return the state, wherever it is stored."""
        value = self.attributes.get(self.name, self.location)
        assert isinstance(value, Tensor)
        return value

    def fits(self) -> bool:
        """Return True if the state still has the shape and dtype that graphs were captured with."""
        if self.name not in self.attributes:
            return True
        value = self.attributes[self.name]
        return (
            isinstance(value, Tensor)  # a user may have reset it to a number
            and value.shape == self.graph_tensor.shape
            and value.dtype == self.graph_tensor.dtype
        )

    def move_to_graph(self, tensor: Tensor) -> None:
        """Store the state in ``tensor``, which a graph has written, instead of an attribute."""
        self.attributes.pop(self.name, None)
        self.location = tensor

    def give_back(self, value: Tensor) -> None:
        """Store the state as an attribute again: ``value``, if nobody has set another one since."""
        self.attributes.setdefault(self.name, value)
        self.location = None


Locations = list[tuple[MetricState, Tensor | None]]
"""Where each state is stored."""


class _StateReader(ModuleHandler):
    """Gives a state that is stored in a static tensor to whoever reads it."""

    def __init__(self, states: MetricStates, metric: nn.Module) -> None:
        self._states = states
        self._metric = metric

    def get_missing(self, name: str) -> Tensor:
        return self._states.read(self._metric, name)

    def before_copy(self) -> None:
        self._states.materialize_all_of(self._metric)


class MetricStates:
    """The states of all metrics of one run that graphs read or write.

    After a replay, a state is *not* among the attributes of its metric. If something reads it, it
    gets a copy, which then is an attribute again: a value that somebody keeps is not changed by
    later replays. The next replay copies it into the graph's tensor. Metrics that share a state, as
    those of a compute group do, get the same copy.

    Args:
        device: Where the graphs run.
        before_read: Called before a state is read.
    """

    def __init__(self, device: torch.device, before_read: Callable[[], None]) -> None:
        self._device = device
        self._before_read = before_read
        self._states: dict[tuple[int, str], MetricState] = {}
        self._interceptions: dict[int, Interception] = {}
        self.stage_number = 0
        """Number of stages that have ended; metrics are left alone at the end of each."""
        self.moves = 0
        """Number of moves of any state. If it is unchanged, no state has moved since."""

    def of(self, metrics: Iterable[nn.Module]) -> list[MetricState]:
        """Return the tensor states of ``metrics``: the same objects as long as they fit.

        Raises:
            CaptureError: A state is no tensor at the moment: it was reset to a number, for instance.
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
        """Return True if graphs that use ``state`` are still right: it fits, and always did."""
        return self._states.get((id(state.metric), state.name)) is state and state.fits()

    def intercept(self, metrics: Iterable[nn.Module]) -> None:
        """Give states of ``metrics`` to whoever reads them, until the end of the stage."""
        for metric in metrics:
            if id(metric) not in self._interceptions:
                self._interceptions[id(metric)] = Interception(metric, _StateReader(self, metric))

    def read(self, metric: nn.Module, name: str) -> Tensor:
        """Return a state that is stored in a static tensor, and make it an attribute.

        Raises:
            AttributeError: There is no such state.
        """
        state = self._states.get((id(metric), name))
        if state is None or state.location is None:
            raise AttributeError(name)
        self._before_read()
        if state.location is not None:  # the check itself may have read it
            self.materialize(state.location)
        return state.value()

    def move_to_graph(self, moved: Iterable[tuple[MetricState, Tensor]]) -> None:
        """Store states in tensors that a graph has written."""
        self.moves += 1
        for state, tensor in moved:
            state.move_to_graph(tensor)

    def materialize(self, tensor: Tensor) -> None:
        """Copy a static tensor back into the attributes of every metric that shares it."""
        self.moves += 1
        with torch.inference_mode(False):
            value = tensor.clone()
        for state in self._states.values():
            if state.location is tensor:
                state.give_back(value)

    def materialize_all_of(self, metric: nn.Module) -> None:
        """Make all states of one metric attributes."""
        for state in list(self._states.values()):
            if state.metric is metric and state.location is not None:
                self.materialize(state.location)

    def copy_in(self, moved: Sequence[MetricState]) -> None:
        """Copy states that are stored elsewhere into the tensors that graphs read."""
        used = {id(state.location) for state in self._states.values()}
        for state in moved:
            if id(state.graph_tensor) in used:  # a metric whose state is stored there keeps it
                self.materialize(state.graph_tensor)
        torch._foreach_copy_(
            [state.graph_tensor for state in moved], [state.value() for state in moved]
        )

    @contextlib.contextmanager
    def held_for_capture(self, metrics: Iterable[nn.Module]) -> Iterator[list[MetricState]]:
        """While this is entered, graph tensors have the values of the states, and no state moves.

        States are neither attributes nor stored in a static tensor then, as far as
        :meth:`read` is concerned. The caller takes them out of the attributes, and puts those back.
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
        """Return where each state is stored, for :meth:`restore`."""
        return [(state, state.location) for state in self._states.values()]

    def restore(self, locations: Locations) -> None:
        """Say where states are stored again; attributes are restored by the caller."""
        self.moves += 1
        for state, location in locations:
            state.location = location

    def tensors(self) -> list[Tensor]:
        """Return the tensors that graphs read and write."""
        return [state.graph_tensor for state in self._states.values()]

    def release(self, check: bool) -> None:
        """Leave no trace in any metric.

        Args:
            check: Raise what ``before_read`` raises; the metrics are left alone all the same.
        """
        try:
            if check:
                self._before_read()
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
        """Free the static tensors, after :meth:`release`, without the garbage collector."""
        for state in self._states.values():
            del state.graph_tensor
        self._states.clear()
