"""The submodules of one module that run from graphs."""

from __future__ import annotations

from torch import nn

from cg_lightning.backends import GraphBackend
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import NO_CHANGE, Changed
from cg_lightning.runtime.profiling import Ranges
from cg_lightning.runtime.submodule_runner import SubmoduleRunner
from cg_lightning.runtime.target import GraphTarget, TargetParts


class Submodules:
    """Keeps one runner for each submodule, and intercepts them during a stage.

    Args:
        parts: What all targets of the session use.
        backend: Captures and replays.
        ranges: Marks replays and captures for profilers.
    """

    def __init__(self, parts: TargetParts, backend: GraphBackend, ranges: Ranges) -> None:
        self._parts = parts
        self._backend = backend
        self._ranges = ranges
        self._runners: dict[int, SubmoduleRunner] = {}
        self._is_installed = False
        self._why_cleared = NO_CHANGE

    def runners(self) -> list[SubmoduleRunner]:
        """Return all runners."""
        return list(self._runners.values())

    def add(self, submodules: dict[str, nn.Module]) -> None:
        """Let submodules, by path, run from graphs. Those that are known stay as they are."""
        for path, module in submodules.items():
            if id(module) not in self._runners:
                target = GraphTarget(module, CUDAGraphMode.PIECEWISE, self._parts)
                target.after_change = self._why_cleared
                runner = SubmoduleRunner(path, target, self._backend, self._ranges)
                self._runners[id(module)] = runner
            if self._is_installed:
                self._runners[id(module)].install()

    def varying_sources(self, step: BatchDescriptor) -> set[tuple[int, str]]:
        """Return the sources that had a new value in each watched step with this key."""
        found = [runner.varying_sources(step) for runner in self.runners()]
        return set[tuple[int, str]]().union(*found)

    def install(self) -> None:
        """Intercept all of them; idempotent."""
        self._is_installed = True
        for runner in self.runners():
            runner.install()

    def remove(self) -> None:
        """Leave no trace in any of them."""
        self._is_installed = False
        for runner in self.runners():
            runner.remove()

    def begin_epoch(self) -> None:
        """Compare what is compared once an epoch."""
        for runner in self.runners():
            runner.begin_epoch()

    def clear(self, why: Changed = NO_CHANGE) -> None:
        """Forget all of them, because the module has changed; ``why`` says how."""
        self._why_cleared = why
        for runner in self.runners():
            runner.remove()
        self._runners.clear()
