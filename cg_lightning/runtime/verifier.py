"""Compares the first replays of a graph with eager, on the user's own batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from cg_lightning.backends import GraphBackend
from cg_lightning.core.equality import same_leaf
from cg_lightning.core.errors import CaptureError, VerificationError
from cg_lightning.core.tree import flatten, leaf_paths
from cg_lightning.effects.attributes import AttributesSnapshot
from cg_lightning.effects.host_randomness import HostRandomState
from cg_lightning.effects.step_metrics import MetricsSnapshot, StepMetrics
from cg_lightning.modules.kinds import is_metric

TOLERANCES = ("exact", "close")
_LIKELY_CAUSE = (
    "The graph has most likely frozen a Python value, one that a function has closed over for instance, or reads memory "
    "that has moved"
)


@dataclasses.dataclass(frozen=True)
class VerificationSettings:
    """Which replays are compared, and how closely.

    Attributes:
        replays: The first so many of each entry.
        every: And every so-manieth after them; 0: none.
        tolerance: ``exact``: every bit, or within what eager differs from itself. ``close``: the defaults of
            ``torch.testing.assert_close``.
        strict: Raise where a replay differs.
    """

    replays: int
    every: int
    tolerance: str
    strict: bool

    def wants(self, replays_so_far: int) -> bool:
        """Whether the next replay is compared."""
        if replays_so_far < self.replays:
            return True
        return self.every > 0 and (replays_so_far - self.replays + 1) % self.every == 0


class StepState:
    """What a step may change beside what it returns: buffers, random states, plain attributes of submodules.

    Args:
        module: The module.
        backend: Where it runs.
        metrics: Its metrics, where a step may update them.
        written: Other tensors that steps write to.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: GraphBackend,
        metrics: StepMetrics | None = None,
        written: Iterable[Tensor] = (),
    ) -> None:
        self._backend = backend
        self._metrics = None if metrics is None else MetricsSnapshot(metrics)
        others = [(f"tensor of shape {tuple(tensor.shape)}", tensor) for tensor in written]
        self._buffers = [
            (name, tensor, tensor.clone()) for name, tensor in [*module.named_buffers(), *others]
        ]
        self._attributes = AttributesSnapshot(
            child for child in module.modules() if metrics is None or not is_metric(child)
        )
        self._host_random_state = HostRandomState()
        self._device_random_state = backend.get_random_state()

    def restore(self) -> None:
        """Puts everything back in place: tensors keep their addresses."""
        with torch.no_grad():
            for _, buffer, value in self._buffers:
                buffer.copy_(value)
        self._attributes.restore()
        if self._metrics is not None:
            self._metrics.restore()
        self._host_random_state.restore()
        self._backend.set_random_state(self._device_random_state)

    def values(self) -> list[tuple[str, Any]]:
        """Names and copies of the buffers, and of what metrics hold, as they are now."""
        buffers = [(f"buffer {name}", buffer.clone()) for name, buffer, _ in self._buffers]
        return buffers if self._metrics is None else [*buffers, *self._metrics.values()]


def _leaves(output: Any, values: list[tuple[str, Any]]) -> list[Any]:
    return [*flatten(output)[0], *[value for _, value in values]]


def _within(one: Any, other: Any, spread: float) -> bool:
    return (
        isinstance(one, Tensor)
        and one.is_floating_point()
        and bool(((one - other).abs() <= spread).all())
    )


def _close(one: Any, other: Any) -> bool:
    try:
        torch.testing.assert_close(one, other, equal_nan=True)
    except AssertionError:
        return False
    return True


def _show(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    flat = value.detach().flatten()[:3].tolist()
    return f"{flat}{' ...' if value.numel() > 3 else ''} of shape {tuple(value.shape)}"


def report_difference(error: VerificationError, settings: VerificationSettings) -> str:
    """Warns of a replay that differs from eager, and gives the reason why its key runs lower from now on.

    Raises:
        VerificationError: ``settings.strict``.
    """
    if settings.strict:
        raise error
    rank_zero_warn(
        f"CUDAGraphCallback: a replay differed from eager and was dropped; eager's result was used: {error}."
    )
    return f"verification: {error}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a comparison showed; ``difference`` is empty where the replay gave what eager gives."""

    output: Any
    difference: str = ""
    within_spread: bool = False


def verify(
    eager: Callable[[], Any],
    replay: Callable[[], Any],
    module: nn.Module,
    backend: GraphBackend,
    tolerance: str,
    metrics: StepMetrics | None = None,
    inputs: Sequence[Any] = (),
    written: Sequence[Tensor] = (),
) -> Verdict:
    """Runs a step eagerly and from its graph, from the same state, so that a user sees one step.

    Where they agree, output and state are those of the replay; where they differ, those of eager. Where a bit differs,
    eager is run once more, and what it differs from itself is let pass (atomic additions, for instance).

    Args:
        eager: Runs the step as it is.
        replay: Runs its graph; gives outputs that the next replay does not overwrite.
        module: Whose state a step may change.
        backend: Where it runs.
        tolerance: One of :data:`TOLERANCES`.
        metrics: The metrics of the module, where a step may update them.
        inputs: What the step is given. A graph writes to its own copies, so a step that changes these is no graph.
        written: As in :class:`StepState`.

    Raises:
        CaptureError: There is no graph to compare with; the step has run eagerly, and the error carries its output.
    """
    before = StepState(module, backend, metrics, written)
    given = [(leaf, leaf.clone()) for leaf in inputs if isinstance(leaf, Tensor)]
    expected = eager()
    if not all(same_leaf(leaf, value) for leaf, value in given):
        return Verdict(expected, "it changes a tensor that it is given")
    expected_values = before.values()
    paths = [*leaf_paths(expected, "output"), *[name for name, _ in expected_values]]
    after_eager = StepState(module, backend, metrics, written)
    before.restore()
    try:
        output = replay()
    except CaptureError as error:
        after_eager.restore()
        error.ran_eagerly, error.output = True, expected
        raise
    wanted = _leaves(expected, expected_values)
    found = _leaves(output, before.values())
    if len(wanted) != len(found):
        after_eager.restore()
        return Verdict(
            expected,
            f"the output and the metrics have {len(found)} leaves, eager's {len(wanted)}. {_LIKELY_CAUSE}",
        )
    same = same_leaf if tolerance == "exact" else _close
    differing = [
        index
        for index, (one, other) in enumerate(zip(found, wanted, strict=True))
        if not same(one, other)
    ]
    if not differing:
        return Verdict(output)
    before.restore()
    again = _leaves(eager(), before.values())
    after_eager.restore()
    for index in differing:
        one, other = wanted[index], again[index]
        spread = (
            float((one - other).abs().max())
            if isinstance(one, Tensor) and one.is_floating_point()
            else 0.0
        )
        if not (spread > 0 and _within(found[index], one, spread)):
            shown = (
                f"{paths[index]} is {_show(found[index])} from the graph, {_show(one)} from eager"
            )
            return Verdict(expected, f"{shown}. {_LIKELY_CAUSE}")
    return Verdict(expected, within_spread=True)
