"""Batches of a run that are captured ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from cg_lightning.core.causes import Cause
from cg_lightning.core.reasons import Reason
from cg_lightning.core.tree import tensors_in
from cg_lightning.runtime.examples import Example
from cg_lightning.trainer.progress import progress_of
from cg_lightning.trainer.stage_length import dataloaders, numbers_of_batches

_BY_HAND = "give batches like its own to callback.capture(trainer, model, batches)"


class HostBatch:
    """One batch as a loader makes it: a :class:`~cg_lightning.runtime.examples.Example`."""

    def __init__(self, batch: Any, dataloader_idx: int, trainer: Trainer) -> None:
        tensors = tensors_in(batch)
        self.size = sum(tensor.numel() for tensor in tensors)
        """Number of elements."""
        self.shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors) or "-"
        """The shapes, for printing."""
        self._batch = batch
        self._dataloader_idx = dataloader_idx
        self._trainer = trainer

    def load(self) -> Any:
        """Do what Lightning's loops do with a batch before a step."""
        trainer, module = self._trainer, self._trainer.lightning_module
        batch = trainer.precision_plugin.convert_input(self._batch)
        # private, because it also finds the hook of a LightningDataModule
        before = getattr(module, "_on_before_batch_transfer", module.on_before_batch_transfer)
        batch = before(batch, dataloader_idx=self._dataloader_idx)
        strategy = trainer.strategy
        # that of the class: concurrent copies are for batches whose step comes next
        return type(strategy).batch_to_device(strategy, batch, None, self._dataloader_idx)


class BatchesAhead:
    """The batches to capture ahead in one run of a Trainer.

    It implements :class:`~cg_lightning.runtime.examples.Examples`.

    Args:
        trainer: The Trainer.
        given: The user's batches by stage, for each dataloader of the stage.
        from_loaders: Also make batches of the first items of each dataloader.
        warn: Is called with each sentence for the user.
    """

    def __init__(
        self,
        trainer: Trainer,
        given: dict[str, list[Any]],
        from_loaders: bool,
        warn: Callable[[str], object],
    ) -> None:
        self._trainer = trainer
        self._given = given
        self._from_loaders = from_loaders
        self._warn = warn
        self._taken: set[tuple[str, int]] = set()

    def take(self, stage: str, dataloader_idx: int) -> list[HostBatch]:
        """Return the batches of one dataloader, the largest first. A second call returns none."""
        if (stage, dataloader_idx) in self._taken:
            return []
        self._taken.add((stage, dataloader_idx))
        batches = list(self._given.get(stage, ()))
        if self._from_loaders:
            batches += self._first_items(stage, dataloader_idx)
        examples = [HostBatch(batch, dataloader_idx, self._trainer) for batch in batches]
        return sorted(examples, key=lambda example: -example.size)

    def progress(self, examples: Sequence[Example]) -> Iterable[Example]:
        """Yield the batches. If there are more than three, the Trainer's bar shows how many."""
        return progress_of(examples, self._trainer)

    def not_captured(self, example: Example, reason: Reason) -> None:
        """Warn about a batch that was not captured."""
        remedy = f" Remedy: {reason.remedy}." if reason.remedy else ""
        has_run = isinstance(reason.kind, Cause)  # or else nothing was found in the step
        stays = " It ran once; what it changed outside of the module stays." if has_run else ""
        self._warn(
            f"CUDAGraphCallback: a batch of shapes {example.shapes} was not captured ahead: "
            f"{reason}.{remedy}{stays} The first real batches of these shapes decide again."
        )

    def warn_if_left(self, stage: str) -> None:
        """Warn at the end of a stage in which nothing was captured ahead."""
        has_some = self._from_loaders or self._given.get(stage)
        if has_some and not any(taken == stage for taken, _ in self._taken):
            self._warn(
                f"CUDAGraphCallback: nothing was captured ahead, because no step of stage {stage!r}"
                " was found to be one graph in its first run. callback.summary() says why."
            )

    def _first_items(self, stage: str, dataloader_idx: int) -> list[Any]:
        """Return batches of the first items of a dataloader; none if it cannot be read."""
        loader = CombinedLoader(dataloaders(self._trainer, stage)).flattened[dataloader_idx]
        number = numbers_of_batches(self._trainer, stage)[dataloader_idx]
        if why := _why_unreadable(loader):
            self._warn(
                f"CUDAGraphCallback: capture_ahead=True makes no batch of dataloader "
                f"{dataloader_idx} of stage {stage!r}: {why}. Instead, {_BY_HAND}."
            )
            return []
        try:
            return _first_batches(loader, number)
        except Exception as error:
            self._warn(
                f"CUDAGraphCallback: capture_ahead=True could not make a batch of dataloader "
                f"{dataloader_idx} of stage {stage!r} in this process: {type(error).__name__}: "
                f"{error}. Instead, {_BY_HAND}."
            )
            return []


def _first_batches(loader: DataLoader[Any], batches: float) -> list[Any]:
    """Return a batch of each size that comes, of the first items of the dataset.

    Args:
        loader: The loader.
        batches: The number of its batches that run.
    """
    sampler: Any = loader.batch_sampler
    if sampler is None:
        return [loader.collate_fn(loader.dataset[0])]
    number, batch_size = len(sampler.sampler), sampler.batch_size
    sizes = {min(batch_size, number)}
    if not sampler.drop_last and batches >= len(loader):
        sizes.add(number % batch_size)
    return [
        loader.collate_fn([loader.dataset[index] for index in range(size)]) for size in sizes - {0}
    ]


def _why_unreadable(loader: Any) -> str:
    """Return why no batch can be made of the first items of a loader; empty if one can."""
    if not isinstance(loader, DataLoader):
        return f"it is a {type(loader).__name__}, not a DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "reading its IterableDataset would take batches from the stage"
    sampler = loader.batch_sampler  # that of predict is Lightning's, with the attributes of torch's
    if sampler is not None and not hasattr(sampler, "batch_size"):
        return f"its batch_sampler, a {type(sampler).__name__}, has no batch_size"
    return ""
