"""What a step changes in place: what it was given, and tensors that live longer than it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy

from cg_lightning.core.causes import Cause
from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.core.equality import copy_of, same_leaf
from cg_lightning.core.lines import Elsewhere
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.module_state import readable_contents
from cg_lightning.diagnosis.operands import addresses_in, written_tensors
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall, WrittenTensors
from cg_lightning.effects.batch_entries import BatchEntries
from cg_lightning.effects.batch_writes import BatchWrites
from cg_lightning.effects.containers import ContainersSnapshot
from cg_lightning.guards.values import addresses_of
from cg_lightning.metrics.members import states_of
from cg_lightning.modules.attributes import names_of_frameworks
from cg_lightning.modules.kinds import is_metric


class Mutations(Detector):
    """Reports inputs that are changed in place, and notes all other tensors that are.

    A tensor of the batch that the step changes is no finding if a replay can copy it back.

    The containers of the batch, and of the arguments of each call, are compared before and after: a
    replay adds, replaces and removes no entries.

    Compiled code and kernels of the user's own show no operation, so tensors are compared with
    copies there. States of metrics do not count: they have effects of their own.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._is_elsewhere = watch.device_type != "cpu"
        states = [
            getattr(metric, name) for metric in watch.all_metrics for name in states_of(metric)
        ]
        self._made = addresses_of(state for state in states if isinstance(state, Tensor))
        self._made |= watch.step.input_addresses
        self._written: dict[int, Tensor] = {}
        """Tensors that were changed and not made in the step, by the address of their storage."""
        self._persistent = _PersistentTensors(watch.root)
        self._batch = BatchWrites(watch.batch, watch.device_type, self._persistent.addresses())
        self._containers: dict[int, ContainersSnapshot] = {}
        """By the id of the call."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        watch = self.watch
        hidden = [child for inside in watch.hidden.values() for _, child in inside]
        copies_inside = _TensorCopies(self._persistent.of_attributes(hidden) if hidden else [])
        copies = _TensorCopies(watch.step.inputs)
        with watch.paused():
            entries = BatchEntries(watch.batch)
        with self._comparing_containers(watch.step, [("batch", watch.batch)], entries):
            yield
        self._add(copies_inside.changed(), "compiled code")
        if not any(finding.cause is Cause.INPUT_MUTATED for finding in watch.step.findings):
            unseen = [tensor for tensor in copies.changed() if not self._batch.has(tensor)]
            self._add(unseen, "the batch", location=Elsewhere.AT_THE_END)
        watch.notes.batch_writes = self._batch.indices()
        watch.notes.written.update(self._persistent.written(self._written))

    @contextlib.contextmanager
    def around_call(self, call: ModuleCall) -> Iterator[None]:
        given = [
            (f"argument {index}", value)
            for index, value in enumerate([*call.given, *call.inputs])
            if not is_plain_value(value)
        ]
        with self._comparing_containers(call, given), self._comparing_tensors(call):
            yield

    def returned(self, call: ModuleCall, output: Any) -> None:
        known = set(map(id, call.inputs))
        for tensor in tensors_in(output):
            is_made = id(tensor) not in known and type(tensor) is Tensor
            # private: marks of dimensions, for the next compilation
            names = [name for name in vars(tensor) if "_dynamo_" not in name]
            if is_made and names and not self._persistent.holds(tensor):
                words = f"{names[0]}, an attribute of its output"
                self.watch.report(Cause.STATE_REBOUND, words, calls=[call])
        containers = self._containers.get(id(call))
        if containers is None or isinstance(output, Tensor) or call is self.watch.step:
            return
        with self.watch.paused():
            is_returned = containers.holds(output)
        if is_returned:
            what = "a container of its arguments"
            self.watch.report(Cause.INPUT_MUTATED, f"returns {what}", calls=[call])

    @contextlib.contextmanager
    def _comparing_containers(
        self, call: ModuleCall, given: list[tuple[str, Any]], entries: BatchEntries | None = None
    ) -> Iterator[None]:
        if not given:
            yield
            return
        with self.watch.paused():
            containers = self._containers[id(call)] = ContainersSnapshot(given)
        try:
            yield
        finally:
            del self._containers[id(call)]
        line = ""
        with self.watch.paused():
            changed = containers.changed()
            if changed:
                line = self.watch.line_that_changes(containers.changed_places())
            if changed and entries is not None and entries.can_be_made_again():
                with entries.undone():
                    changed = containers.changed()
                if not changed:
                    self.watch.notes.fills_batch = True
        if changed:
            where = line or Elsewhere.AT_THE_END
            self.watch.report(
                Cause.INPUT_MUTATED, changed, location=where, module=call.path, calls=[call]
            )

    @contextlib.contextmanager
    def _comparing_tensors(self, call: ModuleCall) -> Iterator[None]:
        if not call.hidden:
            yield
            return
        with self.watch.paused():
            copies = _TensorCopies(call.inputs)
        yield
        with self.watch.paused():
            changed = copies.changed()
        self._add(changed, "compiled code")

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tensors = written_tensors(function, args, kwargs)
        self._add(tensors, function._schema.name, is_seen=True)

    def after_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        made = addresses_in(output)
        made -= self._made
        if made:
            made -= addresses_in(args)
            if kwargs:
                made -= addresses_in(list(kwargs.values()))
            self._made |= made

    def _add(
        self,
        tensors: list[Tensor],
        operation: str,
        *,
        is_seen: bool = False,
        location: str | None = None,
    ) -> None:
        if not tensors:
            return
        if any(tensor.layout is not torch.strided for tensor in tensors):
            self.watch.report(Cause.STATE_REBOUND, f"{operation} of a sparse tensor")
            tensors = [tensor for tensor in tensors if tensor.layout is torch.strided]
        addresses = addresses_of(tensors)
        for tensor in tensors:
            if tensor.is_cpu and self._is_elsewhere:
                continue  # no graph writes to it: see CopiedConstants
            address = tensor.untyped_storage().data_ptr()
            if address not in self._made and address not in self._written:
                with torch.inference_mode(False), self.watch.paused():
                    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                    self._written[address] = whole.set_(tensor.untyped_storage())
        given = [
            call for call in self.watch.stack if not addresses.isdisjoint(call.input_addresses)
        ]
        step = self.watch.step
        if is_seen and step in given and self.watch.is_about_step and self._batch.add(tensors):
            given.remove(step)  # a replay copies it back
        self.watch.report(Cause.INPUT_MUTATED, operation, location=location, calls=given)


class _TensorCopies:
    """Copies of tensors, to find those that were changed by no visible operation."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._pairs = [
            (tensor, copy_of(tensor)) for tensor in tensors if tensor.layout is torch.strided
        ]

    def changed(self) -> list[Tensor]:
        """Returns the tensors that differ from their copies."""
        return [tensor for tensor, before in self._pairs if not same_leaf(tensor, before)]


