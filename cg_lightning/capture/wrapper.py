"""The wrapper that captures and replays what it wraps."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cg_lightning.backends import CapturedGraph, GraphBackend, check_backend, resolve_backend
from cg_lightning.capture.graph import capture_graph, logger, weak_ref_tensors
from cg_lightning.core.descriptor import BatchDescriptor
from cg_lightning.core.errors import CUDAGraphError
from cg_lightning.core.forward_context import current_forward_context
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import CUDAGraphOptions
from cg_lightning.core.tree import flatten, leaf_paths


@dataclasses.dataclass
class CUDAGraphEntry:
    """One captured graph."""

    batch_descriptor: BatchDescriptor
    cudagraph: CapturedGraph
    output: Any
    """What the runnable returned during capture: every replay writes it anew."""
    input_addresses: list[int]
    """``data_ptr()`` of each tensor among the arguments of the capture, nested ones too."""


def _named_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    paths = leaf_paths(args, "args") + leaf_paths(kwargs, "kwargs")
    leaves = flatten((args, kwargs))[0]
    return [
        (path, leaf) for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, Tensor)
    ]


def _input_addresses(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [leaf.data_ptr() for leaf in flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]


class CUDAGraphWrapper:
    """Gives a runnable the ability to be captured and replayed (vLLM: ``compilation/cuda_graph.py``).

    1. It is made for one runtime mode, PIECEWISE or FULL.
    2. When called, it reads runtime mode and batch descriptor from the forward context, and blindly trusts them.
    3. Without a context, in mode NONE, in a mode not its own, or inside a running capture, it calls the runnable.
    4. Else a new descriptor is captured, and then replayed so that the call returns real values; a known one is replayed.

    Within one step of a step runner each call gets an entry of its own (``BatchDescriptor.call``); in a context opened by
    hand a second call replays the entry of the first.

    It owns no buffers and copies no inputs: whoever calls it copies new values into the tensors of the capture, and reads
    or copies the outputs before the next replay. A call with *other* tensors is not refused: the graph reads the old ones,
    and returns a stale result without a word. ``CUDAGraphOptions(check_addresses=True)`` raises instead; switch it on while
    a loop is written. It does not look whether the descriptor fits the arguments.

    Args:
        runnable: What to capture.
        runtime_mode: PIECEWISE or FULL.
        options: How to capture.
        backend: ``cuda``, ``recorder`` or ``auto`` (``cuda`` where there is a CUDA device; else the runnable is called).

    Raises:
        ValueError: ``runtime_mode`` is NONE or a policy, or the backend is unknown or not to be had.

    Example::

        >>> import torch
        >>> from cg_lightning import BatchDescriptor, CUDAGraphMode, CUDAGraphOptions, CUDAGraphWrapper
        >>> from cg_lightning import set_forward_context
        >>> options = CUDAGraphOptions(check_addresses=True)
        >>> double = CUDAGraphWrapper(lambda x: x * 2, CUDAGraphMode.FULL, options, backend="recorder")
        >>> static = torch.tensor([1.0, 2.0])  # every batch is copied into it
        >>> key = BatchDescriptor(batch_size=2)
        >>> with torch.no_grad(), set_forward_context(CUDAGraphMode.FULL, key):
        ...     print(double(static).tolist())  # captured, then replayed
        ...     for batch in (torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])):
        ...         print(double(static.copy_(batch)).tolist())  # replayed
        [2.0, 4.0]
        [6.0, 8.0]
        [10.0, 12.0]
        >>> with torch.no_grad(), set_forward_context(CUDAGraphMode.FULL, key):
        ...     double(torch.tensor([7.0, 8.0]))  # without check_addresses: [10.0, 12.0] once more
        Traceback (most recent call last):
        cg_lightning.core.errors.CUDAGraphError: Input args[0] lies at ...
    """

    def __init__(
        self,
        runnable: Callable[..., Any],
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
        runnable = self.__dict__.get("runnable")  # not yet there while a copy is being made
        if runnable is not None and hasattr(runnable, name):
            return getattr(runnable, name)
        raise AttributeError(
            f"Neither {type(self).__name__} nor its runnable {runnable!r} has an attribute {name!r}."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(type(self), backend=self._backend_name)
        return (
            make,
            (self.runnable, self.runtime_mode, self.options),
        )  # graphs stay: a copy runs its own weights

    def unwrap(self) -> Callable[..., Any]:
        """Gives the runnable."""
        return self.runnable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls, captures or replays the runnable, as the forward context says.

        Raises:
            CaptureError: The capture failed; no entry is left.
            CUDAGraphError: The context has no batch descriptor, capturing is disabled, or an input lies elsewhere.
        """
        context = current_forward_context()
        if context is None or context.cudagraph_runtime_mode is not self.runtime_mode:
            return self.runnable(*args, **kwargs)
        if self._backend is None or self._backend.is_capturing():
            return self.runnable(*args, **kwargs)
        descriptor = context.batch_descriptor
        if descriptor is None:
            raise CUDAGraphError(
                f"The forward context is in mode {self.runtime_mode.name} but has no batch_descriptor."
            )
        if call := context.next_call(self):
            descriptor = dataclasses.replace(descriptor, call=call)
        entry = self.concrete_cudagraph_entries.get(descriptor)
        if entry is None:
            entry = self._capture(self._backend, descriptor, args, kwargs)
        elif self._checks_addresses():
            self._check_addresses(entry, args, kwargs)
        entry.cudagraph.replay()
        return entry.output

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
                f"Captured with {len(entry.input_addresses)} input tensors, called with {len(addresses)}."
            )
        for (path, tensor), expected in zip(
            _named_tensors(args, kwargs), entry.input_addresses, strict=True
        ):
            if tensor.data_ptr() != expected:
                raise CUDAGraphError(
                    f"Input {path} lies at {tensor.data_ptr():#x}, but the graph reads {expected:#x}: expected the "
                    f"address of the capture. Copy new values into the captured tensor: captured.copy_(new)."
                )
