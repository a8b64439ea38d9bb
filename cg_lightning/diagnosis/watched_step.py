"""What one watched step showed, by call of a submodule."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.diagnosis.findings import Finding
from cg_lightning.diagnosis.operation_log import Operation
from cg_lightning.effects.side_effects import SideEffects
from cg_lightning.guards.comparisons import Comparison, Condition
from cg_lightning.guards.sources import Source
from cg_lightning.guards.values import FrozenValues, addresses_of
from cg_lightning.host_values.path import ReadPath


@dataclasses.dataclass(eq=False)
class ModuleCall:
    """One call of a module, or (``module`` is None) the step."""

    path: str
    module: nn.Module | None
    inputs: list[Tensor] = dataclasses.field(repr=False)
    """The tensors among the arguments; empty once the call has returned."""
    descriptor: BatchDescriptor | None = None
    """The key of the call; None if it has none."""
    hidden: tuple[nn.Module, ...] = ()
    """All modules that compiled code runs in this call; empty if the module is not compiled."""
    given: list[Any] = dataclasses.field(default_factory=list, repr=False)
    """The other arguments; empty once the call has returned."""
    findings: list[Finding] = dataclasses.field(default_factory=list)
    calls: list[ModuleCall] = dataclasses.field(default_factory=list, repr=False)
    sources: dict[tuple[int, str], Source] = dataclasses.field(default_factory=dict, repr=False)
    """What the call reads in Python, by the key of the source."""
    comparisons: dict[Comparison, bool] = dataclasses.field(default_factory=dict, repr=False)
    """How the step compares ``batch_idx``, and what comes out; empty for other calls."""
    compared: dict[Any, Condition] = dataclasses.field(default_factory=dict, repr=False)
    """What the call reads in Python and only compares, and where its gradients may be."""
    copies_from_host: bool = False
    """Whether it copies constants from the host, and no function that it calls shows it."""

    def __post_init__(self) -> None:
        self.input_addresses = addresses_of(self.inputs)

    def all_calls(self) -> Iterator[ModuleCall]:
        """Yield the calls inside this one, in order, however deep."""
        for call in self.calls:
            yield call
            yield from call.all_calls()


class WrittenTensors:
    """Tensors, other than states of metrics, that a step changes in place: a running total, say.

    Verification puts them back. Attributes are looked up each time, because a total may be another
    tensor by then.
    """

    def __init__(self) -> None:
        self._attributes: dict[tuple[int, str], nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}

    def add_attribute(self, module: nn.Module, name: str) -> None:
        """Add all tensors that an attribute holds, however deep."""
        self._attributes[id(module), name] = module

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Add these very tensors."""
        self._tensors.update({id(tensor): tensor for tensor in tensors})

    def update(self, other: WrittenTensors) -> None:
        """Add all tensors of another one."""
        self._attributes.update(other._attributes)
        self._tensors.update(other._tensors)

    def clear(self) -> None:
        """Forget all of them."""
        self._attributes.clear()
        self._tensors.clear()

    def now(self) -> list[Tensor]:
        """Return the tensors as they are now."""
        held = [vars(module).get(name) for (_, name), module in self._attributes.items()]
        return [*FrozenValues(held).tensors, *self._tensors.values()]


@dataclasses.dataclass(eq=False)
class StepNotes(SideEffects):
    """What detectors note of a watched step, other than findings and reads."""

    written: WrittenTensors = dataclasses.field(default_factory=WrittenTensors)
    """Tensors, other than states of metrics, that the step changed in place."""
    did_one_time_work: bool = False
    """Whether the step did one-time work: metrics formed groups, a module was compiled."""
    path: ReadPath | None = None
    """What the step reads on the host, if all of it is known before the step."""
    unseen_use: str = ""
    """The line of code that may use a value of its batch in a way that a capture does not see: it
    catches errors, or asks for the class of an object."""
    kinds_compared: dict[int, tuple[type, str]] = dataclasses.field(default_factory=dict)
    """Classes, by id, of whose objects it asks ``is``, with a line that does."""
    generators: Sequence[torch.Generator] = ()
    """Random generators, other than the default one, that the step draws from."""
    classes: dict[int, type] = dataclasses.field(default_factory=dict)
    """The user's classes that the step uses, by id: a class may have no hash."""
    late_targets: set[tuple[int, str]] = dataclasses.field(default_factory=set)
    """Ids of modules, and names of their attributes, that get values which a replay reads later."""
    operations: list[Operation] = dataclasses.field(default_factory=list, repr=False)
    """The first operations, without tensors: they show later which value a graph has frozen."""


