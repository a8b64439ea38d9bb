"""The Lightning callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from cg_lightning.backends import CapturedGraph, resolve_backend
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import (
    BackendName,
    CUDAGraphOptions,
    ModeName,
    Settings,
    StageName,
    Tolerance,
)
from cg_lightning.core.stages import STEP_METHODS
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.modules.kinds import lightning_class
from cg_lightning.report.stats import CUDAGraphStats
from cg_lightning.report.summary import render_summary
from cg_lightning.runtime.session import Session
from cg_lightning.runtime.targets import check_targets
from cg_lightning.trainer.installation import InertInstallation, Installation
from cg_lightning.trainer.logged_results import LoggedResults
from cg_lightning.trainer.preconditions import check_not_graphed_already, why_inert

_NO_CUDA = (
    "CUDAGraphCallback: there is no CUDA device and backend='auto', so every step runs eagerly, as without the callback. "
    "To try graphs on this machine, at a cost in speed, ask for backend='recorder'."
)


class CUDAGraphCallback(Callback):
    """Runs ``validate``, ``test``, ``predict`` and the validation inside ``fit`` from CUDA graphs.

    The first ``warmup_steps`` batches of each shape run as they would without it. Then the whole step (FULL), or where it does
    not allow that the submodules that it calls (PIECEWISE), are captured once a shape and replayed. What is logged, returned
    and predicted is what eager gives; what cannot be captured runs eagerly, and :attr:`stats` and :meth:`summary` say why.
    Between stages, in training and after an exception nothing of it is left on the module. It does *not* graph training, and
    it saves nothing in checkpoints.

    Args:
        mode: A :class:`CUDAGraphMode` or its name. NONE graphs nothing, PIECEWISE submodules, FULL whole steps, with the
            metrics that they update and what they log, FULL_AND_PIECEWISE whole steps where possible and else submodules.
        stages: Any of ``validate`` (also inside ``fit``; the sanity check is always eager), ``test`` and ``predict``.
        targets: For PIECEWISE, patterns as in :mod:`fnmatch` for names in ``named_modules()``. None: the largest submodules
            with parameters that the step calls and that can be captured. A step that is one graph has no targets: with
            FULL_AND_PIECEWISE they count for the others.
        warmup_steps: Eager runs of a key before its capture. The first one is watched for what a graph could not hold or
            would freeze, so 0 means 1.
        verify_replays: How many first replays of each graph are compared with the eager step on the same batch. A graph that
            differs is dropped, eager's result is used, and a warning names the values.
        verify_every: Compare every so-manieth later replay as well; 0: none.
        verify_tolerance: ``exact``: bit for bit, or within what eager differs from itself; ``close``: the defaults of
            ``torch.testing.assert_close``.
        sync_free_metrics: In captures of whole steps, replace functions of torchmetrics that wait for the device by equal ones
            that do not (:mod:`cg_lightning.metrics.sync_free`). What a metric refuses is then raised when its state is read, at
            the end of the epoch at the latest. False: such metrics keep their step out of mode FULL.
        copy_outputs: Copy outputs out of graph memory. False: a step's output lives until the next replay of its graph.
        max_graphs: The most graphs kept at a time; the least recently used goes first.
        strict: Raise where a step past its warm-up runs in a lower mode than asked: with FULL in any lower one, with the
            other modes where it runs no graph at all.
        backend: ``cuda``, ``recorder`` (any device; for tests and laptops, no speed-up), or ``auto`` (``cuda`` where the
            Trainer runs on it, else everything is eager).
        report: Print the summary of each run when the Trainer is done with it. Each call of ``fit``, ``validate``, ``test``
            or ``predict`` is a run, which warms up and captures anew.
        options: How graphs are captured.

    Raises:
        ValueError: An argument is out of its range; the message names it and the choices. ``setup`` raises it for what only
            the Trainer shows: a target that matches nothing, ``cuda`` without CUDA, a module that is graphed already.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from cg_lightning import CUDAGraphCallback
        >>> trainer = Trainer(callbacks=[CUDAGraphCallback()], logger=False)
    """

    def __init__(
        self,
        *,
        mode: CUDAGraphMode | ModeName = "FULL_AND_PIECEWISE",
        stages: Sequence[StageName] = ("validate", "test", "predict"),
        targets: Sequence[str] | None = None,
        warmup_steps: int = 3,
        verify_replays: int = 2,
        verify_every: int = 0,
        verify_tolerance: Tolerance = "exact",
        sync_free_metrics: bool = True,
        copy_outputs: bool = True,
        max_graphs: int = 64,
        strict: bool = False,
        backend: BackendName = "auto",
        report: bool = True,
        options: CUDAGraphOptions | None = None,
    ) -> None:
        self._settings = Settings(
            mode=mode,
            stages=stages,
            targets=targets,
            warmup_steps=warmup_steps,
            verify_replays=verify_replays,
            verify_every=verify_every,
            verify_tolerance=verify_tolerance,
            sync_free_metrics=sync_free_metrics,
            copy_outputs=copy_outputs,
            max_graphs=max_graphs,
            strict=strict,
            backend=backend,
            report=report,
            options=options,
        )
        self.stats = CUDAGraphStats()
        """What happened so far, over all runs and Trainers that this callback was in."""
        self._installation: Installation | InertInstallation | None = None
        self._stages_run: list[str] = []
        self._runs = 0
        self._before_run = CUDAGraphStats()
        self._reported: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # graphs belong to this process and its module
        return {**self.__dict__, "_installation": None}

    def __repr__(self) -> str:
        settings = self._settings
        return (
            f"{type(self).__name__}(mode={settings.runtime_policy.name!r}, "
            f"stages={settings.stages!r}, targets={settings.targets!r}, "
            f"warmup_steps={settings.warmup_steps}, backend={settings.backend!r})"
        )

    def summary(self) -> str:
        """Return the counts of all runs so far as a table: graphs by stage, target and shape; eager steps with their reasons."""
        scope = f"all {self._runs} runs" if self._runs > 1 else ""
        return render_summary(self.stats, self._settings.backend, tuple(STEP_METHODS), scope)

    def graphs(self, mode: CUDAGraphMode | str) -> list[CapturedGraph]:
        """Return the graphs that are kept at the moment, to measure or to inspect them.

        Args:
            mode: ``FULL``: those of whole steps; ``PIECEWISE``: those of submodules.

        Returns:
            Objects with ``replay()`` and ``num_bytes``; empty between two runs of a Trainer. A replay writes the outputs
            and the metric states of its graph.
        """
        name = CUDAGraphMode.parse(mode).name
        return [] if self._installation is None else self._installation.graphs(name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        self._stages_run = []
        self._runs += 1
        self._before_run = self.stats.copy()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        first = next(callback for callback in callbacks if isinstance(callback, CUDAGraphCallback))
        if first is not self:
            self._report_inert("another CUDAGraphCallback comes first in this Trainer")
            return
        if self._settings.runtime_policy is CUDAGraphMode.NONE:
            self._installation = InertInstallation(trainer.strategy, self.stats, "mode=NONE")
            return
        check_not_graphed_already(pl_module)
        if why := why_inert(trainer, pl_module):
            self._report_inert(why)
            self._installation = InertInstallation(trainer.strategy, self.stats, why)
            return
        backend = resolve_backend(self._settings.backend, trainer.strategy.root_device)
        if self._settings.targets is not None:
            check_targets(pl_module, tuple(self._settings.targets))
        if backend is None:
            why = "no CUDA device: backend='auto' runs eagerly"
            self._report_once(rank_zero_info, _NO_CUDA)
            self._installation = InertInstallation(trainer.strategy, self.stats, why)
            return
        effects = ModuleEffects(
            pl_module,
            backend.device,
            sync_free=self._settings.sync_free_metrics,
            logged=LoggedResults(pl_module),
        )
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        if lightning_class(type(profiler), "PassThroughProfiler"):
            profiler = None
        session = Session(pl_module, backend, self._settings, self.stats, effects, profiler)
        self._installation = Installation(trainer.strategy, pl_module, session)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._install("validate")

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install("test")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install("predict")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        if self._settings.report and self._stages_run and trainer.is_global_zero:
            run = self.stats.since(self._before_run)
            scope = f"run {self._runs} only" if self._runs > 1 else ""
            print(render_summary(run, self._settings.backend, self._stages_run, scope))
        self._stages_run = []

    def _report_inert(self, why: str) -> None:
        message = f"CUDAGraphCallback is inert: {why}. Steps run as without it."
        self._report_once(rank_zero_warn, message)

    def _report_once(self, say: Callable[[str], object], message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            say(message)

    def _install(self, stage: str) -> None:
        if stage not in self._settings.stages:
            return
        if stage not in self._stages_run:
            self._stages_run.append(stage)
        if self._installation is not None:
            self._installation.install(stage)

    def _remove(self) -> None:
        if self._installation is not None:
            self._installation.remove()

    def _close(self) -> None:
        if self._installation is not None:
            self._installation.close()
            self._installation = None
