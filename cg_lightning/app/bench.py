"""The benchmark, from a config."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cg_lightning.bench.charts import draw_all, draw_before_after
from cg_lightning.bench.costs import measure_costs
from cg_lightning.bench.measure import Settings
from cg_lightning.bench.records import describe_environment, environment, write_lines
from cg_lightning.bench.run import check, measure
from cg_lightning.bench.tables import table


def bench(config: DictConfig) -> None:
    """Measure, print a table, and write lines of JSON and two charts.

    The charts are ``OUTPUT`` (all contestants) and ``OUTPUT_before_after``, each as SVG and PNG.

    Args:
        config: A config of the schema :class:`~cg_lightning.app.config.BenchConfig`.

    Raises:
        SystemExit: A name is unknown, the library of a case is not installed, or there is no CUDA
            device, and ``bench.backend`` is not ``recorder``.
    """
    try:
        check(config.cases, config.contestants, config.stages, config.backend)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_float32_matmul_precision(config.matmul_precision)
    output = None if config.output is None else folder() / config.output
    settings = Settings(config.batches, config.warmup, config.rounds, config.batches_on)
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
            draw_all(records, output.with_suffix(""))
            before_after = output.with_name(f"{output.stem}_before_after")
            draw_before_after(records, before_after, where=describe_environment(environment()))
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            print("No chart: matplotlib is not installed. pip install 'cg-lightning[bench]'")


def folder() -> Path:
    """Return the folder of relative paths. Jobs of a multirun must not overwrite each other."""
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        return Path(HydraConfig.get().runtime.output_dir)
    return Path()
