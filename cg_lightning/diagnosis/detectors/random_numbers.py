"""Random numbers drawn on the host, which a graph cannot follow."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.cuda import random as device_random
from torch.utils._pytree import tree_leaves

from cg_lightning.core.causes import KEPT_STATES, Cause
from cg_lightning.core.tree import tensors_in
from cg_lightning.diagnosis.detector import Detector
from cg_lightning.diagnosis.findings import find_location
from cg_lightning.diagnosis.operands import HeldOperand, addresses_in
from cg_lightning.diagnosis.step_watch import StepWatch
from cg_lightning.diagnosis.watched_step import ModuleCall
from cg_lightning.effects.host_draws import HostDraw

_COMPILER = ("torch._dynamo.convert_frame", "torch._dynamo.utils", "torch._inductor")
_HARMLESS = ("getstate", "get_state")
_SEEDING = (
    *("manual_seed", "manual_seed_all", "seed", "seed_all"),
    *("set_rng_state", "set_rng_state_all", "fork_rng"),
)
"""Functions of PyTorch that set a generator: a replay draws on from where it is."""
_READING = ("get_rng_state", "get_rng_state_all")
_CHECKPOINT = "torch.utils.checkpoint"
"""The module that reads the states in the forward pass, and sets them again in the backward."""


@dataclasses.dataclass
class _UnusedDraw:
    """A tensor of the host that a step has drawn, and given to no operation so far."""

    draw: HostDraw
    held: HeldOperand
    location: str
    """The line that draws it."""
    is_used: bool = False


class RandomNumbers(Detector):
    """Compares the states of the host's generators around each call.

    The user's line is known if a function of ``random`` or ``numpy.random`` was called by its
    module, or if an operation of PyTorch drew. Other draws are only seen by the comparison. What
    sets a generator of PyTorch, the device's included, is reported as well.

    A tensor of the host that the step draws, gives to no operation, and drops is no reason: it is
    drawn again with each replay (``effects/host_draws.py``). Submodules that draw it get no graph.
    """

    def __init__(self, watch: StepWatch) -> None:
        super().__init__(watch)
        self._unused: list[_UnusedDraw] = []
        self._begin: tuple[Any, ...] = ()
        self._drawn_before = 0
        """The draws before :attr:`_begin`."""
        self._checkpoint: str | None = None
        """The line of the last checkpoint that keeps random states."""

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        with self._noticing_draws(), self._noticing_seeds():
            self._begin = self._state()
            yield
            self._compare(self._begin, self._drawn_before)
        for draw in self._unused:
            if draw.held.is_held_by_others():
                self._report_draw(draw)
        self.watch.notes.host_draws = [each.draw for each in self._unused]
        self._unused = []

    @contextlib.contextmanager
    def around_update(self) -> Iterator[None]:
        # LateUpdates compares what the call draws
        self._compare(self._begin, self._drawn_before)
        yield
        self._begin, self._drawn_before = self._state(), len(self._unused)

    @contextlib.contextmanager
    def around_call(self, call: ModuleCall) -> Iterator[None]:
        before, drawn_before = self._state(), len(self._unused)
        yield
        self._compare(before, drawn_before)

    def before_read(self, tensor: Tensor) -> None:
        self._note_used([tensor])

    def before_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # PyTorch itself detaches what it has drawn, which reads nothing
        if function is not torch.ops.aten.detach.default:
            self._note_used([*args, *kwargs.values()])
        if self.watch.device_type != "cpu" and _has_cudnn_dropout(function, args, kwargs):
            words = f"{function._schema.name} with dropout, whose state cannot be restored"
            self.watch.report_once_a_line(Cause.HOST_RANDOMNESS, words)
        if function.namespace == "aten" and not _draws(function):
            return  # all of PyTorch's own operations that take a generator have the tag
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator):
                is_followed = function.namespace == "aten" and self.watch.draws_from(value)
                if not is_followed:
                    words = f"{function._schema.name} with a generator of its own"
                    self.watch.report(Cause.HOST_RANDOMNESS, words)

    def after_operation(
        self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.watch.device_type == "cpu" or not _draws(function):
            return
        tensors = tensors_in(output)
        # attention on a device returns the seed of its dropout as well, on the host
        if not (tensors and all(tensor.is_cpu for tensor in tensors)):
            return
        words = function._schema.name
        if not (self.watch.is_about_step and _can_be_repeated(function, args, kwargs, output)):
            self.watch.report_once_a_line(Cause.HOST_RANDOMNESS, words)
            return
        draw = HostDraw(function, args, {**kwargs, "dtype": output.dtype})
        self._unused.append(_UnusedDraw(draw, HeldOperand(output), find_location().user))
        inner = [call for call in self.watch.stack if call is not self.watch.step]
        self.watch.report(Cause.HOST_RANDOMNESS, words, calls=inner)

    def _state(self) -> tuple[Any, ...]:
        """The generators' states; PyTorch's CPU generator is the device's if steps run there."""
        numpy = sys.modules.get("numpy")
        return (
            random.getstate(),
            _numpy_state() if numpy is not None else None,
            None if self.watch.device_type == "cpu" else _torch_state(),
        )

    def _compare(self, before: tuple[Any, ...], drawn_before: int) -> None:
        """Report a difference from an earlier state that the draws since then do not make."""
        after = self._state()
        draws = self._unused[drawn_before:]
        if draws and after != before:
            with self.watch.paused():
                self._put(before)
                for each in draws:
                    each.draw.run()
                before = self._state()
                self._put(after)
        if after != before:
            self.watch.report_unless_found(Cause.HOST_RANDOMNESS, "random state moved")

    @staticmethod
    def _put(state: tuple[Any, ...]) -> None:
        """Put PyTorch's generator of the host into a state."""
        torch.set_rng_state(torch.frombuffer(bytearray(state[-1]), dtype=torch.uint8))

    def _note_used(self, operands: list[Any]) -> None:
        used = addresses_in(operands) if self._unused else ()
        for draw in self._unused:
            if draw.held.address in used and not draw.is_used:
                draw.is_used = True
                self._report_draw(draw)

    def _report_draw(self, draw: _UnusedDraw) -> None:
        words, where = draw.draw.function._schema.name, draw.location
        self.watch.report_once_a_line(Cause.HOST_RANDOMNESS, words, location=where)

    @contextlib.contextmanager
    def _noticing_draws(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in ("random", "numpy.random"):
                module = sys.modules.get(name)
                for attribute, function in _draws_of(module):
                    stack.callback(setattr, module, attribute, function)
                    setattr(module, attribute, self._noticed(f"{name}.{attribute}", function))
            yield

    @contextlib.contextmanager
    def _noticing_seeds(self) -> Iterator[None]:
        thread = threading.get_ident()

        def noticed(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def seed(*args: Any, **kwargs: Any) -> Any:
                caller = sys._getframe(1).f_globals.get("__name__", "")
                # the compiler sets generators, and sets them back
                is_of_step = threading.get_ident() == thread and not caller.startswith(_COMPILER)
                if is_of_step and not _is_fork_disabled(function, args, kwargs):
                    self._note_state(function.__name__, caller)
                return function(*args, **kwargs)

            return seed

        with contextlib.ExitStack() as stack:
            for module, name, function in _seeding_functions(len(sys.modules)):
                if vars(module).get(name) is not function:  # other code has replaced it
                    continue
                stack.enter_context(patch.object(module, name, noticed(function)))
            yield

    def _note_state(self, name: str, caller: str) -> None:
        """Note that a module calls a function that reads or sets the state of a generator.

        PyTorch and we read states to set them again.
        """
        cause = Cause.HOST_RANDOMNESS
        is_checkpoint = caller == _CHECKPOINT
        if name in _READING and is_checkpoint:
            self._checkpoint = find_location().user
        elif name in _READING and caller.split(".")[0] in ("torch", "cg_lightning"):
            return
        elif is_checkpoint:
            self.watch.report_once_a_line(cause, KEPT_STATES, location=self._checkpoint)
        else:
            self.watch.report_once_a_line(cause, f"torch.{name}")

    def _noticed(self, name: str, function: Any) -> Callable[..., Any]:
        thread = threading.get_ident()

        @functools.wraps(function)
        def draw(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or self.watch.is_paused:
                return function(*args, **kwargs)
            before = self._state()
            output = function(*args, **kwargs)
            if self._state() != before:
                self.watch.report_once_a_line(Cause.HOST_RANDOMNESS, name)
            return output

        return draw


@functools.lru_cache(maxsize=1)
def _seeding_functions(_: int) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return where functions that set a generator are named: also by ``from torch import seed``.

    Args:
        _: The number of modules that are loaded; with another one, all are searched again.
    """
    owners, every = (torch.random, device_random), (*_SEEDING, *_READING)
    functions = [getattr(owner, name, None) for owner in owners for name in every]
    known = {id(function) for function in functions if function is not None}
    return [
        (module, name, names[name])
        for module in list(sys.modules.values())
        for names in [getattr(module, "__dict__", {})]
        for name in every
        if name in names and id(names[name]) in known
    ]


def _can_be_repeated(
    function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> bool:
    """Return True if an operation makes one tensor by plain values and the default generator."""
    names = [argument.name for argument in function._schema.arguments]
    values = tree_leaves((args, kwargs))
    is_plain = not any(isinstance(value, (Tensor, torch.Generator)) for value in values)
    return is_plain and type(output) is Tensor and "dtype" in names and function.namespace == "aten"


def _is_fork_disabled(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether it is ``fork_rng(enabled=False)``, as checkpoints call it that keep no state."""
    if function.__name__ != "fork_rng":
        return False
    given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    return given.get("enabled") is False


def _draws(function: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in function.tags


def _has_cudnn_dropout(function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is a recurrent network with dropout: cuDNN draws from a state of its own.

    PyTorch seeds that state once in a process, and each run of the step changes it.
    """
    names = [argument.name for argument in function._schema.arguments]
    if "dropout" not in names or "train" not in names:
        return False
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("train")) and bool(given.get("dropout"))


def _torch_state() -> bytes:
    """The state of PyTorch's generator of the host; no operation is dispatched to read it."""
    state = torch.get_rng_state()
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = sys.modules["numpy"].random.get_state()
    return (name, keys.tobytes(), *rest)


def _draws_of(module: Any) -> list[tuple[str, Any]]:
    """Returns the functions of a module that draw from its generator: methods of one object."""
    sample = getattr(module, "random", None)
    generator = getattr(sample, "__self__", None)
    if generator is None:
        return []
    return [
        (name, function)
        for name, function in vars(module).items()
        if name not in _HARMLESS and getattr(function, "__self__", None) is generator
    ]
