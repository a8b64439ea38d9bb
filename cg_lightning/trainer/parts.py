"""What evaluation and training install alike: a session, and transfers of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from cg_lightning.backends import GraphBackend
from cg_lightning.core.settings import Settings
from cg_lightning.effects.module_effects import ModuleEffects
from cg_lightning.modules.kinds import lightning_class
from cg_lightning.report.counts import Counts
from cg_lightning.runtime.session import Session
from cg_lightning.trainer.batch_transfer import (
    Transfer,
    noted_transfer,
    overlapped_transfer,
)
from cg_lightning.trainer.logged_results import LoggedResults
from cg_lightning.trainer.prediction_copies import PredictionCopies


def make_session(
    trainer: Trainer,
    module: LightningModule,
    backend: GraphBackend,
    settings: Settings,
    stats: Counts,
    *,
    has_backward: bool = False,
) -> Session:
    """Return the runtime state of a LightningModule under a Trainer; see :class:`Session`."""
    effects = ModuleEffects(
        module,
        backend.device,
        sync_free=settings.sync_free_metrics,
        logged=LoggedResults(module),
    )
    profiler: Any = trainer.profiler  # type: ignore[attr-defined]
    if lightning_class(type(profiler), "PassThroughProfiler"):
        profiler = None
    return Session(module, backend, settings, stats, effects, profiler, has_backward=has_backward)


def make_transfers(
    trainer: Trainer, module: LightningModule, session: Session, hooks: Sequence[str]
) -> list[Transfer]:
    """Return what moves batches and predictions; see :func:`noted_transfer` for ``hooks``."""
    overlaps, backend = session.settings.overlap_copies, session.backend
    copies = backend.batch_copies() if overlaps else None
    late = backend.late_copies() if overlaps else None
    overlapped = overlapped_transfer(trainer, module, copies, session.stats)
    noted = noted_transfer(trainer, module, session.host_copies, hooks)
    predictions = None if late is None else PredictionCopies(trainer, module, late, session.stats)
    moved: tuple[Transfer | None, ...] = (overlapped, noted, predictions)
    return [each for each in moved if each is not None]
