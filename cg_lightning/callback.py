"""The Lightning callback."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from cg_lightning.backends import CapturedGraph, resolve_backend
from cg_lightning.core.errors import CaptureError
from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.settings import (
    BackendName,
    CUDAGraphOptions,
    ModeName,
    Settings,
    StageName,
    Tolerance,
)
from cg_lightning.core.stages import STEP_METHODS, TRAIN
from cg_lightning.report.logged import numbers_to_log
from cg_lightning.report.stats import CUDAGraphStats
from cg_lightning.report.summary import Summary, print_summary, render_summary
from cg_lightning.runtime.targets import check_targets
from cg_lightning.trainer.batch_transfer import EVALUATION_HOOKS, TRAINING_HOOKS
from cg_lightning.trainer.examples import BatchesAhead
from cg_lightning.trainer.given_batches import GivenBatches
from cg_lightning.trainer.installation import InertInstallation, Installation
from cg_lightning.trainer.loggers import log_numbers
from cg_lightning.trainer.parts import make_session, make_transfers
from cg_lightning.trainer.preconditions import (
    check_not_graphed_already,
    why_inert,
    why_no_training,
)
from cg_lightning.trainer.stage_length import TrainerStageLength
from cg_lightning.trainer.training import TrainingInstallation

_NO_CUDA = (
    "CUDAGraphCallback: there is no CUDA device and backend='auto', so every step runs eagerly, as "
    "without the callback. To try graphs on this machine, at a cost in speed, ask for "
    "backend='recorder'."
)


class CUDAGraphCallback(Callback):
    """Runs ``validate``, ``test``, ``predict`` and the validation inside ``fit`` from CUDA graphs.

    The first ``warmup_steps`` batches of each shape run as without the callback. Then the whole
    step is captured once for each input shape (FULL), and replayed. If the step does not allow
    that, the submodules that it calls are captured instead (PIECEWISE). Logged, returned and
    predicted values are those of eager. If a step cannot be captured, it runs eagerly, and
    :attr:`stats` and :meth:`summary` say why. Between stages and after an exception, nothing of the
    callback is on the module. Training runs as without it, unless ``stages`` names
    ``train``. It does *not* save anything in checkpoints. The modes are vLLM's
    (``vllm/config/compilation.py``).

    Args:
        mode: A :class:`CUDAGraphMode` or its name. NONE: no graphs. PIECEWISE: submodules. FULL:
            whole steps, including their metrics and logged values. FULL_AND_PIECEWISE: whole steps
            if possible, otherwise submodules.
        stages: Any of ``validate`` (also inside ``fit``), ``test``, ``predict`` and ``train``. The
            sanity check is always eager. With ``train``, step and backward of automatic
            optimization are one graph in the modes FULL and FULL_AND_PIECEWISE; the optimizer stays
            eager. Training is never compiled, captured ahead or in pieces.
        targets: Submodules for PIECEWISE: patterns of :mod:`fnmatch` for the names in
            ``named_modules()``. None: the largest submodules with parameters that the step calls
            and that can be captured. With FULL_AND_PIECEWISE, targets apply only to steps that are
            not one graph.
        warmup_steps: Number of eager runs of a key before its capture. The first run is watched for
            operations that a graph cannot contain and values that it would freeze, so 0 means 1.
        verify_replays: Number of first replays of each graph to compare with the eager step on the
            same batch. If a replay differs, the graph is dropped, eager's result is used, and a
            warning names the value.
        verify_every: After that, compare every n-th replay (0 = never).
        verify_tolerance: ``exact``: bitwise equal; if eager itself is not deterministic, within the
            difference between eager runs. ``close``: the defaults of
            ``torch.testing.assert_close``.
        sync_free_metrics: In captures of whole steps, replace functions of torchmetrics that wait
            for the device by equal ones that do not (:mod:`cg_lightning.metrics.sync_free`). If a
            metric refuses its input, the error is raised when its state is read, at the end of the
            epoch at the latest. Likewise for functions of PyTorch that check their arguments
            (``torch.linalg.cholesky``, ``Normal``). False: they keep their step out of mode FULL.
        compile: Run the networks under ``torch.compile`` during a stage, and graph the result; or
            the arguments of ``torch.compile`` as a dictionary. Compiled are the largest submodules
            with parameters; afterwards they are as before. A compiler rounds differently, so
            results equal eager's within a tolerance only, and verification compares with the
            uncompiled step as with ``verify_tolerance="close"``.
        copy_outputs: Copy outputs out of graph memory. False: an output is valid until the next
            replay of its graph.
        overlap_copies: Copy each batch to the device on a stream of its own, while the device still
            computes the batch before. It applies to Lightning's own transfer of batches of more
            than 1 MiB on the host, to eager steps as well. At most two steps are queued on the
            device, because the memory of a batch is held until its step is done. In ``predict``,
            copy predictions to the host while the device computes the next ones. False: Lightning
            copies on the stream that computes, and waits for predictions.
        capture_sizes: Pad batches along dimension 0 up to the next of these sizes, and cut outputs
            back: whole steps of ``predict``, and the submodules of other steps. Needs
            ``verify_tolerance="close"``. Where rows change each other, shapes stay as they are.
        pad_dims: Pad other dimensions, for example
            ``{"input_ids": {1: {"sizes": "pow2", "value": 0}}}``: for each leaf of the batch and
            each dimension the sizes, a list or ``"pow2"``, and the value of the padding. ``"auto"``
            proposes these from the first batches. Only what gives the numbers of eager is used.
        min_saving: The share of a step's time that a graph must save. The first replays are timed
            on host and device. If they do not save enough, a few steps run eagerly to compare, and
            then a graph that saves less is dropped. Its key runs eagerly from then on, with the
            reason ``no gain``. A stage with too few batches to win back a capture runs eagerly. 0
            keeps every graph, and so do ``strict=True`` and the recorder, which is no speed-up.
        max_graphs: Maximum number of graphs. The least recently used graph is dropped first, but
            no graph that is still in use.
        max_graph_bytes: Maximum memory of all graphs, in bytes, as measured in their captures. The
            least recently used graph is dropped first. None: any.
        strict: Raise if a step runs in a lower mode than asked after its warm-up. With FULL, any
            lower mode raises. With the other modes, only a step without any graph raises.
        backend: ``cuda``; ``recorder`` (any device, for tests and laptops, no speed-up); or
            ``auto`` (``cuda`` if the Trainer runs on CUDA, otherwise every step is eager).
        report: Print the summary of each run when the Trainer is done, or interrupted by Ctrl-C: a
            part for each stage. Each call of ``fit``, ``validate``, ``test`` or ``predict`` is a
            run, with its own warm-up and captures. ``fit`` has one table, not one for each of its
            validations, because they run from the same graphs, and only the numbers would grow.
        capture_ahead: In the first batch of each dataloader, once it has run, capture the step for
            a full and for the last partial batch, made of the first items of the dataset. Not
            before: what a step does that was never watched could not be undone. The dataset must be
            map-style. For other batches, call :meth:`capture`. Later batches of these shapes run
            from graphs at once. Modes FULL and FULL_AND_PIECEWISE only.
        log_stats: At the end of each stage, send the statistics of the run so far to every logger
            of the Trainer, in steps, microseconds and MiB:
            ``cuda_graph/<stage>/replays``, ``.../eager/<cause>``, ``.../us_per_replay``,
            ``.../us_per_eager_step`` and ``.../graph_mib``
            (:func:`~cg_lightning.report.logged.numbers_to_log`).
        options: How graphs are captured.

    Raises:
        ValueError: An argument is out of its range. The message names the argument and the choices.
            ``setup`` raises it if a target matches nothing, if ``cuda`` is asked for without CUDA,
            and if the module was compiled with its own CUDA graphs.
        CaptureError: With ``strict=True``, a step ran in a lower mode than asked.
        VerificationError: With ``strict=True``, a replay differed from eager.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from cg_lightning import CUDAGraphCallback
        >>> callback = CUDAGraphCallback(backend="recorder", report=False)  # on a GPU: no backend
        >>> trainer = Trainer(
        ...     callbacks=[callback],
        ...     accelerator="cpu",
        ...     limit_predict_batches=10,
        ...     logger=False,
        ...     enable_progress_bar=False,
        ... )
        >>> predictions = trainer.predict(BoringModel())
        >>> len(predictions), callback.stats.steps
        (10, {'NONE': 3, 'PIECEWISE': 0, 'FULL': 7})
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
        compile: bool | Mapping[str, Any] = False,
        copy_outputs: bool = True,
        overlap_copies: bool = True,
        capture_sizes: Sequence[int] | None = None,
        pad_dims: Mapping[str, Any] | Literal["auto"] | None = None,
        min_saving: float = 0.03,
        max_graphs: int = 64,
        max_graph_bytes: int | None = None,
        strict: bool = False,
        backend: BackendName = "auto",
        report: bool = True,
        capture_ahead: bool = False,
        log_stats: bool = False,
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
            compile=compile,
            copy_outputs=copy_outputs,
            overlap_copies=overlap_copies,
            capture_sizes=capture_sizes,
            pad_dims=pad_dims,
            min_saving=min_saving,
            max_graphs=max_graphs,
            max_graph_bytes=max_graph_bytes,
            strict=strict,
            backend=backend,
            report=report,
            capture_ahead=capture_ahead,
            log_stats=log_stats,
            options=options,
        )
        self.stats = CUDAGraphStats()
        """Counts of captures, replays and steps over all runs and Trainers of this callback."""
        self._installation: Installation | InertInstallation | None = None
        self._training: TrainingInstallation | InertInstallation | None = None
        self._is_sanity_check = False
        self._given = GivenBatches()
        self._ahead: BatchesAhead | None = None
        self._stages_run: list[str] = []
        self._runs = 0
        self._before_run = CUDAGraphStats()
        self._reported: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # graphs belong to this process and its module
        mine: dict[str, Any] = {"_installation": None, "_training": None, "_ahead": None}
        return {**self.__dict__, **mine}

    def __repr__(self) -> str:
        settings = self._settings
        return (
            f"{type(self).__name__}(mode={settings.runtime_policy.name!r}, "
            f"stages={settings.stages!r}, targets={settings.targets!r}, "
            f"warmup_steps={settings.warmup_steps}, backend={settings.backend!r})"
        )

    def summary(self) -> Summary:
        """Return the counts of all runs: for each stage its graphs, and reasons with remedies.

        It is a string of at most 20 lines for each stage, and shows itself in a notebook.
        :attr:`stats` has all counts.
        """
        scope = f"all {self._runs} runs" if self._runs > 1 else ""
        return render_summary(self.stats, self._settings.backend, tuple(STEP_METHODS), scope)

    def capture(
        self,
        trainer: Trainer,
        model: LightningModule,
        batches: Sequence[Any],
        *,
        stage: StageName | None = None,
    ) -> None:
        """Capture the step for batches like these ahead, in the first batch of each dataloader.

        Call it before ``trainer.validate(model)`` and the like, or in a hook. The first batch runs
        and is watched as always: what a step does that was never watched could not be undone. Then
        the step runs ``warmup_steps`` times on each given batch and is captured, the largest one
        first, before the second batch comes. All state is restored after each run: of
        metrics, logged values, modules and random generators. Later batches of these shapes run
        from graphs at once. A batch that cannot be captured ahead is named in a warning.

        Args:
            trainer: The Trainer that will run the stage. It must have this callback.
            model: The module that it will run.
            batches: Batches as the dataloader gives them, of any shape and on any device. They are
                kept, also for later runs of the same module. An empty list forgets them.
            stage: One stage. None: all stages of this callback.

        Raises:
            ValueError: The Trainer does not have this callback, the mode has no whole steps, the
                stage is unknown, or ``batches`` is no list of batches.
        """
        if self not in getattr(trainer, "callbacks", ()):
            raise ValueError(
                "callback.capture(trainer, ...): the Trainer does not have this callback; make it "
                "with Trainer(callbacks=[callback])."
            )
        self._given.keep(self._settings, model, batches, stage)
        if isinstance(self._installation, Installation):
            self._arrange_captures(trainer, self._installation)

    def graphs(self, mode: CUDAGraphMode | str) -> list[CapturedGraph]:
        """Return the stored graphs, to measure or inspect them.

        Args:
            mode: ``FULL`` for graphs of whole steps, ``PIECEWISE`` for those of submodules.

        Returns:
            Objects with ``replay()`` and ``num_bytes``, the memory in bytes. The list is empty
            between two runs of a Trainer. A replay writes the outputs and metric states of its
            graph.

        Raises:
            ValueError: ``mode`` is unknown.
        """
        name = CUDAGraphMode.parse(mode).name
        installations = [each for each in (self._installation, self._training) if each is not None]
        return [graph for each in installations for graph in each.graphs(name)]

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
        backend = resolve_backend(self._settings.backend, trainer.strategy.root_device)
        why = why_inert(trainer, pl_module)
        if why := why or ("" if backend is None else backend.why_no_captures):
            if self._settings.strict and stage == "fit" and TRAIN in self._settings.stages:
                self._refuse_training(why)
            self._report_inert(why)
            self._installation = InertInstallation(trainer.strategy, self.stats, why)
            return
        if self._settings.targets is not None:
            check_targets(pl_module, tuple(self._settings.targets))
        if backend is None:
            why = "no CUDA device: backend='auto' runs eagerly"
            self._report_once(rank_zero_info, _NO_CUDA)
            self._installation = InertInstallation(trainer.strategy, self.stats, why)
            return
        session = make_session(trainer, pl_module, backend, self._settings, self.stats)
        if session.target.dispatcher.compares_times:
            session.stage_length = TrainerStageLength(trainer)
        transfers = make_transfers(trainer, pl_module, session, EVALUATION_HOOKS)
        self._installation = Installation(trainer.strategy, pl_module, session, transfers)
        self._arrange_captures(trainer, self._installation)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if TRAIN not in self._settings.stages or self._installation is None:
            return
        self._stages_run.append(TRAIN)
        if isinstance(self._installation, InertInstallation):
            self._training = InertInstallation(trainer.strategy, self.stats, self._installation.why)
        elif why := self._why_no_training(trainer, pl_module):
            self._refuse_training(why)
            self._training = InertInstallation(trainer.strategy, self.stats, why)
        else:
            backend = self._installation.session.backend
            settings = self._settings.for_training()
            session = make_session(
                trainer, pl_module, backend, settings, self.stats, has_backward=True
            )
            transfers = make_transfers(trainer, pl_module, session, TRAINING_HOOKS)
            self._training = TrainingInstallation(trainer, pl_module, session, transfers)
        self._resume_training()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self._training, TrainingInstallation):
            self._training.begin_epoch()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is not None:
            self._training.remove()  # raises the errors of deferred checks
            self._training.close()
            self._training = None
            self._log_stats(trainer, TRAIN)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is not None:
            self._training.remove()
        self._is_sanity_check = trainer.sanity_checking
        if not self._is_sanity_check:
            self._install("validate")

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._is_sanity_check and isinstance(self._installation, Installation):
            self._installation.check_sanity_batch(batch)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install("test")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install("predict")

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self._installation, Installation):
            self._installation.complete_predictions()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, "validate")
        self._resume_training()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, "test")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, "predict")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()
        if isinstance(exception, KeyboardInterrupt):  # Lightning ends the process without teardown
            self._report(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        if self._settings.report and self._stages_run and trainer.is_global_zero:
            run = self.stats.since(self._before_run)
            scope = f"run {self._runs} only" if self._runs > 1 else ""
            print_summary(render_summary(run, self._settings.backend, self._stages_run, scope))
        self._stages_run = []

    def _why_no_training(self, trainer: Trainer, module: LightningModule) -> str:
        if not self._settings.runtime_policy.has_full_cudagraphs():
            return f"mode={self._settings.runtime_policy.name}: training has no pieces"
        return why_no_training(trainer, module)

    def _refuse_training(self, why: str) -> None:
        message = (
            f"CUDAGraphCallback(stages={list(self._settings.stages)!r}): {TRAIN!r} can have no "
            f"graph here: {why}."
        )
        if self._settings.strict:
            raise CaptureError(f"{message} Remove {TRAIN!r} from stages, or set strict=False.")
        self._report_once(rank_zero_warn, f"{message} Training runs as without the callback.")

    def _resume_training(self) -> None:
        if isinstance(self._training, InertInstallation):
            self._training.install(TRAIN)
        elif self._training is not None:
            self._training.install()

    def _arrange_captures(self, trainer: Trainer, installation: Installation) -> None:
        """Hand the batches to capture ahead to the session."""
        given = self._given.of(installation.module)
        self._ahead = None
        if any(given.values()) or self._settings.capture_ahead:
            warn = functools.partial(self._report_once, rank_zero_warn)
            self._ahead = BatchesAhead(trainer, given, self._settings.capture_ahead, warn)
        installation.session.examples = self._ahead

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

    def _end(self, trainer: Trainer, stage: str) -> None:
        if self._installation is not None:
            self._installation.remove()
            if self._ahead is not None and stage in self._stages_run:
                self._ahead.warn_if_left(stage)
            if said := self._installation.hint(stage):
                self._report_once(rank_zero_warn, said)
        self._log_stats(trainer, stage)

    def _log_stats(self, trainer: Trainer, stage: str) -> None:
        if self._settings.log_stats and stage in self._stages_run:
            run = self.stats.since(self._before_run)
            warn = functools.partial(self._report_once, rank_zero_warn)
            log_numbers(trainer, numbers_to_log(run, stage), warn)

    def _close(self) -> None:
        if self._training is not None:
            self._training.close()
            self._training = None
        if self._installation is not None:
            self._installation.close()
            self._installation = self._ahead = None
