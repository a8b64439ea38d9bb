"""Copy batches to the device while it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from cg_lightning.backends.base import BatchCopies
from cg_lightning.core.tree import flatten
from cg_lightning.host_values.host_copies import HostCopies
from cg_lightning.modules.kinds import is_lightnings_own
from cg_lightning.report.counts import Counts

_LEAST_BYTES = 1024 * 1024
"""Copies of fewer bytes take less time than the host needs to overlap them (about 100 us)."""
_TRANSFER, _AFTER_TRANSFER = "transfer_batch_to_device", "on_after_batch_transfer"
EVALUATION_HOOKS = ("on_validation_batch_start", "on_test_batch_start", "on_predict_batch_start")
TRAINING_HOOKS = ("on_train_batch_start",)
"""Hooks that get a batch on the device before its step, and may write to it."""
PLAIN = (int, float, bool, str, bytes, type(None))
"""Classes of values beside tensors that a copy leaves as they are."""


class Transfer(Protocol):
    """Moves or notes data during a stage."""

    def install(self) -> None:
        """Begin, in a stage that begins; idempotent."""

    def remove(self) -> None:
        """End, and leave it to Lightning again; idempotent."""


def overlapped_transfer(
    trainer: Trainer, module: nn.Module, copies: BatchCopies | None, stats: Counts
) -> OverlappedTransfer | None:
    """Return an object that transfers batches instead of Lightning; None if Lightning does.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        copies: Copies during the computation. None: the user or the device does not allow it.
        stats: Counts.
    """
    if copies is None or not _is_lightnings_transfer(trainer, module, (_TRANSFER,)):
        return None
    return OverlappedTransfer(trainer.strategy, copies, stats)


class OverlappedTransfer:
    """Copies the tensors of a batch on a stream of their own, before Lightning's hooks see them.

    During a stage, the strategy *object* has an attribute ``batch_to_device``. It copies the batch,
    and then calls Lightning's method, which finds the batch on the device and calls the hooks of
    the user on the stream that computes. Batches with other objects than tensors and plain values,
    small ones, those that are on the device already, and all while the device has nothing to
    compute are left to Lightning.

    Args:
        strategy: The strategy of the Trainer.
        copies: Copies during the computation.
        stats: Counts the batches.
    """

    def __init__(self, strategy: Strategy, copies: BatchCopies, stats: Counts) -> None:
        self._strategy = strategy
        self._copies = copies
        self._stats = stats

    def install(self) -> None:
        """Transfer the batches of the strategy; idempotent.

        If the user has set an attribute of that name since, it stays.
        """
        vars(self._strategy).setdefault("batch_to_device", self._batch_to_device)

    def remove(self) -> None:
        """Leave the batches to Lightning; idempotent."""
        if vars(self._strategy).get("batch_to_device") == self._batch_to_device:
            del vars(self._strategy)["batch_to_device"]

    def _batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        target = device or self._strategy.root_device
        if _is_worth_it(batch) and self._copies.is_device_busy():
            moved = self._copies.run(lambda: move_data_to_device(batch, target))
            self._stats.overlapped_copies += 1
        else:
            moved = batch
        transfer = type(self._strategy).batch_to_device
        return transfer(self._strategy, moved, device, dataloader_idx)


def noted_transfer(
    trainer: Trainer, module: nn.Module, copies: HostCopies, hooks: Sequence[str]
) -> NotedTransfer | None:
    """Return an object that keeps the batches of a Trainer on the host.

    None if other code may change a batch on the device before its step: hooks of the user, and
    callbacks that are called when a batch starts. Their writes are not observed.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        copies: Takes the notes.
        hooks: The hooks that get a batch before its step.
    """
    if not _is_lightnings_transfer(trainer, module, (_TRANSFER, _AFTER_TRANSFER)):
        return None
    if not are_lightnings_hooks([module, *callbacks_of_others(trainer)], hooks):
        return None
    return NotedTransfer(trainer.strategy, copies)


class InFrontOfTransfer:
    """Puts a function in front of a strategy's transfer of batches.

    The strategy *object* has it as attribute ``batch_to_device``.

    Args:
        strategy: The strategy.
        function: Takes the arguments of the transfer, and calls :meth:`transfer` with them.
    """

    def __init__(self, strategy: Strategy, function: Callable[..., Any]) -> None:
        self._strategy = strategy
        self._function = function
        self._before: Any = None

    def install(self) -> None:
        """Let the strategy call the function."""
        self._before = vars(self._strategy).get("batch_to_device")
        vars(self._strategy)["batch_to_device"] = self._function

    def remove(self) -> None:
        """Restore the strategy; idempotent."""
        if vars(self._strategy).get("batch_to_device") == self._function:
            del vars(self._strategy)["batch_to_device"]
            if self._before is not None:
                vars(self._strategy)["batch_to_device"] = self._before

    def transfer(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the strategy did before."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        return type(self._strategy).batch_to_device(self._strategy, *args, **kwargs)


class NotedTransfer:
    """Keeps each batch on the host, after the batch was copied to the device.

    Args:
        strategy: The strategy of the Trainer.
        copies: Takes the notes.
    """

    def __init__(self, strategy: Strategy, copies: HostCopies) -> None:
        self._copies = copies
        self._in_front = InFrontOfTransfer(strategy, self._batch_to_device)

    def install(self) -> None:
        """Note the batches of the strategy."""
        self._in_front.install()

    def remove(self) -> None:
        """Restore the strategy; idempotent."""
        self._in_front.remove()

    def _batch_to_device(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        transfer = self._in_front.transfer
        if not self._copies.are_wanted:
            return transfer(batch, *args, **kwargs)
        on_host, structure = flatten(batch)  # before: some batches move themselves
        moved = transfer(batch, *args, **kwargs)
        on_device, structure_there = flatten(moved)
        if structure == structure_there:
            self._copies.note(on_host, on_device)
        else:
            self._copies.clear()
        return moved


def _is_lightnings_transfer(trainer: Trainer, module: nn.Module, hooks: Sequence[str]) -> bool:
    """Return True if neither the strategy nor one of these hooks of the user moves batches."""
    return is_lightnings_own(trainer.strategy, "batch_to_device") and are_lightnings_hooks(
        owners_of_data_hooks(trainer, module), hooks
    )


def owners_of_data_hooks(trainer: Trainer, module: nn.Module) -> list[Any]:
    """Return the module, and the datamodule if there is one."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return [module] if datamodule is None else [module, datamodule]


def callbacks_of_others(trainer: Trainer) -> list[Any]:
    """Return the callbacks that are not of this package."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if not type(each).__module__.startswith("cg_lightning.")]


def are_lightnings_hooks(owners: Sequence[Any], hooks: Sequence[str]) -> bool:
    """Return True if no owner has a hook of these names that is the user's."""
    return all(is_lightnings_own(owner, hook) for owner in owners for hook in hooks)


def _is_worth_it(batch: Any) -> bool:
    """Return True if all of a batch is known, and much of it is on the host."""
    num_bytes = 0
    for leaf in flatten(batch)[0]:
        if type(leaf) is Tensor:
            if leaf.layout is not torch.strided:
                return False
            num_bytes += leaf.nbytes if leaf.device.type == "cpu" else 0
        elif not isinstance(leaf, PLAIN):
            return False
    return num_bytes > _LEAST_BYTES
