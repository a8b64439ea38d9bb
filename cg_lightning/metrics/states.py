"""Metric states at fixed addresses, which graphs read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.metrics.members import states_of
from cg_lightning.modules.interception import Interception, ModuleHandler


class Slot:
    """One tensor state of one metric: among its attributes, or (``home``) in a fixed tensor that the latest replay wrote."""

    __slots__ = ("attributes", "fixed", "home", "metric", "name")

    def __init__(self, metric: nn.Module, name: str, device: torch.device) -> None:
        self.metric = metric
        self.name = name
        self.attributes: dict[str, Any] = vars(metric)
        value = self.attributes[name]
        with torch.inference_mode(False):
            self.fixed = torch.empty_like(value, device=device, requires_grad=False)
        self.home: Tensor | None = None

    def value(self) -> Tensor:
        """The state, wherever it is."""
        value = self.attributes.get(self.name, self.home)
        assert isinstance(value, Tensor)
        return value

    def fits(self) -> bool:
        """Whether the state still has the shape and dtype that graphs were captured with."""
        value = self.attributes.get(self.name)
        return value is None or (
            value.shape == self.fixed.shape and value.dtype == self.fixed.dtype
        )


class FixedStates:
    """The fixed states of all metrics of one run.

    After a replay a state is *not* among the attributes of its metric. Whoever reads it gets a copy, which then is among
    them: a value that somebody keeps is not changed by later replays. The next replay copies it in. Metrics that share a
    state, as those of a compute group do, get the same copy.

    Args:
        device: Where the graphs run.
        before_read: Called before a state is given out.
    """

    def __init__(self, device: torch.device, before_read: Callable[[], None]) -> None:
        self._device = device
        self._before_read = before_read
        self._slots: dict[tuple[int, str], Slot] = {}
        self._interceptions: dict[int, Interception] = {}
        self.period = 0
        """Goes up when metrics are left alone again."""

    def slots(self, metric: nn.Module) -> list[Slot]:
        """Gives a slot for each tensor state of ``metric``, the same ones each time."""
        names = [name for name, default in states_of(metric).items() if isinstance(default, Tensor)]
        return [self._slot(metric, name) for name in names]

    def _slot(self, metric: nn.Module, name: str) -> Slot:
        slot = self._slots.get((id(metric), name))
        if slot is None or not slot.fits():
            slot = self._slots[id(metric), name] = Slot(metric, name, self._device)
        return slot

    def intercept(self, metrics: Iterable[nn.Module]) -> None:
        """Gives out states of these metrics to whoever reads them."""
        for metric in metrics:
            if id(metric) not in self._interceptions:
                self._interceptions[id(metric)] = Interception(
                    metric, _GivesOutStates(self, metric)
                )

    def give_out(self, home: Tensor) -> None:
        """Puts what lies in ``home`` back among the attributes of all whose state it is."""
        with torch.inference_mode(False):
            value = home.clone()
        for slot in self._slots.values():
            if slot.home is home:
                slot.attributes.setdefault(slot.name, value)
                slot.home = None

    def release(self, check: bool) -> None:
        """Leaves no trace in any metric.

        Args:
            check: Raise what ``before_read`` raises; the metrics are left alone all the same.
        """
        try:
            if check:
                self._before_read()
        finally:
            for slot in self._slots.values():
                if slot.home is not None:
                    self.give_out(slot.home)
            for interception in self._interceptions.values():
                interception.remove()
            self._interceptions.clear()
            self.period += 1

    def close(self) -> None:
        """Lets go of the fixed tensors, after :meth:`release`: their memory is not to wait for the garbage collector."""
        for slot in self._slots.values():
            del slot.fixed
        self._slots.clear()

    def tensors(self) -> list[Tensor]:
        """The fixed tensors."""
        return [slot.fixed for slot in self._slots.values()]

    def homes(self) -> list[tuple[Slot, Tensor | None]]:
        """Where each state is."""
        return [(slot, slot.home) for slot in self._slots.values()]

    def read(self, metric: nn.Module, name: str) -> Any:
        """Gives out one state of ``metric``."""
        slot = self._slots.get((id(metric), name))
        if slot is None or slot.home is None:
            raise AttributeError(name)
        self._before_read()
        if slot.home is not None:  # the check itself may have read it
            self.give_out(slot.home)
        return slot.attributes[name]

    def give_out_all(self, metric: nn.Module) -> None:
        """Gives out all states of ``metric``."""
        for (owner, _), slot in list(self._slots.items()):
            if owner == id(metric) and slot.home is not None:
                self.give_out(slot.home)


class _GivesOutStates(ModuleHandler):
    def __init__(self, states: FixedStates, metric: nn.Module) -> None:
        self._states = states
        self._metric = metric

    def get_missing(self, name: str) -> Any:
        return self._states.read(self._metric, name)

    def before_copy(self) -> None:
        self._states.give_out_all(self._metric)
