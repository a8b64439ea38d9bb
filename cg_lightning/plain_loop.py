"""Graphs without a Trainer: for a plain loop, or for Lightning Fabric."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, Self

import torch
from torch import nn
from typing_extensions import ParamSpec, TypeVar

from cg_lightning.backends import resolve_backend
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.reasons import Reason, Status
from cg_lightning.core.settings import (
    BackendName,
    CUDAGraphOptions,
    ModeName,
    Settings,
    Tolerance,
)
from cg_lightning.core.stages import CALL
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.report.stats import CUDAGraphStats
from cg_lightning.report.summary import Summary, render_summary
from cg_lightning.report.timeline import Ran
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.step_runner import StepRunner
from cg_lightning.runtime.targets import check_targets

_NO_CUDA = Reason(Status.INERT, "no CUDA device: backend='auto' runs eagerly")


_Given = ParamSpec("_Given", default=...)
_Returned = TypeVar("_Returned", default=Any)


class Graphed(Generic[_Given, _Returned]):
    """Runs calls of a module, or of a function that uses one, from graphs.

    :func:`graphed` makes it. The first call intercepts submodules. :meth:`close`, or the end of the
    ``with`` block, restores them and drops the graphs. While it is open, do *not* run the same
    module under another :class:`Graphed` or a callback.

    What the callback compares at the start of each stage is compared here only when a block begins:
    settings of layers (``eps``), strides of weights, values of classes, and containers with more
    than 256 items. Call :meth:`close` if you change one of them.

    Example::

        >>> import torch
        >>> from cg_lightning import graphed
        >>> with torch.inference_mode(), graphed(torch.nn.Linear(3, 2), backend="recorder") as run:
        ...     outputs = [run(torch.ones(4, 3)) for _ in range(6)]
        >>> run.stats.steps["FULL"]
        3

    Attributes:
        stats: Counts, as in :class:`~cg_lightning.CUDAGraphCallback`. The stage is ``call``.
    """

    def __init__(
        self, function: Callable[_Given, _Returned], module: nn.Module, settings: Settings
    ) -> None:
        self.stats = CUDAGraphStats()
        self._function = function
        self._module = module
        self._settings = settings
        self._runner: StepRunner | None = None
        self._session: Session | None = None
        self._why_eager: Reason | None = None
        self._name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
        """Call the function: eagerly while its arguments are new, then from a graph."""
        if self._runner is None and self._why_eager is None:
            self._open()
        if self._runner is None:
            began = perf_counter()
            output = self._function(*args, **kwargs)
            self.stats.timeline.add(CALL, Ran.EAGER, began, self._why_eager)
            self.stats.ran(CALL, "NONE", "-", self._why_eager)
            return output
        return self._runner.run(((args, kwargs),), {})  # type: ignore[no-any-return]

    def _open(self) -> None:
        device = next((p.device for p in self._module.parameters()), None)
        if device is None:
            device = next((b.device for b in self._module.buffers()), torch.device("cpu"))
        backend = resolve_backend(self._settings.backend, device)
        if self._settings.targets is not None:
            check_targets(self._module, tuple(self._settings.targets))
        if backend is None:
            self._why_eager = _NO_CUDA
            warnings.warn(
                "graphed: the module is not on a CUDA device and backend='auto', so every call "
                "runs eagerly. To try graphs on this machine, at a cost in speed, ask for "
                "backend='recorder'.",
                stacklevel=3,
            )
            return
        if why := backend.why_no_captures:
            self._why_eager = Reason(Status.INERT, why)
            warnings.warn(f"graphed: {why}. Every call runs eagerly.", stacklevel=3)
            return
        effects = ModuleEffects(
            self._module, backend.device, sync_free=self._settings.sync_free_metrics
        )
        self._session = Session(self._module, backend, self._settings, self.stats, effects)
        self._runner = StepRunner(self._session, CALL, self._name, self._run)
        self._session.install()

    def _run(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = arguments
        return self._function(*args, **kwargs)

    def summary(self) -> Summary:
        """Return the counts as a table."""
        return render_summary(self.stats, self._settings.backend, [CALL])

    def close(self, check: bool = True) -> None:
        """Leave no trace in the module, and drop the graphs. The next call starts again.

        Args:
            check: Raise the errors of deferred checks of metrics.

        Raises:
            Exception: The error that eager would have raised for a metric's ``validate_args``.
        """
        session, self._session, self._runner = self._session, None, None
        if session is not None:
            try:
                session.remove(check)
            finally:
                session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(check=kind is None)


def graphed(
    function: Callable[_Given, _Returned],
    *,
    module: nn.Module | None = None,
    mode: CUDAGraphMode | ModeName = "FULL_AND_PIECEWISE",
    targets: Sequence[str] | None = None,
    warmup_steps: int = 3,
    verify_replays: int = 2,
    verify_every: int = 0,
    verify_tolerance: Tolerance = "exact",
    sync_free_metrics: bool = True,
    compile: bool | Mapping[str, Any] = False,
    copy_outputs: bool = True,
    min_saving: float = 0.03,
    max_graphs: int = 64,
    max_graph_bytes: int | None = None,
    strict: bool = False,
    backend: BackendName = "auto",
    options: CUDAGraphOptions | None = None,
) -> Graphed[_Given, _Returned]:
    """Run calls of a module or function from graphs, in a plain loop or with Lightning Fabric.

    It works as :class:`~cg_lightning.CUDAGraphCallback` does: the first calls of each shape run
    eagerly and the first one is watched, graphs are verified and guarded, and a call that cannot be
    captured runs eagerly with a reason. Calls under gradients run eagerly. It does *not* move
    anything to a device, and it does *not* graph training.

    Args:
        function: A module, a method of a module, or a function that uses ``module``. Tensors in its
            arguments, including nested ones, are inputs of the graph. Other arguments are part of
            its key.
        module: The module whose parameters and submodules a plain function uses.
        mode: This and all below are those of :class:`~cg_lightning.CUDAGraphCallback`. FULL: each
            call is one graph. PIECEWISE: the submodules that it calls.
        targets: Submodules for PIECEWISE: patterns for their names. None: the largest that can be.
        warmup_steps: Number of eager calls of a key before its capture.
        verify_replays: Number of first replays of each graph to compare with eager.
        verify_every: After that, compare every n-th replay (0 = never).
        verify_tolerance: ``exact`` or ``close``.
        sync_free_metrics: Replace functions of torchmetrics that wait for the device.
        compile: Run the networks under ``torch.compile``; or its arguments as a dictionary.
        copy_outputs: Copy outputs out of graph memory. False: valid until the next replay.
        min_saving: The share of a call's time that a graph must save, or else it is dropped.
        max_graphs: Maximum number of graphs. The least recently used graph is dropped first, but
            no graph that is still in use.
        max_graph_bytes: Maximum memory of all graphs, in bytes. None: any.
        strict: Raise if a call runs in a lower mode than asked after its warm-up.
        backend: ``cuda``, ``recorder`` or ``auto`` (``cuda`` if the module is on CUDA).
        options: How graphs are captured.

    Returns:
        A callable that is also a context manager. At its end nothing is left on the module.

    Raises:
        ValueError: A plain function is given without ``module``, or an option is out of its range.

    Example::

        >>> import torch
        >>> from cg_lightning import graphed
        >>> net = torch.nn.Linear(8, 4).eval()
        >>> with torch.inference_mode(), graphed(net, backend="recorder") as run:
        ...     outputs = [run(torch.randn(2, 8)) for _ in range(8)]
        >>> run.stats.steps
        {'NONE': 3, 'PIECEWISE': 0, 'FULL': 5}
    """
    if module is None:
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if not isinstance(owner, nn.Module):
            raise ValueError(
                f"graphed({getattr(function, '__name__', function)!r}) is given a function that is "
                "no method of a module; expected module=..., the module that it uses."
            )
        module = owner
    settings = Settings(
        mode=mode,
        targets=targets,
        warmup_steps=warmup_steps,
        verify_replays=verify_replays,
        verify_every=verify_every,
        verify_tolerance=verify_tolerance,
        sync_free_metrics=sync_free_metrics,
        compile=compile,
        copy_outputs=copy_outputs,
        min_saving=min_saving,
        max_graphs=max_graphs,
        max_graph_bytes=max_graph_bytes,
        strict=strict,
        backend=backend,
        options=options,
    )
    return Graphed(function, module, settings)
