"""Watches what an eager step does to metrics: what of it a graph could not hold, and a replay not bring up to date."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection

from cg_lightning.core.causes import Cause
from cg_lightning.effects.recorder import unsupported_read, unsupported_update, unsupported_write
from cg_lightning.metrics.members import states_of
from cg_lightning.metrics.sync_free import SyncFree, replacing
from cg_lightning.modules.interception import Interception, ModuleHandler


def _shapes(metric: nn.Module) -> dict[str, Any]:
    states = {name: getattr(metric, name) for name in states_of(metric)}
    return {
        name: (state.shape, state.dtype)
        for name, state in states.items()
        if isinstance(state, Tensor)
    }


class MetricWatch:
    """Watches one step.

    Args:
        metrics: The metrics of the module.
        logged: Gives those behind what it logs.
        add: Takes what was found.
        sync_free: Whether captures replace what waits for the device.
    """

    def __init__(
        self,
        metrics: list[nn.Module],
        logged: Callable[[], list[nn.Module]],
        add: Callable[[Cause, str], None],
        sync_free: bool = True,
    ) -> None:
        self._sync_free = sync_free
        self._metrics = metrics
        self._add = add
        self._written: dict[int, set[str]] = {}
        self._said: set[str] = set()
        self._shapes = [_shapes(metric) for metric in metrics]
        self._groups = [
            metric
            for metric in metrics
            if isinstance(metric, MetricCollection) and not metric._groups_checked
        ]
        self._logged = logged
        self._where_logged = self._devices()
        self.settles = False
        """Whether something was done that is done once: a collection formed its compute groups, for which it waits for the
        device, or what is logged was given a place there.
        """

    @contextlib.contextmanager
    def watching(
        self, sparing_the_step: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """While the step runs.

        Args:
            sparing_the_step: Entered while a function runs that a capture of the whole step replaces.
        """

        def make(original: Callable[..., Any], replacement: SyncFree) -> Callable[..., Any]:
            def function(*args: Any, **kwargs: Any) -> Any:
                with (
                    sparing_the_step()
                    if replacement.applies(*args, **kwargs)
                    else contextlib.nullcontext()
                ):
                    return original(*args, **kwargs)

            return function

        with contextlib.ExitStack() as stack:
            for metric in self._metrics:
                interception = Interception(metric, _WatchedMetric(self, metric))
                stack.callback(interception.remove)
            if self._sync_free:
                stack.enter_context(replacing(make))
            yield

    def finish(self) -> None:
        """After the step."""
        for metric, before in zip(self._metrics, self._shapes, strict=True):
            written = self._written.get(id(metric), set())
            self._say(unsupported_update(metric, written))
            now = _shapes(metric)
            for name in sorted(written & set(now)):
                if now[name] != before.get(name, now[name]):
                    self._say(f"{type(metric).__name__}.{name} changes its shape or dtype")
        formed_groups = any(collection._groups_checked for collection in self._groups)
        self.settles = formed_groups or self._devices() != self._where_logged

    def _devices(self) -> list[tuple[int, list[Any]]]:
        states = [
            (metric, [getattr(metric, name) for name in states_of(metric)])
            for metric in self._logged()
        ]
        return [
            (id(metric), [value.device for value in values if isinstance(value, Tensor)])
            for metric, values in states
        ]

    def read(self, metric: nn.Module, name: str) -> None:
        """Says why a replay could not do what reads this attribute."""
        self._say(unsupported_read(metric, name, self._written.get(id(metric), set())))

    def write(self, metric: nn.Module, name: str, value: Any) -> None:
        """Notes what the step sets."""
        self._written.setdefault(id(metric), set()).add(name)
        self._say(unsupported_write(metric, name, value))

    def _say(self, reason: str) -> None:
        if reason and reason not in self._said:
            self._said.add(reason)
            self._add(Cause.METRIC_UPDATED, reason)


class _WatchedMetric(ModuleHandler):
    def __init__(self, watch: MetricWatch, metric: nn.Module) -> None:
        self._watch = watch
        self._metric = metric

    def on_read(self, name: str) -> None:
        self._watch.read(self._metric, name)

    def on_write(self, name: str, value: Any) -> None:
        self._watch.write(self._metric, name, value)
