"""Schemas for Hydra, and the folder of the YAML files."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class Task(Enum):
    """The tasks of ``cg-lightning``."""

    fit = "fit"
    validate = "validate"
    test = "test"
    predict = "predict"
    bench = "bench"


@dataclasses.dataclass
class OptionsConfig:
    """Schema of :class:`cg_lightning.CUDAGraphOptions`."""

    _target_: str = "cg_lightning.CUDAGraphOptions"
    debug_log_enable: bool = True
    gc_disable: bool = False
    weak_ref_output: bool = True
    check_addresses: bool | None = None
    capture_error_mode: str = "thread_local"


@dataclasses.dataclass
class CUDAGraphConfig:
    """Schema of :class:`cg_lightning.CUDAGraphCallback`."""

    _target_: str = "cg_lightning.CUDAGraphCallback"
    _convert_: str = "all"
    mode: str = "FULL_AND_PIECEWISE"
    stages: list[str] = dataclasses.field(default_factory=lambda: ["validate", "test", "predict"])
    targets: list[str] | None = None
    warmup_steps: int = 3
    verify_replays: int = 2
    verify_every: int = 0
    verify_tolerance: str = "exact"
    sync_free_metrics: bool = True
    copy_outputs: bool = True
    max_graphs: int = 64
    strict: bool = False
    backend: str = "auto"
    report: bool = True
    options: OptionsConfig = dataclasses.field(default_factory=OptionsConfig)


@dataclasses.dataclass
class BenchConfig:
    """Schema of ``conf/bench``, with the arguments of :func:`cg_lightning.bench.run.measure`."""

    cases: list[str] = MISSING
    contestants: list[str] = MISSING
    stages: list[str] = MISSING
    batches: int = 100
    warmup: int = 20
    rounds: int = 3
    costs: bool = True
    matmul_precision: str = "high"
    backend: str = "auto"
    output: str | None = None


@dataclasses.dataclass
class AppConfig:
    """Schema of ``config.yaml``."""

    model: Any = MISSING
    data: Any = MISSING
    trainer: Any = MISSING
    callbacks: Any = None
    cuda_graph: Any = None
    bench: BenchConfig = dataclasses.field(default_factory=BenchConfig)
    task: Task = Task.fit
    seed: int = 0
    compare: bool = True
    ckpt_path: str | None = None


def register_configs() -> None:
    """Register the schemas with Hydra. It may be called several times."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=AppConfig, provider="cg_lightning")
    store.store(
        group="cuda_graph_schema", name="base", node=CUDAGraphConfig, provider="cg_lightning"
    )


def config_dir() -> str:
    """Return the absolute path of ``conf/``.

    It is the packaged copy if there is one, otherwise the folder next to the package in a checkout.
    Hydra resolves relative paths through the package and does not find a folder outside of it
    (hydra#2125).
    """
    package = Path(__file__).resolve().parent.parent
    packaged = package / "conf"
    return str(packaged if packaged.is_dir() else package.parent / "conf")
