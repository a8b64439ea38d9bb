"""The benchmark, from a config."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
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
    settings = Settings(config.batches, config.warmup, config.rounds)
    costs = [measure_costs(settings, config.backend)] if config.costs else []
    print(*costs, flush=True)
    records = []
    for record in measure(config.cases, config.contestants, config.stages, settings, config.backend):
        print(record, flush=True)
        records.append(record)
        if config.output is not None:
            write_lines([*costs, *records], Path(config.output))
    print(environment())
    print(table(records))
    if config.output is not None:
        try:
            draw(records, Path(config.output).with_suffix(".png"))
        except ModuleNotFoundError as error:
            print(f"No chart: {error}.")
