"""What one watched step showed: its calls of submodules, and what in them a graph could not hold or would freeze."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.diagnosis.written_tensors import WrittenTensors
from cg_lightning.guards.values import addresses_of


@dataclasses.dataclass(frozen=True)
class Finding:
    """One reason why a step, or a submodule that it calls, cannot run from a graph."""

    cause: Cause
    operation: str
    """What was called or changed, such as ``aten::item``."""
    module: str
    """Dotted path of the innermost module that was running; empty for the step itself."""
    location: str
    """The user's own line, as ``file:line``."""

    @property
    def remedy(self) -> str:
        """What a user can do about it."""
        return self.cause.remedy

    def reason(self, path=""):
        from cg_lightning.core.reasons import Reason

        return Reason(self.cause, f"{path}: {self}" if path else str(self), self.location)

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.cause.value}: {self.operation}{where} ({self.location})"


@dataclasses.dataclass
class Call:
    """One call of a module, or (``module`` is None) the step."""

    path: str
    module: nn.Module | None
    inputs: list[Tensor]
    descriptor: BatchDescriptor | None = None
    findings: list[Finding] = dataclasses.field(default_factory=list)
    calls: list[Call] = dataclasses.field(default_factory=list)
    reads: dict[tuple[int, str], Any] = dataclasses.field(default_factory=dict)
    """What holds attributes and globals that the call reads, by its id and their names."""

    def __post_init__(self) -> None:
        self.input_addresses = addresses_of(self.inputs)


class Observation:
    """What one eager run of a step showed."""

    def __init__(self, step: Call) -> None:
        self._step = step
        self.written = WrittenTensors()
        """Tensors, other than buffers of submodules and states of metrics, that the step changed in place."""
        self.settles = False
        """Whether something was done that is done once: metrics formed groups, a module was compiled."""

    def release(self) -> None:
        """Lets go of the tensors that the calls were given: an observation lives as long as its key."""
        for call in (self._step, *self._all_calls(self._step)):
            call.inputs.clear()

    def add_to_readers(self, key: tuple[int, str], finding: Finding) -> None:
        """Adds a finding to every call that has read something, given by the key of :attr:`Call.reads`."""
        for call in (self._step, *self._all_calls(self._step)):
            if key in call.reads:
                call.findings.append(finding)

    @property
    def findings(self) -> list[Finding]:
        """Reasons why the whole step is no graph; empty where it could be one."""
        return self._step.findings

    @property
    def may_settle(self) -> bool:
        """Whether another look may show less: a cache that the first step built is not built again."""
        return self.settles or any(
            finding.cause is Cause.STATE_REBOUND for finding in self.findings
        )

    def called(self) -> list[str]:
        """Paths of the modules that were called, each once."""
        return list({call.path: None for call in self._all_calls(self._step)})

    def findings_of(self, path: str) -> list[Finding] | None:
        """Why the submodule at ``path`` is no graph; None where it was not called."""
        calls = [call for call in self._all_calls(self._step) if call.path == path]
        return [finding for call in calls for finding in call.findings] if calls else None

    def largest_capturable(self) -> dict[str, nn.Module]:
        """Gives the fewest, largest called submodules that have parameters and no finding, by path."""
        unclean = {id(call.module) for call in self._all_calls(self._step) if call.findings}
        chosen: dict[str, nn.Module] = {}

        def choose(outer: Call) -> None:
            for call in outer.calls:
                assert call.module is not None
                if id(call.module) in unclean or next(call.module.parameters(), None) is None:
                    choose(call)
                else:
                    chosen[call.path] = call.module

        choose(self._step)
        return chosen

    def reads(self, module: nn.Module | None = None) -> list[tuple[Any, str]]:
        """Plain attributes of user-written modules, and globals, that calls of ``module`` (None: the step) read."""
        calls = (
            [self._step]
            if module is None
            else [c for c in self._all_calls(self._step) if c.module is module]
        )
        return [(owner, name) for call in calls for (_, name), owner in call.reads.items()]

    def keys_of_calls(self, module: nn.Module) -> list[BatchDescriptor]:
        """The keys that ``module`` was called with."""
        calls = [call for call in self._all_calls(self._step) if call.module is module]
        return [call.descriptor for call in calls if call.descriptor is not None]

    def _all_calls(self, outer: Call) -> Iterator[Call]:
        for call in outer.calls:
            yield call
            yield from self._all_calls(call)

    @property
    def needs_second_look(self):
        return self.may_settle

    @property
    def did_one_time_work(self):
        return self.settles

    def sources(self, module=None):
        from cg_lightning.guards.sources import Source

        return [Source(o, n, f"self.{n}") for o, n in self.reads(module)]


WatchedStep = Observation