class WatchedStep(StepNotes):
    """What one eager run of a step showed.

    Args:
        step: The step, with its calls.
        notes: What detectors have noted.
    """

    def __init__(self, step: ModuleCall, notes: StepNotes) -> None:
        super().__init__(**vars(notes))
        self._step = step
        self._calls = list(step.all_calls())
        # without a path, reads count as well, if no other finding explains why there is no path
        unknown = [finding for finding in step.findings if not finding.is_known_before]
        self.findings = unknown if self.path is not None else unknown or list(step.findings)
        """Why the whole step cannot be one graph; empty if it can."""
        self.comparisons = step.comparisons
        """How the step compares ``batch_idx``, and what comes out."""

    @property
    def needs_second_look(self) -> bool:
        """Whether watching a second step may find less, for example after a cache was filled."""
        return self.did_one_time_work or any(
            finding.cause in (Cause.STATE_REBOUND, Cause.WORLD) for finding in self.findings
        )

    @property
    def only_computes(self) -> bool:
        """Whether the step did nothing but compute its output, and would do the same once more."""
        does_more = (self.changes, self.late, self.batch_writes, self.generators, self.host_draws)
        asks = self.comparisons or self.fills_batch or self.needs_second_look
        return not (self.findings or any(does_more) or asks or self.late_reads)

    @property
    def may_be_full_next_time(self) -> bool:
        """Whether the step could be one graph, but for what Lightning does for its first log.

        It moves what it keeps for a logged value to the device, once.
        """
        return (
            self.did_one_time_work
            and bool(self.findings)
            and all(finding.is_of_logging for finding in self.findings)
        )

    def called(self) -> list[str]:
        """Return the paths of the modules that were called, each once."""
        return list({call.path: None for call in self._calls})

    def findings_of(self, path: str) -> list[Finding] | None:
        """Return why the submodule at ``path`` cannot be a graph; None if it was not called."""
        calls = [call for call in self._calls if call.path == path]
        return [finding for call in calls for finding in call.findings] if calls else None

    def largest_capturable(
        self, knows_reads: bool = False, besides: Collection[tuple[int, str]] = ()
    ) -> dict[str, nn.Module]:
        """Return the fewest, largest submodules with parameters and without findings, by path.

        A call without a key (one argument is an object, for example a cache) cannot be captured. It
        is returned only if no call inside it can be, so that its reason is shown.

        Args:
            knows_reads: Whether values that the batch alone decides may be read on the host.
            besides: The keys of sources that these submodules may not read.
        """
        unclean = {
            id(call.module)
            for call in self._calls
            if any(not (knows_reads and finding.is_known_before) for finding in call.findings)
            or (knows_reads and not call.path)
            or not call.sources.keys().isdisjoint(besides)
        }
        chosen: dict[str, nn.Module] = {}

        def choose(outer: ModuleCall) -> None:
            for call in outer.calls:
                assert call.module is not None
                is_clean = id(call.module) not in unclean
                has_parameters = next(call.module.parameters(), None) is not None
                # without a key, it is at least what the reason names, if nothing inside has one
                has_key = call.descriptor is not None or not any(
                    inner.descriptor is not None for inner in call.all_calls()
                )
                if is_clean and has_parameters and has_key:
                    chosen[call.path] = call.module
                else:
                    choose(call)

        choose(self._step)
        return chosen

    def obstacle(self) -> tuple[str, Finding] | None:
        """Return why the first submodule with parameters is no graph, and its path.

        None if no submodule with parameters has a finding.
        """
        for call in self._calls:
            parameters = iter(()) if call.module is None else call.module.parameters()
            if call.findings and next(parameters, None) is not None:
                return call.path, call.findings[0]
        return None

    def sources(self, module: nn.Module | None = None) -> list[Source]:
        """Return what calls of ``module`` (None: the step) read in Python, each source once."""
        calls = self._calls_of(module)
        return list({key: s for call in calls for key, s in call.sources.items()}.values())

    def compared(self, module: nn.Module | None = None) -> list[Condition]:
        """Return what calls of ``module`` (None: the step) read in Python and only compare."""
        calls = self._calls_of(module)
        return list({key: c for call in calls for key, c in call.compared.items()}.values())

    def copies_from_host(self, module: nn.Module | None = None) -> bool:
        """Return whether calls of ``module`` (None: the step) copy constants from the host."""
        return any(call.copies_from_host for call in self._calls_of(module))

    def _calls_of(self, module: nn.Module | None) -> list[ModuleCall]:
        if module is None:
            return [self._step]
        return [call for call in self._calls if call.module is module]

    def keys_of_calls(self, module: nn.Module) -> list[BatchDescriptor]:
        """Return the keys that ``module`` was called with."""
        calls = self._calls_of(module)
        return [call.descriptor for call in calls if call.descriptor is not None]
