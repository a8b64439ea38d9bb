"""A bar for captures ahead, of the same kind as the bar of the Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

T = TypeVar("T")
FEW = 3
"""So many captures need no bar."""
_TITLE = "Capturing"


def progress_of(items: Sequence[T], trainer: Trainer) -> Iterable[T]:
    """Yield the items, and show how many are done if there are more than :data:`FEW`.

    Args:
        items: The items.
        trainer: Its bar is used. Without one, nothing is shown.
    """
    bar = trainer.progress_bar_callback
    if len(items) <= FEW or not trainer.is_global_zero:
        return items
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        return _by_rich(items, bar.progress)
    if isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
        bar_of_tqdm: Iterable[T] = Tqdm(
            items, desc=_TITLE, leave=False, position=2 * bar.process_position + 2
        )
        return bar_of_tqdm
    return items


def _by_rich(items: Sequence[T], progress: Any) -> Iterator[T]:
    task = progress.add_task(_TITLE, total=len(items))
    try:
        for item in items:
            yield item
            progress.update(task, advance=1)
            progress.refresh()
    finally:
        progress.remove_task(task)
        progress.refresh()
