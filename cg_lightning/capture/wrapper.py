"""The public, vLLM-shaped wrapper that captures and replays a callable."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Generic

from torch import Tensor
from typing_extensions import ParamSpec, TypeVar

from cg_lightning.backends import CapturedGraph, GraphBackend, check_backend, resolve_backend
from cg_lightning.capture.graph import capture_graph, logger, weak_ref_tensors
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import CUDAGraphError
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import CUDAGraphOptions
from cg_lightning.core.tree import flatten, leaf_paths, tensors_in

_Given = ParamSpec("_Given", default=...)
_Returned = TypeVar("_Returned", default=Any)


@dataclasses.dataclass
class CUDAGraphEntry:
    """One captured graph of a :class:`CUDAGraphWrapper` (vLLM: ``compilation/cuda_graph.py``).

    The wrapper makes and stores it; do not make one yourself.

    Example::

        >>> import torch
        >>> from cg_lightning import BatchDescriptor, CUDAGraphMode, CUDAGraphWrapper
        >>> from cg_lightning import set_forward_context
        >>> wrapper = CUDAGraphWrapper(torch.relu, CUDAGraphMode.FULL, backend="recorder")
        >>> key = BatchDescriptor(batch_size=2)
        >>> with set_forward_context(CUDAGraphMode.FULL, key):
        ...     output = wrapper(torch.tensor([-1.0, 1.0]))
        >>> wrapper.concrete_cudagraph_entries[key].cudagraph.replay()
    """

    batch_descriptor: BatchDescriptor
    """The key of the graph."""
    cudagraph: CapturedGraph
    """The graph, with ``replay()`` and ``num_bytes``, its memory in bytes."""
    output: Any
    """The output of the captured call. Every replay overwrites its tensors."""
    input_addresses: list[int]
    """``data_ptr()`` of each tensor in the arguments of the capture, including nested ones."""


def _named_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    paths = leaf_paths(args, "args") + leaf_paths(kwargs, "kwargs")
    leaves = flatten((args, kwargs))[0]
    return [
        (path, leaf) for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, Tensor)
    ]


def _input_addresses(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors_in((args, kwargs))]


class CUDAGraphWrapper(Generic[_Given, _Returned]):
    """Captures a callable and replays it (vLLM: ``vllm/compilation/cuda_graph.py``).

    1. A wrapper is made for one runtime mode, PIECEWISE or FULL.
    2. A call reads runtime mode and batch descriptor from the forward context, and trusts them.
    3. The call goes to the runnable if there is no context, if the mode is NONE or the mode of
       another wrapper, or inside a running capture.
    4. Otherwise a new descriptor is captured, then replayed, so that the call returns real values.
       A known descriptor is replayed.

    In a step of the callback, each call of the wrapper has its own entry
    (``BatchDescriptor.call``). In a context that you open yourself, a second call replays the entry
    of the first.

    The wrapper does *not* own buffers, and it does *not* copy inputs or outputs. Copy new values
    into the tensors that were captured, and read or copy the output before the next replay. If a
    call passes *other* tensors, the graph still reads the old ones and returns a stale result, and
    nothing is raised. With ``CUDAGraphOptions(check_addresses=True)`` such a call raises. Use it
    while you write a loop. The wrapper does *not* check that the descriptor fits the arguments.

    Example::

        >>> import torch
        >>> from cg_lightning import (
        ...     BatchDescriptor,
        ...     CUDAGraphMode,
        ...     CUDAGraphOptions,
        ...     CUDAGraphWrapper,
        ...     set_forward_context,
        ... )
        >>> FULL, key = CUDAGraphMode.FULL, BatchDescriptor(batch_size=2)
        >>> options = CUDAGraphOptions(check_addresses=True)
        >>> double = CUDAGraphWrapper(lambda x: x * 2, FULL, options, backend="recorder")
        >>> static = torch.tensor([1.0, 2.0])  # each batch is copied into it
        >>> with torch.no_grad(), set_forward_context(FULL, key):
        ...     print(double(static).tolist())  # captured, then replayed
        ...     for batch in (torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])):
        ...         print(double(static.copy_(batch)).tolist())  # replayed
        [2.0, 4.0]
        [6.0, 8.0]
        [10.0, 12.0]
        >>> with torch.no_grad(), set_forward_context(FULL, key):
        ...     double(torch.tensor([7.0, 8.0]))  # without check_addresses: [10.0, 12.0] again
        Traceback (most recent call last):
        cg_lightning.core.errors.CUDAGraphError: Input args[0] is at ...

    Args:
        runnable: The callable.
        runtime_mode: PIECEWISE or FULL.
        options: How to capture. None: the defaults of :class:`CUDAGraphOptions`.
        backend: ``cuda``, ``recorder`` or ``auto``. ``auto`` is ``cuda`` if there is a CUDA device;
            otherwise each call goes to the runnable.

    Attributes:
        concrete_cudagraph_entries: The graphs by descriptor.

    Raises:
        ValueError: ``runtime_mode`` is NONE or a policy, or the backend is unknown or unavailable.
    """

    def __init__(
        self,
        runnable: Callable[_Given, _Returned],
        runtime_mode: CUDAGraphMode,
        options: CUDAGraphOptions | None = None,
        *,
        backend: str | GraphBackend = "auto",
    ) -> None:
        mode = CUDAGraphMode.parse(runtime_mode)
        if mode not in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL):
            raise ValueError(f"A wrapper's own runtime_mode is PIECEWISE or FULL, not {mode.name}.")
        self.runnable = runnable
        self.runtime_mode = mode
        self.options = options or CUDAGraphOptions()
        self.concrete_cudagraph_entries: dict[BatchDescriptor, CUDAGraphEntry] = {}
        self._backend_name = check_backend(backend) if isinstance(backend, str) else backend.name
        self._backend = resolve_backend(backend) if isinstance(backend, str) else backend

    def __getattr__(self, name: str) -> Any:
        runnable = self.__dict__.get("runnable")  # missing while a copy is being made
        if runnable is not None and hasattr(runnable, name):
            return getattr(runnable, name)
        raise AttributeError(
            f"Neither {type(self).__name__} nor its runnable {runnable!r} has an attribute "
            f"{name!r}."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(type(self), backend=self._backend_name)
        return (
            make,
            (self.runnable, self.runtime_mode, self.options),
        )  # graphs stay: a copy runs its own weights

    def unwrap(self) -> Callable[_Given, _Returned]:
        """Return the runnable."""
        return self.runnable

    def __call__(self, *args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
        """Call, capture or replay the runnable, as the forward context says.

        Raises:
            CaptureError: The capture failed. No entry is stored.
            CUDAGraphError: The context has no batch descriptor, captures are disabled, or an input
                has another address than in the capture.
        """
        context = current_forward_context()
        if context is None or context.cudagraph_runtime_mode is not self.runtime_mode:
            return self.runnable(*args, **kwargs)
        if self._backend is None or self._backend.is_capturing():
            return self.runnable(*args, **kwargs)
        descriptor = context.batch_descriptor
        if descriptor is None:
            raise CUDAGraphError(
                f"The forward context is in mode {self.runtime_mode.name} but has no "
                "batch_descriptor."
            )
        if call := context.next_call(self):
            descriptor = dataclasses.replace(descriptor, call=call)
        entry = self.concrete_cudagraph_entries.get(descriptor)
        if entry is None:
            entry = self._capture(self._backend, descriptor, args, kwargs)
        elif self._checks_addresses():
            self._check_addresses(entry, args, kwargs)
        entry.cudagraph.replay()
        return entry.output  # type: ignore[no-any-return]

    def _capture(
        self,
        backend: GraphBackend,
        descriptor: BatchDescriptor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> CUDAGraphEntry:

        def run() -> Any:
            output = self.runnable(*args, **kwargs)
            # inside the capture, so that the memory is free for the next one
            return weak_ref_tensors(output, backend) if self.options.weak_ref_output else output

        graph, output = capture_graph(
            backend,
            run,
            self.runtime_mode,
            descriptor,
            self.options,
            collect_garbage=not self.options.gc_disable,
        )
        entry = CUDAGraphEntry(descriptor, graph, output, _input_addresses(args, kwargs))
        self.concrete_cudagraph_entries[descriptor] = entry
        return entry

    def _checks_addresses(self) -> bool:
        check = self.options.check_addresses
        return logger.isEnabledFor(logging.DEBUG) if check is None else check

    def _check_addresses(
        self, entry: CUDAGraphEntry, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if (addresses := _input_addresses(args, kwargs)) == entry.input_addresses:
            return
        if len(addresses) != len(entry.input_addresses):
            raise CUDAGraphError(
                f"Captured with {len(entry.input_addresses)} input tensors, called with "
                f"{len(addresses)}."
            )
        for (path, tensor), expected in zip(
            _named_tensors(args, kwargs), entry.input_addresses, strict=True
        ):
            if tensor.data_ptr() != expected:
                raise CUDAGraphError(
                    f"Input {path} is at {tensor.data_ptr():#x}, but the graph reads "
                    f"{expected:#x}: expected the address of the capture. Copy new values into the "
                    "captured tensor: captured.copy_(new)."
                )
