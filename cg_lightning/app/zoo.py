"""The zoo, from a config."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from fnmatch import fnmatchcase

from omegaconf import DictConfig

from cg_lightning.app.bench import folder
from cg_lightning.bench.measure import Settings
from cg_lightning.bench.records import write_lines
from cg_lightning.bench.run import backend_to_measure
from cg_lightning.bench.zoo import HEADER, counts, row, visit
from cg_lightning.bench.zoo_models import MODELS


def zoo(config: DictConfig) -> None:
    """Run models of other libraries with and without graphs; print a table, and write records.

    Args:
        config: The config of the command: ``zoo`` has patterns of names, and ``bench`` has the
            number of batches, the backend and the file of records.

    Raises:
        SystemExit: A pattern matches no model, there is no CUDA device and ``bench.backend`` is not
            ``recorder``, or a model differs from eager.
    """
    patterns = list(config.zoo)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in MODELS):
            raise SystemExit(f"zoo={patterns}: {pattern!r} matches none of {', '.join(MODELS)}.")
    names = [name for name in MODELS if any(fnmatchcase(name, pattern) for pattern in patterns)]
    try:
        backend = backend_to_measure(config.bench.backend, task="zoo")
    except ValueError as error:
        raise SystemExit(str(error)) from error
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of the models' libraries
    settings = Settings(config.bench.batches, config.bench.warmup, config.bench.rounds)
    output = None if config.bench.output is None else folder() / config.bench.output
    results = []
    print(HEADER, flush=True)
    for result in visit(names, settings, backend):
        print(row(result), flush=True)
        results.append(result)
        if output is not None:
            write_lines([dataclasses.asdict(each) for each in results], output)
    print("", counts(results), sep="\n")
    if any(result.is_wrong for result in results):
        raise SystemExit(1)
