"""Everything that a step may change, and how to restore it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cg_lightning.backends import GraphBackend
from cg_lightning.core.equality import copy_of, numbers_of, parts_of
from cg_lightning.core.tree import flatten
from cg_lightning.effects.attributes import AttributesSnapshot
from cg_lightning.effects.containers import ContainersSnapshot
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.effects.places import ChangedAttribute
from cg_lightning.effects.python_changes import ChangedAttributesSnapshot
from cg_lightning.metrics.members import states_of
from cg_lightning.modules.attributes import (
    global_hooks,
    names_of_frameworks,
    slots_in,
)
from cg_lightning.modules.kinds import is_metric


def _held_by(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **slots_in(module)}


class HeldByModules:
    """Snapshot of the attributes of modules, which finds tensors that a capture leaves there.

    Such tensors are in graph memory.

    Args:
        module: The module.
        effects: The effects of its steps. None: metrics are treated like other modules.
    """

    def __init__(self, module: nn.Module, effects: ModuleEffects | None) -> None:
        self._modules = [
            (path, child)
            for path, child in module.named_modules(prefix="self")
            if effects is None or not is_metric(child)
        ]
        self._attributes = AttributesSnapshot(child for _, child in self._modules)
        self._before = [_held_by(child) for _, child in self._modules]
        self._containers = ContainersSnapshot(
            (f"{path}.{name}", value)
            for path, child in self._modules
            for known in [names_of_frameworks(child) - _TENSOR_TABLES]
            for name, value in _held_by(child).items()
            if name not in known
        )

    def left(self) -> str:
        """Return where a new tensor is; empty if there is none."""
        for (path, child), before in zip(self._modules, self._before, strict=True):
            for name, value in _held_by(child).items():
                if value is not before.get(name) and any(
                    isinstance(leaf, Tensor) for leaf in flatten(value)[0]
                ):
                    return f"{path}.{name}"
        return self._containers.changed()

    def restore(self) -> None:
        """Restore all of them."""
        self._attributes.restore()
        self._containers.restore()


class TablesSnapshot:
    """Snapshot of the dictionaries of PyTorch in modules: members and hooks.

    Args:
        module: The module; its submodules and the global hooks are stored as well.
    """

    def __init__(self, module: nn.Module) -> None:
        tables: list[dict[Any, Any]] = [
            value
            for child in module.modules()
            for known in [names_of_frameworks(child)]
            for name, value in vars(child).items()
            if isinstance(value, dict) and name in known
        ]
        self._tables = [(table, dict(table)) for table in [*tables, *global_hooks()]]

    def restore(self) -> None:
        """Put everything back in place."""
        for table, before in self._tables:
            table.clear()
            table.update(before)


_TENSOR_TABLES = {"_buffers", "_parameters"}


class HostRandomState:
    """Stores the state of the random generators of Python, of NumPy if loaded, and of the CPU."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._module: Any = sys.modules.get("numpy")
        self._numpy = self._module.random.get_state() if self._module is not None else None

    def restore(self) -> None:
        """Restore the states."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._module is not None:
            self._module.random.set_state(self._numpy)

    def was_drawn(self, device_type: str) -> bool:
        """Return True if a number was drawn since this object was made.

        Args:
            device_type: The device type of steps. On the CPU, PyTorch's own generator may be used.
        """
        now = HostRandomState()
        if now._python != self._python or now._comparable_numpy() != self._comparable_numpy():
            return True
        return device_type != "cpu" and not torch.equal(now._torch, self._torch)

    def _comparable_numpy(self) -> tuple[Any, ...]:
        if self._numpy is None:
            return ()
        name, keys, *rest = self._numpy
        return (name, keys.tobytes(), *rest)


def can_be_written(tensor: Tensor) -> bool:
    """Return False for a tensor that PyTorch protects from writes, so no step has written to it."""
    is_expanded = tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return not is_expanded and (torch.is_inference_mode_enabled() or not tensor.is_inference())


def put_back(tensor: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor: part by part, since sparse ones are given other memory."""
    pairs = list(zip(parts_of(tensor), parts_of(value), strict=True))
    if all(part.shape == before.shape for part, before in pairs):
        for part, before in pairs:
            numbers_of(part).copy_(numbers_of(before))
    else:
        tensor.copy_(value)


