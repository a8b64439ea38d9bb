"""The command ``cg-lightning``."""

from __future__ import annotations

import sys

import hydra
from hydra.utils import get_original_cwd
from omegaconf import DictConfig

from cg_lightning.app.config import Task, config_dir, register_configs

register_configs()


@hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")
def main(config: DictConfig) -> None:
    """Run a task with any model, data and Trainer, with and without graphs."""
    folder = get_original_cwd()
    if folder not in sys.path:  # a script's path has the script's folder instead
        sys.path.insert(0, folder)
    # imported here, because torch takes seconds and --help should not
    from cg_lightning.app.compare import describe_difference
    from cg_lightning.app.run import choose_backend, report_at_the_end, run
    from cg_lightning.report.summary import print_summary

    task: Task = config.task
    if task is Task.bench:
        from cg_lightning.app.bench import bench

        bench(config.bench)
        return
    choose_backend(config)
    reports = report_at_the_end(config)
    with_graphs, callback = run(config)
    if callback is None:
        return
    if reports:
        print_summary(callback.summary())
    if not config.compare:
        return
    without, _ = run(config, graphs=False)
    difference = describe_difference(with_graphs, without)
    if difference:
        raise SystemExit(f"The same {task.value} without graphs differs: {difference}")
    print(
        f"The same {task.value} without graphs gives identical metrics and predictions: "
        f"{len(without.metrics)} metrics and {without.num_predictions} predicted batches, "
        f"compared bit for bit after {callback.stats.replays} graph replays."
    )


if __name__ == "__main__":
    main()
