"""The command ``cg-lightning``."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import traceback
import warnings
from typing import TYPE_CHECKING

import hydra
from hydra.utils import get_original_cwd
from omegaconf import DictConfig

from cg_lightning.app.config import Task, config_dir, register_configs
from cg_lightning.app.mistakes import sentence_of, without_hydra

if TYPE_CHECKING:
    from cg_lightning.app.jobs import JobResult

register_configs()
_FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """Run a task with any model, data and Trainer, with and without graphs.

    Raises:
        SystemExit: The command line has a mistake, the run failed, or numbers differ.
    """
    for before, word in itertools.pairwise(sys.argv):
        if word in Task.__members__ and not before.startswith("-"):
            raise SystemExit(f"{word} is a task: write task={word}.")
    wants_tracebacks = os.environ.get(_FULL_ERROR) == "1"

    @hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")
    def run(config: DictConfig) -> None:
        _run(config, wants_tracebacks)

    if wants_tracebacks:
        run()
        return
    os.environ[_FULL_ERROR] = "1"  # so that Hydra raises errors instead of printing them
    try:
        run()
    except Exception as error:
        sentence = sentence_of(error)
        if sentence:
            raise SystemExit(sentence) from None
        error.__traceback__ = without_hydra(error.__traceback__)
        raise
    finally:
        del os.environ[_FULL_ERROR]


def _run(config: DictConfig, wants_tracebacks: bool) -> None:
    folder = get_original_cwd()
    if folder not in sys.path:  # a script's path has the script's folder instead
        sys.path.insert(0, folder)
    # imported here, because torch takes seconds and --help should not
    if config.task is Task.bench:
        from cg_lightning.app.bench import bench

        bench(config.bench)
        return
    if config.task is Task.zoo:
        from cg_lightning.app.zoo import zoo

        zoo(config)
        return
    from cg_lightning.app.jobs import JobResult, finish_job, is_one_of_several

    try:
        result = _run_job(config)
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        result = JobResult(error.code)
    except Exception as error:
        sentence = sentence_of(error)
        if wants_tracebacks or not (sentence or is_one_of_several()):
            raise
        if not sentence:  # of the user's code, in one of several jobs: the others run
            traceback.print_exception(error)
            first = error
            while isinstance(first.__cause__, Exception):  # behind what Hydra raised
                first = first.__cause__
            sentence = f"{type(first).__name__}: {first}"
        result = JobResult(sentence)
    finish_job(result)


def _run_job(config: DictConfig) -> JobResult:
    """Run a task for a model and its data.

    Raises:
        SystemExit: The command line has a mistake.
    """
    from cg_lightning.app.run import (
        require_checkpoint,
        require_device,
        require_own_arguments,
    )

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its import sets INFO
    # Lightning 2.6 with torch 2.13, about itself
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    if str(config.data.get("_target_")).startswith("cg_lightning."):  # small, and in memory
        warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    try:
        require_device(config)
        require_checkpoint(config)
        require_own_arguments(config)
        if config.task is Task.diagnose:
            from cg_lightning.app.diagnose import diagnose_step

            return diagnose_step(config)
        if config.task is Task.shapes:
            from cg_lightning.app.shapes import show_shapes

            return show_shapes(config)
        from cg_lightning.app.compare import run_and_compare

        return run_and_compare(config)
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
