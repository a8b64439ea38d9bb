"""Watches one eager step, without changing what it computes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from cg_lightning.backends.host_reads import OnCall
from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.tree import flatten
from cg_lightning.diagnosis.detectors.metric_updates import MetricWatch
from cg_lightning.diagnosis.detectors.rebound_state import ReboundState
from cg_lightning.diagnosis.step_watch import Copies, Watch, other_metrics_noticed, printing_noticed
from cg_lightning.diagnosis.watched_step import Call, Finding, Observation
from cg_lightning.diagnosis.written_tensors import LastingTensors
from cg_lightning.effects.host_randomness import HostRandomState
from cg_lightning.effects.step_metrics import StepMetrics
from cg_lightning.metrics.members import metrics_of, states_of
from cg_lightning.modules.attributes import (
    global_hooks,
    hooks_of,
    is_plain_attribute,
    plain_attributes,
    values_of_classes,
)
from cg_lightning.modules.compiled import (
    is_compiled,
    is_graphed_by_compiler,
    modules_inside,
    modules_that_run,
)
from cg_lightning.modules.interception import (
    Interception,
    ModuleHandler,
    can_intercept,
    replaced_method,
)
from cg_lightning.modules.kinds import is_metric, is_user_file, is_user_module
from cg_lightning.runtime.call_key import describe_call, is_inside_transform

_AT_THE_END = "between the start and end of the step"


def _updates(metrics: list[Metric]) -> list[int]:
    return [vars(metric)["_update_count"] for metric in metrics]


def _key_of_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BatchDescriptor | None:
    context = current_forward_context()
    if context is None or context.batch_descriptor is None:
        return None
    training = tuple([child.training for child in module.modules()])
    with contextlib.suppress(UnkeyableBatchError):  # its calls will be eager, and say so then
        return describe_call(
            training, context.next_call(module), context.batch_descriptor, args, kwargs
        )[0]
    return None


class Observer:
    """Runs steps of one module under watch. It changes nothing: what is computed is what eager computes.

    Compiled modules run compiled, so they are watched from outside: what they are given and what they hold is compared.
    Functions and methods that were compiled run as they were written, in watched steps only.

    Args:
        root: The module whose step is run.
        device_type: Where it runs.
        noticing_host_syncs: As the backend's method of that name.
        effects: Methods of ``root`` whose call a graph would freeze, and what the call is called in a finding.
        run_effects: Whether those methods do what they do.
        metrics: Those of ``root``; None: no graph of the whole step may hold ``self.log`` or updates of metrics.
    """

    def __init__(
        self,
        root: nn.Module,
        device_type: str,
        noticing_host_syncs: Callable[[OnCall], AbstractContextManager[None]],
        effects: dict[str, Cause],
        run_effects: bool = True,
        metrics: StepMetrics | None = None,
    ) -> None:
        self._metrics = metrics
        self._noticing_host_syncs = noticing_host_syncs
        self._run_effects = run_effects
        self._root = root
        self._device_type = device_type
        self._effects = effects

    def observe(self, step: Callable[[], Any], batch: Any) -> tuple[Any, Observation]:
        """Runs ``step`` once; gives what it returned, and what was seen."""
        tensors = [leaf for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)]
        frame = Call("", None, tensors)
        modules = list(modules_that_run(self._root))
        all_metrics = metrics_of(self._root)
        with_states = all_metrics if self._metrics is None else self._metrics.all()
        states = [getattr(metric, name) for metric in with_states for name in states_of(metric)]
        watch = Watch(
            self._device_type, frame, [state for state in states if isinstance(state, Tensor)]
        )
        metrics = [module for module in all_metrics if isinstance(module, Metric)]
        watched = None
        if self._metrics is not None:
            watched = MetricWatch(
                all_metrics, self._metrics.results.metrics, watch.add, self._metrics.sync_free
            )
        compiled = [(path, module) for path, module in modules if is_compiled(module)]
        inside = [
            pair
            for path, module in compiled
            for pair in modules_inside(path, module)
            if not is_metric(pair[1])
        ]
        states_before = {path: ReboundState(module) for path, module in [*modules, *inside]}
        for read in values_of_classes([self._root]):
            watch.add_read(read)
        lasting = LastingTensors(self._root)
        copies, copies_inside = (
            Copies(tensors),
            Copies(lasting.of_attributes(module for _, module in inside)),
        )
        updates = _updates(metrics)
        with self._intercepted(modules, metrics, watch, watched is not None):
            host = HostRandomState()
            with (
                watch.globals.noticing(),
                printing_noticed(watch),
                other_metrics_noticed(all_metrics, watch),
                self._noticing_host_syncs(watch.add),
                contextlib.nullcontext()
                if watched is None
                else watched.watching(watch.sparing_the_step),
                watch.watching(),
            ):
                output = step()
            watch.add_mutation(copies_inside.changed(), "compiled code")
            if (changed := copies.changed()) and not any(
                f.cause is Cause.INPUT_MUTATED for f in frame.findings
            ):
                watch.add_mutation(changed, "the batch")
            if host.was_drawn(self._device_type) and not any(
                f.cause is Cause.HOST_RANDOMNESS for f in frame.findings
            ):
                watch.add(Cause.HOST_RANDOMNESS, "random state moved")
        if watched is not None:
            watched.finish()
        elif _updates(metrics) != updates and not any(
            f.cause is Cause.METRIC_UPDATED for f in frame.findings
        ):
            watch.add(Cause.METRIC_UPDATED, "update")
        self._find_rebound_state(
            frame, {path: state.changed() for path, state in states_before.items()}
        )
        observation = Observation(frame)
        for key, words in watch.globals.problems():
            observation.add_to_readers(key, Finding(Cause.STATE_REBOUND, words, "", _AT_THE_END))
        observation.settles = (watched is not None and watched.settles) or bool(
            compiled and frame.findings
        )
        observation.written = lasting.written(watch.written_outside)
        observation.release()
        return output, observation

    @contextlib.contextmanager
    def _intercepted(
        self,
        modules: list[tuple[str, nn.Module]],
        metrics: list[Metric],
        watch: Watch,
        may_log: bool,
    ) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for path, module in modules:
                if can_intercept(module):
                    handler = self._handler(path, module, metrics, watch, may_log)
                    stack.callback(Interception(module, handler).remove)
            for name, cause in self._effects.items():
                effect = self._effect(name, cause, watch, may_log)
                stack.enter_context(replaced_method(self._root, name, effect))
            yield

    def _handler(
        self, path: str, module: nn.Module, metrics: list[Metric], watch: Watch, may_log: bool
    ) -> ModuleHandler:
        graphed_already = is_graphed_by_compiler(module)
        inside = (
            [module, *[child for _, child in modules_inside(path, module)]]
            if is_compiled(module)
            else []
        )
        unseen = [
            (child, name) for child in inside for name in plain_attributes(child)
        ] + values_of_classes(inside or [module])

        def call(
            original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            leaves = [] if is_inside_transform() else flatten((args, kwargs))[0]
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            frame = Call(path, module, tensors, _key_of_call(module, args, kwargs))
            watch.stack[-1].calls.append(frame)
            watch.stack.append(frame)
            for read_unseen in unseen:
                watch.add_read(read_unseen)
            updates = _updates(metrics)
            own_state = ReboundState(module) if module is self._root else None
            with watch.paused():
                host, copies = HostRandomState(), Copies(tensors if inside else [])
            try:
                if graphed_already:
                    watch.add(Cause.GRAPHED_ALREADY, type(module).__name__)
                if any(global_hooks()) or any(any(hooks_of(child)) for child in inside or [module]):
                    watch.add(Cause.FORWARD_HOOK, type(module).__name__)
                if not inside:
                    return original(*args, **kwargs)
                with watch.globals.paused(), watch.left():
                    return original(*args, **kwargs)
            finally:
                with watch.paused():
                    drawn = host.was_drawn(self._device_type)
                    if changed := copies.changed():
                        watch.add_mutation(changed, "compiled code")
                if drawn:
                    watch.add(Cause.HOST_RANDOMNESS, "random state moved")
                if _updates(metrics) != updates:
                    # nobody sees what compiled code does to them
                    add = watch.add_for_submodules if may_log and not inside else watch.add
                    add(Cause.METRIC_UPDATED, "update")
                if own_state is not None and (names := own_state.changed()):
                    watch.add(Cause.STATE_REBOUND, ", ".join(names))
                watch.stack.pop()

        def read(name: str) -> None:
            if watch.is_in_framework:
                return
            if module is self._root and name in ("logger", "loggers"):
                watch.add(Cause.PRINTED, f"self.{name}")
            if module is self._root and name in ("trainer", "current_epoch", "global_step"):
                watch.add(Cause.TRAINER_READ, f"self.{name}")
            names = [name] if is_plain_attribute(module, name) else []
            if name == "__dict__" and is_user_file(
                sys._getframe(3).f_code.co_filename
            ):  # ``vars(self)["name"]``
                names = plain_attributes(module)
            for each in names:
                watch.add_read((module, each))

        if (is_user_module(module) and not inside) or module is self._root:
            return _SeesCallsAndReads(call, read)
        return _SeesCalls(call)

    def _effect(self, name: str, cause: Cause, watch: Watch, may_log: bool) -> Callable[..., Any]:
        def method(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            spares = cause is Cause.LOGGED and may_log
            (watch.add_for_submodules if spares else watch.add)(cause, f"self.{name}")
            if not self._run_effects:
                return None
            # where Lightning's results are not known, the call is made after the replay
            is_made_later = (
                spares and self._metrics is not None and not self._metrics.results.is_supported()
            )
            before, watch.is_in_framework = watch.is_in_framework, True
            try:
                with watch.sparing_the_step() if is_made_later else contextlib.nullcontext():
                    return original(*args, **kwargs)
            finally:
                watch.is_in_framework = before

        return method

    def _find_rebound_state(self, frame: Call, changed: dict[str, list[str]]) -> None:
        for path, names in changed.items():
            if not names:
                continue
            finding = Finding(Cause.STATE_REBOUND, ", ".join(sorted(names)), path, _AT_THE_END)
            frame.findings.append(finding)
            for call in Observation(frame)._all_calls(frame):
                inside = not call.path or path == call.path or path.startswith(f"{call.path}.")
                if inside and path:  # the root's own state was compared around each of its calls
                    call.findings.append(finding)


class _SeesCalls(ModuleHandler):
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def on_call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return self._call(original, args, kwargs)


class _SeesCallsAndReads(_SeesCalls):
    def __init__(self, call: Callable[..., Any], read: Callable[[str], None]) -> None:
        super().__init__(call)
        self._read = read

    def on_read(self, name: str) -> None:
        self._read(name)
