"""Watches one eager step: which submodules it calls, and what in them a graph could not hold or would freeze."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torchmetrics import Metric

from cg_lightning.backends.dispatch import EagerDispatchMode
from cg_lightning.backends.invisible import OnCall
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import UnkeyableBatchError
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.legality import Cause, find_illegal
from cg_lightning.core.tree import flatten
from cg_lightning.metrics.members import is_metric, metrics_of
from cg_lightning.metrics.step_metrics import StepMetrics
from cg_lightning.metrics.watch import MetricWatch
from cg_lightning.stage.call_key import describe_call
from cg_lightning.stage.host_randomness import HostRandomState
from cg_lightning.stage.interception import Interception, can_intercept, plain_class
from cg_lightning.stage.location import users_location
from cg_lightning.stage.module_attributes import (
    class_values,
    global_hooks,
    hooks_of,
    is_plain_object,
    is_same_value,
    is_user_written,
    names_of_frameworks,
)

_MOST_ITEMS = 100
"""Items of a container that are compared."""


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

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.cause.value}: {self.operation}{where} ({self.location})"


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout is torch.strided}


@dataclasses.dataclass
class _Call:
    """One call of a module, or (``module`` is None) the step."""

    path: str
    module: nn.Module | None
    inputs: list[Tensor]
    descriptor: BatchDescriptor | None = None
    findings: list[Finding] = dataclasses.field(default_factory=list)
    calls: list[_Call] = dataclasses.field(default_factory=list)
    reads: dict[tuple[int, str], nn.Module] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.input_addresses = _addresses(self.inputs)


def is_graphed_by_compiler(module: nn.Module) -> bool:
    """Whether ``torch.compile`` runs this module from CUDA graphs of its own."""
    get_config = getattr(module, "get_compiler_config", None) if is_compiled(module) else None
    return bool(get_config is not None and (get_config() or {}).get("triton.cudagraphs"))


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` runs this module."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes a second, and what is not imported compiled nothing
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def modules_that_run(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Gives paths and modules as ``named_modules()``, but goes neither into metrics nor into compiled modules."""
    seen: set[int] = set()
    pending = [(path, root)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen or is_metric(module):
            continue
        seen.add(id(module))
        yield path, module
        if not (is_compiled(module) and module is not root):
            children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
            pending.extend(reversed(children))


def _state(module: nn.Module) -> dict[str, Any]:
    """What the module's attributes refer to, those of its classes too, and how long its containers are."""
    state: dict[str, Any] = {}
    for name, value in class_values(module):
        state.update({name: value, **{f"{name}{key}": item for key, item in _inside(value)}})
    for name, value in vars(module).items():
        if name == "_metric_attributes":
            continue  # Lightning's cache of the names of metrics, made by the first ``self.log``
        if name in ("_parameters", "_buffers", "_modules"):
            state.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            state[name] = value
            if name not in names_of_frameworks():
                state.update({f"{name}{key}": item for key, item in _inside(value)})
    return state


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container or a plain object of the user's holds: a step may change it, and a graph would not."""
    if isinstance(value, (list, tuple, set, dict)):
        yield "'s length", len(value)
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in itertools.islice(value.items(), _MOST_ITEMS))
    elif isinstance(value, list):
        yield from ((f"[{index}]", item) for index, item in enumerate(value[:_MOST_ITEMS]))
    elif is_plain_object(value):
        yield from ((f".{name}", item) for name, item in vars(value).items())


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    missing = object()
    return [name for name in {**before, **after} if not is_same_value(before.get(name, missing), after.get(name, missing))]


def _updates(metrics: list[Metric]) -> list[int]:
    return [vars(metric)["_update_count"] for metric in metrics]


def _key_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchDescriptor | None:
    context = current_forward_context()
    if context is None or context.batch_descriptor is None:
        return None
    training = tuple([child.training for child in module.modules()])
    with contextlib.suppress(UnkeyableBatchError):  # its calls will be eager, and say so then
        return describe_call(training, context.next_call(module), context.batch_descriptor, args, kwargs)[0]
    return None


@contextlib.contextmanager
def _other_metrics_noticed(known: list[nn.Module], watch: _Watch) -> Iterator[None]:
    """Notices metrics that are no submodules (in a dict, say): nobody would bring up to date what they hold."""
    thread, original = threading.get_ident(), Metric.__setattr__
    ids = set(map(id, known))

    def write(metric: Metric, name: str, value: Any) -> None:
        if name == "_update_count" and threading.get_ident() == thread and id(metric) not in ids:
            watch.add(Cause.METRIC_UPDATED, f"{plain_class(metric).__name__} is no submodule")
        original(metric, name, value)

    with patch.object(Metric, "__setattr__", write):
        yield


