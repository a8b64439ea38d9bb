"""The benchmark, from a config."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cg_lightning.bench.costs import measure_costs
from cg_lightning.bench.measure import Settings
from cg_lightning.bench.report import draw, environment, table, write_lines
from cg_lightning.bench.run import measure


def bench(config: DictConfig) -> None:
    """Measures, prints a table, and writes lines of JSON and a chart.

    Args:
        config: Of the schema :class:`~cg_lightning.app.config.BenchConfig`.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_float32_matmul_precision(config.matmul_precision)
    output = None if config.output is None else _folder() / config.output
    settings = Settings(config.batches, config.warmup, config.rounds)
    costs = [measure_costs(settings, config.backend)] if config.costs else []
    print(*costs, flush=True)
    records = []
    for record in measure(
        config.cases, config.contestants, config.stages, settings, config.backend
    ):
        print(record, flush=True)
        records.append(record)
        if output is not None:
            write_lines([*costs, *records], output)
    print(environment())
    print(table(records))
    if output is not None:
        try:
            draw(records, output.with_suffix(".png"))
        except ModuleNotFoundError as error:
            print(f"No chart: {error}.")


def _folder() -> Path:
    """Where relative paths begin: the jobs of a multirun must not overwrite each other's files."""
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        return Path(HydraConfig.get().runtime.output_dir)
    return Path()
