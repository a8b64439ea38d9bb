"""Copy predictions to the host while the device computes the next ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loops import prediction_loop
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cg_lightning.backends.base import LateCopies
from cg_lightning.core.tree import flatten
from cg_lightning.modules.kinds import is_lightnings_own
from cg_lightning.report.counts import Counts
from cg_lightning.trainer.batch_transfer import (
    PLAIN,
    InFrontOfTransfer,
    are_lightnings_hooks,
    callbacks_of_others,
    owners_of_data_hooks,
)

_MOST_BYTES = 64 * 1024 * 1024
"""Larger predictions are left to Lightning, because a late copy needs them twice on the host."""
_MOVE, _LISTS = "move_data_to_device", "_predictions"
_BATCH_HOOKS = ("on_predict_batch_start", "on_predict_batch_end")
_DATA_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class PredictionCopies:
    """Lets the host go on while the device computes a prediction that Lightning keeps.

    Lightning copies each prediction to the host and waits for it, so host and device take turns.
    During a stage, the loop calls :meth:`_move` instead. It returns tensors on the host whose
    values come later: before the loop keeps the next prediction, and before anybody takes the
    predictions from the loop. Lightning copies

    - the predictions of steps that did not run from a graph, the last prediction, those with other
      objects than plain tensors and values, and large ones;
    - a prediction that goes into a list which somebody else holds;
    - all, if the user has a hook that is called for each batch: by Lightning's wait, the hook may
      know that what it has queued on the device itself is done;
    - those of batches in pinned memory that a dataset of this process may fill again.

    The private names ``move_data_to_device`` of the loop's module and ``_predictions`` of the loop
    are needed. If they are not what they were in Lightning 2.6, Lightning copies.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        copies: Makes the copies.
        stats: Counts the predictions.
    """

    def __init__(
        self, trainer: Trainer, module: nn.Module, copies: LateCopies, stats: Counts
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._loop: Any = trainer.predict_loop
        self._copies = copies
        self._stats = stats
        self._lists: _Lists | None = None
        self._most_references = 0
        # the strategy may have another object's transfer in a stage
        self._is_lightnings_transfer = is_lightnings_own(trainer.strategy, "batch_to_device")
        self._in_front = InFrontOfTransfer(trainer.strategy, self._batch_to_device)
        self._is_pinned = False
        """Whether the current batch came from pinned memory that may be filled again."""
        self.is_replayed = False
        """Whether the current step ran from a graph. Who runs the steps sets it."""

    def install(self) -> None:
        """Delay the copies, if the Trainer predicts; idempotent."""
        if (
            self._lists is None
            and self._trainer.predicting
            and self._is_lightnings_transfer
            and _is_known(self._loop)
            and not _has_hooks(self._trainer, self._module)
        ):
            self._most_references = _references_in_append()
            self._lists = _Lists(vars(self._loop)[_LISTS], self._copies.finish)
            vars(self._loop)[_LISTS] = self._lists
            vars(prediction_loop)[_MOVE] = self._move
            self._in_front.install()

    def remove(self) -> None:
        """Wait for the copies, and leave them to Lightning again; idempotent."""
        if self._lists is None:
            return
        self._copies.finish()
        self._in_front.remove()
        if vars(prediction_loop)[_MOVE] == self._move:
            vars(prediction_loop)[_MOVE] = move_data_to_device
        if vars(self._loop)[_LISTS] is self._lists:  # not if Lightning has dropped them
            vars(self._loop)[_LISTS] = self._lists.copy()
        self._lists = None

    def _batch_to_device(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        loaders = self._trainer.predict_dataloaders
        self._is_pinned = not _is_read_by_workers(loaders) and any(
            map(_may_be_pinned, flatten(batch)[0])
        )
        return self._in_front.transfer(batch, *args, **kwargs)

    def _move(self, predictions: Any, device: torch.device) -> Any:
        """Return the predictions on the host. Their values may come later."""
        lists, is_replayed = self._lists, self.is_replayed
        self.is_replayed = False
        is_ours = sys._getframe(1).f_locals.get("self") is self._loop  # not another Trainer's
        if is_ours and getattr(self._loop.batch_progress, "is_last_batch", True):
            self.remove()
        elif (
            is_ours
            and lists is not None
            and is_replayed
            and not self._is_pinned
            and vars(self._loop).get(_LISTS) is lists  # a user may have replaced them
            and lists.references_to_latest() <= self._most_references
            and 0 < self._late_bytes(predictions) <= _MOST_BYTES
        ):
            self._stats.late_predictions += 1
            moved = (
                self._copies.start(predictions)
                if type(predictions) is Tensor  # mostly
                else apply_to_collection(predictions, Tensor, self._start)
            )
            if lists.references_to_latest() > self._most_references:  # taken by a thread meanwhile
                self._copies.finish()
            return moved
        return move_data_to_device(predictions, device)

    def _late_bytes(self, value: Any) -> float:
        """Return the bytes of the tensors to copy; infinity if Lightning has to copy the value."""
        if type(value) is Tensor:
            if self._copies.can_copy(value):
                return value.nbytes
            return 0 if value.device.type == "cpu" else float("inf")
        if isinstance(value, PLAIN):
            return 0
        if isinstance(value, (list, tuple, dict)) and not hasattr(value, "to"):
            parts = value.values() if isinstance(value, dict) else value
            return sum(map(self._late_bytes, parts))
        return float("inf")

    def _start(self, tensor: Tensor) -> Tensor:
        return self._copies.start(tensor) if self._copies.can_copy(tensor) else tensor


class _Lists(list[Any]):
    """The loop's lists of predictions, one for each dataloader.

    Whoever takes a list gets it complete. Each way to read it waits for the copies, see below.

    Args:
        lists: The lists.
        finish: Waits for the copies.
    """

    def __init__(self, lists: Iterable[Any], finish: Callable[[], None]) -> None:
        super().__init__(lists)
        self._finish = finish
        self._latest: Any = 0

    def __getitem__(self, index: Any) -> Any:
        self._latest = index
        taken = super().__getitem__(index)  # first, so that the reference counts from here on
        self._finish()
        return taken

    def __radd__(self, other: list[Any]) -> list[Any]:
        return other + self.copy()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Let copies and pickles be Lightning's lists."""
        return list, (self.copy(),)

    def references_to_latest(self) -> int:
        """Return how many references the list has that was taken last."""
        return sys.getrefcount(super().__getitem__(self._latest))