class _PersistentTensors:
    """Tensors that live longer than a step: parameters, buffers, and what attributes hold.

    Args:
        root: The module whose step runs.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._attributes = [
            (module, name, contents)
            for module in root.modules()
            if not is_metric(module)
            for name, value in vars(module).items()
            if name not in names_of_frameworks(module)
            if (contents := readable_contents(value)) is not None
        ]
        known = {id(module) for module in root.modules()}
        self._hidden = [
            module
            for _, _, values in self._attributes
            for module in values.modules
            if id(module) not in known
        ]

    def of_attributes(self, modules: Iterable[nn.Module]) -> list[Tensor]:
        """Returns the tensors that attributes of some modules hold."""
        ids = set(map(id, modules))
        return [
            tensor
            for module, _, values in self._attributes
            if id(module) in ids
            for tensor in values.tensors
        ]

    def holds(self, tensor: Tensor) -> bool:
        """Returns whether a tensor is a parameter, a buffer, or held by an attribute."""
        return any(each is tensor for each in self._all())

    def addresses(self) -> set[int]:
        """Returns where the storages of all of them begin."""
        return addresses_of(self._all())

    def _all(self) -> list[Tensor]:
        modules = [self._root, *self._hidden]
        members = _of(
            each for module in modules for each in (module.parameters(), module.buffers())
        )
        return [*members, *(t for _, _, values in self._attributes for t in values.tensors)]

    def written(self, outside: dict[int, Tensor]) -> WrittenTensors:
        """Returns which tensors were changed.

        Args:
            outside: Tensors that were changed and not made in the step, by the address of their
                storage.
        """
        modules = [self._root, *self._hidden]
        parameters = _of(module.parameters() for module in modules)
        found = WrittenTensors()
        # not every operation says that it writes to buffers, so these are always restored
        found.add(_of(module.buffers() for module in self._hidden))
        if not outside:
            return found
        found.add(
            parameter for parameter in parameters if addresses_of([parameter]) & outside.keys()
        )
        known = addresses_of([*parameters, *_of(module.buffers() for module in modules)])
        for module, name, values in self._attributes:
            addresses = addresses_of(values.tensors)
            known |= addresses
            if addresses & outside.keys():
                found.add_attribute(module, name)
        found.add(tensor for address, tensor in outside.items() if address not in known)
        return found


def _of(iterators: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    return [tensor for each in iterators for tensor in each if not is_lazy(tensor)]