@contextlib.contextmanager
def _printing_noticed(watch: _Watch) -> Iterator[None]:
    original, thread = builtins.print, threading.get_ident()

    def noticed(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread:
            watch.add(Cause.PRINTED, "print")
        original(*args, **kwargs)

    with patch.object(builtins, "print", noticed):
        yield


class _Watch(EagerDispatchMode):
    """Collects findings for all calls that are under way."""

    def __init__(self, device_type: str, step: _Call) -> None:
        super().__init__(device_type)
        self.stack = [step]
        self.is_in_framework = False
        """Whether what reads attributes of the module is Lightning, in ``self.log``."""
        self._paused = False
        self._first = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While we ourselves compare something, nothing is a finding."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def add(self, cause: Cause, operation: str) -> None:
        """Adds a finding to every call that is under way."""
        if self._paused:
            return
        finding = Finding(cause, operation, self.stack[-1].path, users_location())
        for call in self.stack[self._first :]:
            call.findings.append(finding)

    @contextlib.contextmanager
    def sparing_the_step(self) -> Iterator[None]:
        """While something runs that a graph of the whole step can hold, and that of a submodule cannot."""
        before, self._first = self._first, 1
        try:
            yield
        finally:
            self._first = before

    def add_for_submodules(self, cause: Cause, operation: str) -> None:
        """Adds a finding to every call of a submodule that is under way."""
        with self.sparing_the_step():
            self.add(cause, operation)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return self.call(func, args, kwargs)
        if (cause := find_illegal(func, args, kwargs, self.device_type)) is not None:
            self.add(cause, func._schema.name)
        caches_a_cast = self._autocast and func._schema.name == "aten::_to_copy"  # autocast does so with gradients
        if torch.is_grad_enabled() and not caches_a_cast and self._tracks_gradients(args):
            self.add(Cause.GRADIENTS, func._schema.name)
        if func._schema.is_mutable:
            self._find_mutated_inputs(func, args, kwargs)
        return self.call(func, args, kwargs)

    def _tracks_gradients(self, args: tuple[Any, ...]) -> bool:
        """Whether what is computed has a gradient: metrics enable gradients for the value of a batch, which has none."""
        if torch.is_inference_mode_enabled():
            return False
        return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in flatten(args)[0])

    def _find_mutated_inputs(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = zip(func._schema.arguments, args, strict=False)
        written = [value for argument, value in named if argument.alias_info is not None and argument.alias_info.is_write]
        written += [kwargs[a.name] for a in func._schema.arguments if a.alias_info is not None and a.name in kwargs]
        addresses = _addresses(leaf for leaf in flatten(written)[0] if isinstance(leaf, Tensor))
        for call in self.stack:
            if call.input_addresses & addresses:
                call.findings.append(Finding(Cause.INPUT_MUTATED, func._schema.name, self.stack[-1].path, users_location()))


class Observation:
    """What one eager run of a step showed."""

    def __init__(self, step: _Call) -> None:
        self._step = step
        self.settles = False
        """Whether something was done that is done once: metrics formed groups, a module was compiled."""

    def release(self) -> None:
        """Lets go of the tensors that the calls were given: an observation lives as long as its key."""
        for call in (self._step, *self._all_calls(self._step)):
            call.inputs.clear()

    @property
    def findings(self) -> list[Finding]:
        """Reasons why the whole step is no graph; empty where it could be one."""
        return self._step.findings

    @property
    def may_settle(self) -> bool:
        """Whether another look may show less: a cache that the first step built is not built again."""
        return self.settles or any(finding.cause is Cause.STATE_REBOUND for finding in self.findings)

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

        def choose(outer: _Call) -> None:
            for call in outer.calls:
                assert call.module is not None
                if id(call.module) in unclean or next(call.module.parameters(), None) is None:
                    choose(call)
                else:
                    chosen[call.path] = call.module

        choose(self._step)
        return chosen

    def reads(self, module: nn.Module | None = None) -> list[tuple[nn.Module, str]]:
        """Plain attributes of user-written modules that calls of ``module`` (None: the step) read."""
        calls = [self._step] if module is None else [c for c in self._all_calls(self._step) if c.module is module]
        return [(owner, name) for call in calls for (_, name), owner in call.reads.items()]

    def keys_of_calls(self, module: nn.Module) -> list[BatchDescriptor]:
        """The keys that ``module`` was called with."""
        calls = [call for call in self._all_calls(self._step) if call.module is module]
        return [call.descriptor for call in calls if call.descriptor is not None]

    def _all_calls(self, outer: _Call) -> Iterator[_Call]:
        for call in outer.calls:
            yield call
            yield from self._all_calls(call)


class Observer:
    """Runs steps of one module under watch. It changes nothing: what is computed is what eager computes.

    Steps with compiled modules are watched from outside only: under a dispatch mode they would not run compiled.

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
        frame = _Call("", None, tensors)
        watch = _Watch(self._device_type, frame)
        modules = list(modules_that_run(self._root))
        all_metrics = metrics_of(self._root)
        metrics = [module for module in all_metrics if isinstance(module, Metric)]
        watched = None
        if self._metrics is not None:
            watched = MetricWatch(all_metrics, self._metrics.results.metrics, watch.add, self._metrics.sync_free)
        before = {path: _state(module) for path, module in modules}
        updates = _updates(metrics)
        with self._intercepted(modules, metrics, watch, watched is not None):
            compiled = any(is_compiled(module) for _, module in modules)
            host = HostRandomState()
            with (
                _printing_noticed(watch),
                _other_metrics_noticed(all_metrics, watch),
                self._noticing_host_syncs(watch.add),
                contextlib.nullcontext() if watched is None else watched.watching(watch.sparing_the_step),
                contextlib.nullcontext() if compiled else watch.watching(),
            ):
                output = step()
            if host.was_drawn(self._device_type) and not any(f.cause is Cause.HOST_RANDOMNESS for f in frame.findings):
                watch.add(Cause.HOST_RANDOMNESS, "random state moved")
        if watched is not None:
            watched.finish()
        elif _updates(metrics) != updates and not any(f.cause is Cause.METRIC_UPDATED for f in frame.findings):
            watch.add(Cause.METRIC_UPDATED, "update")
        self._find_rebound_state(frame, {path: _changed(before[path], _state(module)) for path, module in modules})
        observation = Observation(frame)
        observation.settles = (watched is not None and watched.settles) or (compiled and bool(frame.findings))
        observation.release()
        return output, observation

    @contextlib.contextmanager
    def _intercepted(
        self, modules: list[tuple[str, nn.Module]], metrics: list[Metric], watch: _Watch, may_log: bool
    ) -> Iterator[None]:
        interceptions: list[Interception] = []
        try:
            for path, module in modules:
                if can_intercept(module):
                    interceptions.append(self._intercept(path, module, metrics, watch, may_log))
            yield
        finally:
            for interception in reversed(interceptions):
                interception.remove()

    def _intercept(self, path: str, module: nn.Module, metrics: list[Metric], watch: _Watch, may_log: bool) -> Interception:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
            frame = _Call(path, module, tensors, _key_of_call(module, args, kwargs))
            watch.stack[-1].calls.append(frame)
            watch.stack.append(frame)
            updates = _updates(metrics)
            own_state = _state(module) if module is self._root else {}
            host = HostRandomState()
            try:
                if is_graphed_by_compiler(module):
                    watch.add(Cause.GRAPHED_ALREADY, type(module).__name__)
                if any((*hooks_of(module), *global_hooks())):
                    watch.add(Cause.FORWARD_HOOK, type(module).__name__)
                return interception.call_original(*args, **kwargs)
            finally:
                with watch.paused():
                    drawn = host.was_drawn(self._device_type)
                if drawn:
                    watch.add(Cause.HOST_RANDOMNESS, "random state moved")
                if _updates(metrics) != updates:
                    add = watch.add_for_submodules if may_log else watch.add
                    add(Cause.METRIC_UPDATED, "update")
                if own_state and (names := _changed(own_state, _state(module))):
                    watch.add(Cause.STATE_REBOUND, ", ".join(names))
                watch.stack.pop()

        methods: dict[str, Callable[..., Any]] = {}
        if module is self._root:
            methods = {name: self._effect(name, cause, watch, may_log) for name, cause in self._effects.items()}

        def read(name: str) -> None:
            if watch.is_in_framework:
                return
            if module is self._root and name in ("logger", "loggers"):
                watch.add(Cause.PRINTED, f"self.{name}")
            if module is self._root and name in ("trainer", "current_epoch", "global_step"):
                watch.add(Cause.TRAINER_READ, f"self.{name}")
            if name not in names_of_frameworks() and not callable(getattr(plain_class(module), name, None)):
                for frame in watch.stack:
                    frame.reads[id(module), name] = module

        on_read = read if is_user_written(module) or module is self._root else None
        interception = Interception(module, call=call, methods=methods, on_read=on_read)
        return interception

    def _effect(self, name: str, cause: Cause, watch: _Watch, may_log: bool) -> Callable[..., Any]:
        original = getattr(self._root, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            spares = cause is Cause.LOGGED and may_log
            (watch.add_for_submodules if spares else watch.add)(cause, f"self.{name}")
            if not self._run_effects:
                return None
            # where Lightning's results are not known, the call is made after the replay
            is_made_later = spares and self._metrics is not None and not self._metrics.results.is_supported()
            before, watch.is_in_framework = watch.is_in_framework, True
            try:
                with watch.sparing_the_step() if is_made_later else contextlib.nullcontext():
                    return original(*args, **kwargs)
            finally:
                watch.is_in_framework = before

        return method

    def _find_rebound_state(self, frame: _Call, changed: dict[str, list[str]]) -> None:
        for path, names in changed.items():
            if not names:
                continue
            finding = Finding(Cause.STATE_REBOUND, ", ".join(sorted(names)), path, "between the start and end of the step")
            frame.findings.append(finding)
            for call in Observation(frame)._all_calls(frame):
                inside = not call.path or path == call.path or path.startswith(f"{call.path}.")
                if inside and path:  # the root's own state was compared around each of its calls
                    call.findings.append(finding)