def _complete(name: str) -> Callable[..., Any]:
    read = getattr(list, name)

    def method(self: _Lists, *args: Any) -> Any:
        self._finish()
        return read(self, *args)

    return method


for _name in (
    *("__iter__", "__reversed__", "__contains__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__"),
    *("__ge__", "__add__", "__mul__", "__rmul__", "__repr__", "copy", "count", "index", "pop"),
):
    setattr(_Lists, _name, _complete(_name))


def _references_in_append() -> int:
    """Return how many references a list has if only the loop holds it, at the time of a copy."""
    lists = _Lists([[]], lambda: None)
    lists[0].append(lists.references_to_latest())  # the loop's own expression, with another value
    return int(lists[0][0])


def _has_hooks(trainer: Trainer, module: nn.Module) -> bool:
    """Return True if code of the user may run between two steps, other than that of a dataset."""
    others = callbacks_of_others(trainer)
    return (
        any(isinstance(each, BasePredictionWriter) and each.interval.on_batch for each in others)
        or not are_lightnings_hooks([module, *others], _BATCH_HOOKS)
        or not are_lightnings_hooks(owners_of_data_hooks(trainer, module), _DATA_HOOKS)
    )


def _may_be_pinned(leaf: Any) -> bool:
    if type(leaf) is Tensor:
        return leaf.device.type == "cpu" and leaf.is_pinned()
    return not isinstance(leaf, PLAIN)


def _is_read_by_workers(loaders: Any) -> bool:
    """Return True if no dataset of these dataloaders runs in this process."""
    each = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return all(type(loader) is DataLoader and loader.num_workers > 0 for loader in each)


def _is_known(loop: Any) -> bool:
    """Return True if a loop of Lightning is as :class:`PredictionCopies` knows it."""
    lists = vars(loop).get(_LISTS)
    return (
        type(loop).__module__ == prediction_loop.__name__
        and vars(prediction_loop).get(_MOVE) is move_data_to_device
        and type(lists) is list
        and all(type(each) is list for each in lists)
    )
