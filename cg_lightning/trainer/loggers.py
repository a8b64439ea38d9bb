"""Send numbers to the loggers of a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning.pytorch import Trainer

_NO_LOGGER = (
    "CUDAGraphCallback: log_stats=True, but the Trainer has no logger. Give it one, for example "
    "Trainer(logger=CSVLogger('logs')), or set log_stats=False."
)


def log_numbers(
    trainer: Trainer, numbers: Mapping[str, float], warn: Callable[[str], object]
) -> None:
    """Send ``numbers`` to every logger, from rank zero.

    Args:
        trainer: The Trainer.
        numbers: What to log, by key.
        warn: Is called with a sentence if there is no logger, or one that takes no numbers.
    """
    if not trainer.is_global_zero:
        return
    if not trainer.loggers:
        warn(_NO_LOGGER)
    for logger in trainer.loggers:
        if callable(getattr(logger, "log_metrics", None)):
            logger.log_metrics(dict(numbers), step=trainer.global_step)
        else:
            warn(
                f"CUDAGraphCallback: log_stats=True, but {type(logger).__name__} has no method "
                "log_metrics. Derive it from lightning.pytorch.loggers.Logger, or set "
                "log_stats=False."
            )