class StepState:
    """Stores everything that a step may change, except its output.

    These are buffers, attributes of submodules, and the states of random generators. If ``effects``
    are given, metrics and logged values are stored as well.

    Args:
        module: The module.
        backend: The backend on which it runs.
        effects: The effects of its steps. None if the module runs as a submodule.
        written: Other tensors that steps write to.
        given: The arguments of the step, whose containers are restored as well.
        changes: Attributes that the step changes in Python and a replay changes as well.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: GraphBackend,
        effects: ModuleEffects | None = None,
        written: Iterable[Tensor] = (),
        given: Any = None,
        changes: Sequence[ChangedAttribute] = (),
    ) -> None:
        self._backend = backend
        self._changes = ChangedAttributesSnapshot(changes)
        self._metrics = None if effects is None else MetricsSnapshot(effects)
        others = [(f"tensor of shape {tuple(tensor.shape)}", tensor) for tensor in written]
        self._buffers = [
            (name, tensor, copy_of(tensor)) for name, tensor in [*module.named_buffers(), *others]
        ]
        modules = [child for child in module.modules() if effects is None or not is_metric(child)]
        self._attributes = AttributesSnapshot(modules)
        self._given = ContainersSnapshot([("batch", given)])
        self._containers = ContainersSnapshot(
            (name, value)
            for child in modules
            for known in [names_of_frameworks(child)]
            for name, value in _held_by(child).items()
            if name not in known
        )
        self._host_random_state = HostRandomState()
        self._device_random_state = backend.get_random_state()

    def restore(self) -> None:
        """Restore everything in place. Tensors keep their addresses."""
        with torch.no_grad():
            for _, buffer, value in self._buffers:
                if can_be_written(buffer):
                    put_back(buffer, value)
        self._attributes.restore()
        self._given.restore()
        self._containers.restore()
        self._changes.restore()
        if self._metrics is not None:
            self._metrics.restore()
        self._host_random_state.restore()
        self._backend.set_random_state(self._device_random_state)

    def has_changed_containers(self) -> bool:
        """Return True if a container in the arguments of the step was changed since."""
        return bool(self._given.changed())

    def metric_tensors(self) -> list[Tensor]:
        """Return what metrics held when this was made. A step may write to it and then drop it."""
        return [] if self._metrics is None else self._metrics.tensors()

    def values(self) -> list[tuple[str, Any]]:
        """Return names and copies of the current buffers, metric values, and Python changes."""
        buffers = [(f"buffer {name}", copy_of(buffer)) for name, buffer, _ in self._buffers]
        entries = [
            (path, copy_of(leaf) if isinstance(leaf, Tensor) else leaf)
            for path, value in self._given.new_items()
            for leaf in flatten(value)[0]
        ]
        values = [*buffers, *self._changes.values(), *entries]
        return values if self._metrics is None else [*values, *self._metrics.values()]


class NoState:
    """The state of a step that changes nothing, for callers of :class:`StepState`."""

    def restore(self) -> None:
        """Do nothing."""

    def has_changed_containers(self) -> bool:
        """Return False."""
        return False

    def metric_tensors(self) -> list[Tensor]:
        """Return nothing."""
        return []

    def values(self) -> list[tuple[str, Any]]:
        """Return nothing."""
        return []


class MetricsSnapshot:
    """Stores everything that a step may change in metrics and logged values.

    Args:
        effects: The effects of the steps of a module.
    """

    def __init__(self, effects: ModuleEffects) -> None:
        self._effects = effects
        metrics = effects.reachable_metrics()
        tensors = {id(tensor): tensor for tensor in effects.states.tensors()}
        for metric in metrics:
            values = [vars(metric).get(name) for name in states_of(metric)]
            tensors.update({id(value): value for value in values if isinstance(value, Tensor)})
        self._tensors = [(tensor, tensor.clone()) for tensor in tensors.values()]
        self._attributes = AttributesSnapshot(metrics)
        lists = [
            value for metric in metrics for value in vars(metric).values() if type(value) is list
        ]
        self._lists = [(value, list(value)) for value in lists]
        self._locations = effects.states.locations()
        self._logged = effects.logged.snapshot()

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the states."""
        return [tensor for tensor, _ in self._tensors]

    def restore(self) -> None:
        """Restore everything in place."""
        for tensor, value in self._tensors:
            if torch.is_inference_mode_enabled() or not tensor.is_inference():
                tensor.copy_(value)  # outside inference mode, no inference tensor was written to
        self._attributes.restore()
        for items, before in self._lists:
            items[:] = before
        self._effects.states.restore(self._locations)
        self._effects.logged.restore(self._logged)

    def values(self) -> list[tuple[str, Any]]:
        """Return names and values of states, of results of the last step, and of counters."""
        return [
            (f"{type(metric).__name__}.{name}", leaf.clone() if isinstance(leaf, Tensor) else leaf)
            for metric in self._effects.metrics()
            for name in (*states_of(metric), "_forward_cache", "_update_count", "_computed")
            for leaf in flatten(getattr(metric, name, None))[0]
        ]
