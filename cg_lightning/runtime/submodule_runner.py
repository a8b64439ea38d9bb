"""Replace the calls of one submodule in steps that run PIECEWISE."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch
from torch import nn

from cg_lightning.backends import GraphBackend
from cg_lightning.capture.call import GraphCall
from cg_lightning.capture.entry import GraphEntry
from cg_lightning.core.descriptor import BatchDescriptor, describe_call
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.forward_context import StepInProgress, current_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import WARM_UP, Changed, Reason, Status
from cg_lightning.guards.guard_set import GuardSet
from cg_lightning.guards.module_guard import Change
from cg_lightning.modules.compiled import is_compiled_by_callback
from cg_lightning.modules.interception import Interception, ModuleHandler
from cg_lightning.report.records import Saving
from cg_lightning.runtime.keys import Entry, KeyState, Miss, Variant
from cg_lightning.runtime.plans import Action, Plan, no_gain
from cg_lightning.runtime.profiling import Ranges
from cg_lightning.runtime.target import GraphTarget, reason_of

_OTHER_INPUT = Changed("an input that is not what the submodule before it has computed")
MANY_VALUES = 2
"""If a source has had this many values, the submodules inside may run from graphs too."""


@dataclasses.dataclass(eq=False)
class _KnownCalls:
    """What is known of the calls of one submodule in steps with one key."""

    guards: list[GuardSet] | None = None
    """The values that watched steps have read, the latest first. None: no graph is allowed."""
    refusal: Reason | None = None
    """Why no graph is allowed."""
    calls: list[BatchDescriptor] = dataclasses.field(default_factory=list)
    """The keys of the calls in the latest watched step."""
    changed: Changed | None = None
    """The large container that has changed since the last epoch; None if none has."""


class SubmoduleRunner(ModuleHandler):
    """Intercepts one submodule and runs its calls from graphs.

    Graphs are used only in steps whose watched run called this submodule without findings. A call
    has its own key, which is made from its arguments, because arguments may differ in steps with
    equal batches. Like a step, a call runs eagerly until its key is warm. A call is also eager
    outside a step, in mode NONE, under gradients, inside a capture, and if the step has changed a
    value that the submodule reads.

    Args:
        path: Dotted path of the submodule; empty for the LightningModule itself.
        target: Captures and verifies.
        backend: Captures and replays.
        ranges: Marks replays and captures for profilers.
    """

    def __init__(
        self, path: str, target: GraphTarget, backend: GraphBackend, ranges: Ranges
    ) -> None:
        self.path = path
        self.target = target
        self.name = path or "forward"
        self._backend = backend
        self._ranges = ranges
        self._steps: dict[BatchDescriptor, _KnownCalls] = defaultdict(_KnownCalls)
        self._interception: Interception | None = None
        self._is_idle = False
        """True if no step uses its graphs any more, so that it is not intercepted."""

    @property
    def module(self) -> nn.Module:
        """The submodule."""
        return self.target.module

    def allow(
        self, step: BatchDescriptor, guards: GuardSet, calls: Iterable[BatchDescriptor], runs: int
    ) -> None:
        """Allow graphs in steps with this key.

        Args:
            step: The key of the step.
            guards: The values that the submodule read in the watched step.
            calls: The keys of its calls in that step.
            runs: Number of steps with this key so far.
        """
        if self._is_idle:
            self._is_idle = False
            self.install()
        state = self._steps[step]
        known = state.guards or []
        state.guards = known if any(each.check() for each in known) else [guards, *known]
        state.calls = list(calls)
        for descriptor in state.calls:
            call = self.target.dispatcher.state(descriptor.fields, descriptor)
            self.target.dispatcher.ran_before(call, runs)

    def varying_sources(self, step: BatchDescriptor) -> set[tuple[int, str]]:
        """Return the keys of the sources that had a new value in each watched step."""
        known = self._steps[step].guards if step in self._steps else None
        stale = [guards for guards in known or () if not guards.check()]
        if len(stale) < MANY_VALUES:
            return set()
        return set[tuple[int, str]]().union(*[guards.changed_sources() for guards in stale])

    def refuse(self, step: BatchDescriptor, reason: Reason) -> None:
        """Run eagerly in steps with this key, unless another watched step allows it."""
        self._steps[step].refusal = reason

    def note_saving(self, step: BatchDescriptor, saving: Saving) -> None:
        """Store in the statistics what graphs save in steps with this key. The step has ended."""
        for entry in self.target.dispatcher.entries_of(self._steps[step].calls):
            assert isinstance(entry, GraphEntry)
            entry.record.saved(saving)

    def leave_alone(self, step: BatchDescriptor, saving: Saving) -> list[Entry]:
        """Run eagerly in steps with this key from now on, because graphs do not save time.

        Args:
            step: The key of the step.
            saving: The times of the calls of this submodule in a step.

        Returns:
            Graphs that the caller must drop, because no step uses them any more.
        """
        self._steps[step].guards = None
        self._steps[step].refusal = no_gain(saving).of_submodule(self.path)
        if any(state.guards is not None for state in self._steps.values()):
            return []
        self.remove()
        self._is_idle = True
        return self.target.dispatcher.entries()

    def begin_epoch(self) -> None:
        """Forget permissions whose large containers have changed."""
        self._drop(self.target.dispatcher.begin_epoch())
        for state in self._steps.values():
            stale = [guards for guards in state.guards or () if not guards.check_epoch()]
            if state.guards and stale:
                state.changed = stale[0].explain()
                state.guards = [guards for guards in state.guards if guards not in stale]

    def install(self) -> None:
        """Intercept the submodule from now on; idempotent."""
        if self._interception is None and not self._is_idle:
            self._interception = Interception(self.module, self)

    def remove(self) -> None:
        """Leave no trace in the submodule. Its graphs are kept for the next stage."""
        if self._interception is not None:
            self._interception.remove()
            self._interception = None

    def on_call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call, from a graph if that is allowed."""
        context = current_forward_context()
        if context is None or context.step is None:
            return original(*args, **kwargs)
        if context.step.times is not None:
            return self._timed(context.step, original, args, kwargs)
        if context.batch_descriptor is None:
            return original(*args, **kwargs)
        mode = context.cudagraph_runtime_mode
        if mode is CUDAGraphMode.FULL or torch.is_grad_enabled() or self._backend.is_capturing():
            return original(*args, **kwargs)
        step, key = context.step, context.batch_descriptor
        known = self._steps.get(key)
        if mode is CUDAGraphMode.PIECEWISE and (known is None or known.guards is None):
            if known is not None and known.refusal is not None:
                step.ran_eagerly(self.path, known.refusal)
            return original(*args, **kwargs)
        try:
            training = self.target.guard.flags()
            fields, leaves = describe_call(training, step.next_call(self), key, args, kwargs)
        except UnkeyableBatchError as error:
            step.ran_eagerly(self.path, reason_of(error).of_submodule(self.path))
            return original(*args, **kwargs)
        state = self.target.dispatcher.known(fields) or self.target.dispatcher.state(fields)
        if mode is CUDAGraphMode.NONE:
            return self._warm_up(state, step, original, args, kwargs)
        plan = self._plan(state, key, step)
        entry = None if plan.variant is None else plan.variant.entry
        if isinstance(entry, GraphEntry) and not entry.finds(leaves):
            plan = self._captured_anew(plan, entry)
        if plan.action is Action.REPLAY:
            assert plan.variant is not None and isinstance(plan.variant.entry, GraphEntry)  # noqa: PT018
            given = (args, kwargs)
            began = perf_counter()
            if self._ranges.is_on:
                with self._ranges.range("replay"):
                    output = plan.variant.entry.replay(leaves, self.target.cache.step, given)
            else:
                output = plan.variant.entry.replay(leaves, self.target.cache.step, given)
            plan.variant.entry.count_timed(perf_counter() - began)
            step.ran_from_graph()
            return output
        return self._run(plan, original, args, kwargs, leaves, step)

    def _warm_up(
        self,
        state: KeyState,
        step: StepInProgress,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run one call eagerly, which counts as a warm-up."""
        self.target.dispatcher.ran_eagerly(state)
        began = perf_counter()
        output = original(*args, **kwargs)
        if step.is_warm:  # or else the step is watched
            state.called_eagerly(perf_counter() - began)
        return output

    def _timed(
        self,
        step: StepInProgress,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run one call, and take its time, which includes the calls inside it."""
        times = step.times
        stopwatch = times.begin(perf_counter())
        with step.inside_timed_call():
            output = self.on_call(original, args, kwargs)
        stopwatch.stop()
        times.pieces[self].append(stopwatch)
        return output

    def _plan(self, state: KeyState, key: BatchDescriptor, step: StepInProgress) -> Plan:
        if not self.target.guard.check():
            self._module_changed()
        plan = self.target.dispatcher.plan(state)
        if plan.variant is not None:
            return plan
        known = self._steps[key]
        if known.guards is None:  # the module has just changed
            known.guards = []
        guards = next((guards for guards in known.guards if guards.check()), None)
        if guards is None:
            changed = known.changed or Changed(self.name)
            changed = known.guards[0].explain() if known.guards else changed
            step.missed(Miss(changed, list(known.guards)))
            reason = Reason.of_change(Status.CHANGED, changed).of_submodule(self.path)
            return Plan(Action.EAGER, state, None, reason)
        self._drop(
            self.target.dispatcher.add_variant(state, Variant(guards, [CUDAGraphMode.PIECEWISE]))
        )
        return self.target.dispatcher.plan(state)

    def _captured_anew(self, plan: Plan, entry: GraphEntry) -> Plan:
        """Return the plan of a call whose input is not where its graph reads it.

        Until now, that was where the graph of another submodule has left it.
        """
        assert plan.variant is not None
        self._drop([entry])
        plan.variant.entry = None
        plan.state.inputs_moved += 1
        plan.state.ledger.note(Status.UNPROFITABLE, _OTHER_INPUT)
        return plan._replace(action=Action.CAPTURE)

    def _run(
        self,
        plan: Plan,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        step: StepInProgress,
    ) -> Any:
        if plan.action in (Action.CAPTURE, Action.VERIFY):
            step.took_longer()

            def call_original(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
                return original(*arguments[0], **arguments[1])

            call = GraphCall(plan.state.descriptor, call_original, (args, kwargs), leaves)
            with self._ranges.range(plan.action.name.lower()):
                outcome = self.target.run(self.name, plan, call)
            if outcome is not None:
                if outcome.reason is None:
                    step.ran_from_graph()
                else:
                    step.ran_eagerly(self.path, outcome.reason)
                return outcome.output
            assert plan.variant is not None and plan.variant.reason is not None  # noqa: PT018
            step.ran_eagerly(self.path, plan.variant.reason)
            return original(*args, **kwargs)
        reason = plan.reason or WARM_UP
        step.ran_eagerly(self.path, reason)
        if reason.kind is Status.CHANGED and is_compiled_by_callback(self.module):
            # Dynamo does not guard all values: see Compilation.compile_again
            with torch.compiler.set_stance("force_eager"):
                return self._run_eagerly(plan, step, original, args, kwargs)
        return self._run_eagerly(plan, step, original, args, kwargs)

    def _run_eagerly(
        self,
        plan: Plan,
        step: StepInProgress,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if plan.action is Action.WARM_UP:
            return self._warm_up(plan.state, step, original, args, kwargs)
        return original(*args, **kwargs)

    def _module_changed(self) -> None:
        failure = self.target.guard.failure()
        self.target.guard.refresh()
        self._drop(self.target.dispatcher.entries())
        if failure.change is Change.MOVED:
            self.target.dispatcher.changed(failure.text)
        else:
            self.target.dispatcher.reset(failure.text)
            for state in self._steps.values():
                state.guards = None

    def _drop(self, entries: Iterable[object]) -> None:
        for entry in entries:
            assert isinstance(entry, GraphEntry)
            self.target.cache.drop(entry)
