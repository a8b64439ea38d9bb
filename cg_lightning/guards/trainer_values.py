"""Plain values of the Trainer, which can be guarded.

They are compared before each replay. Reading them has no side effects, and most of them do not
change within a stage. The Trainer itself cannot be compared, because it refers to the whole run.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import nn

from cg_lightning.core.descriptor import is_plain_value
from cg_lightning.modules.kinds import namespace_of

NAMES_OF_MODULE = frozenset({"current_epoch", "global_step", "global_rank", "local_rank"})
"""Properties of a LightningModule that ask the Trainer."""
NAMES_OF_TRAINER = frozenset(
    {
        *NAMES_OF_MODULE,
        *("sanity_checking", "training", "validating", "testing", "predicting", "evaluating"),
        *("state.fn", "state.stage", "state.status", "is_last_batch", "should_stop"),
        *("num_training_batches", "num_val_batches", "num_test_batches", "num_predict_batches"),
        *("num_sanity_val_batches", "num_sanity_val_steps", "num_devices", "num_nodes"),
        *("world_size", "node_rank", "is_global_zero", "max_epochs", "min_epochs", "max_steps"),
        *("min_steps", "fast_dev_run", "overfit_batches", "limit_train_batches", "precision"),
        *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval"),
        *("log_every_n_steps", "check_val_every_n_epoch", "accumulate_grad_batches", "barebones"),
    }
)
"""Attributes of a Trainer that are plain values, or lists of them."""
OBJECTS = frozenset({"logger", "datamodule"})
"""Attributes of a Trainer that a step may ask for: ``self.trainer.logger is not None``."""


def _trainer_of(module: nn.Module) -> Any:
    return namespace_of(module).get("_trainer")


class TrainerValues:
    """The plain values of the Trainer of one module, as a namespace.

    Args:
        module: The LightningModule. Another Trainer may come to it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def get(self, name: str, default: Any) -> Any:
        """Return a value; a list comes as its text, because a Trainer makes a new one each time."""
        trainer = _trainer_of(self._module)
        if trainer is None:
            return 0 if name in NAMES_OF_MODULE else default  # as Lightning has it
        value = operator.attrgetter(name)(trainer)
        return repr(value) if isinstance(value, list) and all(map(is_plain_value, value)) else value


class TrainerTypes:
    """The types of objects that the Trainer of one module has: NoneType if it has none.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def get(self, name: str, _: Any) -> Any:
        """Return the type of an object; an empty name is the Trainer itself."""
        trainer = _trainer_of(self._module)
        value = trainer if trainer is None or not name else getattr(trainer, name)
        return type(value)
